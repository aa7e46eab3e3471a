"""What decode attention multiplies: scores of a tile's keys, values, and the query for both.

See ``decode_attention`` for the letters and the way pages of codes are multiplied. What threads do
to bytes in PTX, and products from registers, the interpreter cannot run: tests put plain arithmetic
in the place of ``register_matmul``, ``e4m3_as_bf16`` and ``nibbles_as_bf16``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kv_codes
from pallas_kernels.hopper.decode_tiles import TILE, Boxes, Buffers, Split
from pallas_kernels.hopper.mosaic import (
    LOG2_E,
    MATRIX,
    MATRIX_TRANSPOSED,
    PER_ROW,
    matmul,
    spread_columns,
    spread_rows,
)
from pallas_kernels.hopper.quant_operands import asm

# An int8 holds a query to 1/127; the rounding error, at most 1/254 of that step, fills another. Of
# e4m3 the error is at most half of the largest step, 32, and 16 times that still a number.
LOW_STEPS = {"int8": 254.0, "int4": 254.0, "fp8": 16.0}


class QueryScale(NamedTuple):
    """What products of codes of K with a query's two parts are multiplied by, and added to."""

    scale: Any  # [N]
    totals: tuple[Any, ...]  # [N], of the query in either half of the channels; for int4 pages only


def load_query(rows, buffers: Buffers) -> QueryScale | None:
    """Puts Q ``rows`` [N, D] bf16 where wgmma reads it, as one bf16 matrix or two of codes.

    For int4 pages a query of [4 N, D]: both parts with the first half of the channels and zeros for
    the second, then the other way round. Returns what scores are made with, if those are codes.
    """
    N, D = rows.shape
    transposed = plgpu.load(
        rows.transpose((1, 0)),
        layout=MATRIX_TRANSPOSED,
        optimized=False,  # D * N elements once a split
    )
    if buffers.kind is None:
        buffers.query[0].transpose((1, 0))[...] = transposed
        plgpu.commit_smem()
        return None
    query = plgpu.layout_cast(transposed, MATRIX).astype(jnp.float32)  # [D, N]
    largest = jnp.maximum(jnp.abs(query).max(axis=0), 1e-30)
    if buffers.kind == "fp8":
        # By a power of two: then two e4m3, of 4 digits each, hold the 8 of a bf16.
        bits = lax.bitcast_convert_type(448.0 / largest, jnp.int32) & jnp.int32(0x7F800000)
        factor = lax.bitcast_convert_type(bits, jnp.float32)
        largest = 127.0 / factor  # what 127 stands for, as with int8
    else:
        factor = 127.0 / largest
    query = query * spread_columns(factor, query)
    high = _rounded(query, buffers.kind)
    low = _rounded((query - high) * LOW_STEPS[buffers.kind], buffers.kind)
    parts, targets, totals = [high, low], buffers.query, ()
    if buffers.kind == "int4":
        [stacked] = buffers.query
        targets = [stacked.at[pl.ds(number * N, N)] for number in range(4)]
        channel = plgpu.broadcasted_iota(jnp.int32, query.shape, 0, layout=MATRIX)
        halves = channel < D // 2, channel >= D // 2
        parts = [jnp.where(half, part, 0.0) for half in halves for part in (high, low)]
        totals = tuple(
            (first * LOW_STEPS["int4"] + second).sum(axis=0)
            for first, second in (parts[:2], parts[2:])
        )
        largest = largest * (1.0 / LOW_STEPS["int4"])
    for to, value in zip(targets, parts, strict=True):
        # Codes are exact in bf16, the width that can be transposed.
        value = plgpu.layout_cast(value.astype(jnp.bfloat16), MATRIX_TRANSPOSED)
        to.transpose((1, 0))[...] = value.astype(jnp.float32).astype(to.dtype)
    plgpu.commit_smem()
    return QueryScale(largest * (score_scale(D) / 127.0), totals)


def _rounded(x, kind: kv_codes.KVKind):
    if kind == "fp8":
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.round(x)


def score_scale(head_dim: int) -> float:
    """Scores in base 2: exp2 is one instruction."""
    return head_dim**-0.5 * LOG2_E


def scales(scale_smem, stage, boxes: Boxes, like):
    """Of a tile's tokens, in every column of ``like`` [T, ...]."""

    def shifted(j):
        """Right in the rows of box j: what lies before its scales is left out."""
        gaps = j * (boxes.scale_stride - boxes.tokens)
        row_scale = plgpu.load(scale_smem.at[stage, pl.ds(gaps, TILE)], layout=PER_ROW)
        return spread_rows(row_scale, like)

    result = shifted(0)
    if boxes.tokens < boxes.scale_stride:
        row = plgpu.broadcasted_iota(jnp.int32, like.shape, 0, layout=MATRIX)
        for j in range(1, boxes.count):
            result = jnp.where(row >= j * boxes.tokens, shifted(j), result)
    return result


def scores(buffers: Buffers, stage, boxes: Boxes, query_scale: QueryScale | None):
    """Of a tile's keys [T, N], base 2; ``query_scale`` is what ``load_query`` returned."""
    keys = buffers.k.at[stage]
    N, D = buffers.query[0].shape
    if buffers.kind is None or query_scale is None:
        query = buffers.query[0].transpose((1, 0))
        return matmul(keys, query, TILE, N) * score_scale(D)
    if buffers.kind == "int4":
        return _scores_of_halves(buffers, stage, boxes, query_scale)
    sums = jnp.int32 if buffers.kind == "int8" else jnp.float32
    high, low = (
        matmul(keys, x.transpose((1, 0)), TILE, N, sums).astype(jnp.float32) for x in buffers.query
    )
    x = high + low * (1.0 / LOW_STEPS[buffers.kind])
    x = x * spread_columns(query_scale.scale, high)
    return x * scales(buffers.k_scale[0], stage, boxes, x)


def _scores_of_halves(buffers: Buffers, stage, boxes: Boxes, query_scale: QueryScale):
    """The same where each half of the channels has codes and a word of its own (int4)."""
    [query] = buffers.query
    N = query.shape[0] // 4
    codes = plgpu.load(buffers.k.at[stage], layout=plgpu.Layout.WGMMA_8BIT)
    sums = register_matmul(_nibbles(codes), query.T, TILE, 4 * N, jnp.int32)
    x = 0.0
    for half in range(2):
        high, low = (sums[:, n * N : (n + 1) * N] for n in (2 * half, 2 * half + 1))
        product = (high * int(LOW_STEPS["int4"]) + low).astype(jnp.float32)
        step, lowest = step_and_lowest(buffers.k_scale[half], stage, boxes, product)
        if half == 1:
            step, lowest = step * (1 / 16), lowest + 8.0 * step
        x = x + lowest * spread_columns(query_scale.totals[half], lowest)
        x = x + product * step
    return x * spread_columns(query_scale.scale, x)


def register_matmul(a, b, m: int, n: int, dtype: jax.typing.DTypeLike):
    """As ``matmul``, with ``a`` in registers, which Mosaic GPU's interpreter cannot do."""
    return matmul(a, b, m, n, dtype)


def step_and_lowest(words, stage, boxes: Boxes, like, attended=None):
    """What the words of half of the channels say, [T, ...]; 0 where not ``attended``, if given."""
    word = scales(words, stage, boxes, like)
    if attended is not None:
        word = jnp.where(attended, word, 0)
    return kv_codes.word_values(word)


def _nibbles(codes):
    """Codes of 4 bits [T, D / 2] uint8 as int8 [T, D]: n, and of the upper half 16 * (n - 8).

    Numbers of 8 bits can be masked, and not shifted.
    """
    return jnp.concatenate([codes & 15, (codes & 240) ^ 128], axis=1).astype(jnp.int8)


def wide_layout(row: int):
    """[T, row] of codes: a thread has 8 in a row, so 16 bytes when they are bf16."""
    rows = 256 // row  # a warp's
    tiling = fa.Tiling(((4 * rows, row), (rows, row), (8,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def values(buffers: Buffers, stage, split: Split, step):
    """V bf16 in shared memory [T, D]: as it is, with zeros where not attended, or its codes.

    No code is NaN there, so that the weights of unattended rows, zeros, silence them. Those of
    4 bits are divided by 64.
    """
    tile, v = buffers.v.at[stage], buffers.v_bf16
    if buffers.kind is None:
        _zero_unattended(tile, split, step)
        return tile
    if buffers.kind == "int8":
        codes = plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        v[...] = plgpu.layout_cast(codes, MATRIX).astype(jnp.bfloat16)
        return v
    layout = wide_layout(tile.shape[1])
    codes = plgpu.load(tile, layout=layout)
    if buffers.kind == "fp8":
        v[...] = e4m3_as_bf16(codes, layout)
    else:
        v[...] = jnp.concatenate(nibbles_as_bf16(codes, layout), axis=1)
    return v


def _zero_unattended(tile, split: Split, step) -> None:
    first = split.tile_of(step) * TILE

    @pl.when((first < split.start) | (first + TILE > split.stop))
    def _():
        v = plgpu.load(tile, layout=MATRIX)
        attended = split.attends(split.token_numbers(step, v.shape))
        tile[...] = jnp.where(attended, v, jnp.zeros_like(v))


# Of a word of four codes, two pairs of bf16. As the bits of a bf16 a code of 4 bits is a subnormal
# number, code * 2^-133, and one of e4m3 has its sign, exponent and mantissa in place, * 2^-120.
_E4M3 = (
    "prmt.b32 a, $1, 0, {}; shr.b32 b, a, 4; and.b32 b, b, 0x07f007f0; "
    "lop3.b32 b, a, 0x80008000, b, 0xea; mov.b32 c, 0x7b807b80; mul.bf16x2 $0, b, c;"
)
_NIBBLES = (
    "shr.b32 a, $1, {}; and.b32 a, a, 0x0f0f0f0f; prmt.b32 a, a, 0, {}; "
    "mov.b32 b, 0x7f007f00; mul.bf16x2 $0, a, b;"
)
E4M3_PAIRS: list[str] = [_E4M3.format(order) for order in ("0x1404", "0x3424")]
NIBBLE_PAIRS: list[list[str]] = [
    [_NIBBLES.format(shift, order) for order in ("0x4140", "0x4342")] for shift in (0, 4)
]


def e4m3_as_bf16(codes, layout):
    """[T, D]: NaN becomes 480."""
    [made] = _pairs(codes, layout, [E4M3_PAIRS])
    return made


def nibbles_as_bf16(codes, layout):
    """Codes of 4 bits [T, D / 2] uint8, / 64: those of the lower halves of bytes, and the upper."""
    return _pairs(codes, layout, NIBBLE_PAIRS)


def _pairs(codes, layout, arrays: list[list[str]]) -> tuple[Any, ...]:
    """Arrays of bf16, for each the PTX of both pairs of a word."""

    def unpack(_, codes):
        bf16, i32 = ir.BF16Type.get(), ir.IntegerType.get_signless(32)
        made = []
        for pairs in arrays:
            registers = np.empty_like(codes.registers)
            for index, register in np.ndenumerate(codes.registers):
                words = vector.bitcast(ir.VectorType.get((2,), i32), register)
                texts = [(vector.extract(words, [], [i]), text) for i in range(2) for text in pairs]
                values = [asm(text, word) for word, text in texts]
                packed = vector.from_elements(ir.VectorType.get((4,), i32), values)
                registers[index] = vector.bitcast(ir.VectorType.get((8,), bf16), packed)
            made.append(
                fa.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)
            )
        return tuple(made)

    result = plgpu.ShapeDtypeStruct(codes.shape, jnp.dtype(jnp.bfloat16), layout=layout)
    returned = (result,) * len(arrays)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=returned)(unpack)(codes)


def of_halves(first, second):
    """[D, N]: the first of the channels of a matrix, or value, the others of another."""
    D = first.shape[0]
    if D == 128:
        return jnp.concatenate([first[:64], second[64:]], axis=0)
    channel = plgpu.broadcasted_iota(jnp.int32, first.shape, 0, layout=MATRIX)
    return jnp.where(channel < D // 2, first, second)
