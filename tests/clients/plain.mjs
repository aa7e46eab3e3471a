// The server asked without any client: what the clients' answers are compared with.

export const url = process.argv[2];
export const question = "Tell a long story about the sea.";
export const messages = [{ role: "user", content: question }];
export const length = 24; // tokens of an answer

async function ask(path, body) {
  const answer = await fetch(url + path, body && { method: "POST", body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

export const model = (await ask("/v1/models")).data[0].id;

export async function chatText() {
  const body = { messages, temperature: 0, max_tokens: length };
  return (await ask("/v1/chat/completions", body)).choices[0].message.content;
}

export async function completionText(prompt, fields) {
  const body = { prompt, temperature: 0, max_tokens: length, ...fields };
  return (await ask("/v1/completions", body)).choices[0].text;
}
