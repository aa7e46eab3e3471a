"""The shared-prefix kernel, interpreted on a CPU, against a plain softmax.

Tokens past the prefix are NaN, and so are pages that the table does not name.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import api
from pallas_kernels.hopper.prefix_attention import (
    Config,
    choose_config,
    merge_parts,
    prefix_attention,
)
from pallas_kernels.kv_codes import float_pages
from pallas_kernels.types import KVPages, OwnAttention

# As for decode: weights and out are rounded to bf16, here also the parts that are merged.
OUT_TOLERANCE = 1e-2
LSE_TOLERANCE = 1e-5


def problem(rows, heads, group, length, *, head_dim=64, page_size=64, seed=0):
    """Arguments with a table longer than the prefix."""
    rng = np.random.default_rng(seed)
    width = -(-length // page_size) + 2
    table = rng.permutation(width + 1)[:width].astype(np.int32)
    used = np.zeros((width + 1, page_size), bool)
    used[table] = np.arange(width * page_size).reshape(width, page_size) < length
    k, v = rng.normal(size=(2, heads, *used.shape, head_dim))
    pages = KVPages(
        *(jnp.asarray(np.where(used[..., None], x, np.nan), jnp.bfloat16) for x in (k, v))
    )
    q = jnp.asarray(rng.normal(size=(rows, heads * group, head_dim)), jnp.bfloat16)
    return q, pages, jnp.asarray(table), jnp.int32(length)


def softmax_attention(q, pages, table, length) -> tuple[np.ndarray, np.ndarray]:
    B, H, D = q.shape
    K = pages.k.shape[0]
    k, v = (
        np.asarray(x[:, table], np.float64).reshape(K, -1, D)[:, : int(length)]
        for x in (pages.k, pages.v)
    )
    grouped = np.asarray(q, np.float64).reshape(B, K, H // K, D)
    scores = np.einsum("bkgd,ktd->bkgt", grouped, k) / np.sqrt(D)
    weights = np.exp(scores)
    total = weights.sum(axis=-1)
    out = np.einsum("bkgt,ktd->bkgd", weights, v) / total[..., None]
    return out.reshape(B, H, D), np.log(total).reshape(B, H)


@pytest.mark.parametrize(
    ("rows", "heads", "group", "length", "head_dim", "page_size", "splits"),
    [
        (5, 1, 4, 600, 128, 64, 2),  # a ragged last block, few rows
        (50, 1, 3, 256, 64, 128, 1),  # two tiles, no merge
        (3, 1, 1, 40, 64, 16, 3),  # more splits than blocks
    ],
)
def test_matches_softmax(rows, heads, group, length, head_dim, page_size, splits) -> None:
    args = problem(rows, heads, group, length, head_dim=head_dim, page_size=page_size)
    out, lse = prefix_attention(*args, config=Config(splits=splits, stages=2))
    expected_out, expected_lse = softmax_attention(*args)
    assert (out.dtype, out.shape) == (args[0].dtype, args[0].shape)
    assert_allclose(lse, expected_lse, atol=LSE_TOLERANCE, rtol=0)
    assert_allclose(np.asarray(out, np.float32), expected_out, atol=OUT_TOLERANCE)


@pytest.mark.parametrize(
    ("rows", "heads", "group", "head_dim", "splits"), [(3, 2, 3, 64, 1), (2, 1, 4, 128, 3)]
)
def test_merging_is_exact(rows, heads, group, head_dim, splits) -> None:
    """Against float64: row 0 does not share the prefix, row 1 has nothing of its own.

    The merging kernel by itself: with ``own`` in one program with the other the interpreter hangs.
    """
    rng = np.random.default_rng(1)
    H, R = heads * group, rows * group + 1
    parts, own_out = (
        rng.normal(size=(splits, heads, R, head_dim)),
        rng.normal(size=(rows, H, head_dim)),
    )
    lses = rng.normal(size=(splits, heads, R)).astype(np.float32)
    own_lse = rng.normal(size=(rows, H)).astype(np.float32)
    parts, own_out = (jnp.asarray(x, jnp.bfloat16) for x in (parts, own_out))
    if splits > 1:  # an empty part may hold anything
        lses[1], parts = -np.inf, parts.at[1].set(jnp.nan)
    own_lse[1], own_out = -np.inf, own_out.at[1].set(jnp.nan)
    shares = np.arange(rows) > 0
    own = OwnAttention(own_out, jnp.asarray(own_lse), jnp.asarray(shares))
    out, lse = jax.jit(merge_parts, static_argnums=(3, 4))(parts, jnp.asarray(lses), own, rows, H)

    def by_row(x):
        """[S, K, R, ...] as [S, B, H, ...]"""
        x = np.asarray(x, np.float64)[:, :, : rows * group]
        x = x.reshape(splits, heads, rows, group, *x.shape[3:])
        return np.moveaxis(x, 1, 2).reshape(splits, rows, H, *x.shape[4:])

    hidden = np.where(shares, 0.0, -np.inf)[:, None]
    weights = np.exp([*(by_row(lses) + hidden), own_lse])
    values = np.nan_to_num([*by_row(parts), np.asarray(own_out, np.float64)])
    total = weights.sum(axis=0)
    assert_allclose(lse, np.log(total), atol=LSE_TOLERANCE, rtol=0)
    expected = (weights[..., None] * values).sum(axis=0) / total[..., None]
    assert_allclose(np.asarray(out, np.float32), expected, atol=OUT_TOLERANCE)


def test_no_prefix() -> None:
    out, lse = prefix_attention(*problem(2, 1, 2, 0))
    assert_array_equal(np.asarray(out, np.float32), 0)
    assert np.isneginf(lse).all()


def test_choice_of_config() -> None:
    assert choose_config(4 * 8, 32768, 128) == Config(splits=4, stages=2)  # 128 of 132 SMs
    assert choose_config(2 * 8, 8192, 128).splits == 8
    assert choose_config(8, 64, 64) == Config(splits=1, stages=4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
        ({"page_size": 8}, "page size must be 16, 32, 64 or 128, got 8"),
    ],
)
def test_refuses_by_name(change: dict, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        prefix_attention(*problem(1, 1, 1, 16, **change))


def test_refuses_other_dtypes() -> None:
    q, pages, *rest = problem(1, 1, 1, 16)
    with pytest.raises(NotImplementedError, match="q must be bfloat16, got float32"):
        prefix_attention(q.astype(jnp.float32), pages, *rest)
    with pytest.raises(NotImplementedError, match="pages must be bfloat16 or codes, got float32"):
        prefix_attention(q, KVPages(*(x.astype(jnp.float32) for x in pages[:2])), *rest)


def as_codes(pages: KVPages, kind: api.KVKind) -> KVPages:
    (k, k_scale), (v, v_scale) = (api.quantize_kv(x, kind) for x in (pages.k, pages.v))
    return KVPages(k, v, k_scale, v_scale)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "length", "splits"),
    [
        (64, 16, 300, 1),  # a ragged last block; more blocks than stages have room for their codes
        (128, 32, 600, 2),
        (128, 16, 200, 1),
        (64, 128, 130, 3),  # a split without a block
        (128, 64, 0, 1),
    ],
)
@pytest.mark.parametrize("kind", api.KV_KINDS)
def test_codes_are_read_as_the_numbers_that_they_stand_for(
    kind: api.KVKind, head_dim: int, page_size: int, length: int, splits: int
) -> None:
    """Bit for bit what pages of these numbers give."""
    q, pages, table, length = problem(
        2, 2 if length == 200 else 1, 3, length, head_dim=head_dim, page_size=page_size
    )
    pages = as_codes(pages, kind)
    numbers = float_pages(pages, table, jnp.bfloat16)
    config = Config(splits=splits, stages=256 // head_dim)
    out, lse = prefix_attention(q, pages, table, length, config=config)
    expected_out, expected_lse = prefix_attention(q, *numbers, length, config=config)
    assert_array_equal(np.asarray(out, np.float32), np.asarray(expected_out, np.float32))
    assert_array_equal(lse, expected_lse)
    if length > 0:
        true_out, true_lse = softmax_attention(q, *numbers, length)
        assert_allclose(np.asarray(out, np.float32), true_out, atol=OUT_TOLERANCE, rtol=0)
        assert_allclose(lse, true_lse, atol=LSE_TOLERANCE, rtol=0)


def test_config_checks_itself() -> None:
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        Config(splits=0, stages=2)


def test_works_under_jit_with_a_traced_length() -> None:
    q, pages, table, _ = problem(2, 1, 2, 200)
    attend = jax.jit(lambda length: prefix_attention(q, pages, table, length))
    for length in (1, 128):
        _, lse = attend(jnp.int32(length))
        assert_allclose(
            lse, softmax_attention(q, pages, table, length)[1], atol=LSE_TOLERANCE, rtol=0
        )
