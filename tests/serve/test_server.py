"""Chats and completions through a real server and a real client."""

import asyncio
import json
import socket
import threading

import httpx
import numpy as np
import openai
import pytest
from served import MODEL, serve, tiny_llm

from lserve_jax import SamplingParams

GREEDY = {"temperature": 0, "max_tokens": 12}
CHAT = [{"role": "user", "content": "Hello, sea."}]


def offline(served, prompt, **sampling):
    """What the engine says to a prompt without HTTP; nothing else may run."""
    text = served.llm.text_engine

    async def run():
        request = (prompt, SamplingParams(**sampling))
        async with await served.service.engine.submit([request]) as stream:
            async for _, delta in stream:
                if delta.output is not None:
                    return delta.output

    assert text is served.service.engine.text
    return asyncio.run(run())


def post(served, path, **body):
    return httpx.post(f"{served.url}{path}", content=json.dumps(body), timeout=None)


def test_a_chat_is_answered_as_the_engine_answers_its_template(served, client):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, **GREEDY)
    expected = offline(served, served.llm.chat_prompt(CHAT), **GREEDY)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.outputs[0].text
    assert choice.finish_reason == expected.outputs[0].finish_reason
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert answer.object == "chat.completion" and answer.model == MODEL


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_has_the_same_text_as_a_whole_one(served, client, n):
    asked = {"model": MODEL, "messages": CHAT, "max_tokens": 13, "seed": 5, "n": n}
    whole = client.chat.completions.create(**asked)
    texts, ends, usage = [""] * n, {}, None
    begun = set()
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert (choice.delta.role == "assistant") == (choice.index not in begun)
            assert choice.index not in ends
            begun.add(choice.index)
            texts[choice.index] += choice.delta.content
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == {c.index: c.finish_reason for c in whole.choices}
    assert usage == whole.usage


def test_the_stream_helper_of_the_client_and_the_async_client(served):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            async with client.chat.completions.stream(
                model=MODEL, messages=CHAT, max_tokens=20, temperature=0
            ) as stream:
                events = [event async for event in stream]
            whole = await client.chat.completions.create(
                model=MODEL, messages=CHAT, max_tokens=20, temperature=0
            )
            return events, whole

    events, whole = asyncio.run(run())
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(deltas) == whole.choices[0].message.content


def test_logprobs_of_a_chat_are_the_engines(served, client):
    asked = {"model": MODEL, "messages": CHAT, **GREEDY, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    expected = offline(served, served.llm.chat_prompt(CHAT), **GREEDY, logprobs=3).outputs[0]
    assert [entry.logprob for entry in content] == pytest.approx(
        [row[i] for i, row in zip(expected.token_ids, expected.logprobs, strict=True)]
    )
    for entry, row in zip(content, expected.logprobs, strict=True):
        best = sorted(row.values(), reverse=True)[:3]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best)
    # A token of this tokenizer is a byte, or a special token, which has no text in the answer.
    assert all(len(e.bytes) == 1 or bytes(e.bytes).decode() == e.token for e in content)


def test_completions_of_several_prompts_in_text_and_ids(served, client):
    prompts = ["The sea", "A ship"]
    ids = [served.llm.token_ids(prompt).tolist() for prompt in prompts]
    asked = {"model": MODEL, "max_tokens": 9, "n": 2, "seed": 3}
    texts = client.completions.create(prompt=prompts, **asked)
    as_ids = client.completions.create(prompt=ids, **asked)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert [c.text for c in texts.choices] == [c.text for c in as_ids.choices]
    expected = [offline(served, p, max_tokens=9, n=2, seed=3).outputs for p in prompts]
    assert [c.text for c in texts.choices] == [c.text for outputs in expected for c in outputs]
    streamed = [""] * 4
    for chunk in client.completions.create(prompt=ids, **asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [c.text for c in texts.choices]


def test_an_echoed_prompt_stands_in_front_with_its_log_probabilities(served, client):
    prompt = "The sea is"
    answer = client.completions.create(
        model=MODEL, prompt=prompt, echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    (choice,) = answer.choices
    expected = offline(served, prompt, prompt_logprobs=2, logprobs=2, max_tokens=1, temperature=0)
    ids = [*expected.prompt_token_ids, *expected.outputs[0].token_ids]
    rows = [*expected.prompt_logprobs, *expected.outputs[0].logprobs]
    assert choice.text == prompt + expected.outputs[0].text
    assert len(choice.logprobs.tokens) == len(ids)  # one behind the echo
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        [row[i] for i, row in zip(ids[1:], rows[1:], strict=True)]
    )
    assert (
        choice.logprobs.text_offset
        == np.cumsum([0, *map(len, choice.logprobs.tokens)])[:-1].tolist()
    )
    scored = post(served, "/v1/completions", prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    assert scored.json()["choices"][0]["text"] == prompt
    assert len(scored.json()["choices"][0]["logprobs"]["tokens"]) == len(ids) - 1


def test_continuous_usage_counts_as_it_goes(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    given = {"prompt": "usage " * 30, "max_tokens": 9, "stream": True, "stream_options": options}
    for first in (True, False):
        answer = post(served, "/v1/completions", **given)
        lines = [line for line in answer.text.splitlines() if line[:7] == "data: {"]
        usage = [json.loads(line[6:])["usage"] for line in lines]
        counts = [used["completion_tokens"] for used in usage]
        assert counts == sorted(counts) and counts[-1] == counts[-2] > 0
        [cached] = {used["prompt_tokens_details"]["cached_tokens"] for used in usage}
        assert (cached == 0) == first


def test_a_deadline_ends_an_answer_as_length(served):
    body = post(
        served, "/v1/completions", prompt="x", max_tokens=900, ignore_eos=True, deadline=1e-6
    ).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["stop_reason"] == "deadline"


# What is refused.

WRONG = [
    ({"prompt": "x", "temperature": -1}, "temperature", None),
    ({"prompt": "x", "temperature": "hot"}, "temperature", None),
    ({"prompt": "x", "n": True}, "n", None),
    ({"prompt": "x", "stop": [1]}, "stop", None),
    ({"prompt": "x", "stop": ["a"] * 65}, "stop", None),
    ({"prompt": "x", "temprature": 1}, "temprature", "unknown_parameter"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "unknown_parameter"),
    ({"prompt": ""}, "prompt", None),
    ({"prompt": []}, "prompt", None),
    ({"prompt": [1, "a"]}, "prompt", None),
    ({"prompt": [[1], []]}, "prompt", None),
    ({"prompt": [9999]}, "prompt", None),
    ({}, "prompt", None),
    ({"prompt": "x" * 2000}, "prompt", "context_length_exceeded"),
    ({"prompt": "x", "max_tokens": 5000}, "prompt", "context_length_exceeded"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", None),
    ({"prompt": "x", "best_of": 2}, "best_of", None),
    ({"prompt": "x", "logprobs": 21}, "logprobs", None),
    ({"prompt": "x", "deadline": 0}, "deadline", None),
    (
        {"prompt": "x", "stream_options": {"include": True}},
        "stream_options.include",
        "unknown_parameter",
    ),
    ({"prompt": ["x"] * 5000}, "prompt", None),
    ({"prompt": "\ud800"}, None, None),
]


@pytest.mark.parametrize(("body", "param", "code"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_body_is_refused_with_the_name_of_its_field(served, body, param, code):
    answer = post(served, "/v1/completions", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == "invalid_request_error" and error["message"]


def test_nulls_and_harmless_fields_are_taken(served):
    fields = {"user": "me", "metadata": {"a": 1}, "store": False, "logprobs": None, "seed": None}
    assert post(served, "/v1/completions", prompt="x", max_tokens=2, **fields).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"prompt": NaN}'])
def test_what_is_no_json_object_is_refused(served, content):
    answer = httpx.post(f"{served.url}/v1/completions", content=content, timeout=None)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_deep_json_is_refused(served):
    content = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert (
        httpx.post(f"{served.url}/v1/completions", content=content, timeout=None).status_code == 400
    )


def test_errors_of_routes_and_models(served, client):
    for answer, status in (
        (httpx.get(f"{served.url}/nowhere", timeout=None), 404),
        (httpx.delete(f"{served.url}/v1/completions", timeout=None), 405),
        (httpx.get(f"{served.url}/v1/models/other", timeout=None), 404),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="other") as error:
        client.completions.create(model="other", prompt="x")
    assert error.value.code == "model_not_found"


def test_models_health_version(served, client):
    (model,) = client.models.list().data
    assert model.id == MODEL and model.max_model_len == 1024
    assert client.models.retrieve(MODEL).id == MODEL
    assert httpx.get(f"{served.url}/health", timeout=None).status_code == 200
    assert httpx.get(f"{served.url}/version", timeout=None).json()["version"]


def test_a_request_keeps_its_id_and_a_bad_one_gets_a_new_one(served):
    given = httpx.get(f"{served.url}/health", headers={"X-Request-Id": "abc-1"}, timeout=None)
    assert given.headers["x-request-id"] == "abc-1"
    other = httpx.get(f"{served.url}/health", headers={"X-Request-Id": 'a" b'}, timeout=None)
    assert other.headers["x-request-id"] not in ('a" b', "")


def test_keys_bounds_and_a_full_queue():
    with serve(
        tiny_llm(max_num_seqs=1), api_keys=("one", "two"), max_body_bytes=2048, max_queue=1
    ) as served:
        url = f"{served.url}/v1/completions"
        body = {"prompt": "x", "max_tokens": 2}
        assert httpx.get(f"{served.url}/health", timeout=None).status_code == 200
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}):
            answer = httpx.post(url, json=body, headers=headers, timeout=None)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        key = {"Authorization": "Bearer two"}
        assert httpx.post(url, json=body, headers=key, timeout=None).status_code == 200
        long = httpx.post(url, json={"prompt": "x" * 4000}, headers=key, timeout=None)
        assert long.status_code == 413

        def pieces():
            for _ in range(100):
                yield b"x" * 100

        assert httpx.post(url, content=pieces(), headers=key, timeout=None).status_code == 413
        too_many = httpx.post(url, json={**body, "n": 3}, headers=key, timeout=None)
        assert too_many.status_code == 400
        # Two run or wait: the third is refused, and told when to come again.
        slow = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with (
            httpx.stream("POST", url, json=slow, headers=key, timeout=None) as first,
            httpx.stream("POST", url, json=slow, headers=key, timeout=None) as second,
        ):
            assert first.status_code == second.status_code == 200
            answer = httpx.post(url, json=body, headers=key, timeout=None)
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert httpx.post(url, json=body, headers=key, timeout=None).status_code in (200, 429)


# The life of a request.


def wait_until_idle(served) -> None:
    """Until nothing waits or runs and every page is free; asked on the engine's own thread."""
    engine = served.llm.engine

    async def run():
        while await served.service.engine.call(lambda: engine.has_unfinished_requests):
            await asyncio.sleep(0.01)
        return await served.service.engine.call(lambda: engine.metrics().free_pages)

    assert asyncio.run(run()) == engine.spec.num_pages


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_ends_when_its_client_goes(served, stream):
    body = json.dumps(
        {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    ).encode()
    before = served.llm.engine.metrics().cancelled
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        if stream:
            assert connection.recv(16)
        else:  # until it runs
            asyncio.run(_until_running(served))
    wait_until_idle(served)
    assert served.llm.engine.metrics().cancelled == before + 1


async def _until_running(served):
    engine = served.llm.engine
    while not await served.service.engine.call(lambda: engine.has_unfinished_requests):
        await asyncio.sleep(0.01)


def test_a_third_of_many_streams_is_cut_and_the_others_say_what_they_say_alone():
    with serve(tiny_llm(deterministic=True, relay="never")) as served:
        prompts = [f"{i} ships" for i in range(32)]
        asked = [
            {"prompt": p, "max_tokens": 40, "seed": i, "ignore_eos": True, "logprobs": 0}
            for i, p in enumerate(prompts)
        ]

        async def one(client, i):
            body = {**asked[i], "stream": True}
            ids = []
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        logprobs = json.loads(line[6:])["choices"][0]["logprobs"]
                        ids += zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
                        if i % 3 == 0:  # it goes in the middle
                            return None
            return ids

        async def all_of_them():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=served.url, timeout=None, limits=limits
            ) as client:
                return await asyncio.gather(*(one(client, i) for i in range(len(prompts))))

        together = asyncio.run(all_of_them())
        wait_until_idle(served)
        for i, ids in enumerate(together):
            if ids is None:
                continue
            alone = post(served, "/v1/completions", **asked[i]).json()["choices"][0]["logprobs"]
            assert ids == list(zip(alone["tokens"], alone["token_logprobs"], strict=True))


def test_one_failing_step_ends_its_requests_and_not_the_server(monkeypatch):
    with serve(tiny_llm()) as served:
        engine = served.llm.engine
        step = engine.step

        def failing():
            monkeypatch.setattr(engine, "step", step)
            raise RuntimeError("secret of the device")

        monkeypatch.setattr(engine, "step", failing)
        answer = post(served, "/v1/completions", prompt="x", max_tokens=3)
        assert answer.status_code == 500
        assert "secret" not in answer.text and answer.json()["error"]["type"] == "server_error"
        assert post(served, "/v1/completions", prompt="x", max_tokens=3).status_code == 200

        monkeypatch.setattr(engine, "step", failing)
        answer = post(served, "/v1/completions", prompt="x", max_tokens=3, stream=True)
        assert "event: error\ndata: " in answer.text and "[DONE]" not in answer.text
        wait_until_idle(served)


def test_shutting_down_finishes_what_runs():
    llm = tiny_llm()
    with serve(llm) as served:
        lines, first = [], threading.Event()

        def read():
            body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
            with httpx.stream(
                "POST", f"{served.url}/v1/completions", json=body, timeout=None
            ) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    first.set()

        reader = threading.Thread(target=read)
        reader.start()
        first.wait()
    reader.join()
    assert "data: [DONE]" in lines
    assert not served.service.engine.is_open
