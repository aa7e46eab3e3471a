// Vercel's ai with @ai-sdk/openai-compatible: texts, streams, objects, tools, errors.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { chatText, completionText, length, model, question, url } from "./plain.mjs";

const provider = createOpenAICompatible({
  name: "lserve", baseURL: `${url}/v1`, includeUsage: true, supportsStructuredOutputs: true,
});
const short = { prompt: question, temperature: 0, maxOutputTokens: length, maxRetries: 0 };
const long = { ...short, model: provider(model), maxOutputTokens: 200 };
const once = { lserve: { parallel_tool_calls: false } }; // a random model would go on calling
const sea = z.object({ name: z.enum(["North Sea", "Baltic Sea"]), salty: z.boolean() });
const expected = await chatText();

async function read(stream) {
  let text = "";
  for await (const part of stream) text += part;
  return text;
}

const whole = await generateText({ model: provider(model), ...short });
assert.equal(whole.text, expected);
assert.equal(whole.finishReason, "length");
assert.equal(whole.usage.outputTokens, length);
const streamed = streamText({ model: provider(model), ...short });
assert.equal(await read(streamed.textStream), expected);
assert.equal((await streamed.usage).outputTokens, length);
assert.equal(await streamed.finishReason, "length");

// It writes the conversation itself, and stops where the user would speak.
const prompt = `user:\n${question}\n\nassistant:\n`;
const completion = streamText({ model: provider.completionModel(model), ...short });
assert.equal(
  await read(completion.textStream), await completionText(prompt, { stop: ["\nuser:"] }),
);

const fields = { lserve: { top_k: 5, ignore_eos: true } };
await generateText({ model: provider(model), ...short, seed: 1, providerOptions: fields });

sea.parse((await generateObject({ ...long, schema: sea })).object);
sea.parse((await generateText({ ...long, output: Output.object({ schema: sea }) })).output);

const depth = tool({
  description: "The depth of a sea in metres.",
  inputSchema: z.object({ sea: z.enum(["North Sea", "Baltic Sea"]) }),
  execute: async ({ sea }) => (sea === "North Sea" ? 700 : 459),
});
const used = await generateText({ ...long, tools: { depth }, toolChoice: "required", providerOptions: once });
assert.equal(used.finishReason, "tool-calls");
assert.ok([700, 459].includes(used.toolResults[0].output));
const calls = streamText({ ...long, tools: { depth }, toolChoice: "required", providerOptions: once });
assert.equal((await calls.toolCalls)[0].toolName, "depth");

await assert.rejects(
  generateText({ model: provider("another"), ...short }),
  (error) => error instanceof APICallError && /another/.test(error.message),
);
