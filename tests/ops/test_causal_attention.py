"""causal_attention and its derivatives against the oracle, and a plain softmax over T x T."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import api

D = 8
TOLERANCE = 2e-5  # as in test_ops_attention.py
attend = jax.jit(api.causal_attention)


def inputs(seed: int, T: int, B: int = 2, H: int = 6, Hk: int = 2) -> list[jax.Array]:
    """q, k, v and segments in no order, some of them padding."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, heads, D), np.float32) for heads in (H, Hk, Hk))
    return [jnp.asarray(x) for x in (q, k, v, rng.integers(0, 4, (B, T), np.int32))]


def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """All scores at once; rows that see nothing are 0."""
    H = q.shape[2]
    k, v = (jnp.repeat(x, H // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5
    seen = jnp.tril(segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    weights = jnp.where(seen[:, None], jax.nn.softmax(scores, where=seen[:, None]), 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


# A tile is 128 queries, or half of a shorter sequence; tiles go in pairs.
@pytest.mark.parametrize("T", [1, 2, 5, 128, 255, 256, 257, 600])
def test_every_query_sees_its_segment(T: int) -> None:
    q, k, v, segments = inputs(T, T)
    out, lse = attend(q, k, v, segments)
    q, k, v, segments, out, lse = map(np.asarray, (q, k, v, segments, out, lse))
    for b, t, h in np.random.default_rng(0).integers(0, (2, T, 6), (60, 3)):
        seen = np.flatnonzero(segments[b, : t + 1] == segments[b, t])
        if segments[b, t] == 0:
            seen = seen[:0]
        keys, values = (x[b, seen, h // 3].astype(float) for x in (k, v))
        wanted, wanted_lse = oracle.softmax_attention(q[b, t, h].astype(float), keys, values)
        assert_allclose(out[b, t, h], wanted, atol=TOLERANCE, rtol=0)
        assert_allclose(lse[b, t, h], wanted_lse, atol=TOLERANCE, rtol=0)


def test_without_segments_all_is_one() -> None:
    q, k, v, segments = inputs(1, 300)
    ones = np.ones(segments.shape, np.int32)
    for x, y in zip(attend(q, k, v), attend(q, k, v, ones), strict=True):
        assert_array_equal(x, y)


@pytest.mark.parametrize("T", [5, 300, 600])
def test_gradients(T: int) -> None:
    """Of sums of some 600 products; two orders of summing differ by 600 * 2^-24 of their size."""
    q, k, v, segments = inputs(2, T)
    weights = jnp.asarray(np.random.default_rng(3).standard_normal(q.shape, np.float32))

    def gradient(f) -> tuple[jax.Array, ...]:
        return jax.jit(jax.grad(lambda *x: (f(*x, segments) * weights).sum(), (0, 1, 2)))(q, k, v)

    wanted = gradient(plain)
    made = gradient(lambda *x: api.causal_attention(*x)[0])
    for x, y in zip(made, wanted, strict=True):
        assert np.isfinite(x).all() and np.abs(y).max() > 0.1
        assert_allclose(x, y, atol=1e-4, rtol=0)


def test_forward_mode_and_second_derivatives() -> None:
    """Also of the lse, at rows that see something."""
    q, k, v, segments = inputs(4, 7, B=1, H=2, Hk=1)

    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, lse = api.causal_attention(q, k, v, segments)
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum()

    # float32: difference quotients are right to about 1e-3.
    check_grads(f, (q, k, v), order=2, modes=["fwd", "rev"], atol=0.02, rtol=0.02, eps=1e-2)


def test_bfloat16() -> None:
    """Products are of bfloat16, sums float32: weights and the result are rounded to 2^-9."""
    q, k, v, segments = inputs(5, 300)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out, lse = attend(*narrow, segments)
    wide, wide_lse = attend(*(x.astype(jnp.float32) for x in narrow), segments)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert_allclose(np.asarray(out, np.float32), wide, atol=4 * 2**-8, rtol=0)
    assert_allclose(lse, wide_lse, atol=1e-4, rtol=0)


def test_memory_is_linear(optimised: None) -> None:
    def temporary(T: int) -> int:
        x = jax.ShapeDtypeStruct((1, T, 2, D), jnp.float32)
        f = jax.grad(lambda q, k, v: api.causal_attention(q, k, v)[0].sum(), (0, 1, 2))
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.5 * temporary(4096)


def test_vmap() -> None:
    q, k, v, segments = inputs(6, 40)
    mapped = jax.vmap(partial(attend, k=k, v=v, segment_ids=segments))(jnp.stack([q, 2 * q]))[0]
    assert_allclose(mapped[1], attend(2 * q, k, v, segments)[0], atol=1e-6, rtol=0)
