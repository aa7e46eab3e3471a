"""The kernel behind block-sparse prefill's choice, interpreted on a CPU, against float64.

Keys that no query sees are NaN: behind the history in its last page, pages that the table does not
name, and the chunk behind its length.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import api
from pallas_kernels.hopper.block_scores import block_scores
from pallas_kernels.types import KVPages

BLOCK = 128
# Products of bf16 are exact in float32, their sums of 128 right to 1e-5; exp2 and log2 of the GPU
# are approximate, the interpreter's are not.
TOLERANCE = 1e-4


def problem(
    heads: int, samples: int, start: int, tokens: int, *, head_dim: int = 64, page_size: int = 64
) -> tuple[Any, ...]:
    """Arguments, each query a tile's sample, the last two of them padding."""
    rng = np.random.default_rng(heads + start + tokens)
    width = -(-start // page_size) + 3
    table = rng.permutation(width + 2)[:width].astype(np.int32)
    history = np.full((width * page_size, heads, head_dim), np.nan)
    history[:start] = rng.standard_normal((start, heads, head_dim))
    pool = np.full((heads, width + 2, page_size, head_dim), np.nan)
    pool[:, table] = history.reshape(width, page_size, heads, head_dim).transpose(2, 0, 1, 3)
    last = rng.integers(0, tokens, samples).astype(np.int32)
    last[:2], last[-2:] = (tokens - 1, 0), -1
    keys = rng.standard_normal((-(-tokens // BLOCK) * BLOCK - 5, heads, head_dim))
    keys[tokens:] = np.nan
    queries = rng.standard_normal((heads, samples, head_dim)) * 2
    queries, keys, pool = (jnp.asarray(x, jnp.bfloat16) for x in (queries, keys, pool))
    return queries, jnp.asarray(last), keys, KVPages(pool, pool), jnp.asarray(table), start


def exact(queries, last, keys, pages, table, start) -> np.ndarray:
    """[K, R, blocks], in float64 from one key after the other's exponential."""
    queries, keys, pool = (np.asarray(x, np.float64) for x in (queries, keys, pages.k))
    (K, R, D), P = queries.shape, pool.shape[2]
    history = -(-len(table) * P // BLOCK)
    sums = np.zeros((K, R, history + -(-len(keys) // BLOCK)))
    for k in range(K):
        for r in range(R):
            for t in range(start):
                score = queries[k, r] @ pool[k, table[t // P], t % P] / D**0.5
                sums[k, r, t // BLOCK] += np.exp(score)
            for t in range(int(last[r]) + 1):
                score = queries[k, r] @ keys[t, k] / D**0.5
                sums[k, r, history + t // BLOCK] += np.exp(score)
    with np.errstate(divide="ignore"):
        return np.log(sums)


CASES: dict[str, dict[str, int]] = {
    "no history": {"heads": 1, "samples": 6, "start": 0, "tokens": 250},
    "a history that ends within a page": {"heads": 2, "samples": 12, "start": 331, "tokens": 130},
    "small pages, two tiles": {"heads": 1, "samples": 130, "start": 128, "tokens": 40}
    | {"page_size": 16},
    "128 channels, pages of a block": {"heads": 1, "samples": 4, "start": 300, "tokens": 129}
    | {"page_size": 128, "head_dim": 128},
}


@pytest.mark.parametrize("name", CASES)
def test_scores_against_float64(name: str) -> None:
    *arrays, start = problem(**CASES[name])
    found = np.asarray(block_scores(*arrays, jnp.int32(start)))
    true = exact(*arrays, start)
    assert_array_equal(np.isneginf(found), np.isneginf(true))
    seen = np.isfinite(true)
    assert_allclose(found[seen], true[seen], atol=TOLERANCE, rtol=0)


def test_layers_of_fewer_heads_leave_what_is_not_theirs() -> None:
    """Programs of the heads that a layer lacks, and splits without a block."""
    *arrays, start = problem(1, 8, 300, 40)
    alone = block_scores(*arrays, jnp.int32(start))
    assert_array_equal(block_scores(*arrays, jnp.int32(start), most_heads=3), alone)


def test_pages_of_codes() -> None:
    queries, last, keys, pages, table, start = problem(1, 4, 200, 20)
    codes, scale = api.quantize_kv(pages.k, "int4")
    read = jnp.asarray(api.dequantize_kv(codes, scale), jnp.bfloat16)
    coded, numbers = KVPages(codes, codes, scale, scale), KVPages(read, read)
    found, true = (
        np.asarray(block_scores(queries, last, keys, pages, table, jnp.int32(start)))
        for pages in (coded, numbers)
    )
    seen = np.isfinite(true)
    # A key may round to the next bf16 where conversion fuses its product and sum.
    assert_allclose(found[seen], true[seen], atol=1e-2, rtol=0)


@pytest.mark.parametrize("how", [{"density": 0.6}, {"threshold": 0.8}])
def test_lists_are_those_of_the_plain_op(how: dict[str, float]) -> None:
    """Through ``choose_blocks``; ties and the last bits of shares decide nothing here."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((256, n, 64)) * 3, jnp.bfloat16) for n in (4, 2))
    pool = jnp.asarray(rng.standard_normal((2, 6, 64, 64)), jnp.bfloat16)
    args = q, k, KVPages(pool, pool), jnp.array([3, 0, 5, 1]), jnp.int32(200), jnp.int32(256)
    lists = [
        api.choose_blocks(*args, **how, backend=backend) for backend in ("mosaic", "reference")
    ]
    for kernel, plain in zip(*lists, strict=True):
        assert_array_equal(kernel, plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
        ({"page_size": 8}, "page size must be 16, 32, 64 or 128, got 8"),
    ],
)
def test_refuses_by_name(change: dict[str, int], reason: str) -> None:
    *arrays, start = problem(1, 4, 10, 20, **change)
    with pytest.raises(NotImplementedError, match=reason):
        block_scores(*arrays, jnp.int32(start))


def test_refuses_other_dtypes() -> None:
    *arrays, start = problem(1, 4, 10, 20)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays[0])
    with pytest.raises(NotImplementedError, match="queries must be bfloat16, got float32"):
        block_scores(wide, *arrays[1:], jnp.int32(start))
