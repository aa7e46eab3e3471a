"""Blocks of codes in shared memory as bf16 beside them: what a warpgroup does to pages of codes.

A thread takes 8 codes of a row at once, so that it stores 16 bytes. Each pair of them becomes

    f16x2     exact: a byte is the bits of a subnormal, e4m3 takes one instruction
    float32   twice: code * scale, or code * step + lowest value, rounded once
    bf16x2    rounded

which are the bits of ``kv_codes.values`` rounded to bf16. That is 3 to 3.6 instructions a code.
What threads do to pairs in PTX the interpreter cannot run: tests put plain arithmetic in the place
of ``numbers``.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kv_codes
from pallas_kernels.hopper.decode_operands import wide_layout
from pallas_kernels.hopper.mosaic import spread_rows
from pallas_kernels.hopper.quant_operands import asm
from pallas_kernels.kv_codes import KVKind

LINE = 128 // 4  # scales from where one copy may start to where the next may
# PTX for $0, a pair of bf16, of a word of codes $1 and float32 numbers as bits: a factor $2, and a
# summand $3 except of e4m3.
_REGISTERS = ".reg .b16 l, h; .reg .f32 x, y; "
_FLOATS = "mov.b32 {l, h}, a; cvt.f32.f16 x, l; cvt.f32.f16 y, h; "
_ROUND = "cvt.rn.bf16x2.f32 $0, y, x;"
_SCALE = f"{_FLOATS} mul.rn.f32 x, x, $2; mul.rn.f32 y, y, $2; {_ROUND}"
_STEP = f"{_FLOATS} fma.rn.f32 x, x, $2, $3; fma.rn.f32 y, y, $2, $3; {_ROUND}"
_BYTES = "prmt.b32 a, a, 0, 0x4140; ", "prmt.b32 a, a, 0, 0x4342; "  # of a pair
# For each of the arrays that codes are, the two pairs of a word.
PAIRS: dict[KVKind, list[list[str]]] = {
    "int8": [[f"{_REGISTERS} xor.b32 a, $1, 0x80808080; {pair} {_STEP}" for pair in _BYTES]],
    "fp8": [
        [
            f"{_REGISTERS} mov.b32 {{l, h}}, $1; cvt.rn.f16x2.e4m3x2 a, {pair}; {_SCALE}"
            for pair in ("l", "h")
        ]
    ],
    "int4": [
        [f"{_REGISTERS} {nibble} and.b32 a, a, 0x0f0f0f0f; {pair} {_STEP}" for pair in _BYTES]
        for nibble in ("mov.b32 a, $1;", "shr.b32 a, $1, 4;")
    ],
}
# A byte n as the bits of an f16 is n * 2^-24, which is exact.
BYTE_ONE = 2.0**24


def scale_stride(page_size: int) -> int:
    """From the scales of one page to those of the next, in shared memory.

    A copy starts at a multiple of 128 bytes there: scales of a page of 16 leave gaps.
    """
    return max(page_size, LINE)


def convert(codes, scales: Sequence[Any], to) -> None:
    """Stores what a block's codes [128, D or D / 2] stand for at ``to`` [128, D] bf16.

    All are in shared memory; scales [pages * stride], one a token, or of 4 bits two words.
    """
    kind = kv_codes.kv_kind(codes.dtype)
    assert kind is not None
    tokens, stored = codes.shape
    layout = wide_layout(stored)
    in_a_line = LINE * tokens // scales[0].shape[0]
    # At once, so that they fit into registers. A line's, or the fewest that the layout holds.
    rows = 64 if in_a_line == LINE else max(in_a_line, 1024 // stored)

    def convert_rows(number, _):
        first = pl.multiple_of(number * rows, rows)
        some = plgpu.load(codes.at[pl.ds(first, rows)], layout=layout)
        of_rows = [
            spread_rows(_row_scales(scale, first, rows, in_a_line, layout.reduce(1)), some)
            for scale in scales
        ]
        halves = numbers(some, of_rows, kind, layout)
        whole = halves[0] if len(halves) == 1 else jnp.concatenate(halves, axis=1)
        to[pl.ds(first, rows), :] = whole

    # A loop, since layout inference tries all combinations of what each slice could be.
    lax.fori_loop(0, tokens // rows, convert_rows, None)


def _row_scales(scale, first, rows: int, in_a_line: int, layout):
    """Of the tokens from ``first`` on, [rows], where each line has those of so many tokens."""
    line = lax.div(first, jnp.int32(in_a_line))

    def shifted(line):
        """Right in the rows of a line: the gaps before it are left out."""
        return plgpu.load(scale.at[pl.ds(first + line * (LINE - in_a_line), rows)], layout=layout)

    result = shifted(line)
    if in_a_line < rows and in_a_line < LINE:
        row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=layout)
        for more in range(1, rows // in_a_line):
            result = jnp.where(row >= more * in_a_line, shifted(line + more), result)
    return result


def factors(scales: Sequence[Any], kind: KVKind) -> list[tuple[Any, ...]]:
    """What ``PAIRS`` take beside codes, for each of the arrays that codes are."""
    if kind == "int4":
        halves = map(kv_codes.word_values, scales)
        return [(step * BYTE_ONE, lowest) for step, lowest in halves]
    if kind == "int8":  # code + 128 is the byte
        return [(scale * BYTE_ONE, scale * -128.0) for scale in scales]
    return [(scale,) for scale in scales]


def numbers(codes, scales: Sequence[Any], kind: KVKind, layout) -> tuple[Any, ...]:
    """bf16 [T, D], of 4 bits its halves: of codes in ``layout`` with the scales of their tokens."""
    flat = [x for of_array in factors(scales, kind) for x in of_array]

    def convert(_, codes, *flat):
        each = len(flat) // len(PAIRS[kind])
        return tuple(
            _numbers(codes, flat[i * each : (i + 1) * each], pairs)
            for i, pairs in enumerate(PAIRS[kind])
        )

    result = plgpu.ShapeDtypeStruct(codes.shape, jnp.dtype(jnp.bfloat16), layout=layout)
    types = {
        "arg_types": (layout,) * (1 + len(flat)),
        "return_type": (result,) * len(PAIRS[kind]),
    }
    return plgpu.inline_mgpu(**types)(convert)(codes, *flat)


def _numbers(codes, of_tokens, pairs: list[str]) -> fa.FragmentedArray:
    bf16, i32 = ir.BF16Type.get(), ir.IntegerType.get_signless(32)
    registers = np.empty_like(codes.registers)
    for index, register in np.ndenumerate(codes.registers):
        words = vector.bitcast(ir.VectorType.get((2,), i32), register)
        # All of a register's codes are of one token.
        of_token = [
            arith.bitcast(i32, vector.extract(x.registers[index], [], [0])) for x in of_tokens
        ]
        values = [
            asm(text, vector.extract(words, [], [i]), *of_token) for i in range(2) for text in pairs
        ]
        packed = vector.from_elements(ir.VectorType.get((4,), i32), values)
        registers[index] = vector.bitcast(ir.VectorType.get((8,), bf16), packed)
    return fa.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)
