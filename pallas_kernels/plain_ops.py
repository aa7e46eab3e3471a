"""The public ops that are plain JAX on every machine; ``api`` has them beside the others."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import causal_attention as causal
from pallas_kernels import reference
from pallas_kernels.checks import (
    INT32_MAX,
    check_range,
    expect_dtype,
    expect_groups,
    expect_int32,
    expect_shape,
)


def causal_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """Whole sequences attend causally, for training: every derivative, in memory of O(T).

    Token t attends the tokens up to itself. With ``segment_ids`` (int32, at least 0) only those of
    its own segment; a token of segment 0, which is padding, attends and is attended by none: out
    0, lse -inf. Scores, of T x 128 at a time, are computed again for a derivative.

    Returns (out in q's dtype, lse float32).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> q, packed = jnp.zeros((1, 4, 2, 8)), jnp.array([[1, 1, 2, 0]])
    >>> out, lse = causal_attention(q, q, q, packed)
    >>> out.shape, jnp.exp(lse[0, :, 0]).round().tolist()  # keys that each token attends
    ((1, 4, 2, 8), [1.0, 2.0, 1.0, 0.0])
    >>> jax.grad(lambda q: causal_attention(q, q, q)[0].sum())(q).shape
    (1, 4, 2, 8)
    """
    expect_shape("q", q, (None, None, None, None))
    B, T, H, D = q.shape
    if T == 0:
        raise ValueError(f"q has shape {q.shape}, needs a token")
    expect_shape("k", k, (B, T, None, D))
    expect_shape("v", v, k.shape)
    for name, x in (("k", k), ("v", v)):
        expect_dtype(str(q.dtype), **{name: x})
    expect_groups(H, k.shape[2])
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    expect_int32((B, T), segment_ids=segment_ids)
    check_range("segment_ids", segment_ids, INT32_MAX)
    return causal.causal_attention(q, k, v, segment_ids)


def merge_attention(
    outs: Float[Array, "n *batch D"], lses: Float[Array, " n *batch"]
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch"]]:
    """Joins n partial attentions over disjoint keys into one (RelayAttention, relay fusion).

    Exact: out = sum_i w_i out_i / sum_i w_i with w_i = exp(lse_i - max lse). A part with lse -inf
    is empty and is ignored whatever its out holds; all parts empty gives out 0, lse -inf.

    >>> import jax.numpy as jnp
    >>> outs, lses = jnp.array([[[1.0]], [[3.0]]]), jnp.array([[0.0], [-jnp.inf]])
    >>> float(merge_attention(outs, lses)[0][0, 0])
    1.0
    """
    if outs.ndim < 2:
        raise ValueError(f"outs has shape {outs.shape}, expected [n, ..., D]")
    expect_shape("lses", lses, outs.shape[:-1])
    expect_dtype("float32", lses=lses)
    return reference.merge_attention(outs, lses)


def apply_rotary(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T D/2"], sin: Float[Array, "B T D/2"]
) -> Float[Array, "B T H D"]:
    """Rotates channel pairs (d, d + D/2) by the given angles; float32 inside, x's dtype out.

    >>> import jax.numpy as jnp
    >>> x, zero = jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1, 2))
    >>> apply_rotary(x, zero, zero + 1).tolist()
    [[[[-1.0, -1.0, 1.0, 1.0]]]]
    """
    expect_shape("x", x, (None, None, None, None))
    B, T, _, D = x.shape
    expect_shape("cos", cos, (None, T, D // 2))
    expect_shape("sin", sin, cos.shape)
    expect_dtype("float32", cos=cos, sin=sin)
    if cos.shape[0] not in (1, B):
        raise ValueError(f"cos has {cos.shape[0]} rows, expected 1 or {B}")
    return reference.apply_rotary(x, cos, sin)


def quantize_kv(x: Float[Array, "... D"]) -> tuple[Array, Array]:
    """Symmetric int8 over the last axis: (int8 ``[..., D]``, float32 scale ``[...]``).

    scale = max |x| / 127, so that |x - int8 * scale| <= scale / 2; never below 1e-6 / 127, so that
    it stays positive for a vector of zeros.

    >>> import jax.numpy as jnp
    >>> codes, scale = quantize_kv(jnp.array([[-127.0, 63.6]]))
    >>> codes.tolist(), scale.tolist()
    ([[-127, 64]], [1.0])
    """
    return reference.quantize_kv(x)


def dequantize_kv(codes: Array, scale: Float[Array, "..."]) -> Float[Array, "... D"]:
    """Inverse of ``quantize_kv`` up to rounding, float32.

    >>> import jax.numpy as jnp
    >>> dequantize_kv(jnp.array([[2]], jnp.int8), jnp.array([0.5])).tolist()
    [[1.0]]
    """
    expect_shape("scale", scale, codes.shape[:-1])
    expect_dtype("int8", codes=codes)
    expect_dtype("float32", scale=scale)
    return codes.astype("float32") * scale[..., None]
