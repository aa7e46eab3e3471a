"""A tiny model whose requests share prefixes, and how their answers are compared."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.testing import assert_allclose
from tiny_llm import (
    VOCAB,
    Generation,
    random_prompts,
    tiny_config,
)

from lserve_jax import LLM, SamplingParams

P = 16
CONFIG = tiny_config(layers=1, kv_heads=2, group=2, max_len=4608)
GATES = [[0.2, 0.9]]
SIZES = {
    "page_size": P,
    "token_budget": 96,
    "reuse_interval": 4,
    "decode_sink": 16,
    "decode_local": 32,
    "prefill_sink": 32,
    "prefill_local": 64,
}
# Two float32 computations of the same sums in another order.
SAME = {"atol": 1e-5, "rtol": 0}
Build = Callable[..., LLM]


def prompts_with(prefix: list[int], seed: int, lengths: list[int]) -> list[list[int]]:
    return [prefix + own for own in random_prompts(seed, lengths)]


def run(
    llm: LLM, prompts: list[list[int]], tokens: int, shared_prefix: Any = None
) -> list[Generation]:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=VOCAB)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], sampling, shared_prefix=shared_prefix
    )
    made = []
    for output in outputs:
        rows = [[row[t] for t in range(VOCAB)] for row in output.outputs[0].logprobs]
        made.append(Generation(output.outputs[0].token_ids, np.array(rows)))
    return made


def assert_same(got: list[Generation], wanted: list[Generation]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.tokens == other.tokens
        assert_allclose(one.logprobs, other.logprobs, **SAME)
