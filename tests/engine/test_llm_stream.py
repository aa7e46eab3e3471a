"""``LLM.stream``: any number of requests, drawn as slots become free."""

import numpy as np
import pytest
from tiny_llm import tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm() -> LLM:
    config = tiny_config(layers=1, kv_heads=1)
    return LLM((config, tiny_params(config)))


def test_requests_are_drawn_as_they_are_needed(llm):
    drawn, ahead = 0, []

    def requests():
        nonlocal drawn
        for i in range(60):
            drawn += 1
            yield {"prompt_token_ids": [i, 7]}, SamplingParams(temperature=0, max_tokens=4)

    for finished, (position, output) in enumerate(llm.stream(requests())):
        assert output.prompt_token_ids == [position, 7]
        ahead.append(drawn - finished)
    assert drawn == len(ahead) == 60
    # Those that run and as many that wait.
    assert max(ahead) <= 2 * llm.spec.max_num_seqs


def test_a_stream_that_is_closed_leaves_the_engine_empty(llm):
    sampling = SamplingParams(temperature=0, max_tokens=100)
    stream = llm.stream(({"prompt_token_ids": [i]}, sampling) for i in range(20))
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished_requests
    assert len(llm.generate({"prompt_token_ids": [1]}, sampling)[0].outputs[0].token_ids) == 100


def test_a_deadline_ends_what_has_not_finished_with_what_it_has(llm, monkeypatch):
    """Of a whole call, or of each request from when it is drawn."""
    now = 0.0
    step = llm.engine.step

    def slow():
        nonlocal now
        now += 1.0
        return step()

    monkeypatch.setattr(llm.engine, "clock", lambda: now)
    monkeypatch.setattr(llm.engine, "step", slow)
    prompts = [{"prompt_token_ids": [i]} for i in range(12)]
    short = SamplingParams(temperature=0, max_tokens=2)
    long = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    outputs = llm.generate(prompts, [short, *[long] * 11], deadline=6.5)
    assert now < 12
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["length", *["deadline"] * 11]
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert all(0 < n < 900 for n in lengths[1:8]) and lengths[-1] == 0
    now = 0.0
    stream = llm.stream(((prompt, long) for prompt in prompts * 2), deadline=6.5)
    lengths = [len(output.outputs[0].token_ids) for _, output in stream]
    assert all(0 < n < 900 for n in lengths[:8])
    assert now > 12  # the later ones had as long as the first
    for wrong in (0, -1, float("nan"), "1"):
        with pytest.raises(ValueError, match=r"deadline=.* must be positive"):
            llm.generate(prompts, short, deadline=wrong)
        with pytest.raises(ValueError, match=r"deadline=.* must be positive"):
            llm.stream([], deadline=wrong)


def test_log_probabilities_as_arrays(llm):
    prompt = {"prompt_token_ids": [5, 6, 7]}
    [output] = llm.generate(prompt, SamplingParams(seed=1, max_tokens=9, logprobs=3))
    [answer] = output.outputs
    assert answer.top_token_ids.shape == answer.top_logprobs.shape == (9, 3)
    assert (answer.top_token_ids.dtype, answer.token_logprobs.dtype) == (np.int32, np.float32)
    for i, (token, row) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        tops = zip(answer.top_token_ids[i].tolist(), answer.top_logprobs[i], strict=True)
        assert {**dict(tops), token: answer.token_logprobs[i]} == row
    [plain] = llm.generate(prompt, SamplingParams(seed=1, max_tokens=9))[0].outputs
    assert plain.token_logprobs.tolist() == answer.token_logprobs.tolist()
    assert plain.logprobs is None and plain.top_token_ids.shape == (9, 0)
