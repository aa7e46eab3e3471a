"""Short prompts that wait are prefilled in one call, and each is as it is alone.

The float64 oracle is the standard for numbers; caches hold NaN first. A call has one row or four.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from engine_cases import CONFIG, ORACLE, PAGE_BYTES, SIZES, drain, greedy, oracle, run, tokens_of
from numpy.testing import assert_allclose
from oracle_model import Oracle
from tiny_llm import VOCAB, check_nothing_left, expected, poison, random_prompts, tiny_params

from lserve_jax import LLM, RequestOutput, SamplingParams, SparsityConfig
from lserve_jax.engine.buckets import row_counts
from lserve_jax.engine.inputs import Chunk
from lserve_jax.engine.prefill_calls import rows_of_calls
from lserve_jax.engine.runner import ModelRunner

pytestmark = pytest.mark.usefixtures("all_slots")

ROWS, CHUNK = 4, 512


class Calls(NamedTuple):
    """An ``LLM``, and the calls that prefilled its prompts: rows, tokens of each chunk."""

    llm: LLM
    made: list[tuple[int, list[int]]]

    def take(self) -> list[tuple[int, list[int]]]:
        made = list(self.made)
        self.made.clear()
        return made


def record(llm: LLM) -> Calls:
    calls = Calls(llm, [])
    prefill = llm.engine.runner.prefill

    def recorded(chunks: list[Chunk], rows: int = 1) -> Any:
        calls.made.append((rows, [len(chunk.tokens) for chunk in chunks]))
        return prefill(chunks, rows)

    llm.engine.runner.prefill = recorded
    return calls


def build(attention: str, pattern: str, **settings: Any) -> Calls:
    sparsity = SparsityConfig(pattern=pattern, **SIZES) if attention == "lserve" else None
    settings = {"max_num_seqs": 6, "prefill_chunk_size": CHUNK, "burst_steps": 8} | settings
    params = tiny_params(CONFIG)
    llm = LLM((CONFIG, params), attention=attention, sparsity=sparsity, relay="never", **settings)
    poison(llm)
    return record(llm)


@pytest.fixture(scope="module")
def engines(pattern: str) -> dict[str, Calls]:
    return {attention: build(attention, pattern) for attention in ("dense", "lserve")}


@pytest.fixture
def calls(engines: dict[str, Calls], request: pytest.FixtureRequest) -> Calls:
    """Of the attention that a test names, else of "lserve"; nothing is remembered."""
    calls = engines[getattr(request, "param", "lserve")]
    poison(calls.llm)
    calls.take()
    return calls


BOTH = pytest.mark.parametrize("calls", ["dense", "lserve"], indirect=True)


def logprobs(output: RequestOutput) -> np.ndarray:
    return np.array([[row[t] for t in range(VOCAB)] for row in output.outputs[0].logprobs])


@BOTH
def test_numbers_are_those_of_the_model(
    calls: Calls, engines: dict[str, Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every length up to a bucket's: those of one bucket run together, four or three of them.

    Longer ones run alone, and so do two that are left over.
    """
    prompts = random_prompts(1, [3, 64, 40, 100, 128, 1, 70, 65, 200, 9, 33, 12])
    outputs = run(calls.llm, prompts, greedy(6))
    assert (4, [3, 64, 40, 1]) in calls.made and (1, [200]) in calls.made
    for prompt, output in zip(prompts, outputs, strict=True):
        model = oracle()
        if calls is engines["dense"]:
            model = Oracle(CONFIG, tiny_params(CONFIG))
        assert_allclose(logprobs(output), expected(model, prompt, tokens_of(output)), **ORACLE)


@BOTH
def test_a_row_knows_nothing_of_the_others(calls: Calls) -> None:
    """Bit for bit: in every row, beside others, beside none at all."""
    prompts = random_prompts(2, [50, 7, 64, 30, 21, 58])
    first: dict[int, tuple[list[int], list[list[float]]]] = {}
    for order in ([0, 1, 2, 3], [3, 0, 4, 1], [5, 4, 0], [1, 2, 3, 0]):
        calls.llm.reset_prefix_cache()
        outputs = run(calls.llm, [prompts[i] for i in order], greedy(1))
        for i, output in zip(order, outputs, strict=True):
            found = tokens_of(output), logprobs(output).tolist()
            assert first.setdefault(i, found) == found
    assert [rows for rows, _ in calls.take()] == [4] * 4


def test_deterministic_prompts_run_alone(pattern: str) -> None:
    """A compiler may round sums of more rows in another way."""
    calls = build("lserve", pattern, deterministic=True, max_num_seqs=4)
    prompts = random_prompts(3, [50, 7, 64, 30])
    together = run(calls.llm, prompts, greedy(3))
    assert [rows for rows, _ in calls.take()] == [1] * 4
    for prompt, output in zip(prompts, together, strict=True):
        calls.llm.reset_prefix_cache()
        [alone] = run(calls.llm, [prompt], greedy(3))
        assert tokens_of(alone) == tokens_of(output)
        assert logprobs(alone).tolist() == logprobs(output).tolist()


def test_who_can_go_on_from_another_waits_for_it(calls: Calls) -> None:
    """One computes what all begin with; three others then run together, what differs alone too."""
    [common] = random_prompts(4, [96])
    own = random_prompts(5, [10, 20, 30, 31, 40])
    prompts = [*[common + tail for tail in own[:4]], own[4]]
    outputs = run(calls.llm, prompts, greedy(6))
    assert calls.take() == [(1, [106]), (4, [20, 30, 31, 40])]
    assert [output.num_cached_tokens for output in outputs] == [0, 96, 96, 96, 0]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_allclose(logprobs(output), expected(oracle(), prompt, tokens_of(output)), **ORACLE)


def test_completions_of_one_prompt(calls: Calls) -> None:
    [prompt] = random_prompts(6, [50])
    sampling = SamplingParams(n=4, max_tokens=6, seed=3)
    [output] = calls.llm.generate({"prompt_token_ids": prompt}, sampling)
    assert calls.take() == [(1, [50]), (4, [2, 2, 2])]
    [again] = calls.llm.generate({"prompt_token_ids": prompt}, dataclasses.replace(sampling, n=1))
    assert again.outputs[0].token_ids == output.outputs[0].token_ids
    assert len({tuple(made.token_ids) for made in output.outputs}) == 4


def test_requests_keep_what_they_asked_for(calls: Calls) -> None:
    """Seeds, penalties, biases, stop ids: in one call with others as alone."""
    stops = range(0, VOCAB, 3)
    asked = [
        SamplingParams(temperature=0.8, seed=1, max_tokens=1),
        SamplingParams(temperature=0, max_tokens=1, repetition_penalty=1.5),
        SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[6, 7, 8], logit_bias={7: 9}),
        SamplingParams(temperature=0, max_tokens=1, stop_token_ids=stops),
        SamplingParams(temperature=0, max_tokens=1, stop_token_ids=stops, min_tokens=1),
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
    ]
    prompts = random_prompts(7, [60, 20, 11, 40, 35, 50])
    together = run(calls.llm, prompts, asked)
    assert calls.take() == [(4, [60, 20, 11, 40]), (1, [35]), (1, [50])]
    for prompt, sampling, output in zip(prompts[:4], asked[:4], together, strict=False):
        calls.llm.reset_prefix_cache()
        [alone] = run(calls.llm, [prompt], sampling)
        assert tokens_of(alone) == tokens_of(output)
        assert alone.outputs[0].finish_reason == output.outputs[0].finish_reason


def test_cancelled_beside_others(calls: Calls) -> None:
    """After their prompts ran together, and while one waits for a place in the next call."""
    engine, prompts = calls.llm.engine, random_prompts(8, [50, 30, 64, 8, 70, 12, 20, 33])
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(12), seed=0)
    outputs = engine.step()
    assert calls.take()[0] == (4, [50, 30, 64, 8])
    for name in ("1", "3", "6"):
        engine.cancel(name)
    outputs += drain(engine)
    check_nothing_left(engine)
    for i, prompt in enumerate(prompts):
        mine = [new for new in outputs if new.request_id == str(i)]
        tokens = [token for new in mine for token in new.token_ids]
        assert len(tokens) == (0 if i in (1, 3, 6) else 12)
        rows = [[row[t] for t in range(VOCAB)] for new in mine for row in new.top_logprobs]
        if rows:
            assert_allclose(rows, expected(oracle(), prompt, tokens), **ORACLE)


def test_a_step_runs_no_more_than_a_chunk(calls: Calls) -> None:
    """Padding and rows without a prompt count."""
    engine = calls.llm.engine
    for i, prompt in enumerate(random_prompts(9, [64, 100, 30, 120, 5, 90, 77, 61, 80, 2])):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=2), seed=0)
    while engine.has_unfinished_requests:
        engine.step()
        run_now = calls.take()
        assert sum(rows * (64 if max(n) <= 64 else 128) for rows, n in run_now) <= CHUNK
    check_nothing_left(engine)


def test_after_a_failure_in_a_call_of_several(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of its requests is left, and the engine goes on."""
    prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts(10, [30, 40, 50, 60])]
    sampling = SamplingParams(temperature=0, max_tokens=3)
    before = [output.outputs[0].token_ids for output in calls.llm.generate(prompts, sampling)]
    calls.llm.reset_prefix_cache()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "insert", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            calls.llm.generate(prompts, sampling)
    check_nothing_left(calls.llm.engine)
    after = [output.outputs[0].token_ids for output in calls.llm.generate(prompts, sampling)]
    assert after == before


@pytest.fixture(scope="module")
def small(pattern: str) -> Calls:
    """Seven pages of 16 tokens, and six of prefill windows, for two slots."""
    settings = {"max_num_seqs": 2, "max_prefixes": 0, "kv_cache_bytes": 7 * PAGE_BYTES}
    calls = build("lserve", pattern, **settings)
    assert (calls.llm.spec.num_pages, calls.llm.spec.num_window_pages) == (7, 6)
    return calls


def test_windows_for_few(small: Calls) -> None:
    """Streaming heads need a window for each, of four pages for 50 tokens and of three for 44."""
    prompts = random_prompts(11, [40, 44, 50, 44])
    outputs = run(small.llm, prompts, greedy(1))
    assert small.take() == [(2, [40, 44]), (1, [50]), (1, [44])]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_allclose(logprobs(output), expected(oracle(), prompt, tokens_of(output)), **ORACLE)


def test_who_is_admitted_leaves_pages_for_the_others(small: Calls) -> None:
    """Two prompts of three pages have room, but not with what their first bursts need."""
    small.llm.reset_prefix_cache()
    run(small.llm, random_prompts(12, [44, 44]), greedy(9))
    assert small.take() == [(1, [44]), (1, [44])]
    assert small.llm.engine.metrics().preemptions == 0


@pytest.mark.parametrize(
    ("prompts", "counts", "size", "calls"),
    [
        (1, [8, 1], 64, [1]),
        (4, [8, 1], 64, [1] * 4),
        (5, [8, 1], 128, [8]),
        (7, [8, 1], 256, [1] * 7),
        (8, [8, 1], 256, [8]),
        (21, [8, 1], 64, [8, 8, 8]),
        (20, [8, 1], 64, [8, 8, 1, 1, 1, 1]),
        (3, [2, 1], 64, [2, 1]),
        (3, [1], 64, [1, 1, 1]),
        (31, [32, 8, 1], 64, [8, 8, 8, 8]),
        (31, [32, 8, 1], 32, [32]),
        (75, [32, 8, 1], 128, [32, 32, 8, 1, 1, 1]),
    ],
)
def test_rows_of_calls(prompts: int, counts: list[int], size: int, calls: list[int]) -> None:
    """Rows without a prompt are fewer than those with one, and in small calls only."""
    assert rows_of_calls(prompts, counts, size) == calls


@pytest.mark.parametrize(
    ("size", "most", "tokens", "parameters", "counts"),
    [
        (64, 256, 8192, 135_000_000, [32, 8, 1]),
        (128, 256, 8192, 135_000_000, [32, 8, 1]),
        (256, 256, 8192, 135_000_000, [16, 8, 1]),  # 4,096 tokens are the most
        (512, 256, 8192, 135_000_000, [8, 1]),
        (128, 24, 8192, 135_000_000, [16, 8, 1]),
        (128, 5, 8192, 135_000_000, [4, 1]),
        (128, 256, 512, 135_000_000, [4, 1]),
        (128, 256, 8192, 1_900_000_000, [32, 8, 1]),
        (128, 256, 8192, 2_000_000_000, [8, 1]),  # 4.1e12 operations of eight prompts
        (64, 256, 8192, None, [8, 1]),
        (64, 1, 8192, 135_000_000, [1]),
        (8192, 256, 8192, 135_000_000, [1]),
    ],
)
def test_row_counts(
    size: int, most: int, tokens: int, parameters: int | None, counts: list[int]
) -> None:
    """More than eight only where those leave a GPU waiting."""
    assert row_counts(size, most, most_tokens=tokens, parameters=parameters) == counts


def test_many_rows_are_for_kernels(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = calls.llm.engine.runner
    monkeypatch.setattr(runner, "spec", dataclasses.replace(runner.spec, max_num_seqs=64))
    monkeypatch.setattr(runner, "chunk_size", 4096)
    assert runner.row_counts(64) == [8, 1]
    monkeypatch.setattr(runner, "backend", "mosaic")
    assert runner.row_counts(64) == [32, 8, 1]
    monkeypatch.setattr(runner, "num_parameters", 8_000_000_000)
    assert runner.row_counts(64) == [8, 1]


def test_many_prompts_in_a_call(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose kernels take all rows at once; numbers are those of the model."""
    counts = partial(row_counts, parameters=135_000_000)
    monkeypatch.setattr(
        ModelRunner, "row_counts", lambda self, size: counts(size, 40, most_tokens=4096)
    )
    calls = build("lserve", pattern, max_num_seqs=40, prefill_chunk_size=4096)
    prompts = random_prompts(8, [1 + n for n in range(41)])
    outputs = run(calls.llm, prompts, greedy(2))
    assert [rows for rows, _ in calls.take()] == [32, 8, 1]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_allclose(logprobs(output), expected(oracle(), prompt, tokens_of(output)), **ORACLE)
    check_nothing_left(calls.llm.engine)
