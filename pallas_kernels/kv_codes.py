"""Keys and values in 8 or 4 bits: how a head's vector is rounded, and what its codes stand for.

Every token and head is rounded on its own, so that a token is written once and never again. What
follows multiplies with reciprocals, as XLA does wherever it compiles a quotient by a constant or by
one number a vector: so kernels and ops that run one by one get the same bits.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.nan import keep_nan, largest_magnitude
from pallas_kernels.types import KVPages, KVScale

KVKind = Literal["int8", "fp8", "int4"]
KV_KINDS: tuple[KVKind, ...] = get_args(KVKind)
# What codes are stored as. Two codes of 4 bits share a byte: that of channel c its low half, that
# of channel c + D / 2 its high half.
CODE_TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.uint8}
# The largest code: with it the largest |x| of a vector is stored.
LARGEST = {"int8": 127.0, "fp8": 448.0}
STEPS = 15.0  # from the lowest code of 4 bits to the highest
# A vector of zeros would have scale 0; any positive scale represents it exactly.
SMALLEST = 1e-6


def kv_kind(dtype: jax.typing.DTypeLike) -> KVKind | None:
    """What pages of ``dtype`` hold; None: numbers as they are.

    >>> kv_kind("uint8"), kv_kind("bfloat16")
    ('int4', None)
    """
    return next((kind for kind in KV_KINDS if jnp.dtype(dtype) == CODE_TYPES[kind]), None)


def stored_channels(kind: KVKind | None, head_dim: int) -> int:
    """How many elements the codes of ``head_dim`` channels are."""
    return head_dim // 2 if kind == "int4" else head_dim


def quantize(x: Float[Array, "... D"], kind: KVKind) -> tuple[Array, KVScale]:
    """See ``api.quantize_kv``."""
    x = x.astype(jnp.float32)
    if kind == "int4":
        halves = [_quantize_half(half) for half in jnp.split(x, 2, axis=-1)]
        (low, low_word), (high, high_word) = halves
        return low | high << 4, (low_word, high_word)
    scale = jnp.maximum(largest_magnitude(x, axis=-1), SMALLEST) * (1 / LARGEST[kind])
    codes = x * (1 / scale)[..., None]
    return (jnp.round(codes) if kind == "int8" else codes).astype(CODE_TYPES[kind]), scale


def _quantize_half(x: Float[Array, "... D/2"]) -> tuple[Array, Int[Array, "..."]]:
    """Codes 0 to 15 as uint8, and the word that says what they stand for."""
    word = range_word(keep_nan(x.min(axis=-1), x, axis=-1), x.max(axis=-1))
    step, lowest = word_values(word)
    codes = jnp.round((x - lowest[..., None]) * (1 / step)[..., None])
    codes = jnp.clip(codes, 0.0, STEPS)
    return codes.astype(jnp.uint8), word


def range_word(lowest: Float[Array, "..."], highest: Float[Array, "..."]) -> Int[Array, "..."]:
    """The word of values between these two, float32; kernels use it too."""
    lower = _bf16_bits(lowest)
    # From the lowest as it is stored: what its own rounding loses, codes make good.
    span = highest - lax.bitcast_convert_type(lower << 16, jnp.float32)
    return _bf16_bits(jnp.maximum(span, SMALLEST) * (1 / STEPS)) << 16 | lower


def _bf16_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """x rounded to bf16, as the lower 16 bits of an int32.

    Between float32 numbers, XLA may leave such a rounding out.
    """
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.int32)


def values(codes: Array, scale: KVScale | None) -> Float[Array, "... D"]:
    """What is stored, float32; without a scale as it is."""
    if scale is None:
        return codes.astype(jnp.float32)
    if not isinstance(scale, tuple):
        return codes.astype(jnp.float32) * scale[..., None]
    halves = []
    for nibbles, word in zip((codes & 15, codes >> 4), scale, strict=True):
        step, lowest = word_values(word)
        halves.append(nibbles.astype(jnp.float32) * step[..., None] + lowest[..., None])
    return jnp.concatenate(halves, axis=-1)


def word_values(word: Int[Array, "..."]) -> tuple[Array, Array]:
    """The step and the lowest value that a word holds, float32; kernels use it too."""
    step = lax.bitcast_convert_type(word & jnp.int32(-65536), jnp.float32)
    return step, lax.bitcast_convert_type(word << 16, jnp.float32)


def as_stored(k: Float[Array, "... D"], v: Float[Array, "... D"], pages: KVPages) -> KVPages:
    """Keys and values in the form that the pool has; leaves [..., D or D / 2] and [...]."""
    kind = kv_kind(pages.k.dtype)
    if kind is None:
        return KVPages(k.astype(pages.k.dtype), v.astype(pages.v.dtype))
    (k, k_scale), (v, v_scale) = quantize(k, kind), quantize(v, kind)
    return KVPages(k, v, k_scale, v_scale)


def float_pages(
    pages: KVPages, page_table: Int[Array, " M"], dtype: jax.typing.DTypeLike
) -> tuple[KVPages, Int[Array, " M"]]:
    """A pool of codes as numbers: a copy of the pages that the table names, in its order.

    Returns it with the table that names its pages; a pool of numbers stays as it is.
    """
    if kv_kind(pages.k.dtype) is None:
        return pages, page_table
    taken = jax.tree.map(lambda x: x[:, page_table], pages)
    k, v = (
        values(codes, scale).astype(dtype)
        for codes, scale in ((taken.k, taken.k_scale), (taken.v, taken.v_scale))
    )
    return KVPages(k, v), jnp.arange(page_table.shape[0], dtype=page_table.dtype)
