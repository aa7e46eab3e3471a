"""Products of packed codes with x: what a thread does with its registers, in PTX of our own.

Mosaic has no operand layout for codes packed as ``packed.py`` does, so these functions make the
operands of mma.sync and wgmma by themselves. bf16 holds every code exactly:

    4 bits    0x4300 is 128, whose mantissa then counts ones: 128 + q, less 136, is q - 8
    int8      (128 + its low 7 bits) - (128, or 256 if it is negative)
    e4m3      its exponent and mantissa in the place of bf16's, times 2^120

The interpreter cannot run them. Tests put plain arithmetic in their place.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, vector
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic import MATRIX, PER_COLUMN, PER_ROW
from pallas_kernels.packed import BITS, INPUTS, ROWS
from pallas_kernels.types import PackedWeight
from pallas_kernels.weights import ZERO_STEPS

# What is taken off codes of 4 bits, and so off their zero points.
CODE_OFFSET = {"uint4": 8, "int8": 0, "float8_e4m3fn": 0}
_PRODUCTS = 8  # m16n8k16 a block, warp and 8 columns
_FLOAT32 = jnp.dtype(jnp.float32)


def words_layout(codes: str):
    """[rows, 64] int32, the codes of a block: 16 bytes a thread and load."""
    return plgpu.Layout.WG_STRIDED((4 * BITS[codes], ROWS), vec_size=4)


# [4, N, 32] bf16, 128 inputs of x as operand B: thread 4 g + t has 16 bytes of row g in each 32
# inputs, the same in each warp. These are 512 bytes in a row for a warp: no bank is asked twice.
X_TILE = plgpu.Layout.TILED(
    fa.Tiling(((8, 32), (8,))), warp_dims=(fa.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)


def row_layout(inputs: int):
    """[inputs / 32, 32] bf16, of one row of x, spread over all threads."""
    each = next(n for n in (8, 4, 2, 1) if inputs % (128 * n) == 0)
    return plgpu.Layout.WG_STRIDED((inputs // 32, 32), vec_size=each)


# Half the rows of a matrix, 8 of each 16: what a thread has of them is its own in either half.
HALF = plgpu.Layout.TILED(
    fa.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
# [m, N] float32, all of it in each warp: sums over m take no memory that warpgroups share.
EACH_WARP = plgpu.Layout.TILED(
    fa.Tiling(((8, 8), (2,))), warp_dims=(fa.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)


def multiply(words, x, *, codes: str, part: int, parts: int):
    """[64, N] float32: the codes of one of ``parts`` groups of a block, times their x.

    ``words`` int32 in ``words_layout``, ``x`` bf16 [4, N, 32] in ``X_TILE``, both of a whole block.
    """
    N = x.shape[1]

    def product(_, words, x):
        operands = _operands_a(codes, words)
        return _array(MATRIX, (64, N), _products(operands, x, part, parts, N))

    result = plgpu.ShapeDtypeStruct((64, N), _FLOAT32, layout=MATRIX)
    layouts = words_layout(codes), X_TILE
    return plgpu.inline_mgpu(arg_types=layouts, return_type=result)(product)(words, x)


def matrix(words, *, codes: str, part: int, parts: int):
    """[64, 128 / parts] bf16: the codes of one of ``parts`` groups of a block, for wgmma.

    ``words`` int32 in ``words_layout``, of a whole block. Inputs are in the order of ``packed.py``.
    """
    shape = ROWS, INPUTS // parts

    def unpack(_, words):
        operands = _operands_a(codes, words)
        each = len(operands) // parts
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        own = operands[part * each : (part + 1) * each]
        values = [vector.bitcast(pair, vector.from_elements(one, [x])) for x in own]
        return _array(MATRIX, shape, values)

    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16), layout=MATRIX)
    return plgpu.inline_mgpu(arg_types=(words_layout(codes),), return_type=result)(unpack)(words)


def row_totals(x, *, part: int, parts: int):
    """[N] float32: each row's sum over the inputs of one of ``parts`` groups: products with 1."""
    N = x.shape[1]

    def product(_, x):
        i32 = ir.IntegerType.get_signless(32)
        ones = arith.constant(i32, ir.IntegerAttr.get(i32, 0x3F803F80))
        sums = _products([ones] * (4 * _PRODUCTS), x, part, parts, N)
        return _array(PER_COLUMN, (N,), sums[::2])  # all rows are the same

    result = plgpu.ShapeDtypeStruct((N,), _FLOAT32, layout=PER_COLUMN)
    return plgpu.inline_mgpu(arg_types=(X_TILE,), return_type=result)(product)(x)


def scale_and_zero(here, packed: PackedWeight, part: int, parts: int):
    """[64] float32 each, of a group of the block ``here`` [rows, 64]; no zero: None."""
    first = 4 * BITS[packed.codes]
    word = plgpu.load(here.at[first + part], layout=PER_ROW)
    if packed.zeros == "byte":
        scale = lax.bitcast_convert_type(word & -256, jnp.float32)
        return scale, (word & 0xFF).astype(jnp.float32) * (1 / ZERO_STEPS)
    scale = lax.bitcast_convert_type(word, jnp.float32)
    if packed.zeros == "none":
        return scale, None
    zero = plgpu.load(here.at[first + parts + part], layout=PER_ROW)
    return scale, lax.bitcast_convert_type(zero, jnp.float32)


def store_transposed(ref, y) -> None:
    """``y`` [64, N] into ``ref`` [N, 64] of device memory.

    The eight threads of a warp that hold a column store 8 neighbours.
    """

    def store(_, ref, y):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()

        def constant(n: int) -> ir.Value:
            return arith.constant(i32, ir.IntegerAttr.get(i32, n))

        def place(first: ir.Value, n: int) -> ir.Value:
            return arith.index_cast(index, arith.addi(first, constant(n)))

        thread = arith.remui(utils.thread_idx(), constant(128))
        warp, lane = arith.divui(thread, constant(32)), arith.remui(thread, constant(32))
        row = arith.addi(arith.muli(warp, constant(16)), arith.divui(lane, constant(4)))
        column = arith.muli(arith.remui(lane, constant(4)), constant(2))
        for i, pair in enumerate(y.registers.flat):
            for e in range(2):
                value = vector.extract(pair, [], [e])
                at = [place(column, 8 * (i // 2) + e), place(row, 8 * (i % 2))]
                memref.store(value, ref, at)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), MATRIX))(store)(ref, y)


def split_pairs(y):
    """[64, N] as [32, N] twice: rows 0 to 7 of each 16, and rows 8 to 15."""
    N = y.shape[1]

    def split(_, y):
        registers = y.registers.reshape(N // 8, 2)
        return tuple(_array(HALF, (32, N), registers[:, half]) for half in range(2))

    result = plgpu.ShapeDtypeStruct((32, N), _FLOAT32, layout=HALF)
    return plgpu.inline_mgpu(arg_types=(MATRIX,), return_type=(result, result))(split)(y)


def _array(layout, shape: tuple[int, ...], values) -> fa.FragmentedArray:
    layout = layout.to_mgpu()
    array = np.empty(layout.registers_shape(shape), object)
    array.reshape(-1)[:] = values
    return fa.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)


def asm(text: str, *operands: ir.Value) -> Any:
    """The word $0 that PTX makes of ``operands`` $1, ..., with registers a, b and c in between."""
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    text = "{ .reg .b32 a, b, c; " + text + " }"
    return llvm.inline_asm(i32, list(operands), text, constraints)


def _operands_a(codes: str, words: fa.FragmentedArray) -> list[ir.Value]:
    """Operand A of the block's products: pairs of bf16, 4 a product."""
    operands = []
    for i in range(4 * words.registers.size):
        word = vector.extract(words.registers.flat[i // 4], [], [i % 4])
        if codes == "uint4":
            for p in range(4):
                move = f"shr.b32 a, $1, {4 * p};" if p else "mov.b32 a, $1;"
                merge = "lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;"
                less = "mov.b32 b, 0x43084308; sub.bf16x2 $0, a, b;"
                operands.append(asm(f"{move} {merge} {less}", word))
        elif codes == "int8":
            for bytes_ in ("0x4140", "0x4342"):
                text = (
                    f"prmt.b32 a, $1, 0x43, {bytes_}; and.b32 b, a, 0xff7fff7f; "
                    "and.b32 c, a, 0xff80ff80; sub.bf16x2 $0, b, c;"
                )
                operands.append(asm(text, word))
        else:
            for bytes_ in ("0x1404", "0x3424"):
                text = (
                    f"prmt.b32 a, $1, 0, {bytes_}; shr.b32 b, a, 4; and.b32 b, b, 0x07f007f0; "
                    "lop3.b32 b, a, 0x80008000, b, 0xea; mov.b32 c, 0x7b807b80; "
                    "mul.bf16x2 $0, b, c;"
                )
                operands.append(asm(text, word))
    return operands


def _products(
    operands: list[ir.Value], x: fa.FragmentedArray, part: int, parts: int, N: int
) -> list[ir.Value]:
    """Pairs of sums, of rows g and g + 8, for each 8 columns."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    b = x.registers.reshape(4, N // 8)  # 8 inputs each
    each, values = _PRODUCTS // parts, []
    for j in range(N // 8):
        sums = [arith.constant(f32, ir.FloatAttr.get(f32, 0.0))] * 4
        for k in range(part * each, (part + 1) * each):
            inputs = vector.bitcast(ir.VectorType.get((4,), i32), b[k // 2, j])
            pair = [vector.extract(inputs, [], [2 * (k % 2) + i]) for i in range(2)]
            result: Any = llvm.inline_asm(
                llvm.StructType.get_literal([f32] * 4),
                [*operands[4 * k : 4 * k + 4], *pair, *sums],
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3},"
                "{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};",
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            )
            sums = [llvm.extractvalue(f32, result, [i]) for i in range(4)]
        two = ir.VectorType.get((2,), f32)
        values += [vector.from_elements(two, sums[2 * h : 2 * h + 2]) for h in range(2)]
    return values
