"""The public ops that are plain JAX on every machine; ``api`` has them beside the others."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import causal_attention as causal
from pallas_kernels import kv_codes, reference
from pallas_kernels.checks import (
    INT32_MAX,
    check_range,
    expect_dtype,
    expect_groups,
    expect_int32,
    expect_kv_scale,
    expect_pages,
    expect_shape,
)
from pallas_kernels.kv_codes import KV_KINDS, KVKind
from pallas_kernels.types import KVPages, KVScale


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


def quantize_kv(x: Float[Array, "... D"], kind: KVKind = "int8") -> tuple[Array, KVScale]:
    """Codes for the vectors along the last axis, and their scales, as ``KVPages`` has them.

    "int8" and "fp8": int8 or float8_e4m3fn ``[..., D]``, float32 scale ``[...]``, the largest |x|
    over 127 or 448; never below 1e-6 of it, so that it stays positive for a vector of zeros. Then
    |x - code * scale| <= scale / 2 for int8, |x| / 16 or scale / 1024 for fp8.

    "int4": uint8 ``[..., D / 2]`` and two words (int32 ``[...]``), one for either half of the
    channels. Codes 0 to 15 are even steps from the half's lowest to its highest value: off by half
    a step, and at either end by what those two lose in bf16. After QServe's KV4 (arXiv 2405.04532),
    in groups.

    >>> import jax.numpy as jnp
    >>> codes, scale = quantize_kv(jnp.array([[-127.0, 63.6]]))
    >>> codes.tolist(), scale.tolist()
    ([[-127, 64]], [1.0])
    >>> codes, scale = quantize_kv(jnp.array([[0.0, 7.2, 15.0, -1.0, -1.0, 0.5]]), "int4")
    >>> [(int(x) & 15, int(x) >> 4) for x in codes[0]]
    [(0, 0), (7, 0), (15, 15)]
    """
    if kind not in KV_KINDS:
        raise ValueError(f"{kind=} is unknown; known: {', '.join(KV_KINDS)}")
    if kind == "int4" and x.shape[-1] % 2:
        raise ValueError(f"codes of 4 bits need an even number of channels, got {x.shape[-1]}")
    return kv_codes.quantize(x, kind)


def dequantize_kv(codes: Array, scale: KVScale) -> Float[Array, "... D"]:
    """Inverse of ``quantize_kv`` up to rounding, float32.

    >>> import jax.numpy as jnp
    >>> dequantize_kv(jnp.array([[2]], jnp.int8), jnp.array([0.5])).tolist()
    [[1.0]]
    """
    kind = kv_codes.kv_kind(codes.dtype)
    if kind is None:
        raise ValueError(
            f"codes has dtype {codes.dtype}, expected int8, float8_e4m3fn or uint8 (4 bits)"
        )
    expect_kv_scale("scale", scale, kind, codes.shape[:-1])
    return kv_codes.values(codes, scale)


def store_kv(k: Float[Array, "... D"], v: Float[Array, "... D"], pages: KVPages) -> KVPages:
    """Keys and values in the form in which a pool has them: cast, or quantised as it is.

    Returns the pool's fields for them, leaves ``[..., D]``, of codes of 4 bits ``[..., D / 2]``,
    and scales ``[...]``.

    >>> import jax.numpy as jnp
    >>> pool = KVPages(jnp.ones((1, 4, 16, 8), jnp.bfloat16), jnp.ones((1, 4, 16, 8), jnp.bfloat16))
    >>> stored = store_kv(jnp.ones((2, 8)), jnp.ones((2, 8)), pool)
    >>> stored.k.shape, stored.k.dtype.name, stored.k_scale
    ((2, 8), 'bfloat16', None)
    """
    expect_shape("v", v, k.shape)
    expect_pages("pages", pages, k.shape[-1])
    return kv_codes.as_stored(k, v, pages)
