"""Blocks of GGUF's quantisations as codes, scales and zero points, as they are stored.

Layouts: ggml's ``block_q4_0`` and its like, of 32 inputs with one scale, and ``block_q4_K`` and its
like, of 256 inputs, whose scales for 16 or 32 inputs are small integers times one for the block.
4 bits and fewer are held as 4, more as int8.

``(codes - zero) * scale`` is exact where a format has no minimum. A minimum becomes a zero point,
which rounds: then numbers are off by up to 2^-22 of a group's largest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from convert.codes import Coded, CodedRows

# Bytes of blocks [n, bytes of a block] to codes [n, inputs], scales and minima [n, groups].
_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    dtype: str  # of the codes
    group: int  # inputs
    zero: int | None  # point of all groups; None: there are minima, or none is needed
    has_minima: bool
    parts: Callable[[np.ndarray], _Parts]


def _halves(raw: np.ndarray) -> np.ndarray:
    """float16 stored in bytes [n, 2 m], as float32 [n, m]."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Bytes [n, m] to [n, 2 m]: the low halves, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1)


def _bits(raw: np.ndarray, width: int) -> np.ndarray:
    """Bytes [n, m] to [n, 8 / width, m]: all lowest ``width`` bits, then all next ones."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return raw[:, None] >> shifts & np.uint8((1 << width) - 1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """The 32 bits of 4 bytes, one for each input."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little")


def _q4_0(raw: np.ndarray) -> _Parts:
    return _nibbles(raw[:, 2:]), _halves(raw[:, :2]), None


def _q4_1(raw: np.ndarray) -> _Parts:
    return _nibbles(raw[:, 4:]), _halves(raw[:, :2]), -_halves(raw[:, 2:4])


def _q5_0(raw: np.ndarray) -> _Parts:
    codes = _nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6]) << 4
    return codes.view(np.int8) - np.int8(16), _halves(raw[:, :2]), None


def _q5_1(raw: np.ndarray) -> _Parts:
    codes = _nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8]) << 4
    return codes.view(np.int8), _halves(raw[:, :2]), -_halves(raw[:, 2:4])


def _q8_0(raw: np.ndarray) -> _Parts:
    return np.ascontiguousarray(raw[:, 2:]).view(np.int8), _halves(raw[:, :2]), None


def _six_bits(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes to 8 scales and 8 minima of 6 bits, as Q4_K and Q5_K pack them."""
    first, second, last = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _scaled(
    halves: np.ndarray, scales: np.ndarray, minima: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Those of the block times those of its groups; exact in float32."""
    return halves[:, :1] * scales, halves[:, 1:] * minima


def _q2_k(raw: np.ndarray) -> _Parts:
    packed, codes, halves = raw[:, :16], raw[:, 16:80], _halves(raw[:, 80:])
    codes = np.concatenate([_bits(codes[:, :32], 2), _bits(codes[:, 32:], 2)], axis=1)
    return codes.reshape(len(raw), 256), *_scaled(halves, packed & 15, packed >> 4)


def _q3_k(raw: np.ndarray) -> _Parts:
    high, low, packed = raw[:, :32], raw[:, 32:96], raw[:, 96:108]
    low = np.concatenate([_bits(low[:, :32], 2), _bits(low[:, 32:], 2)], axis=1)
    # Of the 16 scales the low 4 bits lie in 8 bytes, the high 2 bits in the last 4.
    scales = _nibbles(packed[:, :8]) | _bits(packed[:, 8:], 2).reshape(len(raw), 16) << 4
    scale = _halves(raw[:, 108:]) * (scales.astype(np.float32) - 32)
    return (low | _bits(high, 1) << 2).reshape(len(raw), 256), scale, None


def _q4_k(raw: np.ndarray) -> _Parts:
    codes = raw[:, 16:].reshape(-1, 32)
    parts = _scaled(_halves(raw[:, :4]), *_six_bits(raw[:, 4:16]))
    return _nibbles(codes).reshape(len(raw), 256), *parts


def _q5_k(raw: np.ndarray) -> _Parts:
    low = _nibbles(raw[:, 48:].reshape(-1, 32)).reshape(len(raw), 8, 32)
    codes = (low | _bits(raw[:, 16:48], 1) << 4).reshape(len(raw), 256)
    parts = _scaled(_halves(raw[:, :4]), *_six_bits(raw[:, 4:16]))
    return codes.view(np.int8), *parts


def _q6_k(raw: np.ndarray) -> _Parts:
    low = _nibbles(raw[:, :128].reshape(-1, 64))
    high = _bits(raw[:, 128:192].reshape(-1, 32), 2).reshape(-1, 128)
    codes = (low | high << 4).reshape(len(raw), 256).view(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8)
    return codes, _halves(raw[:, 208:]) * scales, None


def _kind(
    dtype: str,
    group: int,
    parts: Callable[[np.ndarray], _Parts],
    *,
    zero: int | None = None,
    minima: bool = False,
) -> _Kind:
    return _Kind(dtype=dtype, group=group, zero=zero, has_minima=minima, parts=parts)


_KINDS = {
    GGMLQuantizationType.Q4_0: _kind("uint4", 32, _q4_0, zero=8),
    GGMLQuantizationType.Q4_1: _kind("uint4", 32, _q4_1, minima=True),
    GGMLQuantizationType.Q5_0: _kind("int8", 32, _q5_0),
    GGMLQuantizationType.Q5_1: _kind("int8", 32, _q5_1, minima=True),
    GGMLQuantizationType.Q8_0: _kind("int8", 32, _q8_0),
    GGMLQuantizationType.Q2_K: _kind("uint4", 16, _q2_k, minima=True),
    GGMLQuantizationType.Q3_K: _kind("uint4", 16, _q3_k, zero=4),
    GGMLQuantizationType.Q4_K: _kind("uint4", 32, _q4_k, minima=True),
    GGMLQuantizationType.Q5_K: _kind("int8", 32, _q5_k, minima=True),
    GGMLQuantizationType.Q6_K: _kind("int8", 16, _q6_k),
}


def coded_rows(
    kind: GGMLQuantizationType, inputs: int, raw: Callable[[int, int], np.ndarray]
) -> Coded | None:
    """How to read a matrix of ``inputs`` columns; None for a kind that is no codes and scales.

    ``raw`` gives the bytes of rows [start, stop), uint8 [rows, bytes of a row].
    """
    if kind not in _KINDS:
        return None
    how, (_, block_bytes) = _KINDS[kind], GGML_QUANT_SIZES[kind]
    groups = inputs // how.group

    def rows(start: int, stop: int) -> CodedRows:
        codes, scale, minimum = how.parts(raw(start, stop).reshape(-1, block_bytes))
        codes = codes.reshape(stop - start, groups, how.group)
        scale = scale.astype(np.float32).reshape(stop - start, groups)
        zero = None
        if how.zero is not None:
            zero = np.full_like(scale, how.zero)
        elif minimum is not None:
            # A group whose numbers are all alike has scale 0: its minimum is its zero point then.
            flat = scale == 0
            scale = np.where(flat, np.float32(1), scale)
            zero = minimum.reshape(scale.shape).astype(np.float32) / scale
            codes = np.where(flat[..., None], codes.dtype.type(0), codes)
        return CodedRows(codes.reshape(stop - start, inputs), scale, zero)

    return Coded(
        dtype=how.dtype,
        groups=groups,
        has_zero=how.has_minima or how.zero is not None,
        rows=rows,
    )
