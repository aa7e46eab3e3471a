// npm openai: chats, completions, responses, the stream helper, structured output, tools, errors.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { chatText, completionText, length, messages, model, question, url } from "./plain.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const greedy = { model, temperature: 0, max_tokens: length };
const seas = ["North Sea", "Baltic Sea"];
const expected = await chatText();

const whole = await client.chat.completions.create({ ...greedy, messages });
assert.equal(whole.choices[0].message.content, expected);
assert.equal(whole.usage.completion_tokens, length);

let text = "";
let usage;
const chunks = await client.chat.completions.create({
  ...greedy, messages, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of chunks) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, expected);
assert.deepEqual(usage, whole.usage);

const helper = client.chat.completions.stream({ ...greedy, messages });
assert.equal(await helper.finalContent(), expected);

text = "";
for await (const chunk of await client.completions.create({
  ...greedy, prompt: question, stream: true,
})) text += chunk.choices[0].text;
assert.equal(text, await completionText(question));

const asked = { model, input: question, temperature: 0, max_output_tokens: length };
assert.equal((await client.responses.create(asked)).output_text, expected);
text = "";
for await (const event of await client.responses.create({ ...asked, stream: true })) {
  if (event.type === "response.output_text.delta") text += event.delta;
}
assert.equal(text, expected);

const sea = z.object({ name: z.enum(seas), salty: z.boolean() });
const parsed = await client.chat.completions.parse({
  ...greedy, max_tokens: 200, messages, response_format: zodResponseFormat(sea, "sea"),
});
assert.ok(seas.includes(parsed.choices[0].message.parsed.name));

const parameters = {
  type: "object", properties: { sea: { enum: seas } }, required: ["sea"],
  additionalProperties: false,
};
const called = await client.chat.completions.stream({
  ...greedy, max_tokens: 200, messages, tool_choice: "required",
  parallel_tool_calls: false, // a random model would go on calling
  tools: [{ type: "function", function: { name: "depth", strict: true, parameters } }],
}).finalChatCompletion();
assert.equal(called.choices[0].finish_reason, "tool_calls");
const { name, arguments: given } = called.choices[0].message.tool_calls[0].function;
assert.equal(name, "depth");
assert.ok(seas.includes(JSON.parse(given).sea));

await assert.rejects(
  client.chat.completions.create({ ...greedy, messages, no_such: 1 }),
  (error) => error instanceof OpenAI.BadRequestError && /no_such/.test(error.message),
);
// A loop that is left closes the connection.
for await (const _ of await client.chat.completions.create({
  ...greedy, max_tokens: 200, messages, stream: true,
})) break;
