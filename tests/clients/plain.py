"""The server asked without any client: what the clients' answers are compared with.

A program of a client is run as ``python use_CLIENT.py URL`` and fails where the client does not see
what it must. Answers are greedy, so that the same question has the same answer.
"""

import json
import sys
import urllib.request
from typing import Any

URL = sys.argv[1]  # without a slash at its end
BASE_URL = f"{URL}/v1"
LENGTH = 24  # tokens of an answer
QUESTION = "Tell a long story about the sea."
CHAT = [{"role": "user", "content": QUESTION}]


def ask(path: str, **body: Any) -> dict[str, Any]:
    """A request's answer; a GET without a body."""
    request = urllib.request.Request(URL + path, json.dumps(body).encode() if body else None)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def chat(messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The answer to a chat, whole."""
    fields = {"temperature": 0, "max_tokens": LENGTH} | fields
    return ask("/v1/chat/completions", messages=messages, **fields)


def chat_text(messages: list[dict[str, Any]] = CHAT, **fields: Any) -> str:
    return chat(messages, **fields)["choices"][0]["message"]["content"]


def completion_text(prompt: str, **fields: Any) -> str:
    fields = {"temperature": 0, "max_tokens": LENGTH} | fields
    return ask("/v1/completions", prompt=prompt, **fields)["choices"][0]["text"]


MODEL: str = ask("/v1/models")["data"][0]["id"]
