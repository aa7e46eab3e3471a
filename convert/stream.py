"""Checkpoint tensors to parameters, a block of rows at a time.

Every loader describes its file as a ``Checkpoint``: names, shapes and a way to read some rows.
``assemble`` does the rest once for all of them: check the names, allocate a leaf when its first
tensor comes, convert block by block into its place, hand the finished leaf to its device. Host
memory therefore holds no second copy of the parameters, whatever the format.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from tqdm import tqdm

from convert.json_values import shortened
from convert.lora import Change
from convert.names import (
    Naming,
    TensorSlot,
    check_tensors,
    is_derived,
    tensor_slots,
    tied_names,
    unflatten,
)
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params
from pallas_kernels.api import Weight

# One sharding for all leaves, or one chosen by a leaf's dotted path. None: the default device.
Placement = Sharding | Callable[[str], Sharding] | None

# Few enough rows that a block stays in cache while it is transposed, enough to amortise the call.
_BLOCK_ROWS = 128

# Many, because embedding and output layer may lie in two files, mapped in turn.
_COMPARED_ROWS = 8192

_ALIGNMENT = 64  # bytes


class CodedRows(NamedTuple):
    """Rows of a quantised matrix of [out, in]: ``(codes - zero) * scale``, in groups of inputs."""

    codes: np.ndarray  # [rows, in]  int8, uint8 below 16, or float8_e4m3fn
    scale: np.ndarray  # [rows, groups] float32
    zero: np.ndarray | None  # [rows, groups] float32


@dataclass(frozen=True, kw_only=True)
class Coded:
    """How the rows of a quantised matrix are read as they are stored."""

    dtype: str  # of a ``Weight``'s codes: int8, uint4 or float8_e4m3fn
    groups: int  # of inputs; 1: one scale for each output
    has_zero: bool
    rows: Callable[[int, int], CodedRows]  # [start, stop) of the outputs


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """One tensor of a checkpoint file."""

    name: str  # as the file names it
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]  # [start, stop) of the first axis, any float dtype
    coded: Coded | None = None  # of a quantised matrix that a ``Weight`` can hold


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a loader found: nothing is read yet."""

    where: str  # names the checkpoint in messages
    config: dict[str, Any]  # canonical, see config_json
    naming: Naming
    dtype: np.dtype  # the checkpoint's own
    tensors: list[FileTensor]  # in file order


def parse_dtype(dtype: DTypeLike) -> np.dtype:
    """Raises ``ValueError`` unless ``dtype`` is float32, bfloat16 or float16.

    And ``TypeError`` for what is no dtype at all.
    """
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        raise TypeError(f"dtype={dtype!r} must be one of {', '.join(known)}") from None
    if name not in known:
        raise ValueError(f"dtype {name!r} is unknown; known dtypes: {', '.join(known)}")
    return np.dtype(known[name])


def sharding_of(placement: Placement, leaf: str) -> Sharding | None:
    return placement(leaf) if callable(placement) else placement


def settle_tie(
    checkpoint: Checkpoint, config: ModelConfig, changes: Mapping[str, Change]
) -> tuple[Checkpoint, ModelConfig]:
    """A tied model gets an output layer of its own where its files have one.

    That is a stored one with other values than the embedding table, whatever the flag says; or
    one that an adapter makes by changing one of the two. The checkpoint returned holds exactly
    the output layer that the config returned describes. Reads both only where both are stored.
    """
    if not config.tie_word_embeddings:
        return checkpoint, config
    names = tied_names(checkpoint.naming)
    embedding, head = (
        next((tensor for tensor in checkpoint.tensors if tensor.name == name), None)
        for name in names
    )
    stays_tied = not any(name in changes for name in tied_names("hf"))
    if embedding is None or (stays_tied and (head is None or _equal(embedding, head))):
        tensors = [tensor for tensor in checkpoint.tensors if tensor.name != names[1]]
        return dataclasses.replace(checkpoint, tensors=tensors), config
    if head is None:
        head = dataclasses.replace(embedding, name=names[1])
        tensors = [*checkpoint.tensors, head]
        checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    return checkpoint, dataclasses.replace(config, tie_word_embeddings=False)


def _equal(one: FileTensor, other: FileTensor) -> bool:
    if one.shape != other.shape:
        return False
    return all(
        np.array_equal(
            one.rows(start, min(start + _COMPARED_ROWS, one.shape[0])),
            other.rows(start, min(start + _COMPARED_ROWS, one.shape[0])),
        )
        for start in range(0, one.shape[0], _COMPARED_ROWS)
    )


def require_finite(leaf: str, values: jax.Array, where: str) -> None:
    """Raises ``ValueError`` naming the leaf if it holds NaN or infinite values."""
    if not _all_finite(values):
        raise ValueError(f"{where}: {leaf} holds values that are not finite in {values.dtype}")


@jax.jit
def _all_finite(values: jax.Array) -> jax.Array:
    # Only a value that is not finite makes this sum differ from 0. Reducing jnp.isfinite(values)
    # takes another array as large on a CPU, and a maximum there may pass over NaN.
    return jnp.sum(values.astype(jnp.float32) * 0) == 0


def assemble(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: np.dtype,
    changes: Mapping[str, Change],
    placement: Placement,
    progress: bool,
    keep_codes: bool = False,
) -> Params:
    """Parameters of ``config`` in ``dtype`` from ``checkpoint`` with the ``changes`` of an adapter.

    With ``keep_codes`` a matrix that is quantised in one way as a whole becomes a ``Weight``.

    Raises ``ValueError`` for tensors that are missing, unexpected or misshapen, and for values
    that are not finite.
    """
    all_slots = tensor_slots(config, checkpoint.naming)
    by_name = {slot.name(checkpoint.naming): slot for slot in all_slots}
    tensors = [tensor for tensor in checkpoint.tensors if not is_derived(tensor.name)]
    check_tensors(
        {name: slot.shape for name, slot in by_name.items()},
        {tensor.name: tensor.shape for tensor in tensors},
        where=checkpoint.where,
    )
    _check_changes(changes, {slot.hf: slot.shape for slot in all_slots})

    kept = _coded_leaves(tensors, by_name, changes) if keep_codes else {}
    awaited = Counter(slot.leaf for slot in all_slots)
    unfinished: dict[str, np.ndarray] = {}
    flat: dict[str, jax.Array | Weight] = {}
    for tensor in tqdm(tensors, desc="loading", unit="tensor", disable=not progress):
        slot = by_name[tensor.name]
        if slot.leaf in kept:
            kept[slot.leaf].read(slot, tensor)
            awaited[slot.leaf] -= 1
            if not awaited[slot.leaf]:
                place = sharding_of(placement, slot.leaf)
                flat[slot.leaf] = kept.pop(slot.leaf).finish(place, checkpoint.where)
            continue
        if slot.leaf not in unfinished:
            unfinished[slot.leaf] = _aligned(slot.leaf_shape, dtype)
        target = slot.view(unfinished[slot.leaf])
        change = changes.get(slot.hf)
        for start in range(0, tensor.shape[0], _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, tensor.shape[0])
            block = tensor.rows(start, stop)
            if change is not None:
                block = change.apply(block, start, stop)
            # Cast before the transposing store: casting through strided memory is far slower.
            with np.errstate(over="ignore"):  # found below
                target[start:stop] = block.astype(dtype)
        awaited[slot.leaf] -= 1
        if not awaited[slot.leaf]:
            leaf = jax.device_put(unfinished.pop(slot.leaf), sharding_of(placement, slot.leaf))
            # Without waiting, queued transfers would keep every host copy alive.
            flat[slot.leaf] = leaf.block_until_ready()
            require_finite(slot.leaf, leaf, checkpoint.where)
    return unflatten(flat)


class _CodedLeaf:
    """A quantised leaf on its way: its parts side by side, [in, out]."""

    def __init__(self, name: str, shape: tuple[int, ...], coded: Coded):
        self.name, self.coded = name, coded
        self.codes = np.empty(shape, jnp.dtype(coded.dtype))
        self.scale = np.empty((coded.groups, shape[1]), np.float32)
        self.zero = np.empty_like(self.scale) if coded.has_zero else None

    def read(self, slot: TensorSlot, tensor: FileTensor) -> None:
        assert tensor.coded is not None  # chosen for it
        for start in range(0, tensor.shape[0], _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, tensor.shape[0])
            rows = tensor.coded.rows(start, stop)
            for whole, part in zip((self.codes, self.scale, self.zero), rows, strict=True):
                if whole is not None and part is not None:
                    whole[:, slot.columns].T[start:stop] = part.astype(whole.dtype)

    def finish(self, sharding: Sharding | None, where: str) -> Weight:
        codes, scale = (jax.device_put(x, sharding) for x in (self.codes, self.scale))
        zero = None if self.zero is None else jax.device_put(self.zero, sharding)
        weight = jax.block_until_ready(Weight(codes, scale, zero))
        for part, x in weight._asdict().items():
            if x is not None and jnp.issubdtype(x.dtype, jnp.floating):
                require_finite(f"{self.name}.{part}", x, where)
        return weight


def _coded_leaves(
    tensors: list[FileTensor], by_name: Mapping[str, TensorSlot], changes: Mapping[str, Change]
) -> dict[str, _CodedLeaf]:
    """Leaves whose parts are all quantised in the same way, and none changed by an adapter."""
    found: dict[str, list[tuple[FileTensor, TensorSlot]]] = {}
    for tensor in tensors:
        slot = by_name[tensor.name]
        found.setdefault(slot.leaf, []).append((tensor, slot))
    leaves = {}
    for leaf, parts in found.items():
        ways = {
            None if x.coded is None else (x.coded.dtype, x.coded.groups, x.coded.has_zero)
            for x, _ in parts
        }
        changed = any(slot.hf in changes for _, slot in parts)
        coded, slot = parts[0][0].coded, parts[0][1]
        if len(ways) == 1 and coded is not None and slot.transposed and not changed:
            leaves[leaf] = _CodedLeaf(leaf, slot.leaf_shape, coded)
    return leaves


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX's CPU backend takes over instead of copying."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _check_changes(changes: Mapping[str, Change], weights: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one ``ValueError`` listing the changes that fit no tensor of the model."""
    problems = []
    for name, change in changes.items():
        if name not in weights:
            problems.append(f"{name}: the model has no such tensor")
        problems += [
            f"{name}: found {shape}, expected {weights[name]}"
            for shape in change.shapes
            if shape != weights.get(name, shape)
        ]
    if problems:
        raise ValueError(
            "the adapter does not fit the model:\n  " + "\n  ".join(shortened(problems))
        )
