"""Keys and values as pools store them, once more in float64 NumPy: ``KVPages`` in its own words.

Nothing here is shared with the code under test.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pallas_kernels.api import KVPages
from pallas_kernels.types import KVScale

F64 = NDArray[np.float64]
NAN_WORD = np.int32(0x7FC07FC0)  # NaN as a step and as a lowest value
CODES = {"int8": (np.int8, 127), "fp8": (ml_dtypes.float8_e4m3fn, 448)}


def stored(x: np.ndarray, kind: str | None) -> tuple[np.ndarray, ...]:
    """Vectors [..., D] as a pool of ``kind`` has them: numbers, or codes and their scales.

    One scale [...] in 8 bits; in 4 bits a word for either half of the channels. The scales of a
    vector with NaN are NaN.
    """
    if kind is None:
        return (x.astype(np.float32),)
    if kind == "int4":
        (low, low_word), (high, high_word) = (_half(half) for half in np.split(x, 2, axis=-1))
        return low + 16 * high, low_word, high_word
    dtype, largest = CODES[kind]
    scale = (np.maximum(np.abs(x).max(axis=-1), 1e-6) / largest).astype(np.float32)
    codes = np.nan_to_num(x / scale[..., None])
    return (np.round(codes) if kind == "int8" else codes).astype(dtype), scale


def _half(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and the word of a step (upper half) and of what code 0 stands for."""
    lowest = x.min(axis=-1).astype(ml_dtypes.bfloat16)
    span = np.maximum(x.max(axis=-1) - lowest.astype(float), 1e-6)
    step = (span / 15).astype(ml_dtypes.bfloat16)
    codes = (x - lowest[..., None].astype(float)) / step[..., None].astype(float)
    upper, lower = (value.view(np.uint16).astype(np.uint32) for value in (step, lowest))
    return np.nan_to_num(codes).round().clip(0, 15).astype(np.uint8), (upper * 65536 + lower).view(
        np.int32
    )


def values(codes: np.ndarray, *scales: np.ndarray) -> F64:
    """What is stored."""
    if len(scales) < 2:
        scale = scales[0][..., None].astype(float) if scales else 1.0
        return codes.astype(float) * scale
    halves = []
    for nibbles, word in zip((codes % 16, codes // 16), scales, strict=True):
        step, lowest = steps(word)
        halves.append(nibbles * step[..., None] + lowest[..., None])
    return np.concatenate(halves, axis=-1)


def steps(word: np.ndarray) -> tuple[F64, F64]:
    """Of codes of 4 bits: the step between two, and what code 0 stands for."""
    bits = word.view(np.uint32)
    return tuple(
        half.astype(np.uint16).view(ml_dtypes.bfloat16).astype(float)
        for half in (bits // 65536, bits % 65536)
    )


def bound(x: np.ndarray, kind: str | None, *scales: np.ndarray) -> F64:
    """How far vectors [n, D] may be from what is stored of them: half a step of their codes.

    And what float32 rounds on the way: 2^-23 of the largest |x|, or as much of a quotient of up to
    448 steps.
    """
    x = x.astype(float)
    if kind is None:
        return np.zeros(x.shape)
    if kind == "int4":
        halves = zip(np.split(x, 2, axis=-1), scales, strict=True)
        half_step = np.concatenate([_half_bound(*half) for half in halves], axis=-1)
    else:
        step = scales[0][..., None].astype(float)
        # fp8 has three bits behind the first, and below 2^-6 steps of 2^-9.
        half_step = step / 2 if kind == "int8" else np.maximum(np.abs(x) / 16, step / 1024)
    return half_step * (1 + 5e-5) + 2.0**-22 * np.abs(x).max(axis=-1, keepdims=True)


def _half_bound(x: F64, word: np.ndarray) -> F64:
    """Half a step of 4 bits; at the low end what the lowest loses in bf16, 2^-8 of it.

    The high end is off by 2^-8 of 15 steps at most, which is less than half of one.
    """
    step, _ = steps(word)
    lost = np.abs(x.min(axis=-1)) * 2.0**-8
    return np.broadcast_to(np.maximum(step / 2, lost)[..., None], x.shape)


def pages(k: tuple[np.ndarray, ...], v: tuple[np.ndarray, ...]) -> KVPages:
    """The pool of what ``stored`` returns."""
    (k_codes, *k_scales), (v_codes, *v_scales) = (map(jnp.asarray, x) for x in (k, v))
    return KVPages(k_codes, v_codes, _scale(k_scales), _scale(v_scales))


def _scale(scales: list) -> KVScale | None:
    return tuple(scales) if len(scales) == 2 else scales[0] if scales else None
