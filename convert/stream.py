"""Checkpoint tensors to parameters, a block of rows at a time.

Every loader describes its file as a ``Checkpoint``: names, shapes and a way to read some rows.
``assemble`` does the rest once for all of them: check the names, allocate a leaf when its first
tensor comes, convert block by block into its place, hand the finished leaf to its device. Host
memory therefore holds no second copy of the parameters, whatever the format.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from tqdm import tqdm

from convert.lora import Delta
from convert.names import Naming, check_tensors, is_redundant, tensor_slots, unflatten
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params

# One sharding for all leaves, or one chosen by a leaf's dotted path. None: the default device.
Placement = Sharding | Callable[[str], Sharding] | None

# Few enough rows that a block stays in cache while it is transposed, enough to amortise the call.
_BLOCK_ROWS = 128

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """One tensor of a checkpoint file."""

    name: str  # as the file names it
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]  # [start, stop) of the first axis, any float dtype


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a loader found: nothing is read yet."""

    where: str  # names the checkpoint in messages
    config: dict[str, Any]  # canonical, see config_json
    naming: Naming
    dtype: np.dtype  # the checkpoint's own
    tensors: list[FileTensor]  # in file order


def parse_dtype(dtype: DTypeLike) -> np.dtype:
    """Raises ``ValueError`` unless ``dtype`` is float32, bfloat16 or float16."""
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in known:
        raise ValueError(f"dtype {name!r} is unknown; known dtypes: {', '.join(known)}")
    return np.dtype(known[name])


def sharding_of(placement: Placement, leaf: str) -> Sharding | None:
    return placement(leaf) if callable(placement) else placement


def assemble(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: np.dtype,
    deltas: Mapping[str, Delta],
    placement: Placement,
    progress: bool,
) -> Params:
    """Parameters of ``config`` in ``dtype`` from ``checkpoint`` plus low-rank ``deltas``.

    Raises ``ValueError`` listing all tensors that are missing, unexpected or misshapen.
    """
    all_slots = tensor_slots(config)
    by_name = {slot.name(checkpoint.naming): slot for slot in all_slots}
    tensors = [
        tensor
        for tensor in checkpoint.tensors
        if tensor.name in by_name or not is_redundant(tensor.name, config)
    ]
    check_tensors(
        {name: slot.shape for name, slot in by_name.items()},
        {tensor.name: tensor.shape for tensor in tensors},
        where=checkpoint.where,
    )
    check_deltas(deltas, {slot.hf: slot.shape for slot in all_slots})

    awaited = Counter(slot.leaf for slot in all_slots)
    unfinished: dict[str, np.ndarray] = {}
    flat: dict[str, jax.Array] = {}
    for tensor in tqdm(tensors, desc="loading", unit="tensor", disable=not progress):
        slot = by_name[tensor.name]
        if slot.leaf not in unfinished:
            unfinished[slot.leaf] = _aligned(slot.leaf_shape, dtype)
        target = slot.view(unfinished[slot.leaf])
        delta = deltas.get(slot.hf)
        for start in range(0, tensor.shape[0], _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, tensor.shape[0])
            block = tensor.rows(start, stop)
            if delta is not None:
                block = block.astype(np.float32) + delta.rows(start, stop)
            # Cast before the transposing store: casting through strided memory is far slower.
            target[start:stop] = block.astype(dtype)
        awaited[slot.leaf] -= 1
        if not awaited[slot.leaf]:
            leaf = jax.device_put(unfinished.pop(slot.leaf), sharding_of(placement, slot.leaf))
            # Without waiting, queued transfers would keep every host copy alive.
            flat[slot.leaf] = leaf.block_until_ready()
    return unflatten(flat)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX's CPU backend takes over instead of copying."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def check_deltas(deltas: Mapping[str, Delta], weights: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one ``ValueError`` listing all deltas that fit no weight of the model."""
    problems = []
    for name, delta in deltas.items():
        if name not in weights:
            problems.append(f"{name}: the model has no such weight")
        elif delta.shape != weights[name]:
            problems.append(f"{name}: found {delta.shape}, expected {weights[name]}")
    if problems:
        raise ValueError("the adapter does not fit the model:\n  " + "\n  ".join(problems))
