"""Quantised matrices on their way between files and memory.

A reader says how rows of codes are read (``Coded``): as they are stored, or rounded from floats.
``CodedLeaf`` collects those of one leaf. Our own checkpoints hold a ``Weight`` as an array for each
of its parts, with two codes of 4 bits in a byte.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, UInt4, UInt8
from numpy.typing import DTypeLike

from convert.blocks import each_block
from lserve_jax.model.quantise import CODE_DTYPES, axis_of
from pallas_kernels.api import PackedWeight, Weight, WeightKind, quantize_weight, unpack_weight

# Outputs read at once: few, because rounding makes several copies in float32.
_BLOCK_ROWS = 64
_ALIGNMENT = 64  # bytes


class CodedRows(NamedTuple):
    """Rows of a quantised matrix of [out, in]: ``(codes - zero) * scale``, in groups of inputs.

    Those of an embedding table, [V, E], have its channels as inputs.
    """

    codes: np.ndarray  # [rows, in]  int8, uint8 or uint4 below 16, or float8_e4m3fn
    scale: np.ndarray  # [rows, groups] float32
    zero: np.ndarray | None  # [rows, groups] float32


@dataclass(frozen=True, kw_only=True)
class Coded:
    """How the rows of a quantised matrix are read as codes."""

    dtype: str  # of a ``Weight``'s codes: int8, uint4 or float8_e4m3fn
    groups: int  # of inputs; 1: one scale for each output
    has_zero: bool
    rows: Callable[[int, int], CodedRows]  # [start, stop) of the outputs; by several threads


def rounded(
    rows: Callable[[int, int], np.ndarray], inputs: int, kind: WeightKind, group: int
) -> Coded:
    """A matrix of [out, inputs] whose float ``rows`` are rounded as they are read."""

    def read(start: int, stop: int) -> CodedRows:
        block = jnp.asarray(rows(start, stop).astype(np.float32))
        weight = quantize_weight(block, kind=kind, group=group, axis=1)
        return CodedRows(*jax.tree.map(np.asarray, weight))

    grouped = kind == "int4"
    groups = inputs // group if grouped else 1
    return Coded(dtype=CODE_DTYPES[kind], groups=groups, has_zero=grouped, rows=read)


def numbers(coded: Coded, start: int, stop: int) -> np.ndarray:
    """What coded rows stand for, float32."""
    codes, scale, zero = coded.rows(start, stop)
    group = codes.shape[1] // coded.groups
    values = codes.astype(np.float32)
    if zero is not None:
        values = values - spread(zero, group)
    return values * spread(scale, group)


def spread(per_group: np.ndarray, group: int) -> np.ndarray:
    """[rows, groups] to [rows, inputs], float32."""
    return np.repeat(per_group.astype(np.float32), group, axis=1)


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An uninitialised array that JAX's CPU backend takes over instead of copying."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class CodedLeaf:
    """A quantised leaf on its way, a kernel of [in, out] or a table: its parts side by side.

    Parts may differ in bits and groups: 4 bits are held as int8 beside 8, and a group is cut where
    another part's ends. Both are exact.
    """

    def __init__(self, name: str, shape: tuple[int, ...], parts: Sequence[Coded]):
        self.name, self._shape = name, shape
        dtypes = {part.dtype for part in parts}
        self._dtype = jnp.dtype(dtypes.pop() if len(dtypes) == 1 else "int8")
        self._groups = math.lcm(*(part.groups for part in parts))  # divides the inputs, as each
        self._has_zero = any(part.has_zero for part in parts)
        self._host: tuple[np.ndarray, ...] = ()  # codes, scale, and zero where there is one

    @staticmethod
    def holds(parts: Sequence[Coded]) -> bool:
        """Whether one leaf can hold all: whole numbers, or fp8 alone."""
        dtypes = {part.dtype for part in parts}
        return len(dtypes) == 1 or dtypes == {"int8", "uint4"}

    def read(self, coded: Coded, first: int, count: int, threads: ThreadPoolExecutor) -> None:
        """Takes in one part: ``count`` outputs from ``first`` on, or all rows of a table."""
        axis = axis_of(self.name)
        if not self._host:
            scales = shape_along(axis, self._shape, self._groups)
            parts = 2 if self._has_zero else 1
            self._host = (
                aligned(self._shape, self._dtype),
                *(aligned(scales, np.float32) for _ in range(parts)),
            )
        by_rows = [x if axis == 1 else x.T for x in self._host]
        split = self._groups // coded.groups

        def store(start: int, stop: int) -> None:
            codes, scale, zero = coded.rows(start, stop)
            zero = np.zeros_like(scale) if zero is None else zero
            place = slice(first + start, first + stop)
            by_rows[0][place] = codes.astype(self._dtype)
            for whole, part in zip(by_rows[1:], (scale, zero), strict=False):
                whole[place] = np.repeat(part, split, axis=1)

        each_block(threads, count, _BLOCK_ROWS, store)

    def finish(self, sharding: Sharding | None) -> Weight:
        """The leaf on its devices. The host's copy is given up."""
        host: Any = self._host
        self._host = ()
        return jax.block_until_ready(place(self.name, Weight(*host), sharding))


def place(leaf: str, weight: Weight, sharding: Sharding | None) -> Weight:
    """A ``Weight`` under the sharding of the matrix that it stands for."""
    codes, scale, zero = weight
    of_codes, of_scale, of_zero = weight_shardings(leaf, weight, sharding)
    return Weight(
        jax.device_put(codes, of_codes),
        jax.device_put(scale, of_scale),
        None if zero is None else jax.device_put(zero, of_zero),
    )


def weight_shardings(
    leaf: str, weight: Weight, sharding: Sharding | None
) -> tuple[Sharding | None, Sharding | None, Sharding | None]:
    """Of codes, scale and zero, so that each shard of codes has its own scales beside it.

    Raises ``ValueError`` naming a leaf whose groups a shard would cut.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding, sharding, sharding
    spec = list((*sharding.spec, None, None)[:2])
    axis = axis_of(leaf)
    groups, names, along = weight.scale.shape[axis], spec[axis], 1
    for name in () if names is None else names if isinstance(names, tuple) else (names,):
        along *= sharding.mesh.shape[name]
    if groups == 1:
        spec[axis] = None  # one scale for all inputs: every shard has it
    elif groups % along:
        raise ValueError(
            f"{leaf} is quantised in {groups} groups of inputs, which {along} shards would cut"
        )
    scales = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return sharding, scales, scales


def shape_along(axis: Literal[0, 1], shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """A shape of two axes with another size along one."""
    return (*shape[:axis], size, *shape[axis + 1 :])


# In our own checkpoints.


def stored(flat: dict[str, Array | Weight | PackedWeight]) -> Iterator[tuple[str, Array]]:
    """The arrays that a checkpoint holds for leaves, by name.

    Empties ``flat``, so that codes do not exist twice if nobody else holds them. Raises
    ``ValueError`` for an odd number of inputs of 4 bits.
    """
    for leaf in list(flat):
        value = flat.pop(leaf)
        if isinstance(value, PackedWeight):  # an engine's
            value = unpack_weight(value)
        if not isinstance(value, Weight):
            yield leaf, value
            continue
        codes, scale, zero = value
        del value
        if codes.dtype == jnp.uint4:
            axis = axis_of(leaf)
            inputs = codes.shape[axis]
            if inputs % 2:
                raise ValueError(
                    f"{leaf} has {inputs} inputs of 4 bits, and a byte holds those of two"
                )
            codes = jax.block_until_ready(_pack(codes, axis))
        yield f"{leaf}.codes", codes
        yield f"{leaf}.scale", scale
        if zero is not None:
            yield f"{leaf}.zero", zero


@functools.partial(jax.jit, static_argnames="axis")
def _pack(codes: UInt4[Array, "K out"], axis: Literal[0, 1]) -> UInt8[Array, "K/2 out"]:
    """Two neighbours along an axis in a byte."""
    wide = codes.astype(jnp.uint8)
    first, second = (jax.lax.slice_in_dim(wide, i, None, 2, axis) for i in (0, 1))
    return first | second << jnp.uint8(4)


def _unpack(packed: UInt8[Array, "K/2 out"], axis: Literal[0, 1]) -> UInt4[Array, "K out"]:
    pairs = jnp.stack([packed & jnp.uint8(15), packed >> jnp.uint8(4)], axis=axis + 1)
    return pairs.reshape(shape_along(axis, packed.shape, -1)).astype(jnp.uint4)


def coded_leaves(arrays: Mapping[str, Any], where: str) -> dict[str, Weight]:
    """The quantised leaves of a checkpoint with these arrays, as they will be in memory.

    ``arrays`` have shape and dtype, and so have the parts of what is returned. Raises
    ``ValueError`` naming an array that is missing, misshapen or of a wrong type.
    """
    found = {}
    for name, codes in arrays.items():
        leaf, _, part = name.rpartition(".")
        if part != "codes":
            continue
        dtype, shape = str(np.dtype(codes.dtype)), tuple(codes.shape)
        if dtype not in ("int8", "uint8", "float8_e4m3fn") or len(shape) != 2:
            raise ValueError(
                f"{where}: {name} is {dtype} {shape}, expected two axes of int8, float8_e4m3fn or "
                "uint8 with two codes of 4 bits each"
            )
        axis = axis_of(leaf)
        if dtype == "uint8":
            dtype, shape = "uint4", shape_along(axis, shape, 2 * shape[axis])
        scale, zero = arrays.get(f"{leaf}.scale"), arrays.get(f"{leaf}.zero")
        if scale is None:
            raise ValueError(f"{where}: {leaf} has codes, and {leaf}.scale is missing")
        inputs, groups = shape[axis], scale.shape[axis] if len(scale.shape) == 2 else 0
        fits = groups > 0 and inputs % groups == 0
        fits = fits and tuple(scale.shape) == shape_along(axis, shape, groups)
        for part, x in (("scale", scale), ("zero", zero)):
            if x is None:
                continue
            if not fits or tuple(x.shape) != tuple(scale.shape) or np.dtype(x.dtype) != np.float32:
                raise ValueError(
                    f"{where}: {leaf}.{part} is {np.dtype(x.dtype)} {tuple(x.shape)}, expected "
                    f"float32 for groups that divide {inputs} inputs, times {shape[1 - axis]} "
                    f"{'rows' if axis else 'outputs'}"
                )
        struct: Any = jax.ShapeDtypeStruct
        scales = struct(tuple(scale.shape), jnp.float32)
        found[leaf] = Weight(
            struct(shape, jnp.dtype(dtype)), scales, None if zero is None else scales
        )
    return found


def stored_parts(
    leaf: str, weight: Weight, sharding: Sharding | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What ``stored`` gives for a leaf, by name, where it is to lie under ``sharding``."""
    parts, axis = {}, axis_of(leaf)
    shardings = weight_shardings(leaf, weight, sharding)
    for part, x, to in zip(Weight._fields, weight, shardings, strict=True):
        if x is not None:
            shape, dtype = x.shape, x.dtype
            if dtype == jnp.uint4:
                shape, dtype = shape_along(axis, shape, shape[axis] // 2), jnp.uint8
            parts[f"{leaf}.{part}"] = jax.ShapeDtypeStruct(shape, dtype, sharding=to)
    return parts


def stored_rows(
    leaf: str, weight: Weight, arrays: Callable[[], Mapping[str, np.ndarray]], first: int
) -> Coded:
    """How a quantised leaf is read from what ``stored`` gave for it.

    As rows of [out, in], from output ``first`` on, or those of a table.
    """
    axis = axis_of(leaf)

    def read(start: int, stop: int) -> CodedRows:
        stored = (arrays().get(f"{leaf}.{name}") for name in Weight._fields)
        parts = (None if x is None else x if axis == 1 else x.T for x in stored)
        codes, scale, zero = (None if x is None else x[first + start : first + stop] for x in parts)
        assert codes is not None and scale is not None  # as ``coded_leaves`` found them
        if codes.dtype == np.uint8:
            codes = np.asarray(_unpack(jnp.asarray(codes), 1))
        return CodedRows(codes, scale, zero)

    return Coded(
        dtype=str(np.dtype(weight.codes.dtype)),
        groups=weight.scale.shape[axis],
        has_zero=weight.zero is not None,
        rows=read,
    )


def joined(leaf: str, arrays: dict[str, Array]) -> Weight:
    """The ``Weight`` of a leaf, out of what ``stored`` gave for it: that leaves ``arrays``."""
    codes, scale, zero = (arrays.pop(f"{leaf}.{part}", None) for part in Weight._fields)
    assert codes is not None and scale is not None  # as ``coded_leaves`` found them
    if codes.dtype == jnp.uint8:
        unpack = functools.partial(_unpack, axis=axis_of(leaf))
        codes = jax.jit(unpack, out_shardings=codes.sharding)(codes)
        codes.block_until_ready()
    return Weight(codes, scale, zero)
