"""Exact mode: whatever sparse steps draft, the answers are those of dense attention.

Heads rank, stream in drafts or read everything (``lserve_cases``), budgets are far below the
context, and caches begin full of NaN, so that drafts are often wrong and nothing stale may count.
"""

import dataclasses
from pathlib import Path
from typing import Any

import lserve_cases
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tiny_llm import poison, random_prompts, record_ends, sample_alike

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.costs import RequestCosts
from lserve_jax.engine.drafting import acceptance_of, expected_tokens

CASE = lserve_cases.CASES["shares"]
# Its layers with heads of every kind, without the one in which none ranks: every layer is compiled
# twice, in drafts and in their verification.
TWO_LAYERS = CASE._replace(
    config=dataclasses.replace(CASE.config, num_hidden_layers=2),
    gates=CASE.gates[::2],
    shares=CASE.shares[::2],
)
# The first of them, for tests whose question is not what lies between layers.
ONE_LAYER = CASE._replace(
    config=dataclasses.replace(CASE.config, num_hidden_layers=1),
    gates=CASE.gates[:1],
    shares=CASE.shares[:1],
    fraction=1 / 4,
)
# Two computations of the same float32 sums, of a token alone and of several.
SAME = {"atol": 2e-5, "rtol": 0}
LENGTHS = [700, 300, 65, 500, 128, 900]
# One decode program a way to sample, in place of one for every number of slots.
ALL_SLOTS = {"deterministic": True, "relay": "never"}


def build(directory: Path | None, case=TWO_LAYERS, **settings: Any) -> LLM:
    """Exact over the case's heads; dense without a directory."""
    if directory is not None:
        path = case.write(directory / "heads")
        sparse = {"attention": "lserve", "sparsity": case.sparsity(path), "exact": True}
        settings = sparse | settings
    settings = {"max_num_seqs": 4, "prefill_chunk_size": 64} | settings
    llm = LLM((case.config, case.params()), **settings)
    poison(llm)
    return llm


def answers(llm: LLM, prompts: list[list[int]], params: Any) -> list:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return [completion for output in outputs for completion in output.outputs]


GREEDY = SamplingParams(max_tokens=40, temperature=0.0)
DRAWN = SamplingParams(max_tokens=33, temperature=0.7, seed=5, top_p=0.9, logprobs=3)
STOPPED = SamplingParams(max_tokens=40, temperature=0.0, stop_token_ids=list(range(0, 96, 11)))
MIXED = [
    GREEDY,
    DRAWN,
    SamplingParams(max_tokens=9, temperature=1.0, seed=6, top_k=8, min_tokens=4),
    SamplingParams(max_tokens=40, temperature=0.0, repetition_penalty=1.3),
    SamplingParams(max_tokens=25, temperature=0.8, seed=7, n=2, frequency_penalty=0.5),
    STOPPED,
]
# Each combination of ways to sample in a batch is a program: few where those are not the question.
TWO_WAYS = [GREEDY, DRAWN, GREEDY, DRAWN, GREEDY, STOPPED]


@pytest.mark.parametrize(
    ("kv_dtype", "params", "case"),
    [("auto", MIXED, TWO_LAYERS), ("int4", TWO_WAYS, ONE_LAYER)],
    ids=["auto", "int4"],
)
def test_answers_are_those_of_dense_attention(
    tmp_path: Path,
    kv_dtype: Any,
    params: list[SamplingParams],
    case: lserve_cases.Case,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy and drawn, with filters, penalties, several completions and stop tokens, in a batch
    of mixed lengths that is longer than there are slots."""
    sample_alike(monkeypatch, params)
    settings = {"kv_dtype": kv_dtype, "case": case, **ALL_SLOTS}
    prompts = random_prompts(1, LENGTHS)
    dense = answers(build(None, **settings), prompts, params)
    llm = build(tmp_path, **settings)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    exact = [completion for output in outputs for completion in output.outputs]
    for wanted, got in zip(dense, exact, strict=True):
        assert got.token_ids == wanted.token_ids
        assert got.finish_reason == wanted.finish_reason
        # int4: a key that is rounded to the other code moves what attends it by 1e-3.
        tolerance = 1e-3 if kv_dtype == "auto" else 2e-2
        assert_allclose(got.cumulative_logprob, wanted.cumulative_logprob, rtol=0, atol=tolerance)
    drawn = [completion for completion in zip(dense, exact, strict=True)][1]
    for wanted, got in zip(drawn[0].logprobs, drawn[1].logprobs, strict=True):
        assert list(wanted) == list(got)
        difference = np.subtract([*wanted.values()], [*got.values()])
        assert np.abs(difference).max() < (2e-5 if kv_dtype == "auto" else 2e-3)
    # It did draft, and was wrong at times: else nothing above says anything.
    metrics = [output.metrics for output in outputs]
    drafted = sum(m.drafted_tokens for m in metrics)
    assert 0 < sum(m.confirmed_tokens for m in metrics) < drafted
    first = metrics[0]
    assert first.acceptance == first.confirmed_tokens / first.drafted_tokens
    assert first.tokens_per_verification > 1
    assert "acceptance" in first.draft_reason


def test_looked_up_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that repeat themselves; the answers are dense attention's all the same."""
    (base,) = random_prompts(1, [100])
    prompts = [base * 5, base * 3 + [1, 2, 3], base[:7] * 60, base[:1]]
    params = [
        SamplingParams(max_tokens=60, temperature=0.0),
        SamplingParams(max_tokens=40, temperature=0.3, seed=5),
        SamplingParams(max_tokens=60, temperature=0.0),
        SamplingParams(max_tokens=60, temperature=0.0),
    ]
    sample_alike(monkeypatch, MIXED)  # what dense attention has compiled for the test above
    wanted = answers(build(None, **ALL_SLOTS), prompts, params)
    llm = build(None, attention="lserve", exact=True, draft="ngram", **ALL_SLOTS)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    assert [o.outputs[0].token_ids for o in outputs] == [x.token_ids for x in wanted]
    assert sum(o.metrics.confirmed_tokens for o in outputs) > 0
    assert llm.memory_plan()["key_stats"] == 0  # nothing is ranked


def test_statistics_are_of_confirmed_tokens(tmp_path: Path) -> None:
    """kmax and kmin of every logical page, as if no draft had ever been wrong."""
    llm = build(tmp_path, CASE, max_num_seqs=1)
    ends = record_ends(llm)
    (prompt,) = random_prompts(3, [700])
    params = SamplingParams(max_tokens=70, temperature=0.0)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
    assert output.metrics.confirmed_tokens < output.metrics.drafted_tokens
    oracle = CASE.oracle()
    oracle.sparsity = None  # dense
    oracle.streaming = [[False] * 4 for _ in range(3)]
    tokens = output.outputs[0].token_ids
    oracle.prefill([*prompt, *tokens[:-1]])
    pages, _ = ends[0]
    for layer, heads in ((0, [1, 3]), (2, [0, 1, 2])):  # those that rank
        stats = llm.engine.runner.read_cache(layer).key_stats
        keys = oracle.keys[layer]
        for place, head in enumerate(heads):
            for first in range(0, len(keys), 16):
                got = stats[place, pages[first // 64], first % 64 // 16]
                page = keys[first : first + 16, head]
                wanted = np.stack([page.max(axis=0), page.min(axis=0)])
                assert_allclose(got, wanted, atol=1e-4)
    assert llm.engine.runner.read_cache(1).key_stats is None  # in layer 1 no head ranks


def test_prefixes_preemption_and_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pages, so that requests are preempted and begin again; half of them share a prefix."""
    sample_alike(monkeypatch, MIXED)
    prefix, *rest = random_prompts(4, [192, 100, 200, 300, 50])
    prompts = [prefix + rest[0], prefix + rest[1], rest[2], prefix + rest[3]]
    params = SamplingParams(max_tokens=60, temperature=0.9, seed=3)
    page_bytes = 2 * 4 * 2 * 64 * 16 * 4 + 5 * 4 * 2 * 16 * 4
    small = {"kv_cache_bytes": 10 * page_bytes, "burst_steps": 8, "max_num_seqs": 2}
    wanted = answers(build(None, **ALL_SLOTS), prompts, params)
    llm = build(tmp_path, **small)
    held = llm.prefix({"prompt_token_ids": prefix})
    got = answers(llm, prompts, params)
    held.release()
    assert [x.token_ids for x in got] == [x.token_ids for x in wanted]
    assert llm.engine.metrics().preemptions > 0


def test_up_to_the_last_position(tmp_path: Path) -> None:
    """Drafts reach past the end of what there is room for; nothing may be written there."""
    max_len = 448  # whole pages: the place behind them is another sequence's
    prompts = random_prompts(5, [400, 440, 447, 433])
    params = [SamplingParams(max_tokens=max_len - len(p), temperature=0.0) for p in prompts]
    settings = {"case": ONE_LAYER, "max_model_len": max_len, **ALL_SLOTS}
    wanted = answers(build(None, **settings), prompts, params)
    got = answers(build(tmp_path, **settings), prompts, params)
    assert [x.token_ids for x in got] == [x.token_ids for x in wanted]


def test_scoring_is_that_of_dense_attention(tmp_path: Path) -> None:
    from lserve_jax.engine.scoring import score

    prompts, continuations = random_prompts(6, [500, 70]), random_prompts(7, [20, 33])
    wanted = score(build(None, ONE_LAYER).engine, prompts, continuations)
    got = score(build(tmp_path, ONE_LAYER).engine, prompts, continuations)
    for a, b in zip(wanted, got, strict=True):
        assert_allclose(b.logprobs, a.logprobs, **SAME)
        assert_array_equal(b.likeliest, a.likeliest)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exact": True}, "exact=True needs attention='lserve', got 'dense'"),
        ({"exact": True, "attention": "lserve", "relay": "always"}, "cannot have relay='always'"),
        ({"exact": 1, "attention": "lserve"}, "exact"),
        ({"draft": "ngram", "attention": "lserve"}, "draft='ngram' needs exact=True"),
        ({"draft": "none", "attention": "lserve", "exact": True}, "draft='none' must be"),
        ({"max_draft_tokens": 0}, r"max_draft_tokens=0 must lie in \[1, 15\]"),
        ({"max_draft_tokens": 16}, r"max_draft_tokens=16 must lie in \[1, 15\]"),
    ],
)
def test_refusals(settings: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        LLM((CASE.config, CASE.params()), **settings)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_acceptance_is_found_again(acceptance: float) -> None:
    """From the tokens that rounds of five drafts make on average."""
    rounds = 10_000
    confirmed = round(rounds * (expected_tokens(acceptance, 5) - 1))
    costs = RequestCosts(judging=rounds, drafted=5 * rounds, confirmed=confirmed)
    assert acceptance_of(costs, 5) == pytest.approx(acceptance, abs=1e-3)


def test_expected_tokens() -> None:
    """The sum of a geometric series, against its closed form."""
    assert expected_tokens(0.9, 4) == pytest.approx((1 - 0.9**5) / 0.1)
    assert expected_tokens(1.0, 3) == 4
    assert expected_tokens(0.5, 0) == 1
