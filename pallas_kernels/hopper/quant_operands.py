"""Products of packed codes with x: what a thread does with its registers, in PTX of our own.

Mosaic has no operand layout for codes packed as ``packed.py`` does, so these functions make the
operands of mma.sync and wgmma by themselves. bf16 holds every code exactly:

    4 bits    0x4180 is 16, whose mantissa then counts eighths: 16 + q, less 16 + z, is q - z
    int8      (128 + its low 7 bits) - (128, or 256 if it is negative)
    e4m3      its exponent and mantissa in the place of bf16's, times 2^120

The interpreter cannot run them. Tests put plain arithmetic in their place.
"""

import itertools
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

# Codes of 4 bits are less their zero points. Where these are no eighths they are less 8, and the
# rest of the zero point is multiplied with the sum of x.
CODE_OFFSET = 8
_PAIR_OF_SIXTEENS, _EIGHTH = 0x41804180, 0x00010001
_PRODUCTS = 8  # m16n8k16 a block, warp and 8 columns
_FLOAT32 = jnp.dtype(jnp.float32)


def words_layout(codes: str):
    """[rows, 64] int32, the codes of a block: 16 bytes a thread and load."""
    return plgpu.Layout.WG_STRIDED((4 * BITS[codes], ROWS), vec_size=4)


# [N, 4, 32] bf16, 128 inputs of x as operand B, as ``store_planes`` has put them into shared
# memory: thread 4 g + t has of row g all that it multiplies in 16 bytes for each 32 inputs, the
# same in each warp.
X_TILE = plgpu.Layout.TILED(
    fa.Tiling(((8, 4, 8),)), warp_dims=(fa.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)
# Numbers behind a plane: with them no bank of shared memory is asked twice for 16 bytes.
PLANE_PADDING = 8
# Half the rows of a matrix, 8 of each 16: what a thread has of them is its own in either half.
HALF = plgpu.Layout.TILED(
    fa.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
# [m, N] float32, all of it in each warp: sums over m take no memory that warpgroups share.
EACH_WARP = plgpu.Layout.TILED(
    fa.Tiling(((8, 8), (2,))), warp_dims=(fa.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)


def row_layout(inputs: int):
    """[inputs] bf16, of one row of x, spread over all threads."""
    each = next(n for n in (8, 4, 2, 1) if inputs % (128 * n) == 0)
    return plgpu.Layout.WG_STRIDED((inputs,), vec_size=each)


def _constant(n: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, n))


def _index(n: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), n)


def store_planes(ref, x) -> None:
    """``x`` [n] bf16 into ``ref`` [4, n / 4] of shared memory: pairs of neighbours by turns.

    So the inputs of a thread t, 2 t and 2 t + 1 of each 8, lie in plane t one behind the other.
    """

    def store(_, ref, x):
        each = x.layout.vec_size
        thread = arith.remui(utils.thread_idx(), _constant(128))
        for i, values in enumerate(x.registers.flat):
            first = arith.muli(arith.addi(thread, _constant(128 * i)), _constant(each))
            for at in range(0, each, 2):
                n = arith.addi(first, _constant(at))
                pair = arith.divui(n, _constant(2))
                plane = arith.remui(pair, _constant(4))
                column = arith.muli(arith.divui(pair, _constant(4)), _constant(2))
                if each == 1:
                    column = arith.addi(column, arith.remui(n, _constant(2)))
                own = vector.extract_strided_slice(
                    ir.VectorType.get((min(each, 2),), ir.BF16Type.get()),
                    values,
                    [at],
                    [min(each, 2)],
                    [1],
                )
                vector.store(own, ref, [_index(plane), _index(column)], alignment=2 * min(each, 2))

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), row_layout(x.shape[0])))(store)(ref, x)


def load_planes(ref):
    """[N, 4, 32] bf16 in ``X_TILE``, from ``ref`` [N, 4, 32] of shared memory.

    ``plgpu.load`` does not lower for a piece of padded planes
    (findings/mosaic_gpu_piece_of_padded_rows.sh).
    """
    shape = ref.shape

    def load(_, ref):
        lane = arith.remui(utils.thread_idx(), _constant(32))
        row, plane = arith.divui(lane, _constant(4)), arith.remui(lane, _constant(4))
        eight = ir.VectorType.get((8,), ir.BF16Type.get())
        values = []
        for j, c in itertools.product(range(shape[0] // 8), range(4)):
            places = arith.addi(row, _constant(8 * j)), plane, _constant(8 * c)
            at = [_index(place) for place in places]
            values.append(vector.load(eight, ref, at, alignment=16))
        return _array(X_TILE, shape, values)

    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16), layout=X_TILE)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(load)(ref)


def multiply(words, x, offsets, *, codes: str, part: int, parts: int):
    """[64, N] float32: the codes of one of ``parts`` groups of a block, times their x.

    ``words`` int32 in ``words_layout``, ``x`` bf16 [N, 4, 32] in ``X_TILE``, both of a whole block;
    ``offsets`` int32 [64] or None, as ``scale_and_zero`` has them.
    """
    N = x.shape[0]

    def product(_, words, x, *offsets):
        operands = _operands_a(codes, words, offsets, part, parts)
        return _array(MATRIX, (64, N), _products(operands, x, part, parts, N))

    result = plgpu.ShapeDtypeStruct((64, N), _FLOAT32, layout=MATRIX)
    arguments, layouts = _with_offsets((words, x), (words_layout(codes), X_TILE), offsets)
    return plgpu.inline_mgpu(arg_types=layouts, return_type=result)(product)(*arguments)


def matrix(words, offsets, *, codes: str, part: int, parts: int):
    """[64, 128 / parts] bf16: the codes of one of ``parts`` groups of a block, for wgmma.

    ``words`` int32 in ``words_layout``, of a whole block; ``offsets`` as for ``multiply``.
    """
    shape = ROWS, INPUTS // parts

    def unpack(_, words, *offsets):
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        own = _operands_a(codes, words, offsets, part, parts)
        values = [vector.bitcast(pair, vector.from_elements(one, [x])) for x in own]
        return _array(MATRIX, shape, values)

    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16), layout=MATRIX)
    arguments, layouts = _with_offsets((words,), (words_layout(codes),), offsets)
    return plgpu.inline_mgpu(arg_types=layouts, return_type=result)(unpack)(*arguments)


def code_bytes(words):
    """[64, 128] int8, the bits of a block's codes of 8 bits; ``words`` in ``words_layout``."""
    shape = ROWS, INPUTS

    def unpack(_, words):
        i16 = ir.IntegerType.get_signless(16)
        halves, pair = (ir.VectorType.get((2,), x) for x in (i16, ir.IntegerType.get_signless(8)))
        one = ir.VectorType.get((1,), i16)
        values = []
        for i in range(4 * words.registers.size):
            word = vector.extract_strided_slice(
                ir.VectorType.get((1,), ir.IntegerType.get_signless(32)),
                words.registers.flat[i // 4],
                [i % 4],
                [1],
                [1],
            )
            of_rows = vector.bitcast(halves, word)
            for h in range(2):
                own = vector.from_elements(one, [vector.extract(of_rows, [], [h])])
                values.append(vector.bitcast(pair, own))
        return _array(MATRIX, shape, values, is_signed=True)

    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.int8), layout=MATRIX)
    layouts = (words_layout("int8"),)
    return plgpu.inline_mgpu(arg_types=layouts, return_type=result)(unpack)(words)


def _with_offsets(arguments: tuple, layouts: tuple, offsets) -> tuple[tuple, tuple]:
    if offsets is None:
        return arguments, layouts
    return (*arguments, offsets), (*layouts, PER_ROW)


def row_totals(x, *, part: int, parts: int):
    """[N] float32: each row's sum over the inputs of one of ``parts`` groups: products with 1."""
    N = x.shape[0]

    def product(_, x):
        ones = _constant(0x3F803F80)
        sums = _products([ones] * (4 * _PRODUCTS // parts), x, part, parts, N)
        return _array(PER_COLUMN, (N,), sums[::2])  # all rows are the same

    result = plgpu.ShapeDtypeStruct((N,), _FLOAT32, layout=PER_COLUMN)
    return plgpu.inline_mgpu(arg_types=(X_TILE,), return_type=result)(product)(x)


def scale_and_zero(here, packed: PackedWeight, part: int, parts: int):
    """Of a group of the block ``here`` [rows, 64], [64] each: scale, offsets, zero.

    The scale is float32. Offsets are what ``matrix`` and ``multiply`` take off codes, zero what is
    left to take off, float32; either is None if there is none.
    """
    first = 4 * BITS[packed.codes]
    word = plgpu.load(here.at[first + part], layout=PER_ROW)
    if packed.zeros == "byte":
        offsets = (word & 0xFF) * _EIGHTH + _PAIR_OF_SIXTEENS
        return lax.bitcast_convert_type(word & -256, jnp.float32), offsets, None
    scale = lax.bitcast_convert_type(word, jnp.float32)
    if packed.zeros == "none":
        return scale, None, None
    zero = plgpu.load(here.at[first + parts + part], layout=PER_ROW)
    zero = lax.bitcast_convert_type(zero, jnp.float32)
    return scale, None, zero - CODE_OFFSET if packed.codes == "uint4" else zero


def store_transposed(ref, y) -> None:
    """``y`` [64, N] in ``MATRIX``, or [32, N] in ``HALF``, into ``ref`` [N, 64 or 32] of memory.

    The eight threads of a warp that hold a column store 8 neighbours.
    """
    layout, of_warp = (MATRIX, 16) if y.shape[0] == ROWS else (HALF, 8)

    def store(_, ref, y):
        thread = arith.remui(utils.thread_idx(), _constant(128))
        warp, lane = arith.divui(thread, _constant(32)), arith.remui(thread, _constant(32))
        row = arith.addi(arith.muli(warp, _constant(of_warp)), arith.divui(lane, _constant(4)))
        column = arith.muli(arith.remui(lane, _constant(4)), _constant(2))
        halves = of_warp // 8
        for i, pair in enumerate(y.registers.flat):
            for e in range(2):
                value = vector.extract(pair, [], [e])
                places = (column, 8 * (i // halves) + e), (row, 8 * (i % halves))
                at = [_index(arith.addi(first, _constant(n))) for first, n in places]
                memref.store(value, ref, at)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))(store)(ref, y)


def split_pairs(y):
    """[64, N] as [32, N] twice: rows 0 to 7 of each 16, and rows 8 to 15."""
    N = y.shape[1]

    def split(_, y):
        registers = y.registers.reshape(N // 8, 2)
        return tuple(_array(HALF, (32, N), registers[:, half]) for half in range(2))

    result = plgpu.ShapeDtypeStruct((32, N), _FLOAT32, layout=HALF)
    return plgpu.inline_mgpu(arg_types=(MATRIX,), return_type=(result, result))(split)(y)


def _array(
    layout, shape: tuple[int, ...], values, is_signed: bool | None = None
) -> fa.FragmentedArray:
    layout = layout.to_mgpu()
    array = np.empty(layout.registers_shape(shape), object)
    array.reshape(-1)[:] = values
    return fa.FragmentedArray(_registers=array, _layout=layout, _is_signed=is_signed)


def asm(text: str, *operands: ir.Value) -> Any:
    """The word $0 that PTX makes of ``operands`` $1, ..., with registers a, b and c in between."""
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    text = "{ .reg .b32 a, b, c; " + text + " }"
    return llvm.inline_asm(i32, list(operands), text, constraints)


def _operands_a(
    codes: str,
    words: fa.FragmentedArray,
    offsets: tuple[fa.FragmentedArray, ...],
    part: int,
    parts: int,
) -> list[ir.Value]:
    """Operand A of the products of one of ``parts`` groups: pairs of bf16, 4 a product.

    ``offsets`` is empty or has the pairs that are taken off codes of 4 bits, of rows g and g + 8.
    """
    operands, each = [], 4 * words.registers.size // parts
    for i in range(part * each, (part + 1) * each):
        word = vector.extract(words.registers.flat[i // 4], [], [i % 4])
        if codes == "uint4":
            for p in range(4):
                move = f"shf.r.wrap.b32 a, $1, $1, {4 * p};" if p else "mov.b32 a, $1;"
                merge = "lop3.b32 a, a, 0x00780078, 0x41804180, 0xea;"
                if offsets:
                    text, own = f"{move} {merge} sub.bf16x2 $0, a, $2;", offsets[0].registers.flat
                    operands.append(asm(text, word, own[p % 2]))
                else:
                    less = f"mov.b32 b, {_PAIR_OF_SIXTEENS + 8 * CODE_OFFSET * _EIGHTH:#x};"
                    operands.append(asm(f"{move} {merge} {less} sub.bf16x2 $0, a, b;", word))
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
    """Pairs of sums, of rows g and g + 8, for each 8 columns.

    ``operands`` are those of the part alone, x is that of the block.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    b = x.registers.reshape(N // 8, 4)  # 8 inputs each
    each, values = _PRODUCTS // parts, []
    for j in range(N // 8):
        sums = [arith.constant(f32, ir.FloatAttr.get(f32, 0.0))] * 4
        for i in range(each):
            k = part * each + i
            inputs = vector.bitcast(ir.VectorType.get((4,), i32), b[j, k // 2])
            pair = [vector.extract(inputs, [], [2 * (k % 2) + h]) for h in range(2)]
            result: Any = llvm.inline_asm(
                llvm.StructType.get_literal([f32] * 4),
                [*operands[4 * i : 4 * i + 4], *pair, *sums],
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3},"
                "{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};",
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            )
            sums = [llvm.extractvalue(f32, result, [n]) for n in range(4)]
        two = ir.VectorType.get((2,), f32)
        values += [vector.from_elements(two, sums[2 * h : 2 * h + 2]) for h in range(2)]
    return values
