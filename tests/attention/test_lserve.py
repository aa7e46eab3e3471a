"""LServe end to end: the engine's output distribution at every step, against a float64 oracle.

The oracle (``oracle_model.py``) knows neither pages in memory nor chunks, slots or bursts, so
whatever those get wrong shows as a different distribution. Caches are filled with NaN before every
run. Models are tiny and random, budgets far below the context: nearly every step prunes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kv_oracle
import lserve_cases
import numpy as np
import pytest
from lserve_cases import CASES
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import Oracle, log_softmax
from tiny_llm import (
    Generation,
    Tokens,
    check_nothing_left,
    expected,
    generate,
    poison,
    random_prompts,
    record_ends,
    tiny_config,
    tiny_params,
)

from lserve_jax import LLM, SparsityConfig, logits

# Logits are of size 10, where float32 rounds by 5e-7, and pass through some dozens of roundings.
# One page more or less in one head changes them by 1e-3 and more.
ORACLE = {"atol": 2e-5, "rtol": 0}
# Two float32 computations of the same sums in another order.
SAME = {"atol": 1e-5, "rtol": 0}

Build = Callable[..., LLM]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return functools.partial(lserve_cases.build, directory=tmp_path_factory.mktemp("patterns"))


def check(case: str, prompts: list[Tokens], generations: list[Generation]) -> list[Oracle]:
    """Compares whole distributions at every step; returns the oracles, at their last step."""
    oracles = []
    for prompt, generation in zip(prompts, generations, strict=True):
        oracle = CASES[case].oracle()
        wanted = expected(oracle, prompt, generation.tokens)
        assert oracle.closest_call > 1e-5, "two pages tie as far as float32 can tell; other seed"
        assert_allclose(generation.logprobs, wanted, **ORACLE)
        oracles.append(oracle)
    return oracles


# The case of one layer of page 32 is for tests below.
@pytest.mark.parametrize("case", [case for case in CASES if case != "page 32, one layer"])
def test_every_step_equals_the_oracle(case: str, build: Build) -> None:
    """Prompts around page edges and the budget, in chunks; twice as many requests as slots."""
    P, budget = (CASES[case].sizes[name] for name in ("page_size", "token_budget"))
    prompts = random_prompts(1, [1, P - 1, 700, P, P + 1, budget - 1, budget, 2 * budget + 1])
    llm = build(case)
    check(case, prompts, generate(llm, prompts, 2 * P // 3 + 24))
    check_nothing_left(llm.engine)


def test_300_tokens(build: Build) -> None:
    case = "page 32, reuse 4"
    prompts = random_prompts(2, [40, 130, 9, 700])
    # The longest is in the last slot: finished neighbours leave holes below it.
    check(case, prompts, generate(build(case, deterministic=False), prompts, [7, 30, 100, 300]))


# The defects of LServe's released code, numbered as in docs/lserve.md.


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_d1_d5_statistics_on_fresh_and_recycled_pages(kv_dtype: str, build: Build) -> None:
    """D1: the first token of a logical page assigns; nothing of the page's last owner stays.
    D5: tokens of prefill and of decode go to the same statistics, whatever the storage type.

    Both kinds of page: fresh ones hold NaN, and the second round reuses those of the first.
    """
    case = "page 32, reuse 4" if kv_dtype == "auto" else "page 32, one layer"
    P, logical = 32, 16
    llm = build(case, kv_dtype=kv_dtype)
    ends = record_ends(llm)
    for seed in (3, 4):
        prompts = random_prompts(seed, [70, 129, 32, 500])
        generations = generate(llm, prompts, 45)
        for prompt, generation in zip(prompts, generations, strict=True):
            # All end after as many bursts, so they end in the order in which they began.
            pages, cache = ends.pop(0)
            oracle = CASES[case].oracle()
            oracle.prefill([*prompt, *generation.tokens[:-1]])
            # Keys of layer 0 depend on nothing attended, so they are the same in 4 bits.
            # Its first retrieval head is the checkpoint's second.
            keys = oracle.keys[0][:, 1]
            stats = cache.key_stats[0]  # [N, g, 2, D]
            for first in range(0, len(keys), logical):
                got = stats[pages[first // P], first % P // logical]
                tokens = keys[first : first + logical]
                wanted = np.stack([tokens.max(axis=0), tokens.min(axis=0)])
                assert_allclose(got, wanted, **ORACLE)
        if kv_dtype == "auto":
            check(case, prompts, generations)


@pytest.mark.parametrize("case", ["page 16, reuse 32", "page 32, reuse 4"])
def test_d2_page_crossing_inside_a_reuse_interval(case: str, build: Build) -> None:
    """Every token since the last selection is attended, also when it opened a new page."""
    P, budget, C = (
        CASES[case].sizes[name] for name in ("page_size", "token_budget", "reuse_interval")
    )
    start = budget + 2 * P  # well into pruning
    # The crossing falls on each step of an interval, or on four steps spread over a long one.
    prompts = random_prompts(5, [start + P - step for step in range(1, C + 1, -(-C // 4))])
    generations = generate(build(case), prompts, C + 2 * P)
    for oracle in check(case, prompts, generations):
        last = CASES[case].config.num_hidden_layers - 1
        assert len(oracle.attended[last, 0]) < oracle.length


def test_d3_prompts_of_whole_pages(build: Build) -> None:
    """The first step after them opens a page; the page before it is attended whatever its score."""
    case = "page 64, reuse 8"
    prompts = random_prompts(6, [256, 320, 384, 640])
    check(case, prompts, generate(build(case), prompts, 20))


def test_d4_batches_of_unequal_lengths_that_shrink(build: Build) -> None:
    """Some rows prune, some do not; rows end in the middle of an interval; others take over."""
    case = "page 32, reuse 4"  # as above, whose programs it runs
    prompts = random_prompts(7, [3, 700, 190, 257, 500, 20, 330])
    max_tokens = [3, 10, 21, 60, 6, 31, 13]
    check(case, prompts, generate(build(case, deterministic=False), prompts, max_tokens))


def test_d6_ring_keeps_sinks_and_local_tokens(build: Build) -> None:
    """Contexts that fill the ring for the first time, up to the last page of it, and 2,000."""
    case = "page 64, logical 32"
    prompts = random_prompts(8, [250, 257, 300, 320, 383, 384, 447, 2000])
    check(case, prompts, generate(build(case), prompts, 140))


# What a request's numbers must not depend on.


def test_nothing_depends_on_neighbours(build: Build) -> None:
    """Bit for bit where the batch is as large; to rounding in a batch of one or another slot."""
    case = "page 32, reuse 4"
    [prompt] = random_prompts(9, [333])
    fixed, varying = build(case), build(case, deterministic=False)
    first, *_ = generate(fixed, [prompt, *random_prompts(10, [5, 700, 64])], 40)
    poison(fixed)
    again, *_ = generate(fixed, [prompt, *random_prompts(11, [400, 31, 600])], [40, 3, 50, 60])
    assert_array_equal(first.logprobs, again.logprobs)
    [alone] = generate(varying, [prompt], 40)
    *_, last = generate(varying, [*random_prompts(12, [44, 45, 46]), prompt], 40)
    for other in (again, alone, last):
        assert other.tokens == first.tokens
        assert_allclose(other.logprobs, first.logprobs, **SAME)


def test_nothing_depends_on_the_chunk_size(build: Build) -> None:
    """1024 holds each prompt whole, the prefill window (128 tokens) is a fraction of it."""
    case = "page 32, one layer"
    prompts = random_prompts(13, [700, 129, 590, 768])  # few sizes of a last chunk
    chunked = generate(build(case), prompts, 12)  # of 64 tokens
    for size in (128, 1024):
        others = generate(build(case, prefill_chunk_size=size), prompts, 12)
        for one, other in zip(chunked, others, strict=True):
            assert one.tokens == other.tokens
            assert_allclose(one.logprobs, other.logprobs, **SAME)


def test_unpruned_is_dense_at_any_page_size() -> None:
    """Budget >= context and no streaming heads: dense, and the model without a cache.

    So the page size cannot matter either. 150 tokens: two of the prompts end in another page of
    128 tokens than they began in.
    """
    config = tiny_config(layers=1, kv_heads=2, group=2)
    params = tiny_params(config, seed=5)
    prompts, count = random_prompts(14, [1, 65, 300, 700]), [150, 40, 60, 150]

    def run(**settings: Any) -> list[Generation]:
        llm = LLM(
            (config, params),
            max_num_seqs=4,
            prefill_chunk_size=64,
            relay="never",
            deterministic=True,
            **settings,
        )
        poison(llm)
        return generate(llm, prompts, count)

    def lserve(page_size: int, reuse_interval: int) -> list[Generation]:
        sparsity = SparsityConfig(
            page_size=page_size, token_budget=1024, reuse_interval=reuse_interval
        )
        return run(attention="lserve", sparsity=sparsity)

    dense = run()
    for prompt, generation in zip(prompts, dense, strict=True):
        tokens = np.zeros((1, 1024), np.int32)  # one shape for all; the model is causal
        whole = [*prompt, *generation.tokens[:-1]]
        tokens[0, : len(whole)] = whole
        every = jax.jit(logits, static_argnums=0)(config, params, jnp.asarray(tokens))[0]
        wanted = log_softmax(np.asarray(every)[len(prompt) - 1 : len(whole)])
        assert_allclose(generation.logprobs, wanted, **SAME)
    for settings in ((16, 4), (128, 1)):
        for one, other in zip(dense, lserve(*settings), strict=True):
            assert one.tokens == other.tokens
            assert_allclose(one.logprobs, other.logprobs, **SAME)


def test_prompts_of_a_bucket_compile_nothing_new(build: Build) -> None:
    llm = build("page 32, reuse 4")
    generate(llm, random_prompts(19, [65]), 5)
    compiled: list[str] = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for length, steps in ((90, 9), (64, 20), (500, 3)):
            generate(llm, random_prompts(20, [length]), steps)
        assert compiled == []
        jax.jit(lambda x: x + 1)(jnp.zeros(3))  # the listener does hear compilations
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Keys and values in 8 and 4 bits.


@pytest.mark.parametrize(("kv_dtype", "least", "most"), [("int8", 1e-3, 0.1), ("int4", 1e-2, 1.0)])
def test_quantised_kv(kv_dtype: str, least: float, most: float, build: Build) -> None:
    """Every cached number is within half a step of the true one; the output stays close."""
    case = "page 32, one layer"
    prompts = random_prompts(15, [500, 100, 260, 33])
    llm = build(case, kv_dtype=kv_dtype)
    ends = record_ends(llm)
    generations = generate(llm, prompts, 40)
    for prompt, generation, (pages, cache) in zip(prompts, generations, ends, strict=True):
        oracle = CASES[case].oracle()
        wanted = expected(oracle, prompt, generation.tokens)
        # A step is 1/127 of the largest channel, or 1/15 of what eight channels span. Where two
        # pages nearly tie, the other one may be chosen: hence a quantile and not the maximum.
        assert least < np.quantile(np.abs(generation.logprobs - wanted), 0.9) < most
        # Layer 0, head 1 of the checkpoint: the first retrieval head, whose keys attend nothing.
        positions = np.arange(oracle.length)
        page, offset = np.array(pages)[positions // 32], positions % 32
        for codes, scale, true in (
            (cache.retrieval.k, cache.retrieval.k_scale, oracle.keys),
            (cache.retrieval.v, cache.retrieval.v_scale, oracle.values),
        ):
            stored = [np.asarray(x[0, page, offset]) for x in jax.tree.leaves((codes, scale))]
            true = true[0][:, 1]
            error = np.abs(kv_oracle.values(*stored) - true)
            assert np.all(error <= kv_oracle.bound(true, kv_dtype, *stored[1:]) + 1e-6)
