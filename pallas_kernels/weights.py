"""Quantised matrices: made, multiplied, and turned back into numbers. Plain JAX on every machine.

Round to nearest, from the least number of a group or channel to its greatest, 0 included, without
calibration. Ranges that are clipped where that loses least in squares were tried, and gained
nothing in perplexity: docs/quality.md.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.nan import keep_nan, largest_magnitude
from pallas_kernels.types import Weight

WeightKind = Literal["int8", "int4", "fp8"]
WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
# Inputs that may share a scale and a zero point of 4 bits.
WEIGHT_GROUPS = (32, 64, 128)
# Zero points of 4 bits are multiples of an eighth, so that a byte holds one: see ``packed.py``.
ZERO_STEPS = 8
_FP8_MAX = 448.0
# Rows up to which a product goes group by group: its parts are g times as large as its result.
_FEW_ROWS = 32


@partial(jax.jit, static_argnames=("kind", "group", "axis"))
def quantize_weight(
    kernel: Float[Array, "K out"], *, kind: WeightKind, group: int = 32, axis: Literal[0, 1] = 0
) -> Weight:
    """The nearest ``Weight`` of a kind; ``group`` is how many inputs share a scale in 4 bits.

    ``axis`` is that along which they share it: 0, or 1 of a table whose rows are looked up. A scale
    of 4 bits has 24 bits and its zero point is a multiple of an eighth from 0 to 15, so that both
    fit into a word of ``PackedWeight``; a number is off by nine sixteenths of a step at most, not
    a half. Raises ``ValueError`` for an unknown kind or group, and a group that does not divide the
    axis.

    >>> import jax.numpy as jnp
    >>> weight = quantize_weight(jnp.array([[1.0], [-2.54]]), kind="int8")
    >>> weight.codes.tolist(), round(float(weight.scale[0, 0]), 4)
    ([[50], [-127]], 0.02)
    """
    w = kernel.astype(jnp.float32)
    if kind == "int4":
        if group not in WEIGHT_GROUPS or w.shape[axis] % group:
            raise ValueError(
                f"{group=} must be one of {WEIGHT_GROUPS} and divide the {w.shape[axis]} inputs"
            )
        return _quantize_int4(w, group, axis)
    if kind not in WEIGHT_KINDS:
        raise ValueError(f"{kind=} is unknown; known: {', '.join(WEIGHT_KINDS)}")
    return Weight(*nearest_codes(w, jnp.float8_e4m3fn if kind == "fp8" else jnp.int8, axis=axis))


def nearest_codes(x: Float[Array, "..."], dtype, *, axis: int) -> tuple[Array, Array]:
    """Codes of 8 bits, ``dtype`` int8 or float8 e4m3, and the scales that they share along an axis.

    ``x`` is float32, and so are the scales, whose ``axis`` is 1 long.
    """
    # Zeros alone would have scale 0; any positive scale represents them exactly.
    largest = jnp.maximum(largest_magnitude(x, axis=axis, keepdims=True), 1e-30)
    if dtype == jnp.int8:
        scale = largest / 127.0
        return jnp.round(x / scale).astype(dtype), scale
    scale = largest / _FP8_MAX
    return (x / scale).astype(dtype), scale


def _quantize_int4(w: Float[Array, "K out"], group: int, axis: Literal[0, 1]) -> Weight:
    grouped = w.reshape(*w.shape[:axis], -1, group, *w.shape[axis + 1 :])  # [g, n, out], [V, g, n]
    along = axis + 1
    low = jnp.minimum(keep_nan(grouped.min(axis=along), grouped, axis=along), 0.0)
    high = jnp.maximum(grouped.max(axis=along), 0.0)
    # A group of zeros would have scale 0; with any other its zero point represents them exactly.
    # The least scale is far from numbers that XLA takes for 0.
    scale = jnp.where(low == high, 1.0, jnp.maximum((high - low) / 15.0, 1e-30))
    scale = _without_low_byte(scale)
    # No integer: of 16 codes half a step would be lost at either end.
    zero = jnp.round(jnp.abs(low) / scale * ZERO_STEPS) / ZERO_STEPS  # and never -0.0
    steps = grouped / jnp.expand_dims(scale, along) + jnp.expand_dims(zero, along)
    codes = jnp.clip(jnp.round(steps), 0.0, 15.0)
    return Weight(codes.reshape(w.shape).astype(jnp.uint4), scale, zero)


def _without_low_byte(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest float32 whose last 8 bits are 0: there a packed matrix has its zero point."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type((bits + 0x80) & jnp.uint32(0xFFFFFF00), jnp.float32)


def dequantize_weight(weight: Weight) -> Float[Array, "K out"]:
    """The numbers that a ``Weight`` stands for, float32: the specification of its product.

    >>> import jax.numpy as jnp
    >>> codes, scale, zero = jnp.array([[3], [1]], jnp.uint4), jnp.array([[0.5]]), jnp.ones((1, 1))
    >>> dequantize_weight(Weight(codes, scale, zero)).tolist()
    [[1.0], [0.0]]
    """
    (K, out), (rows, columns) = weight.codes.shape, weight.scale.shape
    blocks = rows, K // rows, columns, out // columns  # one of the two that are shared is 1
    codes = weight.codes.astype(jnp.float32).reshape(blocks)
    if weight.zero is not None:
        codes = codes - weight.zero[:, None, :, None]
    return (codes * weight.scale[:, None, :, None]).reshape(K, out)


def look_up(table: Weight, ids: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "... E"]:
    """Rows of a quantised table of [V, E], rounded to ``dtype``. They alone become numbers.

    ids in [0, V); what others give means nothing. Raises ``ValueError`` for a ``Weight`` whose
    scales are not those of rows.

    >>> import jax.numpy as jnp
    >>> table = quantize_weight(jnp.array([[1.0, -2.54], [127.0, 3.0]]), kind="int8", axis=1)
    >>> look_up(table, jnp.array([1]), jnp.bfloat16).tolist()
    [[127.0, 3.0]]
    """
    if table.scale.shape[0] != table.shape[0]:
        raise ValueError(
            f"table.scale has shape {table.scale.shape}, expected [{table.shape[0]}, any]: each "
            "row has scales of its own"
        )
    rows = jax.tree.map(lambda part: part[ids.reshape(-1)], table)
    return dequantize_weight(rows).astype(dtype).reshape(*ids.shape, table.shape[1])


def product(x: Float[Array, "... K"], kernel: Array | Weight) -> Float[Array, "... out"]:
    """``x @ kernel``, summed and returned in float32.

    Codes are exact in x's dtype, so that a quantised matrix is multiplied as it is and scales are
    applied to sums. Only 4 bits for many rows become a matrix of x's dtype first.

    >>> import jax.numpy as jnp
    >>> weight = Weight(jnp.array([[3], [1]], jnp.int8), jnp.array([[0.5]]))
    >>> product(jnp.array([[1.0, 2.0]]), weight).tolist()
    [[2.5]]
    """
    highest = lax.Precision.HIGHEST
    if not isinstance(kernel, Weight):
        return jnp.matmul(x, kernel, precision=highest, preferred_element_type=jnp.float32)
    (K, out), g = kernel.codes.shape, kernel.scale.shape[0]
    rows = x.reshape(-1, K)
    if g == 1 and kernel.zero is None:
        codes = kernel.codes.astype(x.dtype)
        y = jnp.matmul(rows, codes, precision=highest, preferred_element_type=jnp.float32)
        y = y * kernel.scale
    # R is no int in a program exported for any batch.
    elif isinstance(R := rows.shape[0], int) and R <= _FEW_ROWS:
        # Groups first: XLA's CPU backend has no product of bf16 whose batch axis is another.
        parts = rows.reshape(R, g, K // g).swapaxes(0, 1)
        codes = kernel.codes.astype(x.dtype).reshape(g, K // g, out)
        sums = jnp.matmul(parts, codes, precision=highest, preferred_element_type=jnp.float32)
        if kernel.zero is not None:
            totals = parts.astype(jnp.float32).sum(axis=2, keepdims=True)  # [g, rows, 1]
            sums = sums - totals * kernel.zero[:, None]
        y = (sums * kernel.scale[:, None]).sum(axis=0)
    else:
        whole = dequantize_weight(kernel).astype(x.dtype)
        y = jnp.matmul(rows, whole, precision=highest, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], out)
