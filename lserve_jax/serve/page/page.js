// The chat, and the map of what the model read. Text of models and users is only ever set as
// textContent, so that no part of it becomes markup.

const MOST_WIDTH = 16000; // pixels of a canvas: browsers draw none that is wider
const MOST_AREA = 24e6; // pixels
const BARS = 26; // pixels of the bars above the rows
const BAND = BARS + 18; // with the numbers of tokens below them
const NEIGHBOUR = 160; // characters of the text around a page's
const STATUS_SECONDS = 2;

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const percent = (share) => `${(100 * share).toFixed(1)} %`;

const KINDS = {
  ranked: "selects its pages",
  dense: "reads everything",
  streaming: "streams",
};

let apiKey = ""; // in memory only
let model = "";
let conversation = []; // messages as the API takes them
let attached = null; // {name, text}: the file that goes with the next question
let running = null; // AbortController of the answer that streams
let shown = null; // {context, token, bits, picked, row, column}: the map on the page
let choices = 0; // of tokens so far: an answer to an older one comes too late

function make(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

// The server.

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    $("key-label").textContent = apiKey
      ? "The server does not take this key"
      : "The server asks for an API key";
    $("key-form").hidden = false;
  }
  if (!response.ok) throw new Error(await errorOf(response));
  return response;
}

async function errorOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `the server answered ${response.status}`;
  }
}

/** The events' JSON of a response, as they come; throws what an error event says. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message ?? String(event.error));
      yield event;
    }
  }
}

function showError(error) {
  $("error").hidden = !error;
  $("error").textContent = error ? `Error: ${error.message}` : "";
}

// Status: model, queue, pages.

async function loadModel() {
  const [card] = (await (await request("/v1/models")).json()).data;
  model = card.id;
  const length = card.max_model_len;
  $("model").textContent = length ? `${model} · up to ${number.format(length)} tokens` : model;
}

/** The sum of a metric over its labels; undefined where there is none. */
function metric(text, name) {
  let sum;
  for (const line of text.split("\n")) {
    const found = /^([\w:]+)(?:\{.*\})? (\S+)/.exec(line);
    if (found && found[1] === name) sum = (sum ?? 0) + Number(found[2]);
  }
  return sum;
}

async function showStatus() {
  if (document.hidden) return;
  let text = "";
  try {
    if (!model) await loadModel();
    text = await (await request("/metrics")).text();
  } catch {
    // the server is away, or wants a key: dashes say that nothing is known
  }
  const values = {
    running: metric(text, "lserve:num_requests_running"),
    waiting: metric(text, "lserve:num_requests_waiting"),
    pages: metric(text, "lserve:kv_cache_usage_perc"),
  };
  for (const [id, value] of Object.entries(values)) {
    const known = id === "pages" ? percent(value) : value;
    $(id).textContent = value === undefined ? "–" : known;
  }
}

// The chat.

function addMessage(who, text, file) {
  const item = make("li", "", who === "You" ? "user" : "model");
  const body = make("div", text, "body");
  item.append(make("span", who, "who"));
  if (file) {
    const folded = make("details", "");
    const title = `${file.name}, ${number.format(file.text.length)} characters`;
    folded.append(make("summary", title), make("pre", file.text, "body"));
    item.append(folded);
  }
  item.append(body);
  $("messages").append(item);
  $("messages").scrollTop = $("messages").scrollHeight;
  return body;
}

function attach(file) {
  attached = file;
  $("attached").hidden = !file;
  $("attached-name").textContent = file ? file.name : "";
}

async function ask(question) {
  const record = $("record").checked;
  const content = attached ? `${attached.text}\n\n${question}` : question;
  const messages = [...conversation, { role: "user", content }];
  addMessage("You", question, attached);
  attach(null);
  const body = addMessage("Model", "");
  running = new AbortController();
  setBusy(true);
  showError(null);
  const answer = { text: "", id: "", finish: null, usage: null };
  const times = { start: performance.now(), first: null, last: null };
  $("speed").textContent = "Waiting for the first token …";
  try {
    if (!model) await loadModel();
    const response = await request("/v1/chat/completions", {
      method: "POST",
      signal: running.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model,
        messages,
        max_tokens: Number($("max-tokens").value),
        temperature: Number($("temperature").value),
        stream: true,
        stream_options: { include_usage: true, continuous_usage_stats: true },
        ...(record && { record_reads: true }),
      }),
    });
    for await (const event of events(response)) {
      answer.id = event.id ?? answer.id;
      answer.usage = event.usage ?? answer.usage;
      const choice = event.choices?.[0];
      answer.finish = choice?.finish_reason ?? answer.finish;
      if (choice?.delta?.content) {
        times.last = performance.now();
        times.first ??= times.last;
        answer.text += choice.delta.content;
        body.textContent = answer.text;
        $("messages").scrollTop = $("messages").scrollHeight;
      }
      if (times.first !== null) showSpeed(times, answer);
    }
    if (times.first === null) $("speed").textContent = "No token came.";
  } catch (error) {
    if (error.name !== "AbortError") {
      $("speed").textContent = "";
      return showError(error); // the next question goes without this one
    }
  } finally {
    running = null;
    setBusy(false);
  }
  conversation = [...messages, { role: "assistant", content: answer.text }];
  if (record && answer.finish) await offerTokens(body, answer).catch(showError);
}

function showSpeed({ start, first, last }, { usage, finish }) {
  const figures = [[`${((first - start) / 1000).toFixed(2)} s`, "to the first token"]];
  if (usage) {
    const { completion_tokens: made, prompt_tokens: read } = usage;
    if (made > 1 && last > first) {
      figures.push([((1000 * (made - 1)) / (last - first)).toFixed(1), "tokens/s"]);
    }
    figures.push([number.format(read), "tokens in"], [number.format(made), "out"]);
  }
  if (finish === "length") figures.push(["cut", "at the most tokens"]);
  const parts = figures.map(([value, what]) => {
    const part = make("span", "");
    part.append(make("strong", value), ` ${what}`);
    return part;
  });
  $("speed").replaceChildren(...parts.flatMap((part) => [part, " "]));
}

function setBusy(busy) {
  $("send").disabled = busy;
  $("stop").disabled = !busy;
  $("clear").disabled = busy;
  $("messages").setAttribute("aria-busy", String(busy));
}

// Tokens of an answer: a list of options, one of which is in the tab order.

async function offerTokens(body, { id, text: answer }) {
  const context = await (await request(`/v1/reads/${encodeURIComponent(id)}`)).json();
  const options = context.answer_tokens.map((text, token) => {
    const option = make("span", text || "·", "token"); // a part of a character
    option.role = "option";
    option.tabIndex = token === 0 ? 0 : -1;
    option.ariaSelected = "false";
    option.ariaDisabled = String(token > 0 && token < context.first_known);
    const last = token === context.answer_tokens.length - 1;
    // The token that ended the answer is no part of its text.
    if (last && !answer.endsWith(text)) option.classList.add("mark");
    return option;
  });
  const choose = (token) => {
    const option = options[token];
    if (!option) return;
    for (const other of document.querySelectorAll(".token[aria-selected=true]")) {
      other.ariaSelected = "false";
    }
    for (const other of options) other.tabIndex = -1;
    option.tabIndex = 0;
    option.ariaSelected = "true";
    option.focus();
    showToken(context, token).catch(showError);
  };
  body.role = "listbox";
  body.ariaLabel = "Tokens of the answer: choose one to see what was read for it";
  body.ariaOrientation = "horizontal";
  body.addEventListener("click", (event) => choose(options.indexOf(event.target)));
  body.addEventListener("keydown", (event) => {
    const token = options.indexOf(document.activeElement);
    const targets = {
      ArrowRight: Math.min(token + 1, options.length - 1),
      ArrowLeft: Math.max(token - 1, 0),
      Home: 0,
      End: options.length - 1,
      Enter: token,
      " ": token,
    };
    if (token < 0 || !(event.key in targets)) return;
    event.preventDefault();
    choose(targets[event.key]);
  });
  body.replaceChildren(...options);
}

// The map.

async function showToken(context, token) {
  const choice = ++choices;
  const path = `/v1/reads/${encodeURIComponent(context.id)}/${token}`;
  const read = await (await request(path)).json();
  if (choice !== choices) return;
  const bits = read.read.map((layer) => layer.map((head) => bytesOf(head)));
  const before = shown?.context === context ? shown : { row: 0, column: 0 };
  const column = Math.min(before.column, read.num_pages - 1);
  shown = { context, token: read, bits, row: before.row, column };
  shown.picked = countsOfPages();
  const text = context.answer_tokens[token];
  const made = token === 0 ? "the end of the prompt" : `token ${number.format(token)}`;
  const exact = context.exact ? " Exact mode: what sparse steps draft, dense attention verifies." : "";
  $("summary").replaceChildren(
    `For “${text}” (${made}) a head read `,
    make("strong", `${percent(read.share)} of the context`),
    ` on average: of ${number.format(read.context_tokens)} tokens, ` +
      `${number.format(read.num_pages)} pages of ${context.page_size}.${exact}`,
  );
  $("map").hidden = false;
  draw();
  showShares();
  showCell();
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function isRead(row, page) {
  const heads = shown.context.head_kinds[0].length;
  const bits = shown.bits[Math.floor(row / heads)][row % heads];
  return ((bits[page >> 3] >> (page & 7)) & 1) === 1;
}

/** Of each page, how many of the heads that select chose it; and how many such heads there are. */
function countsOfPages() {
  const kinds = shown.context.head_kinds.flat();
  const rows = kinds.flatMap((kind, row) => (kind === "ranked" ? [row] : []));
  const counts = new Uint16Array(shown.token.num_pages);
  for (const row of rows) for (const page of counts.keys()) counts[page] += isRead(row, page);
  return { counts, heads: rows.length };
}

/** Where rows and columns lie, in CSS pixels; a column is several pages in very long contexts. */
function geometry() {
  const { context, token } = shown;
  const heads = context.head_kinds[0].length;
  const rows = context.head_kinds.length * heads;
  const height = rows <= 160 ? 7 : rows <= 400 ? 4 : 2;
  const gap = heads > 1 ? 2 : 0; // above each layer
  const top = (row) => BAND + row * height + (Math.floor(row / heads) + 1) * gap;
  const total = top(rows - 1) + height;
  const area = MOST_AREA / devicePixelRatio ** 2;
  const most = Math.floor(Math.min(MOST_WIDTH / devicePixelRatio, area / total));
  const perColumn = Math.ceil(token.num_pages / most);
  const columns = Math.ceil(token.num_pages / perColumn);
  const room = Math.max($("scroll").clientWidth, 2 * columns);
  const width = Math.min(room, 24 * columns, most);
  const left = (column) => Math.round((column * width) / columns);
  return { heads, rows, columns, perColumn, width, height, gap, top, left, total };
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["ranked", "dense", "streaming", "unread", "soft"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** A canvas of so many CSS pixels, emptied, with a pen for text. */
function pen(canvas, width, height, colour) {
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const paint = canvas.getContext("2d");
  paint.scale(devicePixelRatio, devicePixelRatio);
  paint.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  paint.textBaseline = "middle";
  paint.fillStyle = colour;
  return paint;
}

function draw() {
  if (!shown) return;
  const { context, token, picked } = shown;
  const at = geometry();
  const { heads, rows, columns, perColumn, width, height, top, left, total } = at;
  const colour = colours();
  const paint = pen($("cells"), width, total, colour.soft);
  const pageWidth = width / columns / perColumn;
  const gap = width >= 4 * columns ? 1 : 0; // between columns, where there is room
  let step = 1; // pages from one number to the next
  while (step * pageWidth < 64) step *= 2;
  for (let page = 0; (page + step / 2) * pageWidth < width; page += step) {
    paint.fillText(number.format(page * context.page_size), page * pageWidth, BARS + 9);
  }
  for (let column = 0; column < columns; column++) {
    const x = left(column);
    const inner = left(column + 1) - x - gap;
    const first = column * perColumn;
    const end = Math.min(first + perColumn, token.num_pages);
    const most = picked.counts.slice(first, end).reduce((a, b) => Math.max(a, b), 0);
    const bar = Math.ceil((BARS * most) / Math.max(picked.heads, 1));
    paint.fillStyle = colour.ranked;
    paint.fillRect(x, BARS - bar, inner, bar);
    for (let row = 0; row < rows; row++) {
      let read = false;
      for (let page = first; page < end && !read; page++) read = isRead(row, page);
      const kind = context.head_kinds[Math.floor(row / heads)][row % heads];
      paint.fillStyle = read ? colour[kind] : colour.unread;
      paint.fillRect(x, top(row), inner, height - 1);
    }
  }
  drawLabels(at, colour.soft);
  placeCursor(at);
}

function drawLabels({ heads, rows, height, gap, top, total }, colour) {
  const write = pen($("labels"), 56, total, colour);
  if (shown.picked.heads) write.fillText("chosen", 0, BARS - 6);
  write.fillText("token", 0, BARS + 9);
  const every = Math.ceil(14 / (heads * height + gap)); // layers to a line of text
  for (let layer = 0; layer * heads < rows; layer += every) {
    write.fillText(`layer ${layer}`, 0, top(layer * heads) + Math.max((heads * height) / 2, 6));
  }
}

function placeCursor({ perColumn, height, top, left }) {
  const column = Math.floor(shown.column / perColumn);
  const box = {
    left: left(column),
    top: top(shown.row),
    width: left(column + 1) - left(column),
    height: height - 1,
  };
  for (const [side, pixels] of Object.entries(box)) $("cursor").style[side] = `${pixels}px`;
}

function showCell() {
  const { context, token, row, column: page } = shown;
  const heads = context.head_kinds[0].length;
  const [layer, head] = [Math.floor(row / heads), row % heads];
  const start = page * context.page_size;
  const end = Math.min(start + context.page_size, token.context_tokens);
  const verdict = isRead(row, page) ? "read" : "not read";
  const { counts, heads: choosing } = shown.picked;
  const chosen = choosing ? ` ${counts[page]} of the ${choosing} heads that select read it.` : "";
  $("cell").textContent =
    `Layer ${layer}, KV head ${head}, which ${KINDS[context.head_kinds[layer][head]]}. ` +
    `Page ${page}, tokens ${start} to ${end - 1}: ${verdict}.${chosen}`;
  $("before").textContent = textOf(page - 1).slice(-NEIGHBOUR);
  $("page-text").textContent = textOf(page);
  $("after").textContent = textOf(page + 1).slice(0, NEIGHBOUR);
}

/** A page's text, as far as it was there when the token was made. */
function textOf(page) {
  const { context, token } = shown;
  const start = page * context.page_size;
  if (page < 0 || start >= token.context_tokens) return "";
  const { end, text } = context.pages[page];
  const made = (tokens) => Math.max(tokens - context.prompt_tokens, 0);
  const later = context.answer_tokens.slice(made(token.context_tokens), made(end)).join("");
  return text.slice(0, text.length - later.length);
}

function showShares() {
  const rows = shown.token.layer_share.map((share, layer) => {
    const [row, last, meter] = ["tr", "td", "meter"].map((tag) => make(tag, ""));
    meter.value = share;
    meter.ariaLabel = `Layer ${layer}`;
    last.append(meter);
    row.append(make("td", layer), make("td", percent(share)), last);
    return row;
  });
  $("shares").replaceChildren(...rows);
}

function moveTo(row, page) {
  const at = geometry();
  shown.row = Math.min(Math.max(row, 0), at.rows - 1);
  shown.column = Math.min(Math.max(page, 0), shown.token.num_pages - 1);
  placeCursor(at);
  showCell();
}

function pointAt(event) {
  if (!shown) return;
  const { rows, columns, perColumn, width, height, top } = geometry();
  const column = Math.min(Math.floor((event.offsetX * columns) / width), columns - 1);
  let row = 0;
  while (row < rows - 1 && event.offsetY >= top(row) + height) row++;
  const page = column * perColumn;
  if (row !== shown.row || page !== shown.column) moveTo(row, page);
}

function moveByKey(event) {
  if (!shown) return;
  const { row, column } = shown;
  const { heads, perColumn, left } = geometry();
  const targets = {
    ArrowLeft: [row, column - 1],
    ArrowRight: [row, column + 1],
    ArrowUp: [row - 1, column],
    ArrowDown: [row + 1, column],
    PageUp: [row - heads, column],
    PageDown: [row + heads, column],
    Home: [row, 0],
    End: [row, shown.token.num_pages - 1],
  };
  if (!(event.key in targets)) return;
  event.preventDefault();
  moveTo(...targets[event.key]);
  const x = left(Math.floor(shown.column / perColumn));
  const scroll = $("scroll");
  if (x < scroll.scrollLeft || x + 24 > scroll.scrollLeft + scroll.clientWidth) {
    scroll.scrollLeft = x - scroll.clientWidth / 2;
  }
}

// What the user does.

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value;
  if (running || !question.trim()) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  conversation = [];
  shown = null;
  $("messages").replaceChildren();
  $("map").hidden = true;
  $("speed").textContent = $("summary").textContent = "";
  attach(null);
  showError(null);
  $("question").focus();
});
$("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (file) attach({ name: file.name, text: await file.text() });
  event.target.value = ""; // so that the same file can be taken again
  $("question").focus();
});
$("detach").addEventListener("click", () => {
  attach(null);
  $("question").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value;
  $("key").value = "";
  $("key-form").hidden = true;
  showError(null);
  showStatus();
});
$("cells").addEventListener("mousemove", pointAt);
$("cells").addEventListener("click", pointAt);
$("cells").addEventListener("keydown", moveByKey);
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.addEventListener("visibilitychange", showStatus);

showStatus();
setInterval(showStatus, 1000 * STATUS_SECONDS);
$("question").focus();
