"""Shared prefixes and relay: the same answers as without, from less work.

A request alone, with no prefix and no relay, is the standard; that one is held to the float64
oracle by test_lserve.py and test_engine.py. Models are tiny and random; caches hold NaN first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import Oracle, streaming_heads
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
from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.attention.cache import make_spec
from lserve_jax.engine.prefix import CommonPrefix
from lserve_jax.engine.relay import LEAST_SAVED_BYTES, decide
from pallas_kernels import api

P = 16
CONFIG = tiny_config(layers=2, kv_heads=2, group=2, max_len=4608)
GATES = [[0.2, 0.9], [0.8, 0.7]]
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


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    pattern = write_pattern(tmp_path_factory.mktemp("patterns") / "p", GATES)

    def build(attention: str = "lserve", **settings: Any) -> LLM:
        settings = {
            "max_num_seqs": 4,
            "prefill_chunk_size": 64,
            "burst_steps": 8,
            "max_model_len": 512,
            "max_prefixes": 3,
        } | settings
        sparsity = None
        if attention == "lserve":
            sparsity = SparsityConfig(pattern=pattern, streaming_fraction=0.5, **SIZES)
        llm = LLM((CONFIG, tiny_params(CONFIG)), attention=attention, sparsity=sparsity, **settings)
        poison(llm)
        return llm

    return build


def prompts_with(prefix: list[int], seed: int, lengths: list[int]) -> list[list[int]]:
    return [prefix + own for own in random_prompts(seed, lengths)]


def run(llm: LLM, prompts: list[list[int]], tokens: int, shared_prefix: Any) -> list[Generation]:
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


# The op: any split of a context into a prefix and a private part.


@pytest.mark.parametrize("total", [2, 17, 300, 4096])
def test_any_split_is_whole_attention(total: int) -> None:
    """prefix_attention over S tokens joined with the rest, S from 0 to all but one."""
    rng = np.random.default_rng(total)
    K, G, D, B = 2, 2, 16, 3
    count = -(-total // P)

    def pool(seed: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).standard_normal((K, count, P, D)), "float32")

    pages = api.KVPages(pool(1), pool(2))
    nothing = jax.tree.map(lambda x: x[:0], pages)
    table = jnp.asarray(rng.permutation(count), jnp.int32)
    q = jnp.asarray(rng.standard_normal((B, K * G, D)) * 3, jnp.float32)

    def private(start: int) -> tuple[jax.Array, jax.Array]:
        ids = jnp.broadcast_to(table, (B, 1, count))
        bounds = [jnp.full((B, 1), x, jnp.int32) for x in (start, total)]
        empty = api.PageList(ids[:, :, :1], bounds[0] * 0, bounds[0] * 0)
        return api.paged_attention(q, pages, nothing, api.PageList(ids, *bounds), empty)

    k, v = (np.asarray(x[:, table], np.float64).reshape(K, -1, D)[:, :total] for x in pages[:2])
    scores = np.einsum("bkgd,ktd->bkgt", np.asarray(q, np.float64).reshape(B, K, G, D), k) / 4
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    whole = np.einsum("bkgt,ktd->bkgd", weights, v) / weights.sum(axis=-1)[..., None]
    edges = {0, 1, P - 1, P, P + 1, total // 2, total - P, total - 1}
    for split in sorted(s for s in edges if 0 <= s < total):
        out, lse = api.prefix_attention(q, pages, table, jnp.int32(split))
        own, own_lse = private(split)
        merged, _ = api.merge_attention(jnp.stack([out, own]), jnp.stack([lse, own_lse]))
        assert_allclose(merged.reshape(B, K, G, D), whole, **SAME)


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
    assert_same(run(llm, prompts, 12, "auto"), alone)
    prefix = llm.prefix({"prompt_token_ids": prefix_ids})
    assert prefix.num_shared_tokens == shared // 64 * 64
    for _ in range(2):
        assert_same(run(llm, prompts, 12, prefix), alone)
    prefix.release()
    check_nothing_left(llm.engine)
    assert len(llm.engine.scheduler.pool.free) == llm.spec.num_pages


def test_long_prefix(build: Build) -> None:
    """4,000 tokens, private parts of 1 and more."""
    [prefix_ids] = random_prompts(3, [4000])
    prompts = prompts_with(prefix_ids, 4, [1, 33])
    settings = {"max_model_len": 4352, "prefill_chunk_size": 1024}
    alone = generate(build("dense", relay="never", **settings), prompts, 9)
    assert_same(run(build("dense", relay="always", **settings), prompts, 9, "auto"), alone)


@pytest.mark.parametrize("chunk", [64, 512])
@pytest.mark.parametrize("shared", [P, 40, 304])
def test_lserve_by_selection_with_a_prefix(shared: int, chunk: int, build: Build) -> None:
    """Option B, per-request selection over prefix and private pages: the unshared algorithm.

    A chunk may be longer than the prefill window of 64 tokens, and a prompt be the prefix itself:
    it goes on from a page before the prefix's end, with the whole window of that place.
    """
    [prefix_ids] = random_prompts(5, [shared])
    prompts = prompts_with(prefix_ids, 6, [0, 17, 150, 64])
    alone = run(build(relay="never", prefill_chunk_size=chunk), prompts, 24, "off")
    llm = build(relay="never", prefill_chunk_size=chunk)
    assert_same(run(llm, prompts, 24, "auto"), alone)
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
    together = run(build(relay="always"), prompts, 24, "auto")
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
    assert_same(together, run(unpruned, prompts, 24, "off"))
    # Selection over everything (option B) prunes, so it differs.
    by_selection = run(llm, prompts, 24, "auto")
    assert any(
        np.abs(one.logprobs[: len(other.logprobs)] - other.logprobs).max() > 1e-3
        for one, other in zip(together, by_selection, strict=True)
    )


def test_lserve_together_selects_among_private_pages(build: Build) -> None:
    """A private part beyond the budget: pages are counted as the rule says."""
    [prefix_ids] = random_prompts(9, [160])
    prompts = prompts_with(prefix_ids, 10, [200, 250, 230])
    llm = build(relay="always", prefill_chunk_size=1024)  # all begin in one step
    sampling = SamplingParams(temperature=0, max_tokens=17)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling)
    for output in outputs:
        metrics = output.metrics
        assert metrics.prefix_tokens == 160
        assert metrics.relay_steps == metrics.decode_steps == 16
        assert metrics.relay_reason == "relay='always'"
        assert metrics.selector_runs == 4
        # Two retrieval heads read 10 pages of the prefix and 6 of their own, the newest of which
        # are not full; two streaming heads 1 sink and 2 to 3 local pages.
        assert 2 * (10 + 5) + 2 * 3 <= 4 * metrics.pages_attended_per_step <= 2 * 17 + 2 * 4
        # A third of the prefix is its share of what was read. Statistics add a hundredth.
        token_bytes = 2 * CONFIG.head_dim * 4
        attended = metrics.pages_attended_per_step * 4 * P * token_bytes
        shared = attended - 2 * 160 * token_bytes * 2 / 3
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
    assert [(64, 2), (64, 2), (192, 2)] in groups, groups
    with pytest.raises(ValueError, match="3 prefixes are held already"):
        llm.prefix({"prompt_token_ids": random_prompts(13, [70])[0]})
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
    [alone] = run(build(relay="always"), [prompt], 30, "off")
    llm = build(relay="never")
    prefix = llm.prefix({"prompt_token_ids": ids})
    engine = llm.engine
    sampling = SamplingParams(temperature=0, max_tokens=30)
    engine.add_request("a", prompt, sampling, seed=0)
    outputs = engine.step()
    prefix.release()
    check_pages(engine)
    other = llm.prefix({"prompt_token_ids": random_prompts(17, [96])[0]})
    assert other.index != prefix.index
    outputs += [new for new in engine.stream()]
    assert [token for new in outputs for token in new.token_ids] == alone.tokens
    assert prefix.index == -1
    other.release()
    check_nothing_left(engine)


def test_a_prefix_added_while_a_prompt_is_prefilled(build: Build) -> None:
    """There is one prefill window: that prompt is finished first, and nobody's numbers change."""
    prompt, ids = random_prompts(18, [200, 100])
    [alone] = run(build(), [prompt], 12, "off")
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
            assert list(engine.stream()) == []
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
        patch.setattr(lserve_jax.engine.runner, "prefill_chunk", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.prefix({"prompt_token_ids": ids})
    check_nothing_left(llm.engine)
    assert len(llm.engine.scheduler.pool.free) == llm.spec.num_pages
    assert_same(run(llm, [ids + prompt], 5, "off"), run(build(), [ids + prompt], 5, "off"))


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
    llm = build("dense", max_model_len=256, max_num_seqs=1, max_prefixes=1, kv_cache_bytes=131072)
    assert llm.spec.num_pages == 4
    sampling = SamplingParams(n=2, max_tokens=64, seed=0)
    [prompt] = random_prompts(28, [192])
    [output] = llm.generate({"prompt_token_ids": prompt}, sampling)
    assert output.metrics.prefix_tokens == 128
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


# Saved prefixes.


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("attention", ["dense", "lserve"])
def test_save_and_load(attention: str, kv_dtype: str, build: Build, tmp_path: Path) -> None:
    """In another engine, on other pages, bit for bit the same."""
    [ids] = random_prompts(19, [130])
    prompts = prompts_with(ids, 20, [9, 40])
    path = tmp_path / "prefix.safetensors"
    first = build(attention, kv_dtype=kv_dtype)
    prefix = first.prefix({"prompt_token_ids": ids})
    prefix.save(path)
    wanted = run(first, prompts, 12, prefix)
    second = build(attention, kv_dtype=kv_dtype)
    second.prefix({"prompt_token_ids": random_prompts(21, [70])[0]})  # takes the first pages
    loaded = second.load_prefix(path)
    assert loaded.pages != prefix.pages
    assert second.engine.metrics().prompt_tokens == 64
    for one, other in zip(run(second, prompts, 12, loaded), wanted, strict=True):
        assert one.tokens == other.tokens
        assert_array_equal(one.logprobs, other.logprobs)


def test_a_saved_prefix_without_a_page_and_one_loaded_twice(build: Build, tmp_path: Path) -> None:
    llm = build()
    for length in (0, 5, 40):
        llm.prefix({"prompt_token_ids": [7] * length}).save(tmp_path / "prefix")
        other = build()
        one, again = (other.load_prefix(tmp_path / "prefix") for _ in "ab")
        assert one.num_shared_tokens == length // P * P
        assert (one is again) == (length >= P)
        check_pages(other.engine)


def test_files_that_do_not_fit(build: Build, tmp_path: Path) -> None:
    llm = build()
    path = tmp_path / "prefix.safetensors"
    llm.prefix({"prompt_token_ids": random_prompts(22, [130])[0]}).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    free = len(llm.engine.scheduler.pool.free)
    with pytest.raises(ValueError, match=r"prefix\.safetensors' is broken"):
        llm.load_prefix(path)
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match="is broken: its digest does not match"):
        llm.load_prefix(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is broken"):
        llm.load_prefix(path)
    with pytest.raises(ValueError, match="does not exist"):
        llm.load_prefix(tmp_path / "none")
    assert len(llm.engine.scheduler.pool.free) == free
    path.write_bytes(whole)
    other = build()
    other.engine.runner.params = tiny_params(CONFIG, seed=1)
    for wrong, part in (
        (build("dense"), "page size"),
        (build(kv_dtype="int8"), "kv_dtype"),
        (other, "model"),
    ):
        with pytest.raises(ValueError, match=f"made with another {part}"):
            wrong.load_prefix(path)
        check_nothing_left(wrong.engine)


def test_prefixes_that_are_refused(build: Build) -> None:
    llm = build(kv_cache_bytes=40_000)
    pages = llm.spec.num_pages
    with pytest.raises(ValueError, match="600 tokens, more than max_model_len=512"):
        llm.prefix({"prompt_token_ids": [1] * 600})
    with pytest.raises(ValueError, match=f"token id {VOCAB} is outside the vocabulary"):
        llm.prefix({"prompt_token_ids": [1, VOCAB]})
    with pytest.raises(ValueError, match=rf"needs 32 pages of 16 tokens, {pages} of {pages} are"):
        llm.prefix({"prompt_token_ids": [1] * 512})
    llm.engine.add_request("a", [1] * 60, SamplingParams(max_tokens=9), seed=0)
    with pytest.raises(ValueError, match=r"would leave .; request 'a' can need 5"):
        llm.prefix({"prompt_token_ids": [2] * 16 * (pages - 4)})
    list(llm.engine.stream())
    held = llm.prefix({"prompt_token_ids": [2] * 16 * (pages - 4)})
    with pytest.raises(ValueError, match=f"the request needs 5 pages .* has {pages}, .* held by"):
        llm.generate({"prompt_token_ids": [1] * 60}, SamplingParams(max_tokens=9))
    with pytest.raises(ValueError, match=r"prompt 1 does not begin with the prefix.*at token 2"):
        prompts = [{"prompt_token_ids": [2] * 100}, {"prompt_token_ids": [2, 2, 3]}]
        llm.generate(prompts, shared_prefix=held)
    with pytest.raises(ValueError, match="shared_prefix='on' must be 'auto', 'off' or a Prefix"):
        llm.generate({"prompt_token_ids": [1]}, shared_prefix="on")
    check_pages(llm.engine)


def test_common_prefix() -> None:
    for prompts, page_size, shared in (
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 9]], 2, [1, 2, 3, 4]),
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3]], 1, [1, 2]),
        ([[1, 2, 3], [1, 2]], 2, []),  # the second would have nothing left to run
        ([[1, 2, 3], [2, 2, 3]], 2, []),
        ([[1, 2, 3]], 1, [1, 2]),
        ([[1, 2, 3], []], 1, []),
    ):
        common = CommonPrefix()
        for prompt in prompts:
            common.add(prompt)
        assert common.whole_pages(page_size) == shared
        assert common.count == len(prompts)


# When relay is used.


def spec_of(sparsity: SparsityConfig | None):
    return make_spec(
        CONFIG,
        sparsity=sparsity,
        num_retrieval_heads=(2, 2),
        max_model_len=1 << 17,
        max_num_seqs=8,
        num_pages=1,
        max_prefixes=1,
        kv_dtype="auto",
    )


def test_break_even() -> None:
    """The smallest number of requests for which the rule says yes, beside the bytes of 8.3."""

    def least(
        sparsity: SparsityConfig | None, prefix: int, private: int, kv_heads: int = 8
    ) -> int | None:
        for requests in range(1, 300):
            decision = decide(
                "auto",
                spec_of(sparsity),
                token_bytes=kv_heads * 2 * 128 * 2,  # of Llama-3-8B
                prefix_tokens=prefix,
                private_tokens=private,
                requests=requests,
            )
            if decision.used:
                return requests
        return None

    # Dense: (B - 1) S tokens saved, whatever the private part.
    assert LEAST_SAVED_BYTES == 32768 * 4096
    assert least(None, 2048, 100_000) == 17
    assert least(None, 8192, 256) == 5
    assert least(None, 32768, 256) == 2
    assert least(None, 64, 256) is None
    assert least(None, 8192, 256, kv_heads=2) == 17
    lserve = SparsityConfig()  # budget 4096
    # B (4096 - 256) - S; by bytes alone 2.1, 8.5 and 34.1 requests.
    assert least(lserve, 8192, 256) == 11
    assert least(lserve, 32768, 256) == 18
    assert least(lserve, 131072, 256) == 43
    assert least(lserve, 8192, 4096) is None
    assert least(lserve, 2048, 1024) == 17  # fits the budget: as in dense attention


def test_auto_says_why_not(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    token_bytes = 2 * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
    monkeypatch.setattr("lserve_jax.engine.relay.LEAST_SAVED_BYTES", 900 * token_bytes)
    [ids] = random_prompts(23, [320])
    prompts = prompts_with(ids, 24, [5, 6, 7])
    llm = build("dense", relay="auto", prefill_chunk_size=512)  # all begin in one step
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], SamplingParams(temperature=0, max_tokens=6)
    )
    saved, least = (f"{tokens * token_bytes / 2**20:,.1f} MiB" for tokens in (640, 900))
    assert outputs[0].metrics.relay_reason == f"it would save {saved} a layer < {least}"
    assert outputs[0].metrics.relay_steps == 0
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in [*prompts, prompts[0]]],
        SamplingParams(temperature=0, max_tokens=6),
    )
    assert outputs[0].metrics.relay_steps == 5
    [alone] = llm.generate({"prompt_token_ids": prompts[0]}, SamplingParams(max_tokens=3))
    assert alone.metrics.relay_reason == "no prefix"


def test_settings_that_contradict_each_other() -> None:
    model = (CONFIG, tiny_params(CONFIG))
    with pytest.raises(ValueError, match="relay='sometimes' must be"):
        LLM(model, relay="sometimes")
    with pytest.raises(ValueError, match=r"=True needs relay in \('never', 'always'\)"):
        LLM(model, deterministic=True)
    with pytest.raises(ValueError, match=r"deterministic=True needs relay in \('never',\)"):
        LLM(model, deterministic=True, relay="always", attention="lserve")
    with pytest.raises(ValueError, match="max_prefixes=-1 must not be negative"):
        LLM("no-such-model", max_prefixes=-1)
    with pytest.raises(ValueError, match=r"memory_fraction=1\.5 must lie in \(0, 1\]"):
        LLM(model, memory_fraction=1.5)
