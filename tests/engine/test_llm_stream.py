"""``LLM.stream``: any number of requests, drawn as slots become free."""

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
