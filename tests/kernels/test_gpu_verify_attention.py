"""Verification of drafted tokens on a Hopper GPU at the shapes of the benchmarks.

    python -m pytest -m gpu tests/kernels

Tokens past a row's last query are NaN. The kernel may be at most twice as far from float32
arithmetic as decode attention, which reads the same pages for one token after the other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes.verify import VERIFY, VerifyShape, verify_inputs

from pallas_kernels import reference
from pallas_kernels.hopper.decode_attention import paged_attention
from pallas_kernels.hopper.verify_attention import verify_attention
from pallas_kernels.types import PageList

pytestmark = pytest.mark.gpu


def one_by_one(q, pages, table, position) -> tuple[jax.Array, jax.Array]:
    nothing = jax.tree.map(lambda x: x[:0], pages)
    results = []
    for t in range(q.shape[1]):
        stop = position[:, None] + t + 1
        lists = PageList(table[:, None], jnp.zeros_like(stop), stop)
        results.append(paged_attention(q[:, t], pages, nothing, lists, lists))
    outs, lses = zip(*results, strict=True)
    return jnp.stack(outs, axis=1), jnp.stack(lses, axis=1)


def distance(x: jax.Array, truth: jax.Array) -> float:
    difference = np.asarray(x, np.float32) - np.asarray(truth, np.float32)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(truth, np.float32)))


@pytest.mark.parametrize("shape", VERIFY, ids=lambda shape: shape.name)
def test_verify_attention(shape: VerifyShape) -> None:
    q, pages, (table,), position = verify_inputs(shape)
    args = pages, table, position
    truth, true_lse = reference.verify_attention(q.astype(jnp.float32), *args)
    out, lse = verify_attention(q, *args)
    allowed = 2 * distance(one_by_one(q, *args)[0], truth)
    assert distance(out, truth) <= allowed
    # As for decode attention (test_gpu_decode_attention.py).
    assert distance(lse, true_lse) <= (1e-4 if shape.kind == "fp8" else 1e-5)


def test_a_row_without_a_token_attends_nothing() -> None:
    q, pages, (table,), position = verify_inputs(VERIFY[0])
    out, lse = verify_attention(q, pages, table, position.at[1].set(-q.shape[1]))
    np.testing.assert_array_equal(np.asarray(out[1], np.float32), 0)
    np.testing.assert_array_equal(lse[1], -np.inf)
    assert np.isfinite(lse[0]).all()
