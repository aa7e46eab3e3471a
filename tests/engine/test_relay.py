"""Shared prefixes and relay: the same answers as without, from less work.

A request alone, with no prefix and no relay, is the standard; that one is held to the float64
oracle by test_lserve.py and test_engine.py. Models are tiny and random; caches hold NaN first.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lserve_cases import that_wants
from numpy.testing import assert_allclose
from oracle_model import Oracle, streaming_heads
from relay_cases import CONFIG, GATES, SIZES, Build, P, assert_same, prompts_with, run
from tiny_llm import (
    VOCAB,
    Generation,
    check_nothing_left,
    check_pages,
    expected,
    generate,
    poison,
    random_prompts,
    tiny_config,
    tiny_params,
    write_pattern,
)

import lserve_jax.engine.runner
from convert.head_shares import save_head_shares
from lserve_jax import LLM, SamplingParams, SparsityConfig

pytestmark = pytest.mark.usefixtures("all_slots")

# The engine.


@pytest.mark.parametrize("relay", ["always", "never"])
@pytest.mark.parametrize("shared", [0, 1, 63, 64, 65, 300])
def test_dense_with_a_prefix(shared: int, relay: str, build: Build) -> None:
    """Cold (computed here) and warm (held already), prefixes around page edges, one token and more
    of their own, a prompt equal to the prefix among them."""
    [prefix_ids] = random_prompts(1, [shared])
    prompts = prompts_with(prefix_ids, 2, [1, 63, 70, 5])
    if shared:
        prompts[1] = prefix_ids
    alone = generate(build("dense", relay="never"), prompts, 12)
    llm = build("dense", relay=relay)
    assert_same(run(llm, prompts, 12), alone)
    prefix = llm.prefix({"prompt_token_ids": prefix_ids})
    assert prefix.num_shared_tokens == shared // 64 * 64
    for _ in range(2):
        assert_same(run(llm, prompts, 12, prefix), alone)
    prefix.release()
    check_nothing_left(llm.engine)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])  # of whole bytes, and two in a byte
def test_codes_are_read_together(kv_dtype: str, build: Build) -> None:
    """As one by one, but for new keys that are rounded to another code: the sums differ."""
    [prefix_ids] = random_prompts(31, [130])
    prompts = prompts_with(prefix_ids, 32, [1, 40, 64])
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    settings = {"kv_dtype": kv_dtype, "prefill_chunk_size": 64}
    alone = build("dense", relay="never", **settings)
    llm = build("dense", relay="always", **settings)
    units = llm.engine.units
    for engine in (alone, llm):
        engine.prefix({"prompt_token_ids": prefix_ids})
    for one, other in zip(run(llm, prompts, 12), run(alone, prompts, 12), strict=True):
        assert one.tokens == other.tokens
        assert_allclose(one.logprobs, other.logprobs, atol=2e-2, rtol=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling)
    metrics = outputs[1].metrics
    assert metrics.relay_steps == metrics.decode_steps == 11
    # Of the 128 tokens that two or three read together its share, all of its own, in two heads.
    own = sum(170 - 128 + step for step in range(1, 12)) / 11
    read = metrics.kv_bytes_read_per_step / 2 / units.token
    assert 128 / 3 + own <= read + 1e-6 and read - 1e-6 <= 128 / 2 + own
    token = {"int8": 2 * (16 + 4), "int4": 2 * (8 + 8)}[kv_dtype]
    assert units.token == token


def test_long_prefix(build: Build) -> None:
    """4,000 tokens, private parts of 1 and more."""
    [prefix_ids] = random_prompts(3, [4000])
    prompts = prompts_with(prefix_ids, 4, [1, 33])
    settings = {"max_model_len": 4352, "prefill_chunk_size": 1024}
    alone = generate(build("dense", relay="never", **settings), prompts, 9)
    assert_same(run(build("dense", relay="always", **settings), prompts, 9), alone)


@pytest.mark.parametrize(("shared", "chunk"), [(P, 512), (40, 64), (304, 64), (304, 512)])
def test_lserve_by_selection_with_a_prefix(shared: int, chunk: int, build: Build) -> None:
    """Option B, per-request selection over prefix and private pages: the unshared algorithm.

    A chunk may be longer than the prefill window of 64 tokens, and a prompt be the prefix itself:
    it goes on from a page before the prefix's end, with the whole window of that place.
    """
    [prefix_ids] = random_prompts(5, [shared])
    prompts = prompts_with(prefix_ids, 6, [0, 17, 150, 64])
    alone = run(build(relay="never", prefill_chunk_size=chunk), prompts, 24)
    llm = build(relay="never", prefill_chunk_size=chunk)
    assert_same(run(llm, prompts, 24), alone)
    poison(llm)
    prefix = llm.prefix({"prompt_token_ids": prefix_ids})
    assert_same(run(llm, prompts, 24, prefix), alone)
    oracle = Oracle(
        CONFIG,
        tiny_params(CONFIG),
        sparsity=SparsityConfig(**SIZES),
        streaming=streaming_heads(GATES, 0.5),
    )
    assert_allclose(alone[2].logprobs, expected(oracle, prompts[2], alone[2].tokens), atol=2e-5)


def test_lserve_reading_the_prefix_together_is_dense_where_the_budget_lasts(build: Build) -> None:
    """Option A attends the whole prefix and private pages by selection. With a private part within
    the budget nothing of a retrieval head is pruned: as with a budget for everything."""
    [prefix_ids] = random_prompts(7, [300])
    prompts = prompts_with(prefix_ids, 8, [1, 17, 40, 30])
    llm = build(relay="always", prefill_chunk_size=1024)  # all begin in one step
    prefix = llm.prefix({"prompt_token_ids": prefix_ids})
    together = run(llm, prompts, 24, prefix)
    llm = build(relay="never")
    sparsity = SparsityConfig(
        pattern=llm.spec.sparsity.pattern, streaming_fraction=0.5, **SIZES | {"token_budget": 512}
    )
    unpruned = LLM(
        (CONFIG, tiny_params(CONFIG)),
        attention="lserve",
        sparsity=sparsity,
        max_model_len=512,
        max_num_seqs=4,
        prefill_chunk_size=64,
        relay="never",
    )
    assert_same(together, run(unpruned, prompts, 24))
    # Selection over everything (option B) prunes, so it differs.
    by_selection = run(llm, prompts, 24)
    assert any(
        np.abs(one.logprobs[: len(other.logprobs)] - other.logprobs).max() > 1e-3
        for one, other in zip(together, by_selection, strict=True)
    )


def test_shares_and_dense_heads_reading_the_prefix_together(tmp_path: Path) -> None:
    """Heads of the least share and dense ones: all of the prefix, and all of an own part that is
    within the least that a share lists. So they are dense attention, alone and in groups."""
    config = tiny_config(layers=2, kv_heads=3, group=2)
    shares = np.array([[1 / 128, 1.0, 1 / 64], [1.0, 1.0, 1.0]])
    path = write_pattern(tmp_path / "heads", np.ones((2, 3)))
    save_head_shares(path, that_wants(shares), shares, {})
    prefixes = random_prompts(20, [300, 170])
    prompts = prompts_with(prefixes[0], 21, [1, 64, 80]) + prompts_with(prefixes[1], 22, [33, 16])
    common = {"max_num_seqs": 8, "max_model_len": 512, "prefill_chunk_size": 1024}
    wanted = generate(LLM((config, tiny_params(config)), **common), prompts, 20)

    def of(relay: str) -> list[Generation]:
        sparsity = SparsityConfig(
            pattern=path, budget_share=1.0, streaming_fraction=0.0, page_size=16
        )
        settings = {"attention": "lserve", "sparsity": sparsity, "relay": relay}
        llm = LLM((config, tiny_params(config)), **settings, **common)
        poison(llm)
        for prefix in prefixes:
            llm.prefix({"prompt_token_ids": prefix})
        made = generate(llm, prompts, 20)
        assert (llm.engine.metrics().relay_bursts > 0) == (relay == "always")
        return made

    assert_same(of("always"), wanted)
    # One by one the same heads leave most of the prefix out.
    assert any(
        np.abs(one.logprobs[1] - other.logprobs[1]).max() > 1e-3
        for one, other in zip(of("never"), wanted, strict=True)
    )


def test_lserve_together_selects_among_private_pages(build: Build) -> None:
    """A private part beyond the budget: pages are counted as the rule says."""
    [prefix_ids] = random_prompts(9, [160])
    prompts = prompts_with(prefix_ids, 10, [200, 250, 230])
    llm = build(relay="always", prefill_chunk_size=1024)  # all begin in one step
    sampling = SamplingParams(temperature=0, max_tokens=17)
    prefix = llm.prefix({"prompt_token_ids": prefix_ids})
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling)
    prefix.release()
    for output in outputs:
        metrics = output.metrics
        assert output.num_cached_tokens == metrics.prefix_tokens == 160
        assert metrics.relay_steps == metrics.decode_steps == 16
        assert metrics.relay_reason == "relay='always'"
        assert metrics.selector_runs == 4
        # A retrieval head reads 10 pages of the prefix and 6 of its own, the newest of which is
        # not full; a streaming head 1 sink and 2 to 3 local pages.
        assert 10 + 5 + 3 <= 2 * metrics.pages_attended_per_step <= 17 + 4
        # A third of the prefix is its share of what was read. Statistics add a hundredth.
        token_bytes = 2 * CONFIG.head_dim * 4
        attended = metrics.pages_attended_per_step * 2 * P * token_bytes
        shared = attended - 160 * token_bytes * 2 / 3
        assert shared < metrics.kv_bytes_read_per_step < 1.05 * shared
    assert llm.engine.metrics().relay_bursts > 0
    assert llm.engine.metrics().prefix_tokens == 3 * 160


def test_several_prefixes_at_once(build: Build) -> None:
    """Requests of three prefixes and of none in one batch; each prefix has its own group."""
    heads = random_prompts(11, [100, 70, 200])
    prompts = [h + own for h in heads for own in random_prompts(len(h), [3, 20])]
    prompts += random_prompts(12, [90])
    alone = generate(build("dense", relay="never"), prompts, 10)
    llm = build("dense", relay="always", max_num_seqs=8, prefill_chunk_size=512)
    engine = llm.engine
    prefixes = [llm.prefix({"prompt_token_ids": h}) for h in heads]
    sampling = SamplingParams(temperature=0, max_tokens=10)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, sampling, seed=0)
    tokens: dict[str, list[int]] = {}
    groups = []
    for new in engine.stream():
        tokens.setdefault(new.request_id, []).extend(new.token_ids)
        groups.append([(d.prefix_tokens, d.requests) for d in engine.metrics().last_step.relay])
    assert [tokens[str(i)] for i in range(len(prompts))] == [made.tokens for made in alone]
    assert [(192, 2), (64, 2), (64, 2)] in groups, groups
    for prefix in prefixes:
        prefix.release()
    check_nothing_left(engine)


def test_the_same_prefix_twice(build: Build) -> None:
    """Computed once, held twice."""
    llm = build()
    [ids] = random_prompts(14, [70])
    one, other = (llm.prefix({"prompt_token_ids": ids}) for _ in "ab")
    assert one is other
    assert llm.engine.metrics().prompt_tokens == 64
    one.release()
    assert not other.is_released
    other.release()
    with pytest.raises(ValueError, match="is released already"):
        other.release()
    with pytest.raises(ValueError, match="is released"):
        run(llm, [ids], 3, one)


def test_a_prefix_lives_as_long_as_its_requests(build: Build) -> None:
    """Released while a request runs: its pages and sinks stay until that one ends."""
    [ids] = random_prompts(15, [96])
    [prompt] = prompts_with(ids, 16, [10])
    [alone] = run(build(relay="always"), [prompt], 30)
    llm = build(relay="never")
    prefix = llm.prefix({"prompt_token_ids": ids})
    engine = llm.engine
    sampling = SamplingParams(temperature=0, max_tokens=30)
    engine.add_request("a", prompt, sampling, seed=0)
    outputs = engine.step()
    prefix.release()
    check_pages(engine)
    other = llm.prefix({"prompt_token_ids": random_prompts(17, [96])[0]})
    assert not set(other.pages) & set(engine.scheduler.placed()[0].pages)
    outputs += [new for new in engine.stream()]
    assert [token for new in outputs for token in new.token_ids] == alone.tokens
    assert prefix.pages == []
    other.release()
    check_nothing_left(engine)


def test_a_prefix_added_while_a_prompt_is_prefilled(build: Build) -> None:
    """There is one prefill window: that prompt is finished first, and nobody's numbers change."""
    prompt, ids = random_prompts(18, [200, 100])
    [alone] = run(build(), [prompt], 12)
    llm = build()
    engine = llm.engine
    engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=12), seed=0)
    assert engine.step() == []
    prefix = engine.add_prefix(ids)
    outputs = [new for new in engine.stream()]
    assert [token for new in outputs for token in new.token_ids] == alone.tokens
    prefix.release()
    check_nothing_left(engine)


def test_a_prompt_ended_by_a_prefix(build: Build) -> None:
    """Its end is handed out, or not, if it is cancelled first."""
    prompt, ids = random_prompts(25, [200, 100])
    engine = build().engine
    sampling = SamplingParams(temperature=0, max_tokens=1)
    for name in ("a", "b"):
        engine.add_request(name, prompt, sampling, seed=0)
        engine.step()
        prefix = engine.add_prefix(ids)
        if name == "a":
            [new] = engine.stream()
            assert (new.request_id, new.finish_reason) == ("a", "length")
        else:
            engine.cancel("b")
            assert [new.finish_reason for new in engine.stream()] == ["cancelled"]
        prefix.release()
        check_nothing_left(engine)


def test_an_interrupted_prefix_leaves_nothing(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = build()
    ids, prompt = random_prompts(26, [200, 200])

    def interrupt(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lserve_jax.engine.runner, "prefill_chunks", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.prefix({"prompt_token_ids": ids})
    check_nothing_left(llm.engine)
    assert_same(run(llm, [ids + prompt], 5), run(build(), [ids + prompt], 5))


def test_errors_leave_held_prefixes(build: Build) -> None:
    llm = build()
    [ids] = random_prompts(27, [100])
    prefix = llm.prefix({"prompt_token_ids": ids})
    good = ({"prompt_token_ids": [*ids, 1]}, SamplingParams(max_tokens=20))
    bad = ({"prompt_token_ids": [VOCAB]}, SamplingParams())
    with pytest.raises(ValueError, match="outside the vocabulary"):
        list(llm.stream([good, bad]))
    closed = llm.stream([good, (good[0], SamplingParams(max_tokens=1))])
    next(closed)
    closed.close()
    assert not prefix.is_released
    check_nothing_left(llm.engine)
    [output] = llm.generate([good[0]], good[1])
    assert output.metrics.prefix_tokens == 96


def test_sharing_never_refuses_what_runs_alone(build: Build) -> None:
    """Equal prompts that fill the cache to its last page."""
    llm = build("dense", max_model_len=256, max_num_seqs=1, max_prefixes=1, kv_cache_bytes=65536)
    assert llm.spec.num_pages == 4
    sampling = SamplingParams(n=2, max_tokens=64, seed=0)
    [prompt] = random_prompts(28, [192])
    [output] = llm.generate({"prompt_token_ids": prompt}, sampling)
    assert [completion.metrics.prefix_tokens for completion in output.outputs] == [0, 128]
    check_nothing_left(llm.engine)


def test_prefixes_are_copies(build: Build) -> None:
    """Of what the caller gave and may change."""
    llm = build()
    ids = np.array(random_prompts(29, [100])[0], np.int32)
    prefix, before = llm.engine.add_prefix(ids), ids.tolist()
    ids[:] = 1
    assert prefix.token_ids.tolist() == before
    with pytest.raises(ValueError, match=r"prefix token id 1.5 must be an integer"):
        llm.engine.add_prefix([1.5, 2.0])
