"""Blocks of GGUF's legacy quantisations as codes, scales and zero points, as they are stored.

Layouts: ggml's ``block_q4_0``, ``block_q4_1`` and ``block_q8_0``. A block has 32 inputs: first a
half-precision scale, for Q4_1 a minimum behind it, then codes. Of a byte of 4-bit codes the low
half is input i, the high half input i + 16.
"""

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType

from convert.codes import Coded, CodedRows

_BLOCK = 32
# Of each kind: the codes' dtype, the bytes in front of them, and whether zero points are stored.
_KINDS = {
    GGMLQuantizationType.Q4_0: ("uint4", 2, True),
    GGMLQuantizationType.Q4_1: ("uint4", 4, True),
    GGMLQuantizationType.Q8_0: ("int8", 2, False),
}


def coded_rows(
    kind: GGMLQuantizationType, inputs: int, raw: Callable[[int, int], np.ndarray]
) -> Coded | None:
    """How to read a matrix of ``inputs`` columns; None for a kind that is no codes and scales.

    ``raw`` gives the bytes of rows [start, stop), uint8 [rows, bytes of a row].
    """
    if kind not in _KINDS:
        return None
    dtype, head, has_zero = _KINDS[kind]

    def rows(start: int, stop: int) -> CodedRows:
        blocks = raw(start, stop).reshape(stop - start, inputs // _BLOCK, -1)
        numbers = np.ascontiguousarray(blocks[..., :head]).view(np.float16).astype(np.float32)
        scale, packed = numbers[..., 0], blocks[..., head:]
        if kind == GGMLQuantizationType.Q8_0:
            codes = np.ascontiguousarray(packed).view(np.int8)
            return CodedRows(codes.reshape(stop - start, inputs), scale, None)
        codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
        if kind == GGMLQuantizationType.Q4_0:
            zero = np.full_like(scale, 8)
        else:
            # A block whose numbers are all alike has scale 0: its minimum is its scale then.
            minimum, flat = numbers[..., 1], scale == 0
            scale = np.where(flat, 1.0, scale).astype(np.float32)
            zero = -minimum / scale
            codes = np.where(flat[..., None], 0, codes)
        return CodedRows(codes.reshape(stop - start, inputs), scale, zero)

    return Coded(dtype=dtype, groups=inputs // _BLOCK, has_zero=has_zero, rows=rows)
