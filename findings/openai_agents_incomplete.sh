#!/usr/bin/env bash
# An answer cut at max_tokens is an answer to openai-agents from /v1/chat/completions, and an error from /v1/responses.
#
# Seen 2026-11-28 with openai-agents 0.24.0, openai 3.57.0.
#
# OpenAI's API ends such a response with the status "incomplete" (and the event response.incomplete in a stream). By
# its default model class openai-agents raises for it, text or no text, and says that a stream ended even where none was
# asked for; its chat class returns the text. openai itself takes the whole response; of a streamed one
# responses.stream() gives every event, but get_final_response() knows response.completed only. Seen:
#   openai-agents, chat completions      'It is deep'
#   openai-agents, responses             ModelBehaviorError: Responses stream ended with terminal event …
#   openai-agents, responses streamed    ModelBehaviorError: Responses stream ended with terminal event …
#   openai, responses                    'It is deep'
#   openai, responses.stream()           RuntimeError: Didn't receive a `response.completed` event.
#
# Why it matters: a small max_tokens, as every test of a server has, fails in the client with the text in its hand, and
# the message sounds like a server's fault. It is none: such a stream ends as OpenAI's does.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages openai==3.57.0 openai-agents==0.24.0

run <<'PY'
import asyncio
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import agents
import openai

TEXT = "It is deep"
PART = {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
ITEM = {"id": "msg_1", "type": "message", "role": "assistant", "status": "incomplete", "content": [PART]}
EMPTY = {
    "id": "resp_1", "object": "response", "created_at": 0, "status": "in_progress", "model": "m", "output": [],
    "error": None, "incomplete_details": None, "instructions": None, "metadata": {}, "parallel_tool_calls": True,
    "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0, "usage": None,
}
WHOLE = EMPTY | {
    "status": "incomplete",
    "incomplete_details": {"reason": "max_output_tokens"},
    "output": [ITEM],
    "usage": {
        "input_tokens": 3, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 6,
    },
}
PLACE = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
EVENTS = [
    ("response.created", {"response": EMPTY}),
    ("response.in_progress", {"response": EMPTY}),
    ("response.output_item.added", {"output_index": 0, "item": ITEM | {"content": [], "status": "in_progress"}}),
    ("response.content_part.added", PLACE | {"part": PART | {"text": ""}}),
    ("response.output_text.delta", PLACE | {"delta": TEXT, "logprobs": []}),
    ("response.output_text.done", PLACE | {"text": TEXT, "logprobs": []}),
    ("response.content_part.done", PLACE | {"part": PART}),
    ("response.output_item.done", {"output_index": 0, "item": ITEM}),
    ("response.incomplete", {"response": WHOLE}),
]


CHAT = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
}


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if asked.get("stream") else "application/json")
        self.end_headers()
        if not asked.get("stream"):
            whole = CHAT if self.path.endswith("/chat/completions") else WHOLE
            self.wfile.write(json.dumps(whole).encode())
            return
        for number, (kind, data) in enumerate(EVENTS):
            event = {"type": kind, "sequence_number": number, **data}
            self.wfile.write(f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_):
        pass


def show(how, act):
    try:
        found = repr(act())
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(f"{how:35}  {found}")
    return found


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}/v1"
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
asked = {"model": "m", "input": "Is the sea deep?", "max_output_tokens": 3}


def helper():
    with client.responses.stream(**asked) as stream:
        return stream.get_final_response().output_text


agents.set_tracing_disabled(True)
server_client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)


def agent(kind):
    settings = agents.ModelSettings(max_tokens=3)
    return agents.Agent(name="sailor", model_settings=settings, model=kind("m", openai_client=server_client))


def whole(kind):
    return asyncio.run(agents.Runner.run(agent(kind), asked["input"])).final_output


async def streamed():
    result = agents.Runner.run_streamed(agent(agents.OpenAIResponsesModel), asked["input"])
    async for _ in result.stream_events():
        pass
    return result.final_output


for how, act, begins in (
    ("openai-agents, chat completions", lambda: whole(agents.OpenAIChatCompletionsModel), repr(TEXT)),
    ("openai-agents, responses", lambda: whole(agents.OpenAIResponsesModel), "ModelBehaviorError"),
    ("openai-agents, responses streamed", lambda: asyncio.run(streamed()), "ModelBehaviorError"),
    ("openai, responses", lambda: client.responses.create(**asked).output_text, repr(TEXT)),
    ("openai, responses.stream()", helper, "RuntimeError: Didn't receive a `response.completed`"),
):
    if not show(how, act).startswith(begins):
        sys.exit(f"Changed: {how} was {begins}.")
PY
