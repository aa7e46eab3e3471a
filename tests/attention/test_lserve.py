"""LServe end to end: the engine's output distribution at every step, against a float64 oracle.

The oracle (``oracle_model.py``) knows neither pages in memory nor chunks, slots or bursts, so
whatever those get wrong shows as a different distribution. Caches are filled with NaN before every
run. Models are tiny and random, budgets far below the context: nearly every step prunes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import Oracle, streaming_heads
from tiny_llm import (
    VOCAB,
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
    write_pattern,
)

import lserve_jax.engine.runner
from lserve_jax import LLM, ModelConfig, SamplingParams, SparsityConfig, logits

# Logits are of size 10, where float32 rounds by 5e-7, and pass through some dozens of roundings.
# One page more or less in one head changes them by 1e-3 and more.
ORACLE = {"atol": 2e-5, "rtol": 0}
# Two float32 computations of the same sums in another order.
SAME = {"atol": 1e-5, "rtol": 0}


class Case(NamedTuple):
    """A model, which of its heads stream, and how the others select pages."""

    config: ModelConfig
    gates: list[list[float]]
    fraction: float
    sizes: dict[str, int]

    def sparsity(self, pattern: str) -> SparsityConfig:
        return SparsityConfig(pattern=pattern, streaming_fraction=self.fraction, **self.sizes)

    def params(self) -> dict:
        return tiny_params(self.config, seed=3)

    def oracle(self) -> Oracle:
        streaming = streaming_heads(self.gates, self.fraction)
        sparsity = SparsityConfig(**self.sizes)
        return Oracle(self.config, self.params(), sparsity=sparsity, streaming=streaming)


def sizes(
    page: int,
    logical: int,
    budget: int,
    reuse: int,
    windows: tuple,
    *,
    selected: int | None = None,
    forced: int = 1,
) -> dict:
    sinks_and_locals = ("decode_sink", "decode_local", "prefill_sink", "prefill_local")
    return {
        "page_size": page,
        "logical_page_size": logical,
        "selected_page_size": selected,
        "token_budget": budget,
        "reuse_interval": reuse,
        "forced_sink_pages": forced,
        **dict(zip(sinks_and_locals, windows, strict=True)),
    }


CASES = {
    # Layer 0 has no retrieval head; in layer 1 the middle one of three heads moves to the front.
    "page 16, reuse 1": Case(
        tiny_config(layers=2, kv_heads=3),
        [[0.1, 0.2, 0.1], [0.2, 0.9, 0.3]],
        5 / 6,
        sizes(16, 16, 64, 1, (16, 32, 32, 64)),
    ),
    # Layer 1 has no streaming head.
    "page 32, reuse 4": Case(
        tiny_config(layers=2, kv_heads=2, group=2),
        [[0.2, 0.9], [0.8, 0.7]],
        0.25,
        sizes(32, 16, 128, 4, (32, 64, 64, 128), selected=32),
    ),
    # No forced pages.
    "page 64, reuse 8": Case(
        tiny_config(layers=2, kv_heads=2, group=3),
        [[0.3, 0.8], [0.9, 0.1]],
        0.5,
        sizes(64, 16, 192, 8, (0, 64, 64, 64), selected=64, forced=0),
    ),
    # Logical pages are selected out of pages; between two selections more than one is filled.
    "page 64, selected 16, reuse 24": Case(
        tiny_config(layers=2, kv_heads=2, group=3),
        [[0.3, 0.8], [0.9, 0.1]],
        0.5,
        sizes(64, 16, 128, 24, (0, 64, 64, 64)),
    ),
    "page 64, selected 32, reuse 4": Case(
        tiny_config(layers=2, kv_heads=2, group=2),
        [[0.2, 0.9], [0.8, 0.7]],
        0.25,
        sizes(64, 16, 128, 4, (64, 64, 64, 128), selected=32),
    ),
    # Between two selections two pages and more are filled.
    "page 16, reuse 32": Case(
        tiny_config(layers=2, kv_heads=1, group=2),
        [[0.5], [0.5]],
        0.0,
        sizes(16, 16, 80, 32, (16, 16, 16, 16), forced=2),
    ),
    # The ring of LServe's own sizes.
    "page 64, logical 32": Case(
        tiny_config(layers=2, kv_heads=2, max_len=2176),
        [[0.9, 0.1], [0.4, 0.2]],
        0.75,
        sizes(64, 32, 256, 4, (128, 256, 128, 512)),
    ),
}
Build = Callable[..., LLM]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``build(case)``: an LLM of a case with four slots and a poisoned cache."""
    directory = tmp_path_factory.mktemp("patterns")

    def build(case: str, **settings: Any) -> LLM:
        made = CASES[case]
        pattern = write_pattern(directory / case.replace(" ", "_"), made.gates)
        settings = {"max_num_seqs": 4, "prefill_chunk_size": 64} | settings
        llm = LLM(
            (made.config, made.params()),
            attention="lserve",
            sparsity=made.sparsity(pattern),
            **settings,
        )
        poison(llm)
        return llm

    return build


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


@pytest.mark.parametrize("case", CASES)
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
    check(case, prompts, generate(build(case), prompts, [7, 30, 100, 300]))


# The defects of LServe's released code, numbered as in docs/lserve.md.


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_d1_d5_statistics_on_fresh_and_recycled_pages(kv_dtype: str, build: Build) -> None:
    """D1: the first token of a logical page assigns; nothing of the page's last owner stays.
    D5: tokens of prefill and of decode go to the same statistics, whatever the storage type.

    Both kinds of page: fresh ones hold NaN, and the second round reuses those of the first.
    """
    case = "page 32, reuse 4"
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
            # Keys of layer 0 depend on nothing attended, so they are the same with int8 KV.
            # Its retrieval head is the checkpoint's second.
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
        assert len(oracle.attended[1, 0]) < oracle.length


def test_d3_prompts_of_whole_pages(build: Build) -> None:
    """The first step after them opens a page; the page before it is attended whatever its score."""
    case = "page 64, reuse 8"
    prompts = random_prompts(6, [256, 320, 384, 640])
    check(case, prompts, generate(build(case), prompts, 20))


def test_d4_batches_of_unequal_lengths_that_shrink(build: Build) -> None:
    """Some rows prune, some do not; rows end in the middle of an interval; others take over."""
    case = "page 64, reuse 8"
    prompts = random_prompts(7, [3, 700, 190, 257, 500, 20, 330])
    max_tokens = [3, 10, 21, 60, 6, 31, 13]
    check(case, prompts, generate(build(case), prompts, max_tokens))


def test_d6_ring_keeps_sinks_and_local_tokens(build: Build) -> None:
    """Contexts that fill the ring for the first time, up to the last page of it, and 2,000."""
    case = "page 64, logical 32"
    prompts = random_prompts(8, [250, 257, 300, 320, 383, 384, 447, 2000])
    check(case, prompts, generate(build(case), prompts, 140))


# What a request's numbers must not depend on.


def test_nothing_depends_on_neighbours(build: Build) -> None:
    """Bit for bit where the batch is as large; to rounding in a batch of one or another slot."""
    case = "page 32, reuse 4"
    llm = build(case)
    [prompt] = random_prompts(9, [333])
    [alone] = generate(llm, [prompt], 40)
    poison(llm)
    first, *_ = generate(llm, [prompt, *random_prompts(10, [5, 700, 64])], 40)
    poison(llm)
    again, *_ = generate(llm, [prompt, *random_prompts(11, [400, 31, 600])], [40, 3, 50, 60])
    *_, last = generate(llm, [*random_prompts(12, [44, 45, 46]), prompt], 40)
    assert_array_equal(first.logprobs, again.logprobs)
    for other in (again, alone, last):
        assert other.tokens == first.tokens
        assert_allclose(other.logprobs, first.logprobs, **SAME)


@pytest.mark.parametrize("chunk", [128, 256, 1024])
def test_nothing_depends_on_the_chunk_size(chunk: int, build: Build) -> None:
    """1024 holds each prompt whole, the prefill window (128 tokens) is a fraction of it."""
    case = "page 32, reuse 4"
    prompts = random_prompts(13, [700, 129, 300, 512])
    runs = [generate(build(case, prefill_chunk_size=size), prompts, 12) for size in (64, chunk)]
    for one, other in zip(*runs, strict=True):
        assert one.tokens == other.tokens
        assert_allclose(one.logprobs, other.logprobs, **SAME)


def test_unpruned_is_dense_at_any_page_size() -> None:
    """Budget >= context and no streaming heads, 300 tokens: dense, and the model without a cache.

    So the page size cannot matter either.
    """
    config = tiny_config(layers=2, kv_heads=2, group=2)
    params = tiny_params(config, seed=5)
    prompts, count = random_prompts(14, [1, 65, 300, 700]), [300, 40, 100, 300]

    def run(**settings: Any) -> list[Generation]:
        llm = LLM((config, params), max_num_seqs=4, prefill_chunk_size=128, **settings)
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
        wanted = jax.nn.log_softmax(every[len(prompt) - 1 : len(whole)])
        assert_allclose(generation.logprobs, wanted, **SAME)
    for settings in ((16, 4), (128, 1)):
        for one, other in zip(dense, lserve(*settings), strict=True):
            assert one.tokens == other.tokens
            assert_allclose(one.logprobs, other.logprobs, **SAME)


# int8 storage.


def test_int8_kv(build: Build) -> None:
    """Every cached number is within half a step of the true one; the output stays close."""
    case = "page 32, reuse 4"
    prompts = random_prompts(15, [500, 100, 260, 33])
    llm = build(case, kv_dtype="int8")
    ends = record_ends(llm)
    generations = generate(llm, prompts, 40)
    for prompt, generation, (pages, cache) in zip(prompts, generations, ends, strict=True):
        oracle = CASES[case].oracle()
        wanted = expected(oracle, prompt, generation.tokens)
        # A quantisation step is 1/127 of the largest channel. Where two pages nearly tie, the
        # other one may be chosen: hence a quantile and not the maximum.
        assert 1e-3 < np.quantile(np.abs(generation.logprobs - wanted), 0.9) < 0.1
        # Layer 0, head 1 of the checkpoint: the retrieval head, whose keys attend nothing.
        positions = np.arange(oracle.length)
        page, offset = np.array(pages)[positions // 32], positions % 32
        for codes, scale, true in (
            (cache.retrieval.k, cache.retrieval.k_scale, oracle.keys),
            (cache.retrieval.v, cache.retrieval.v_scale, oracle.values),
        ):
            step = np.asarray(scale[0, page, offset], np.float64)[:, None]
            error = np.asarray(codes[0, page, offset]) * step - true[0][:, 1]
            assert np.all(np.abs(error) <= step / 2 + 1e-6)


# Memory and traffic.


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_kv_bytes_held(kv_dtype: str, build: Build) -> None:
    """LServe's formula: per token for retrieval heads, constant for streaming heads."""
    D, P, logical, retrieval_heads, streaming_heads = 16, 32, 16, 3, 1
    bits, scales = (32, 0) if kv_dtype == "auto" else (8, 8)
    per_token = retrieval_heads * (2 * D * bits // 8 + scales + 2 * D * 4 // logical)
    ring = streaming_heads * (1 + 2 + 1) * P * (2 * D * bits // 8 + scales)
    llm = build("page 32, reuse 4", kv_dtype=kv_dtype)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in random_prompts(16, [1, 32, 33, 600])],
        SamplingParams(temperature=0, max_tokens=10, logprobs=VOCAB),
    )
    for output in outputs:
        written = len(output.prompt_token_ids) + 9  # the last token is never fed back
        pages = -(-written // P)
        assert output.metrics.kv_bytes_held == pages * P * per_token + ring
    plan = llm.memory_plan()
    assert plan["retrieval"] + plan["key_stats"] == llm.spec.num_pages * P * per_token
    # Of the ring's four pages one is a sink, which every prefix has too.
    caches = [llm.engine.runner.read_cache(i) for i in range(llm.config.num_hidden_layers)]
    rings = 4 * ring + llm.spec.max_prefixes * ring // 4
    assert plan["streaming"] == rings
    held = jax.tree.leaves([[c.retrieval, c.key_stats, c.streaming] for c in caches])
    assert sum(x.nbytes for x in held) == rings + llm.spec.num_pages * P * per_token


LONG = tiny_config(layers=1, kv_heads=2, max_len=66_000)


@pytest.fixture(scope="module")
def long_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """One retrieval and one streaming head, room for 64K tokens."""
    pattern = write_pattern(tmp_path_factory.mktemp("patterns") / "long", [[0.1, 0.9]])
    return LLM(
        (LONG, tiny_params(LONG)),
        max_num_seqs=1,
        attention="lserve",
        sparsity=SparsityConfig(pattern=pattern, token_budget=1024, prefill_local=256),
        prefill_chunk_size=1024,
    )


def test_kv_bytes_read_do_not_grow(long_llm: LLM) -> None:
    """From 8K to 64K tokens. Only the statistics that rank pages grow, by 1/64 of dense."""
    P, token, steps = 64, 2 * 16 * 4, 8
    read = []
    for length in (8_192, 65_536):
        [prompt] = random_prompts(17, [length])
        sampling = SamplingParams(temperature=0, max_tokens=steps + 1)
        [output] = long_llm.generate([{"prompt_token_ids": prompt}], sampling)
        metrics = output.metrics
        assert metrics.selector_runs == steps / 4
        assert metrics.bypassed_steps == 0
        # Of one selection: kmax and kmin of four logical pages a page, in float32.
        statistics = (length // P + 1) * 4 * 2 * 16 * 4 / 4
        assert metrics.kv_bytes_read_per_step > statistics
        read.append(metrics.kv_bytes_read_per_step - statistics)
        # 16 pages for the retrieval head, 6 for the ring: sink and local.
        assert 21 < metrics.pages_attended_per_step * 2 <= 22
        dense = sum(2 * (length + i) for i in range(1, steps + 1)) * token / steps
        assert metrics.dense_kv_bytes_read_per_step == pytest.approx(dense)
    assert abs(read[0] - read[1]) <= P * token
    assert abs(read[0] / token - (1024 + 128 + 256)) <= P


class Calls:
    """Records the shapes of the arguments of the engine's jitted functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.lowered: dict[str, Any] = {}
        for name in names:
            monkeypatch.setattr(lserve_jax.engine.runner, name, self._recording(name))

    def _recording(self, name: str) -> Callable:
        function = getattr(lserve_jax.engine.runner, name)

        def record(*args: Any, **static: Any) -> Any:
            self.lowered[name] = function.lower(*args, **static)
            return function(*args, **static)

        return record


def test_pools_are_updated_in_place(long_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of generation has room for a copy of the keys it caches, or for a T x T mask."""
    calls = Calls(monkeypatch, "prefill_chunk", "decode_burst", "insert")
    [prompt] = random_prompts(18, [1_024])
    sampling = SamplingParams(temperature=0, max_tokens=9)
    long_llm.generate([{"prompt_token_ids": prompt}], sampling)
    runner = long_llm.engine.runner
    caches = [runner.read_cache(layer) for layer in range(runner.config.num_hidden_layers)]
    for name, lowered in calls.lowered.items():
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(caches)), name
        assert memory.temp_size_in_bytes < 0.7 * caches[0].retrieval.k.nbytes, name


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


# Settings.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"page_size": 48}, ["page_size=48", "(16, 32, 64, 128)"]),
        ({"logical_page_size": 8}, ["logical_page_size=8", "(16, 32)"]),
        ({"page_size": 16, "logical_page_size": 32}, ["page_size=16", "logical_page_size=32"]),
        ({"selected_page_size": 128}, ["selected_page_size=128", "divide page_size=64"]),
        ({"selected_page_size": 8}, ["selected_page_size=8", "logical_page_size=16"]),
        ({"selected_page_size": 48}, ["selected_page_size=48", "divide page_size=64"]),
        ({"selected_page_size": 0}, ["selected_page_size=0"]),
        ({"token_budget": 1000}, ["token_budget=1000", "selected_page_size=16"]),
        (
            {"token_budget": 1056, "selected_page_size": 64},
            ["token_budget=1056", "selected_page_size=64"],
        ),
        ({"token_budget": 32}, ["token_budget=32", "48", "1 forced"]),
        (
            {"token_budget": 256, "forced_sink_pages": 3, "selected_page_size": 64},
            ["token_budget=256", "320"],
        ),
        ({"token_budget": -64}, ["token_budget=-64", "48"]),
        ({"lower_bound_weight": -0.5}, ["lower_bound_weight=-0.5", "[0, 1]"]),
        ({"lower_bound_weight": 1.5}, ["lower_bound_weight=1.5", "[0, 1]"]),
        ({"lower_bound_weight": np.nan}, ["lower_bound_weight=nan", "[0, 1]"]),
        ({"reuse_interval": 0}, ["reuse_interval=0", "at least 1"]),
        ({"forced_sink_pages": -1}, ["forced_sink_pages=-1"]),
        ({"decode_sink": 100}, ["decode_sink=100", "page_size=64"]),
        ({"decode_local": 100}, ["decode_local=100", "page_size=64"]),
        ({"prefill_sink": 100}, ["prefill_sink=100", "page_size=64"]),
        ({"prefill_local": 1000}, ["prefill_local=1000", "page_size=64"]),
        ({"prefill_sink": -64}, ["prefill_sink=-64"]),
        ({"decode_local": 0}, ["decode_local=0", "page_size=64"]),
        ({"decode_sink": 256}, ["decode_sink=256", "prefill_sink=128"]),
        ({"prefill_local": 128}, ["decode_local=256", "prefill_local=128"]),
        ({"streaming_fraction": 0.5}, ["streaming_fraction=0.5", "pattern"]),
        ({"pattern": "x", "streaming_fraction": 1.5}, ["streaming_fraction=1.5", "[0, 1]"]),
        ({"pattern": "x", "streaming_fraction": -0.1}, ["streaming_fraction=-0.1", "[0, 1]"]),
        ({"pattern": "x", "streaming_fraction": np.nan}, ["streaming_fraction=nan", "[0, 1]"]),
    ],
    ids=str,
)
def test_sparsity_config_refuses(settings: dict[str, Any], words: list[str]) -> None:
    """Naming the value and what it contradicts."""
    with pytest.raises(ValueError) as error:
        SparsityConfig(**settings)
    for word in words:
        assert word in str(error.value)


def test_streaming_fraction_defaults() -> None:
    assert SparsityConfig().resolved_streaming_fraction == 0
    assert SparsityConfig(pattern="x").resolved_streaming_fraction == 0.5
    assert SparsityConfig(pattern="x", streaming_fraction=0.0).resolved_streaming_fraction == 0


def test_llm_refuses_patterns_that_do_not_fit(tmp_path) -> None:
    config = tiny_config(layers=1, kv_heads=2)
    model = (config, tiny_params(config))
    narrow = SparsityConfig(pattern=write_pattern(tmp_path / "narrow", [[0.1, 0.2, 0.3]]))
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        LLM(model, attention="lserve", sparsity=narrow)
    fits = SparsityConfig(pattern=write_pattern(tmp_path / "fits", [[0.1, 0.2]]))
    with pytest.raises(ValueError, match=r"attention='lserve'.*attention='dense'"):
        LLM(model, attention="dense", sparsity=fits)
    broken = SparsityConfig(pattern=write_pattern(tmp_path / "broken", [[0.1, np.nan]]))
    with pytest.raises(ValueError, match=r"finite.*nan.*layer 0, head 1"):
        LLM(model, attention="lserve", sparsity=broken)
