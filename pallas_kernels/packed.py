"""Quantised matrices in the order in which Hopper's tensor cores take them: packed, and back.

A block is 64 output channels by 128 inputs. The 128 threads of a warpgroup hold it as operand A of
mma.sync (eight products m16n8k16 a warp) or wgmma; its words lie in memory in the order of the
threads' registers, so that a thread's 16-byte loads are its own operands. Thread 4 g + t of warp w
has of product 2 c + s

    rows     16 w + 8 h + g                    h = 0, 1
    inputs   32 c + 16 s + 8 b + 2 t + e       b, e = 0, 1

A word holds 8 codes of 4 bits, of one product: code (e, b, h) begins at bit 16 e + 8 b + 4 h + 3,
and the last one ends in bits 0 to 2 (where a shift puts it, a code is what bf16 adds to 16 in
eighths). Or 4 codes of 8 bits, of half a product: code (h, e) at bit 16 h + 8 e. Behind its codes a
block has for each of its groups of inputs a float32 scale of every row, and its zero points. Those
of codes of 4 bits that are multiples of an eighth, and at most 16, take the low bytes of the scales
as eighths, if these are zero (as in all scales that were float16 or bfloat16, and those of
``quantize_weight``): what a code is less such a zero point bf16 holds exactly. All others have
words of their own.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.types import PackedWeight, Weight
from pallas_kernels.weights import ZERO_STEPS

ROWS, INPUTS = 64, 128  # of a block
BITS = {"int8": 8, "uint4": 4, "float8_e4m3fn": 8}
# Axes as named above, but o and G, the blocks; c = 2 j + i.
_SIZES = {"w": 4, "h": 2, "g": 8, "j": 2, "i": 2, "t": 4, "s": 2, "b": 2, "e": 2}
_INPUT_AXES = "Gjisbte"
# Channels in rows: as they are, or those of the first half beside those of the second.
_CHANNEL_AXES = {False: "owhg", True: "howg"}
_WORD_AXES = {4: "oGjwgtis" + "ebh", 8: "oGjiwgtsb" + "he"}  # words, then the codes in a word
_FIRST_BIT = {4: 3, 8: 0}  # of the first code in a word


def cannot_pack(weight: Weight) -> str | None:
    """Why a matrix cannot be packed; None if it can.

    >>> import jax.numpy as jnp
    >>> cannot_pack(Weight(jnp.ones((100, 64), jnp.int8), jnp.ones((1, 64)), None))
    'K=100 and out=64 must be multiples of 128 and 64, and not 0'
    """
    (K, out), groups = weight.shape, weight.scale.shape[0]
    if weight.scale.shape[1] != out:
        return f"its scales, {weight.scale.shape}, are those of rows"
    if K % INPUTS or out % ROWS or not K * out:
        return f"K={K} and out={out} must be multiples of {INPUTS} and {ROWS}, and not 0"
    if weight.zero is None and weight.codes.dtype == jnp.uint4:
        return "codes of 4 bits need zero points"
    if groups > 1 and K // groups % 32:
        return f"groups of {K // groups} inputs must be multiples of 32"
    return None


def group_size(packed: PackedWeight) -> int | None:
    """Inputs of a block that share a scale: 32, 64 or 128; None where a channel has one scale."""
    if packed.channel_scale is not None:
        return None
    return math.gcd(packed.shape[0] // packed.groups, INPUTS)


def pack_weight(weight: Weight, *, paired: bool = False, in_words: bool = False) -> PackedWeight:
    """The same numbers, in kernel order. Not for use under ``jit``: it looks at the zero points.

    ``paired`` is for a gated layer, whose channel i of the first half (gate) is multiplied with
    that of the second (up). ``in_words`` gives zero points words of their own even if they fit
    beside the scales: so matrices that differ in their numbers alone are packed alike. Raises
    ``ValueError`` for what ``cannot_pack`` names, and for codes that are NaN.

    >>> import jax.numpy as jnp
    >>> codes, scale = jnp.ones((256, 128), jnp.int8), jnp.full((1, 128), 0.5)
    >>> packed = pack_weight(Weight(codes, scale, None))
    >>> packed.shape, packed.words.nbytes
    ((256, 128), 32768)
    >>> bool((unpack_weight(packed).codes == codes).all())
    True
    """
    reason = cannot_pack(weight)
    if reason is None and weight.codes.dtype == jnp.float8_e4m3fn and _hold_nan(weight.codes):
        reason = "codes of e4m3 are NaN, which kernels take for 480"
    if reason is not None:
        raise ValueError(f"the matrix cannot be packed: {reason}")
    zeros: Literal["none", "byte", "word"] = "none"
    if weight.zero is not None:
        fit = not in_words and _may_fit_bytes(weight) and _fit_bytes(weight.scale, weight.zero)
        zeros = "byte" if fit else "word"
    return _pack(weight, zeros=zeros, paired=paired)


def packed_shape(weight: Weight, *, paired: bool = False) -> PackedWeight:
    """What ``pack_weight`` makes of a matrix of these shapes, whose zero points of 4 bits fit.

    >>> import jax.numpy as jnp
    >>> codes, scale = jnp.ones((256, 128), jnp.int8), jnp.full((1, 128), 0.5)
    >>> packed_shape(Weight(codes, scale, None)).words
    ShapeDtypeStruct(shape=(2, 2, 32, 64), dtype=int32)
    """
    zeros: Literal["none", "byte", "word"] = "none"
    if weight.zero is not None:
        zeros = "byte" if _may_fit_bytes(weight) else "word"
    return jax.eval_shape(partial(_pack, zeros=zeros, paired=paired), weight)


def _may_fit_bytes(weight: Weight) -> bool:
    return weight.codes.dtype == jnp.uint4


@jax.jit
def _fit_bytes(scale: Float[Array, "g out"], zero: Float[Array, "g out"]) -> Array:
    low = lax.bitcast_convert_type(scale, jnp.uint32) & 0xFF
    steps = zero * ZERO_STEPS
    # By bits: XLA takes numbers below 2^-126 for 0.
    same = _bitcast(zero, jnp.uint32) == _bitcast(jnp.round(steps) / ZERO_STEPS, jnp.uint32)
    return jnp.all((low == 0) & same & (steps <= 128) & ~jnp.signbit(zero))  # no -0.0


@jax.jit
def _hold_nan(codes: Array) -> Array:
    return jnp.isnan(codes.astype(jnp.float32)).any()


def _sizes(K: int, out: int, axes: str) -> list[int]:
    sizes = _SIZES | {"o": out // ROWS, "G": K // INPUTS}
    return [sizes[axis] for axis in axes]


def _order(axes: str, wanted: str) -> list[int]:
    return [axes.index(axis) for axis in wanted]


@partial(jax.jit, static_argnames=("zeros", "paired"))
def _pack(weight: Weight, *, zeros: Literal["none", "byte", "word"], paired: bool) -> PackedWeight:
    (K, out), groups = weight.shape, weight.scale.shape[0]
    bits, channels = BITS[weight.codes.dtype.name], _CHANNEL_AXES[paired]
    codes = weight.codes.astype(jnp.uint8) if bits == 4 else _bitcast(weight.codes, jnp.uint8)
    axes = _INPUT_AXES + channels
    codes = codes.reshape(_sizes(K, out, axes)).transpose(_order(axes, _WORD_AXES[bits]))
    codes = codes.reshape(out // ROWS, K // INPUTS, -1, 32 // bits)
    words = jnp.zeros(codes.shape[:3], jnp.uint32)
    for value in range(32 // bits):
        words |= codes[..., value].astype(jnp.uint32) << (bits * value)
    words = _rotate(words, _FIRST_BIT[bits])

    def rows(x: Array) -> Array:
        """[g, out] to [blocks, g, 64]."""
        y = x.reshape(len(x), *_sizes(K, out, channels))
        y = y.transpose(1 + channels.index("o"), 0, *(1 + i for i in _order(channels, "whg")))
        return y.reshape(out // ROWS, len(x), ROWS)

    how = {"codes": weight.codes.dtype.name, "groups": groups, "zeros": zeros, "paired": paired}
    if groups == 1 and zeros == "none":
        words = _bitcast(words, jnp.int32).reshape(*words.shape[:2], -1, ROWS)
        return PackedWeight(words=words, channel_scale=rows(weight.scale)[:, 0], **how)

    def block_rows(x: Array) -> Array:
        """[g, out] to [blocks, K / 128, groups of a block * 64]."""
        repeats = K // groups // math.gcd(K // groups, INPUTS)
        return rows(jnp.repeat(x, repeats, axis=0)).reshape(out // ROWS, K // INPUTS, -1)

    scale = block_rows(_bitcast(weight.scale, jnp.uint32))
    behind = [scale]
    if weight.zero is not None and zeros == "byte":
        behind = [scale | block_rows((weight.zero * ZERO_STEPS).astype(jnp.uint32))]
    elif weight.zero is not None:
        behind.append(block_rows(_bitcast(weight.zero, jnp.uint32)))
    words = _bitcast(jnp.concatenate([words, *behind], axis=2), jnp.int32)
    return PackedWeight(words=words.reshape(*words.shape[:2], -1, ROWS), channel_scale=None, **how)


@jax.jit
def unpack_weight(packed: PackedWeight) -> Weight:
    """What was packed, bit by bit.

    >>> import jax.numpy as jnp
    >>> weight = Weight(jnp.ones((256, 64), jnp.int8), jnp.full((1, 64), 0.5), None)
    >>> unpack_weight(pack_weight(weight)).scale[0, :2].tolist()
    [0.5, 0.5]
    """
    (K, out), bits = packed.shape, BITS[packed.codes]
    channels = _CHANNEL_AXES[packed.paired]
    blocks = _bitcast(packed.words, jnp.uint32)
    words = _rotate(blocks[:, :, : 4 * bits], -_FIRST_BIT[bits])
    values = [(words >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    codes = jnp.stack([x.astype(jnp.uint8) for x in values], axis=-1)
    axes = _INPUT_AXES + channels
    codes = codes.reshape(_sizes(K, out, _WORD_AXES[bits]))
    codes = codes.transpose(_order(_WORD_AXES[bits], axes)).reshape(K, out)
    dtype = jnp.dtype(packed.codes)
    codes = codes.astype(dtype) if bits == 4 else _bitcast(codes, dtype)

    def channel_order(x: Array) -> Array:
        """[blocks, g, 64] to [g, out]."""
        y = x.swapaxes(0, 1).reshape(x.shape[1], *_sizes(K, out, "owhg"))
        y = y.transpose(0, *(1 + i for i in _order("owhg", channels)))
        return y.reshape(x.shape[1], out)

    if packed.channel_scale is not None:
        return Weight(codes, channel_order(packed.channel_scale[:, None]))
    group = group_size(packed)
    assert group is not None  # it has no scale of channels
    rows, repeats = INPUTS // group, K // packed.groups // group

    def group_order(behind: Array) -> Array:
        """[blocks, K / 128, groups of a block, 64] to [g, out]."""
        return channel_order(behind.reshape(out // ROWS, -1, ROWS)[:, ::repeats])

    first = 4 * bits + rows
    scale, own = group_order(blocks[:, :, 4 * bits : first]), blocks[:, :, first:]
    zero = None
    if packed.zeros == "byte":
        zero = (scale & 0xFF).astype(jnp.float32) / ZERO_STEPS
        scale = scale & jnp.uint32(0xFFFFFF00)
    elif packed.zeros == "word":
        zero = _bitcast(group_order(own), jnp.float32)
    return Weight(codes, _bitcast(scale, jnp.float32), zero)


def _rotate(words: Array, bits: int) -> Array:
    """To the left."""
    return words << (bits % 32) | words >> (-bits % 32) if bits else words


def _bitcast(x: Array, dtype) -> Array:
    return lax.bitcast_convert_type(x, dtype)
