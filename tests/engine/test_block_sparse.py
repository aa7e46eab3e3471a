"""Block-sparse prefill in the engine: against the oracle, and what of it prompts share.

Chunks are of 256 tokens, and prompts of 400 or more are read block-sparsely. Caches hold NaN first.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import Mask, Oracle, log_softmax, streaming_heads
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    poison,
    random_prompts,
    tiny_config,
    tiny_params,
    write_pattern,
)

from convert.head_shares import save_head_shares
from lserve_jax import LLM, ModelConfig, SamplingParams, SparsityConfig
from lserve_jax.analysis import prefill_recall
from lserve_jax.attention.config import Prefill
from lserve_jax.engine import build
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.options import EngineOptions, Warmup
from lserve_jax.engine.warmup import warmup_calls
from lserve_jax.model.head_shares import MISSED_AT, HeadSensitivity
from lserve_jax.stats import BatchTimes, CompileClock, batch_summary, request_summary

pytestmark = pytest.mark.usefixtures("all_slots")

# Whose blocks are compared with the oracle's, layer by layer.
CONFIG = tiny_config(layers=2, kv_heads=2, group=2)
GATES = [[0.2, 0.9], [0.8, 0.7]]
# For all else: half as much to compile, for every size of a chunk twice.
ONE_LAYER = tiny_config(layers=1, kv_heads=2, group=2)
CHUNK, LEAST = 256, 400
TAIL = 128  # last tokens of a prompt: their tiles attend everything
SPARSITY = SparsityConfig(
    head_shares=None,
    token_budget=1024,  # decode reads everything
    page_size=16,
    prefill="block_sparse",
    prefill_threshold=0.6,
    prefill_min_tokens=LEAST,
    decode_sink=16,
    decode_local=32,
    prefill_sink=32,
    prefill_local=64,
)
FIRST = SamplingParams(temperature=0, max_tokens=1, logprobs=VOCAB)
# A prompt, and the length of one that is read causally.
LONG, SHORT = random_prompts(1, [1000])[0], 390


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pattern(tmp_path_factory.mktemp("patterns") / "one", GATES[:1])


@pytest.fixture(scope="module")
def two_layers_pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pattern(tmp_path_factory.mktemp("patterns") / "two", GATES)


def make(
    pattern: str | None,
    changes: dict[str, Any] | None = None,
    config: ModelConfig = ONE_LAYER,
    **settings: Any,
) -> LLM:
    """One head streams."""
    fraction = 0.5 / config.num_hidden_layers
    changes = {"pattern": pattern, "streaming_fraction": fraction} | (changes or {})
    sparsity = dataclasses.replace(SPARSITY, **changes)
    settings = {"max_num_seqs": 2, "prefill_chunk_size": CHUNK, "relay": "never"} | settings
    llm = LLM((config, tiny_params(config)), attention="lserve", sparsity=sparsity, **settings)
    poison(llm)
    return llm


@pytest.fixture(scope="module")
def llm(pattern: str) -> LLM:
    return make(pattern)


@pytest.fixture(scope="module")
def two_layers(two_layers_pattern: str) -> LLM:
    return make(two_layers_pattern, config=CONFIG)


class Run:
    """The first token's distribution, and what the request says of itself."""

    def __init__(self, llm: LLM, prompt: list[int], **sampling: Any):
        given = {"prompt_token_ids": prompt}
        [self.output] = llm.generate(given, dataclasses.replace(FIRST, **sampling))
        [row] = self.output.outputs[0].logprobs
        self.logprobs = np.array([row[t] for t in range(VOCAB)])
        self.metrics = self.output.metrics


class BlockSparse(Oracle):
    """Reads prompts in chunks, of which each tile's blocks are chosen by the oracle of the op."""

    def __init__(self, threshold: float):
        streaming = streaming_heads(GATES, 0.25)
        super().__init__(CONFIG, tiny_params(CONFIG), sparsity=SPARSITY, streaming=streaming)
        self.threshold, self.blocks, self.causal = threshold, 0, 0

    def _prompt_mask(self, layer: int, head: int, queries: oracle.F64) -> Mask:
        mask = super()._prompt_mask(layer, head, queries)
        if self.streaming[layer][head]:
            return mask
        for start in range(0, self.length, CHUNK):
            end = min(start + CHUNK, self.length)
            keys = self.keys[layer][:end, head : head + 1]
            shares = oracle.block_shares(queries[start:end], keys, start)
            lists = oracle.fewest_blocks(shares, start, self.threshold)
            for tile in range(len(lists[0]) if end == self.length else 0):
                if min(start + 128 * (tile + 1), end) > end - TAIL:
                    lists[0][tile] = list(range(start // 128 + tile + 1))
            mask[start:end, :end] = oracle.block_mask(start, end - start, lists)[0]
            self.blocks += sum(map(len, lists[0]))
            self.causal += sum(range(start // 128 + 1, -(-end // 128) + 1))
        return mask


@functools.cache
def expected() -> tuple[np.ndarray, float]:
    """Log probabilities after ``LONG``, and the density."""
    model = BlockSparse(SPARSITY.prefill_threshold)
    return log_softmax(model.prefill(LONG)[-1]), model.blocks / model.causal


def test_a_long_prompt_is_read_as_the_oracle_reads_it(
    two_layers: LLM, two_layers_pattern: str
) -> None:
    llm = two_layers
    logprobs, density = expected()
    before = llm.engine.metrics()
    made = Run(llm, LONG)
    # float32 against float64 as for every model here.
    assert_allclose(made.logprobs, logprobs, atol=2e-4, rtol=0)
    assert made.metrics.prefill_density == pytest.approx(density, abs=1e-6)
    assert 0.5 < density < 0.95
    after = llm.engine.metrics()
    blocks, causal = (
        getattr(after, name) - getattr(before, name)
        for name in ("prefill_blocks", "causal_prefill_blocks")
    )
    assert blocks / causal == pytest.approx(density)
    causal = Run(make(two_layers_pattern, {"prefill": "causal"}, CONFIG), LONG)
    assert abs(causal.logprobs - logprobs).max() > 1e-2  # that it matters which blocks are read
    assert causal.metrics.prefill_density == 1.0


def test_threshold_one_is_causal(pattern: str) -> None:
    made = Run(make(pattern, {"prefill_threshold": 1.0}), LONG)
    causal = Run(make(pattern, {"prefill": "causal"}), LONG)
    assert_allclose(made.logprobs, causal.logprobs, atol=1e-5, rtol=0)  # sums in another order
    assert made.metrics.prefill_density == 1.0


def test_dense_heads_are_read_causally(tmp_path: Path) -> None:
    """Of which decode reads everything, too. The others choose as ever."""
    worth = np.array([[1.0, 2.0], [4.0, 3.0]])
    missed = np.linspace(1, 0.1, len(MISSED_AT))[:, None, None] * np.ones_like(worth)
    sensitivity = HeadSensitivity(
        streaming=worth, selecting=worth, missed=missed, name="made up", context=1024
    )
    save_head_shares(tmp_path, sensitivity, np.full((2, 2), 0.125), {})

    def with_dense(heads: int, prefill: Prefill = "block_sparse") -> LLM:
        changes = {"head_shares": str(tmp_path), "dense_heads": heads, "prefill": prefill}
        changes |= {"prefill_threshold": 0.01, "streaming_fraction": 0.0}
        return make(None, changes, CONFIG)

    every = Run(with_dense(4), LONG)
    assert every.metrics.prefill_density == 1.0
    causal = Run(with_dense(4, "causal"), LONG)
    assert_allclose(every.logprobs, causal.logprobs, atol=1e-5, rtol=0)
    llm = with_dense(1)
    # Of eight tiles of one head the first six list the least: 1, 2, 3, 3, 3, 3.
    least = (1 + 2 + 3 + 3 + 3 + 3 + 7 + 8) / 36
    assert Run(llm, LONG).metrics.prefill_density == pytest.approx((1 + 3 * least) / 4)
    density = prefill_recall(llm, {"prompt_token_ids": LONG}).density
    assert_allclose(density, [[least, least], [1.0, least]], rtol=1e-6)


def test_a_short_prompt_is_causal_to_the_bit(llm: LLM, pattern: str) -> None:
    causal = make(pattern, {"prefill": "causal"})
    made = Run(llm, LONG[:SHORT])
    assert_array_equal(made.logprobs, Run(causal, LONG[:SHORT]).logprobs)
    assert made.metrics.prefill_density == 1.0


def test_a_density_says_how_many(pattern: str) -> None:
    made = Run(make(pattern, {"prefill_density": 0.5}), LONG)
    # Of one, two, three, ... six blocks, with three always: 1, 2, 3, 3, 3, 3; and all at the end.
    assert made.metrics.prefill_density == pytest.approx((1 + 2 + 3 + 3 + 3 + 3 + 7 + 8) / 36)


@pytest.mark.parametrize(
    "settings", [{}, {"deterministic": True}, {"kv_dtype": "int4"}, {"host_cache_bytes": 1 << 22}]
)
def test_cold_is_warm_bit_for_bit(settings: dict[str, Any], pattern: str) -> None:
    """Whatever was read before, and whoever read it: a short prompt, a long one, a prefix."""
    whole_chunks = settings.keys() & {"deterministic", "kv_dtype"}
    cold_settings = {name: settings[name] for name in whole_chunks}
    cold = make(pattern, enable_prefix_caching=False, **cold_settings)
    own = random_prompts(2, [150])[0]
    prompts = [LONG[:SHORT], LONG, LONG[:600] + own, LONG[:500] + own, LONG[:300] + own]
    prompts += [LONG[:560], LONG[:512], LONG]  # the last chunk of 512 is not as in longer ones
    wanted = [Run(cold, prompt).logprobs for prompt in prompts]
    llm = make(pattern, **settings)
    for order in (prompts, prompts[::-1]):
        llm.reset_prefix_cache()
        for prompt in order:
            made = Run(llm, prompt)
            assert_array_equal(made.logprobs, wanted[prompts.index(prompt)])
    llm.reset_prefix_cache()
    found = [Run(llm, prompt).output.num_cached_tokens for prompt in prompts]
    # A prompt of 390 tokens leaves nothing to them.
    assert found == [0, 0, 512, 256, 256, 512, 256, 768]
    # Of a causal prompt whole pages are shared, as ever, but where chunks must agree.
    again = Run(llm, LONG[: SHORT - 4]).output.num_cached_tokens
    assert again == (256 if whole_chunks else 384)
    check_nothing_left(llm.engine)


def test_chunks_shorter_than_a_tile(pattern: str) -> None:
    """Only the last chunk is unlike those of longer prompts, however short it is."""
    small = {"prefill_chunk_size": 64}
    cold, llm = make(pattern, enable_prefix_caching=False, **small), make(pattern, **small)
    own = random_prompts(3, [20])[0]
    prompts = [LONG[:772], LONG[:640] + own, LONG[:704], LONG[:768]]
    wanted = [Run(cold, prompt).logprobs for prompt in prompts]
    for prompt, logprobs in zip(prompts, wanted, strict=True):
        assert_array_equal(Run(llm, prompt).logprobs, logprobs)
    found = [Run(llm, prompt).output.num_cached_tokens for prompt in prompts]
    assert found == [768, 640, 640, 704]


def test_prompts_of_one_kind_wait_for_what_they_share(llm: LLM) -> None:
    """Who ends where another goes on leaves it the chunk before, and nobody waits in vain."""
    llm.reset_prefix_cache()
    prompts = [LONG[:512], LONG[:512], LONG[:600], LONG]
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, FIRST)
    assert [output.num_cached_tokens for output in outputs] == [0, 256, 256, 512]
    check_nothing_left(llm.engine)


def test_a_prefix_is_read_as_those_that_begin_with_it(pattern: str, tmp_path: Path) -> None:
    llm, own = make(pattern), random_prompts(4, [130])[0]
    logprobs = Run(llm, LONG).logprobs
    llm.reset_prefix_cache()
    file = tmp_path / "prefix.safetensors"
    prefix = llm.prefix({"prompt_token_ids": LONG[: 3 * CHUNK + 5]})
    assert prefix.num_shared_tokens == 3 * CHUNK
    prefix.save(file)
    made = Run(llm, LONG)
    assert made.output.num_cached_tokens == 3 * CHUNK
    assert_array_equal(made.logprobs, logprobs)
    # A prompt of few tokens more goes on from its end, too.
    cold = make(pattern, enable_prefix_caching=False)
    for tokens in (1, 20, 130):
        made = Run(llm, LONG[: 3 * CHUNK] + own[:tokens])
        assert made.output.num_cached_tokens == 3 * CHUNK
        wanted = Run(cold, LONG[: 3 * CHUNK] + own[:tokens])
        assert_array_equal(made.logprobs, wanted.logprobs)
    prefix.release()
    shorter = llm.prefix({"prompt_token_ids": LONG[: LEAST - 1]})  # is read causally
    assert shorter.num_shared_tokens == Run(llm, LONG[:SHORT]).output.num_cached_tokens == 384
    shorter.release()
    llm.reset_prefix_cache()
    llm.load_prefix(file)
    made = Run(llm, LONG)
    assert made.output.num_cached_tokens == 3 * CHUNK
    assert_array_equal(made.logprobs, logprobs)
    for other in ({"prefill": "causal"}, {"prefill_threshold": 0.7}):
        with pytest.raises(ValueError, match="block-sparse from 400 tokens on in chunks of 256"):
            make(pattern, other).load_prefix(file)


def test_what_was_attended_is_said(llm: LLM) -> None:
    llm.reset_prefix_cache()
    metrics, clock = Run(llm, LONG).metrics, CompileClock()
    of_request = request_summary(metrics, clock, sparse=True)
    of_batch = batch_summary(llm.engine.metrics(), BatchTimes(), clock)
    for lines in (of_request, of_batch):
        [line] = [line for line in lines if line.startswith("blocks")]
        assert re.match(r"blocks    \d\d% of those that retrieval heads would have attended", line)
    short = Run(llm, LONG[:SHORT]).metrics
    assert not any("blocks" in line for line in request_summary(short, clock, sparse=True))


def test_judged_prompts_are_read_in_the_same_way(two_layers: LLM) -> None:
    judged = Run(two_layers, LONG, prompt_logprobs=1)
    assert_allclose(judged.logprobs, Run(two_layers, LONG).logprobs, atol=1e-5, rtol=0)
    assert judged.metrics.prefill_density == pytest.approx(expected()[1], abs=1e-6)


def test_a_full_warmup_has_both_ways_to_read(llm: LLM, pattern: str) -> None:
    def prefills(engine: Engine, how: Warmup) -> list[tuple[int, bool]]:
        calls = warmup_calls(engine, how)
        of_chunks = [call for call in calls if call.name == "prefill_chunks"]
        found = [(*call.args[3].shape, call.static["block_sparse"]) for call in of_chunks]
        assert not any(kind for rows, _, kind in found if rows > 1)  # together: short prompts only
        return [(size, kind) for rows, size, kind in found if rows == 1 or kind]

    sizes = (64, 128, 256)
    both = [(size, kind) for kind in (False, True) for size in sizes]
    assert prefills(llm.engine, "full") == both
    assert prefills(llm.engine, "auto") == both[:1]
    too_short = make(pattern, max_model_len=LEAST - 1).engine
    assert prefills(too_short, "full") == both[:3]
    never_causal = make(pattern, {"prefill_min_tokens": 1}).engine
    assert prefills(never_causal, "full") == both[3:]
    assert prefills(never_causal, "auto") == both[3:4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill": "sparse"}, "prefill='sparse' must be 'causal' or 'block_sparse'"),
        ({"prefill_threshold": 0}, r"prefill_threshold=0 must lie in \(0, 1\]"),
        ({"prefill_threshold": 1.01}, r"prefill_threshold=1.01 must lie in \(0, 1\]"),
        ({"prefill_threshold": "0.9"}, r"prefill_threshold='0.9' must lie in \(0, 1\]"),
        ({"prefill_density": float("nan")}, r"prefill_density=nan must lie in \(0, 1\]"),
        ({"prefill_min_tokens": 0}, "prefill_min_tokens=0 must be at least 1"),
        ({"prefill_min_tokens": 1.5}, "prefill_min_tokens must be an integer, got 1.5"),
    ],
)
def test_what_the_settings_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SparsityConfig(**{"prefill": "block_sparse", **settings})


def test_kernels_take_heads_of_some_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "resolve_backend", lambda backend: "mosaic")
    options = EngineOptions(attention="lserve", sparsity=SPARSITY, dtype="bfloat16")
    with pytest.raises(NotImplementedError, match=r"needs heads of 64 or 128 .* got head_dim=16"):
        build.build_engine(CONFIG, tiny_params(CONFIG), options)


def test_what_settings_need_of_each_other() -> None:
    with pytest.raises(ValueError, match=r"prefill_density=0.5 needs prefill='block_sparse'"):
        SparsityConfig(prefill_density=0.5)
    sparsity = SparsityConfig(prefill="block_sparse")
    with pytest.raises(ValueError, match=r"exact=True needs prefill='causal'"):
        EngineOptions(attention="lserve", sparsity=sparsity, exact=True)
    with pytest.raises(ValueError, match=r"prefill='block_sparse'.* needs attention='lserve'"):
        EngineOptions(sparsity=sparsity)
