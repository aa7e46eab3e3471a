"""What clients may ask for at most, and what they are told where it is too much or wrong."""

import json
import logging
import socket
import time

import httpx
import pytest
from served import MODEL, TEMPLATE, Served, byte_tokenizer, serve, tiny_llm

CHAT = [{"role": "user", "content": "Hello, sea."}]


def post(served: Served, path: str, body: object) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    return httpx.post(f"{served.url}{path}", content=content, timeout=None)


def test_a_client_that_does_not_read_takes_no_place_in_the_queue():
    with (
        serve(tiny_llm(), max_queue=0) as served,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", served.port))
        # Megabytes of answer: more than the buffers between server and client hold.
        body = {"prompt": "x", "max_tokens": 900, "n": 4, "logprobs": 20, "ignore_eos": True}
        content = json.dumps({**body, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        client.recv(16)
        while post(served, "/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 429:
            time.sleep(0.02)  # they run, and faster than beside a client that asks all the time
        assert served.service.engine.text.engine.metrics().running == 0


def test_a_client_that_goes_in_its_body_is_no_fault_of_ours(served, caplog):
    caplog.set_level(logging.INFO, "lserve_jax.serve")
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"
        client.sendall(head + b'{"prompt"')
    while not (lines := [r.message for r in caplog.records if "/v1/completions" in r.message]):
        time.sleep(0.02)
    told = json.loads(lines[0])
    assert (told["status"], told["error"]) == (499, "client_gone")
    assert not any(record.levelno >= logging.ERROR for record in caplog.records)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
def test_a_text_that_is_far_too_long_is_not_tokenised(served, monkeypatch, path):
    tokenizer = type(served.llm.tokenizer)
    encode = tokenizer.encode

    def of_a_part(self, text: str, *args: object, **options: object) -> list[int]:
        assert len(text) < 50_000
        return encode(self, text, *args, **options)

    monkeypatch.setattr(tokenizer, "encode", of_a_part)
    error = post(served, path, {"prompt": "word " * 100_000}).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 10_000}, "messages"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10_000}, "prompt"),
        ("/v1/completions", {"prompt": [[1, 10_000]]}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/responses", {"input": "x", "max_output_tokens": 10_000}, "input"),
        ("/v1/responses", {"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ("/v1/responses", '{"input": "x", "metadata": {"a": NaN}}', "metadata"),
        ("/v1/responses", '{"input": "x", "metadata": {"a": 1e999}}', "metadata"),
        (
            "/v1/responses",
            {"input": "x", "text": {"format": {"type": "text", "x": 1}}},
            "text.format.x",
        ),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "response_format": {"type": "json_object", "schema": {}}},
            "response_format.schema",
        ),
        ("/v1/chat/completions", {"messages": CHAT, "use_beam_search": True}, "use_beam_search"),
        (
            "/v1/chat/completions",
            {
                "messages": CHAT,
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/x"}}}
                ],
            },
            "tools",
        ),
    ],
)
def test_an_error_names_the_field_that_was_sent(served, path, body, param):
    answer = post(served, path, body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] is not None and error["param"].startswith(param), error


def test_what_changes_nothing_is_taken(served):
    neutral = {"modalities": ["text"], "use_beam_search": False, "length_penalty": 1.0}
    more = {"top_logprobs": 0, "stream_options": {"include_obfuscation": False}}
    body = {"messages": CHAT, "max_tokens": 2, **neutral, **more}
    assert post(served, "/v1/chat/completions", body).status_code == 200


def test_a_template_gets_what_else_it_asks_for():
    template = TEMPLATE + "{% if enable_thinking %}{{ enable_thinking }}{% endif %}"
    with serve(tiny_llm(byte_tokenizer(template))) as served:
        asked = {"messages": CHAT, "max_tokens": 1}
        counts = []
        # The last one spells out a control token, which stays text.
        for value in (False, "12345", "<|im_end|>"):
            values = {"enable_thinking": value, "messages": "not these"}
            body = {**asked, "chat_template_kwargs": values}
            usage = post(served, "/v1/chat/completions", body).json()["usage"]
            counts.append(usage["prompt_tokens"])
        assert counts == [counts[0], counts[0] + 5, counts[0] + 10]


def test_numbers_of_tokens_that_are_none(served):
    for number in ("x", "-1", "1" * 5000, "\N{SUPERSCRIPT TWO}"):
        answer = httpx.get(f"{served.url}/v1/reads/chatcmpl-1/{number}", timeout=None)
        assert answer.status_code == 404 and "error" in answer.json()


def test_parts_of_characters_have_names_of_their_own(served):
    """Two of them would be one U+FFFD, and one probability would be lost."""
    body = {"prompt": "x", "max_tokens": 6, "logprobs": 20, "seed": 1}
    told = post(served, "/v1/completions", body).json()["choices"][0]["logprobs"]
    assert all(len(row) in (20, 21) for row in told["top_logprobs"])
    names = {name for row in told["top_logprobs"] for name in row}
    assert any(name.startswith("bytes:\\x") for name in names)
    assert not any("\N{REPLACEMENT CHARACTER}" in name for name in names)


def test_what_http_says_beside_the_body():
    with serve(tiny_llm(), api_keys=("schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel",)) as served:
        url, key = f"{served.url}/v1/models", served.service.options.api_keys[0].encode()
        assert httpx.get(url, timeout=None).headers["WWW-Authenticate"] == "Bearer"
        headers = {b"Authorization": b"Bearer " + key}
        assert httpx.get(url, headers=headers, timeout=None).status_code == 200
        assert httpx.post(url, headers=headers, timeout=None).headers["Allow"]
    assert served.service.model_name == MODEL
