"""The public ops that are plain JAX on every machine; ``api`` has them beside the others."""

from jaxtyping import Array, Float

from pallas_kernels import reference
from pallas_kernels.checks import expect_dtype, expect_shape


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
