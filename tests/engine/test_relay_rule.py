"""RelayAttention's arithmetic, and the rule by which it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budgets import budgets_of
from numpy.testing import assert_allclose
from relay_cases import CONFIG, SAME, Build, P, prompts_with
from tiny_llm import (
    random_prompts,
    tiny_params,
)

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.attention.cache import make_spec
from lserve_jax.engine.relay import LEAST_SAVED_BYTES, decide
from pallas_kernels import api

pytestmark = pytest.mark.usefixtures("all_slots")

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


# When relay is used.


@pytest.mark.parametrize(("kv_dtype", "token"), [("auto", 128), ("fp8", 40), ("int4", 32)])
def test_what_moves_for_a_token(kv_dtype: str, token: int, build: Build) -> None:
    """16 channels in float32, or in codes with what these need."""
    assert build("dense", kv_dtype=kv_dtype).engine.units.token == token


def spec_of(sparsity: SparsityConfig | None):
    return make_spec(
        CONFIG,
        sparsity=sparsity,
        heads=budgets_of((2, 2), sparsity),
        max_model_len=1 << 17,
        max_num_seqs=8,
        num_pages=1,
        max_prefixes=1,
        kv_dtype="auto",
    )


def test_break_even() -> None:
    """The smallest number of requests for which the rule says yes, beside the bytes of 8.3."""

    def least(
        sparsity: SparsityConfig | None,
        prefix: int,
        private: int,
        *,
        kv_heads: int = 8,
        token: int = 2 * 128 * 2,
    ) -> int | None:
        for requests in range(1, 300):
            decision = decide(
                "auto",
                spec_of(sparsity),
                token_bytes=kv_heads * token,  # of Llama-3-8B
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
    # In 8 bits with a scale, and in 4 with two words: fewer bytes a token.
    assert least(None, 8192, 256, token=2 * 128 + 8) == 9
    assert least(None, 8192, 256, token=2 * 64 + 16) == 16
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
    llm = build("dense", relay="auto", prefill_chunk_size=1024)  # all begin in one step
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
    assert alone.metrics.relay_reason == "nobody shares its beginning"


def test_settings_that_contradict_each_other() -> None:
    model = (CONFIG, tiny_params(CONFIG))
    with pytest.raises(ValueError, match="relay='sometimes' must be"):
        LLM(model, relay="sometimes")
    for relay in ("auto", "always"):
        with pytest.raises(ValueError, match=f"=True needs relay='never', got relay='{relay}'"):
            LLM(model, deterministic=True, relay=relay)
    with pytest.raises(ValueError, match="max_prefixes=-1 must not be negative"):
        LLM("no-such-model", max_prefixes=-1)
    with pytest.raises(ValueError, match=r"memory_fraction=1\.5 must lie in \(0, 1\]"):
        LLM(model, memory_fraction=1.5)
