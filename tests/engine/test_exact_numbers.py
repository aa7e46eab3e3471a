"""Exact mode under any schedule: the answers, and what metrics say of drafts, reads and rounds."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_exact import ALL_SLOTS, CASE, answers, build
from tiny_llm import check_nothing_left, random_prompts, write_pattern

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.analysis import page_recall
from lserve_jax.engine import engine as engine_module
from lserve_jax.engine.costs import RequestCosts
from lserve_jax.engine.draft_times import DraftTimes
from lserve_jax.engine.drafting import PRIOR_ACCEPTANCE, acceptance_of
from lserve_jax.engine.inputs import BurstInputs
from lserve_jax.engine.metrics import DraftDecision
from lserve_jax.engine.state import Burst


def draft_as(monkeypatch: pytest.MonkeyPatch, count: Any) -> None:
    """Every request drafts ``count(most)`` tokens in its next burst, whatever pays."""

    def decide_all(requests, runner, *_) -> dict[int, DraftDecision] | None:
        most = runner.spec.max_drafts
        if most is None:
            return None
        return {slot: DraftDecision(drafts=count(most), reason="") for slot, _ in requests}

    monkeypatch.setattr(engine_module, "decide_all", decide_all)


@pytest.mark.parametrize("draft", ["sparse", "ngram"])
def test_drafts_come_and_go(draft: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of drafts in every burst, none for a while, and requests that are taken out
    in the middle of bursts: the others' answers are dense attention's, and so are beginnings."""
    rng = np.random.default_rng(8)
    settings = {"burst_steps": 5, "max_model_len": 384, "max_num_seqs": 3, **ALL_SLOTS}
    prompts = random_prompts(9, [127, 1, 64, 200, 2, 65, 15, 300])
    prompts[3] = prompts[3][:9] * 30  # looked up; longer than its slot's next owners
    prompts[6] = [0] * 17
    params = [  # of one kind, so that one program runs them; 0.01 is as good as greedy
        SamplingParams(max_tokens=30, temperature=t, seed=i, repetition_penalty=1.1)
        for i, t in enumerate([0.01, 0.8, 0.01, 0.01, 1.0, 0.01, 0.01, 0.6])
    ]
    wanted = [x.token_ids for x in answers(build(None, **settings), prompts, params)]
    draft_as(monkeypatch, lambda most: int(rng.choice([0, 0, 1, 3, most])))
    if draft == "ngram":
        llm = build(None, attention="lserve", exact=True, draft=draft, **settings)
    else:
        llm = build(tmp_path, **settings)
    engine, got, cut = llm.engine, {str(i): [] for i in range(len(prompts))}, {"2", "5"}
    for i, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), prompt, sampling, seed=0)
    while engine.has_unfinished_requests:
        for output in engine.step():
            got[output.request_id] += output.token_ids
        for name in cut & set(engine.unfinished):
            if len(got[name]) > 8:
                engine.cancel(name)
    check_nothing_left(engine)
    for i, tokens in enumerate(wanted):
        length = len(got[str(i)])
        assert length == len(tokens) or (str(i) in cut and length > 8)
        assert got[str(i)] == tokens[:length]


class Inattentive(type(CASE)):
    """The same heads, but what they attend hardly counts, so that every draft is right."""

    def params(self) -> dict:
        params = super().params()
        for layer in params["layers"].values():
            layer["self_attn"]["o_proj"]["kernel"] *= 1e-3
        return params


def test_what_a_round_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of three drafts that are all confirmed, counted by hand."""
    draft_as(monkeypatch, lambda most: 3)
    llm = build(tmp_path, Inattentive(*CASE), max_num_seqs=1)
    P, token = 700, 2 * 16 * 4
    (prompt,) = random_prompts(1, [P])
    params = SamplingParams(max_tokens=5, temperature=0.0)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
    metrics = output.metrics
    assert metrics.verifications == 1
    assert (metrics.drafted_tokens, metrics.confirmed_tokens) == (3, 3)
    assert (metrics.decode_steps, metrics.selector_runs, metrics.bypassed_steps) == (4, 1, 0)
    assert metrics.tokens_per_verification == 4
    # Ranked heads of the case, by what they list of 44 pages of 16 tokens; five that stream list
    # 4 + 4 pages and three are dense. Each lists the page of the newest token, of 12 tokens, too.
    shares = [1 / 128, 3 / 8, 3 / 16, 1 / 4, 3 / 8]
    pages = [max(math.floor(44 * share + 0.5), 8) - 1 for share in shares]
    drafts = 0
    for position in (700, 701, 702):
        tail = position - 43 * 16 + 1
        drafts += sum(16 * count + tail for count in pages) + 4 * (16 * 8 + tail)
        drafts += 3 * (position + 1)
    verified = 12 * (P + 4)
    assert metrics.pages_attended_per_step == pytest.approx((drafts + verified) / 4 / 12 / 64)
    statistics = 11 * 4 * len(shares) * 2 * 16 * 4  # 11 pages of four logical ones
    read = ((drafts + verified) * token + statistics) / 4
    assert metrics.kv_bytes_read_per_step == pytest.approx(read)
    dense = 12 * token * np.mean([701, 702, 703, 704])
    assert metrics.dense_kv_bytes_read_per_step == pytest.approx(dense)


def test_looked_up_drafts_select_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_as(monkeypatch, lambda most: most)
    llm = build(None, attention="lserve", exact=True, draft="ngram", **ALL_SLOTS)
    (base,) = random_prompts(1, [50])
    params = SamplingParams(max_tokens=30, temperature=0.01)  # runs what test_exact has compiled
    (output,) = llm.generate([{"prompt_token_ids": base * 4}], params)
    metrics = output.metrics
    assert metrics.drafted_tokens > 0
    assert (metrics.selector_runs, metrics.bypassed_steps) == (0, metrics.decode_steps)


def test_replays_say_nothing_of_acceptance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that come again after a preemption are known: no draft of theirs counts."""
    draft_as(monkeypatch, lambda most: most)
    # Of max_model_len 448, as in test_exact, which has compiled what runs.
    llm = build(tmp_path, burst_steps=16, max_model_len=448, **ALL_SLOTS)
    (prompt,) = random_prompts(2, [300])
    engine, sampling = llm.engine, SamplingParams(max_tokens=65, temperature=0.0)
    engine.add_request("a", prompt, sampling, seed=0)
    request = engine.unfinished["a"]
    while len(request.tokens) < 17:
        engine.step()
    engine._collect()  # as where pages run out: who loses them must have all its tokens
    done = list(request.tokens)
    costs = dataclasses.replace(request.costs)
    assert len(done) == 33 and 0 < costs.confirmed < costs.drafted
    engine.runner.stop(request.slot)
    engine.scheduler._preempt(request)
    engine.step()  # it is admitted again
    while request.received < len(done):
        engine.step()
    assert request.tokens == done
    assert request.costs.verified > costs.verified
    for name in ("rounds", "judging", "drafted", "confirmed"):
        assert getattr(request.costs, name) == getattr(costs, name)
    while engine.has_unfinished_requests:
        engine.step()
    assert request.costs.drafted > costs.drafted


def test_an_engine_gives_up_drafts_that_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a burst with drafts takes a hundred times as long as one without.

    By bytes drafts that are looked up always pay.
    """
    settings = {"burst_steps": 4, "max_num_seqs": 1, "max_model_len": 704, "relay": "never"}
    llm = build(None, attention="lserve", exact=True, draft="ngram", **settings)
    dense = build(None, **settings)
    engine, decode = llm.engine, llm.engine.runner.decode
    now, running = [0.0], []

    def decoded(inputs: BurstInputs) -> Burst:
        running.append(1.0 if inputs.drafts is not None and inputs.drafts.any() else 0.01)
        return decode(inputs)

    def is_ready(_: jax.Array) -> bool:  # asked once a burst, when it is fetched
        now[0] += running.pop(0)
        return False

    monkeypatch.setattr(engine.runner, "decode", decoded)
    monkeypatch.setattr(type(jnp.zeros(())), "is_ready", is_ready)
    monkeypatch.setattr(engine, "clock", lambda: now[0])
    monkeypatch.setattr(engine, "_draft_times", DraftTimes(lambda: now[0]))
    (prompt,) = random_prompts(4, [300])
    params = SamplingParams(max_tokens=400, temperature=0.0)
    [output] = llm.generate([{"prompt_token_ids": prompt}], params)
    metrics = output.metrics
    assert "no draft pays: by the bursts before" in metrics.draft_reason
    # Bursts of four tokens, the first with drafts, and few of the others.
    assert 0 < metrics.drafted_tokens < 100
    monkeypatch.undo()
    assert output.outputs[0].token_ids == answers(dense, [prompt], params)[0].token_ids


def test_rounds_without_drafts_say_nothing_of_acceptance() -> None:
    """What a request is thought to confirm stays, however long none of its drafts paid."""
    costs = RequestCosts(verified=10_000)
    assert acceptance_of(costs, 7) == pytest.approx(PRIOR_ACCEPTANCE, abs=1e-5)
    with_some = RequestCosts(verified=50, judging=50, drafted=350, confirmed=100)
    with_more = RequestCosts(verified=5000, judging=50, drafted=350, confirmed=100)
    assert acceptance_of(with_some, 7) == acceptance_of(with_more, 7)


def test_saved_prefixes_of_other_policies(tmp_path: Path) -> None:
    """The same head streams in both drafts, but in one of them another ranks: refused by name.

    A prefix of the same heads with other budgets is right, bit for bit.
    """
    (ids,) = random_prompts(5, [200])
    params = SamplingParams(max_tokens=8, temperature=0.0)

    def of(name: str, gates: list, **settings: Any) -> LLM:
        sizes = dict(CASE.sizes) | {"token_budget": 128, "head_shares": None} | settings
        path = write_pattern(tmp_path / name, gates)
        sparsity = SparsityConfig(pattern=path, **sizes)
        return LLM(
            (CASE.config, CASE.params()),
            attention="lserve",
            sparsity=sparsity,
            exact=True,
            max_num_seqs=1,
            prefill_chunk_size=64,
        )

    gates = [[0.9, 0.9, 0.9, 0.1]] * 3
    first = of("one", gates, streaming_fraction=0.25)
    prefix = first.prefix({"prompt_token_ids": ids})
    prefix.save(tmp_path / "prefix")
    wanted = first.generate([{"prompt_token_ids": [*ids, 1, 2]}], params)[0].outputs[0]
    same = of("one", gates, streaming_fraction=0.25, token_budget=512)
    same.load_prefix(tmp_path / "prefix")
    (output,) = same.generate([{"prompt_token_ids": [*ids, 1, 2]}], params)
    assert output.outputs[0].token_ids == wanted.token_ids
    assert output.metrics.prefix_tokens == 192
    # No head moves, so that the weights are the same; more heads stream.
    other = of("two", [[0.9, 0.9, 0.1, 0.1]] * 3, streaming_fraction=0.5)
    with pytest.raises(ValueError, match="made with another number of ranked heads"):
        other.load_prefix(tmp_path / "prefix")
    # As many of each kind, but others: heads lie in another order.
    other = of("three", [[0.1, 0.9, 0.9, 0.9]] * 3, streaming_fraction=0.25)
    with pytest.raises(ValueError, match="made with another model"):
        other.load_prefix(tmp_path / "prefix")


def test_page_recall_is_that_of_drafts(tmp_path: Path) -> None:
    """Heads that stream in drafts cover their windows, though their pages are all there."""
    (ids,) = random_prompts(6, [400])
    exact = build(tmp_path, max_num_seqs=1)
    sparse = build(tmp_path, max_num_seqs=1, exact=False)
    got, wanted = (
        page_recall(llm, {"prompt_token_ids": ids}, num_queries=8) for llm in (exact, sparse)
    )
    streaming = ~np.repeat(wanted.is_retrieval, CASE.config.group_size, axis=1)
    assert wanted.mean[streaming].max() < 1
    np.testing.assert_allclose(got.recall, wanted.recall, atol=1e-6)
