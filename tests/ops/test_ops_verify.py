"""verify_attention against the float64 oracle, and against one token at a time.

Places of a page past a row's last query, and pages that no row uses, are NaN.
"""

import jax
import jax.numpy as jnp
import kv_oracle
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import api
from pallas_kernels.api import KVPages, PageList

verify = jax.jit(api.verify_attention)

D, P, M = 8, 16, 40
# As in test_ops_attention: scores are sums of D products, rounded to 2^-24 of themselves.
TOLERANCE = 2e-5


class Case:
    """Rows at ``positions``, T query tokens each; those at negative ones attend nothing."""

    def __init__(
        self, positions: list[int], T: int, heads: int, group: int, kind: str | None = None
    ) -> None:
        rng = np.random.default_rng([T, *map(abs, positions)])
        B, N = len(positions), len(positions) * M + 1
        self.positions, self.group = positions, group
        self.q = rng.standard_normal((B, T, heads * group, D), np.float32)
        self.tables = rng.permutation(N)[: B * M].reshape(B, M).astype(np.int32)
        used = np.zeros((N, P), bool)
        for row, position in enumerate(positions):
            token = np.arange(max(position + T, 0))
            used[self.tables[row, token // P], token % P] = True
        k, v = rng.standard_normal((2, heads, N, P, D), np.float32)
        k, v = (kv_oracle.stored(np.where(used[..., None], x, np.nan), kind) for x in (k, v))
        self.k, self.v = kv_oracle.values(*k), kv_oracle.values(*v)
        self.pages = kv_oracle.pages(k, v)

    def run(self) -> tuple[jax.Array, jax.Array]:
        positions = jnp.asarray(self.positions, jnp.int32)
        return verify(jnp.asarray(self.q), self.pages, jnp.asarray(self.tables), positions)


# A query's keys end inside a page, at its end, on the next.
PAGE_ENDS = [0, 12, 16, 630], 5, 3
# Over the edge of a block of 512; a row that attends nothing.
BLOCK_ENDS = [507, -9, 511], 9, 1


@pytest.mark.parametrize(
    ("positions", "T", "group", "kind"),
    [
        ([0, 14, 15, 16], 1, 2, None),
        ([-3, -1, 20], 5, 2, None),  # rows of fewer tokens than there are queries
        *((*PAGE_ENDS, kind) for kind in (None, *api.KV_KINDS)),
        *((*BLOCK_ENDS, kind) for kind in (None, *api.KV_KINDS)),
    ],
)
def test_every_token_attends_up_to_its_own_position(
    positions: list[int], T: int, group: int, kind: str | None
) -> None:
    case = Case(positions, T, 2, group, kind)
    out, lse = case.run()
    assert out.shape == case.q.shape and lse.shape == case.q.shape[:3]
    for row, t, h in np.ndindex(case.q.shape[:3]):
        head, stop = h // group, max(positions[row] + t + 1, 0)
        true_out, true_lse = oracle.paged_attention(
            case.q[row, t, h].astype(float), case.k[head], case.v[head], case.tables[row], 0, stop
        )
        assert_allclose(out[row, t, h], true_out, atol=TOLERANCE, rtol=0)
        assert_allclose(lse[row, t, h], true_lse, atol=TOLERANCE, rtol=0)


def test_tokens_together_are_tokens_one_by_one() -> None:
    """As decode would attend them, each after the one before was written."""
    case = Case([37, 250], 4, 2, 2)
    out, lse = case.run()
    nothing = KVPages(*(x[:0] for x in case.pages[:2]))
    pages, zero = jnp.asarray(case.tables)[:, None], jnp.zeros((2, 1), jnp.int32)
    for t in range(4):
        stop = jnp.asarray(case.positions)[:, None] + t + 1
        lists = PageList(pages, zero, stop)
        one = api.paged_attention(jnp.asarray(case.q[:, t]), case.pages, nothing, lists, lists)
        assert_allclose(out[:, t], one[0], atol=TOLERANCE, rtol=0)
        assert_allclose(lse[:, t], one[1], atol=TOLERANCE, rtol=0)


def test_a_row_without_a_token_attends_nothing() -> None:
    out, lse = Case([-3, 20, -7], 3, 1, 2).run()
    assert_array_equal(out[::2], 0.0)
    assert_array_equal(lse[::2], -np.inf)
    assert np.isfinite(lse[1]).all()
