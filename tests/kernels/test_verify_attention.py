"""The kernel of verify_attention, interpreted on a CPU, against its reference.

Tokens past a row's last query are NaN, and so are pages of no row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from shapes.pages import stored

from pallas_kernels import reference
from pallas_kernels.hopper.decode_attention import Config, choose_config
from pallas_kernels.hopper.verify_attention import verify_attention
from pallas_kernels.kv_codes import CODE_TYPES, kv_kind
from pallas_kernels.types import KVPages

# As for decode attention (test_decode_attention.py): weights and out are rounded to bf16, a unit in
# the last place of |out| < 4; codes are multiplied with a q that is rounded once more.
OUT_TOLERANCE = 2**-6
LSE_TOLERANCE = {None: 1e-5, "int8": 2e-3, "fp8": 5e-4, "int4": 2e-3}


store = jax.jit(stored, static_argnums=2)  # one program in place of an op's each


def problem(positions, tokens, heads, group, head_dim, page_size, width, kind=None):
    rng = np.random.default_rng(tokens)
    B, N = len(positions), len(positions) * width + 1
    table = rng.permutation(N)[: B * width].reshape(B, width).astype(np.int32)
    used = np.zeros((N, page_size), bool)
    for row, position in enumerate(positions):
        token = np.arange(max(position + tokens, 0))
        used[table[row, token // page_size], token % page_size] = True
    numbers = rng.normal(size=(2, heads, N, page_size, head_dim)).astype(jnp.bfloat16)
    (k, k_scale), (v, v_scale) = (store(x, used, kind) for x in numbers)
    pages = KVPages(k, v, k_scale, v_scale)
    q = jnp.asarray(rng.normal(size=(B, tokens, heads * group, head_dim)), jnp.bfloat16)
    return q, pages, jnp.asarray(table), jnp.asarray(positions, jnp.int32)


def check(args, config: Config | None = None) -> tuple[np.ndarray, np.ndarray]:
    out, lse = verify_attention(*args, config=config)
    expected_out, expected_lse = reference.verify_attention(*args)
    assert_allclose(lse, expected_lse, atol=LSE_TOLERANCE[kv_kind(args[1].k.dtype)], rtol=0)
    assert out.dtype == expected_out.dtype
    out, expected_out = (np.asarray(x, np.float32) for x in (out, expected_out))
    assert_allclose(out, expected_out, atol=OUT_TOLERANCE, rtol=0)
    return out, np.asarray(lse)


@pytest.mark.parametrize(
    ("positions", "tokens", "heads", "group", "head_dim", "page_size", "width", "kind"),
    [
        ([0, 62, 200], 1, 1, 4, 128, 64, 4, None),  # as decode attention
        ([0, 61, 150], 5, 2, 3, 64, 16, 10, None),  # 15 queries; an end inside a tile
        ([119], 9, 1, 4, 128, 128, 1, None),  # 36: weights are summed in the loop
        ([60], 9, 1, 1, 64, 32, 3, None),  # a token's own key in the next tile
        ([58], 9, 1, 8, 64, 64, 2, None),  # 72: pieces of 5 and 4 tokens
        ([3, 120], 5, 1, 4, 128, 64, 2, "int8"),  # 20
        ([70], 9, 1, 4, 64, 16, 5, "int8"),  # 36: pieces
        ([90], 1, 1, 3, 64, 32, 3, "int8"),
        ([70], 9, 1, 3, 128, 16, 5, "fp8"),  # 27
        ([3, 120], 5, 1, 4, 128, 64, 2, "int4"),  # 20: weights are summed in the loop
        ([70], 7, 1, 4, 64, 16, 5, "int4"),  # 28: pieces of 4 and 3 tokens
    ],
)
def test_matches_reference(
    positions, tokens, heads, group, head_dim, page_size, width, kind
) -> None:
    check(problem(positions, tokens, heads, group, head_dim, page_size, width, kind))


@pytest.mark.parametrize("splits", [(1, 1), (3, 2)])
def test_any_number_of_splits(splits: tuple[int, ...]) -> None:
    """Splits refill their stages, and a split may hold nothing but keys that some queries see."""
    check(problem([317, 64], 6, 2, 4, 64, 64, 6), Config(splits=splits, parts=2))


def test_rows_of_fewer_tokens_than_queries() -> None:
    out, lse = check(problem([-3, 40, -5, -2], 3, 1, 2, 64, 16, 3))
    for row, empty in ((0, 3), (2, 3), (3, 2)):
        assert_array_equal(out[row, :empty], 0)
        assert_array_equal(lse[row, :empty], -np.inf)
    assert np.isfinite(lse[3, 2]).all()


def test_choice_of_config() -> None:
    """Many columns: fewer parts at once in registers, and for int8 fewer CTAs an SM."""
    dense = (2048 * 64,) * 8
    assert choose_config(1, dense, jnp.bfloat16, 16) == choose_config(1, dense, jnp.bfloat16)
    same = {"splits": (33,) * 8, "numbers": 264}
    assert choose_config(1, dense, jnp.bfloat16, 36) == Config(**same, parts=6)
    assert choose_config(1, dense, CODE_TYPES["int8"], 20) == Config(**same, parts=11)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
        ({"page_size": 8}, "listed pages must have 16, 32, 64 or 128 tokens, got 8"),
        ({"group": 17}, "at most 16 query heads a KV head, got 17"),
    ],
)
def test_refuses_by_name(change: dict, reason: str) -> None:
    shape = {"group": 1, "head_dim": 64, "page_size": 16} | change
    with pytest.raises(NotImplementedError, match=f"verify_attention kernel: .*{reason}"):
        verify_attention(*problem([3], 2, 1, width=2, **shape))


def test_refuses_float32() -> None:
    q, *rest = problem([3], 2, 1, 1, 64, 16, 1)
    with pytest.raises(NotImplementedError, match="queries must be bfloat16, got float32"):
        jax.jit(verify_attention)(q.astype(jnp.float32), *rest)
