"""Checkpoint tensors to parameters, a block of rows at a time.

Every loader describes its file as a ``Checkpoint``: names, shapes and a way to read some rows.
``assemble`` does the rest once for all of them: check the names, allocate a leaf when its first
tensor comes, convert block by block into its place, hand the finished leaf to its device. Host
memory therefore holds no second copy of the parameters, whatever the format. Blocks of a tensor are
converted by several threads, tensors one after another.
"""

import dataclasses
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

from convert.blocks import each_block, reading_threads
from convert.codes import Coded, CodedLeaf, aligned, rounded
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
from lserve_jax.model.params import Params
from lserve_jax.model.quantise import (
    CODE_DTYPES,
    WeightForm,
    check_groups,
    kinds_of,
    quantisable,
    require_fp8,
)
from pallas_kernels.api import Weight

# One sharding for all leaves, or one chosen by a leaf's dotted path. None: the default device.
Placement = Sharding | Callable[[str], Sharding] | None

# Few enough rows that a block stays in cache while it is transposed, enough to amortise the call.
_BLOCK_ROWS = 128

# Many, because embedding and output layer may lie in two files, mapped in turn.
_COMPARED_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """One tensor of a checkpoint file."""

    name: str  # as the file names it
    shape: tuple[int, ...]
    # [start, stop) of the first axis, any float dtype; called by several threads
    rows: Callable[[int, int], np.ndarray]
    coded: Coded | None = None  # of a quantised matrix that a ``Weight`` can hold
    # Of another quantised matrix: what is in the way, as a sentence about its file's tensors.
    uncoded: str | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a loader found: nothing is read yet."""

    where: str  # names the checkpoint in messages
    config: dict[str, Any]  # canonical, see config_json
    naming: Naming
    dtype: np.dtype  # the checkpoint's own
    tensors: list[FileTensor]  # in file order
    keeps_codes: bool = False  # unless it is said what becomes of them


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


def require_finite_weight(leaf: str, weight: Weight, where: str) -> None:
    """The same for the scales of a quantised leaf, its zero points, and codes that are floats."""
    for part, x in weight._asdict().items():
        if x is not None and jnp.issubdtype(x.dtype, jnp.floating):
            require_finite(f"{leaf}.{part}", x, where)


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
    weights: WeightForm | None = None,
    weight_group: int = 32,
) -> Params:
    """Parameters of ``config`` in ``dtype`` from ``checkpoint`` with the ``changes`` of an adapter.

    ``weights`` makes ``Weight``s of matrices: of a kind, rounded from what they are with the
    changes, or by the codes that the checkpoint holds.

    Raises ``ValueError`` for tensors that are missing, unexpected or misshapen, for values that
    are not finite, and with ``NotImplementedError`` for codes that cannot be kept.
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

    leaves, coded = _coded(checkpoint, by_name, changes, weights, weight_group)
    awaited = Counter(slot.leaf for slot in all_slots)
    unfinished: dict[str, np.ndarray] = {}
    flat: dict[str, jax.Array | Weight] = {}
    with reading_threads() as threads:
        for tensor in tqdm(tensors, desc="loading", unit="tensor", disable=not progress):
            slot, outputs = by_name[tensor.name], tensor.shape[0]
            awaited[slot.leaf] -= 1
            if slot.leaf in leaves:
                coded_leaf = leaves[slot.leaf]
                coded_leaf.read(coded[tensor.name], slot.columns.start, outputs, threads)
                if not awaited[slot.leaf]:
                    weight = leaves.pop(slot.leaf).finish(sharding_of(placement, slot.leaf))
                    require_finite_weight(slot.leaf, weight, checkpoint.where)
                    flat[slot.leaf] = weight
                continue
            if slot.leaf not in unfinished:
                unfinished[slot.leaf] = aligned(slot.leaf_shape, dtype)
            rows = _rows(tensor, changes.get(slot.hf))
            store = _store(rows, slot.view(unfinished[slot.leaf]))
            each_block(threads, outputs, _BLOCK_ROWS, store)
            if not awaited[slot.leaf]:
                leaf = jax.device_put(unfinished.pop(slot.leaf), sharding_of(placement, slot.leaf))
                # Without waiting, queued transfers would keep every host copy alive.
                flat[slot.leaf] = leaf.block_until_ready()
                require_finite(slot.leaf, leaf, checkpoint.where)
    return unflatten(flat)


def _store(rows: Callable[[int, int], np.ndarray], to: np.ndarray) -> Callable[[int, int], None]:
    def store(start: int, stop: int) -> None:
        block = rows(start, stop)
        # Cast before the transposing store: casting through strided memory is far slower.
        with np.errstate(over="ignore"):  # found when the leaf is whole
            to[start:stop] = block.astype(to.dtype, copy=False)

    return store


def _rows(tensor: FileTensor, change: Change | None) -> Callable[[int, int], np.ndarray]:
    """Those of the tensor as an adapter leaves it."""
    if change is None:
        return tensor.rows
    return lambda start, stop: change.apply(tensor.rows(start, stop), start, stop)


def _coded(
    checkpoint: Checkpoint,
    slots: Mapping[str, TensorSlot],
    changes: Mapping[str, Change],
    weights: WeightForm | None,
    group: int,
) -> tuple[dict[str, CodedLeaf], dict[str, Coded]]:
    """Leaves that become codes, and how the tensors of these are read, by name."""
    if weights is None and checkpoint.keeps_codes:
        weights = "checkpoint"
    if weights is None:
        return {}, {}
    shapes = {slot.leaf: slot.leaf_shape for slot in slots.values()}
    kinds, may_be = {}, quantisable(shapes)
    if weights != "checkpoint":
        kinds = kinds_of(shapes, weights)
        check_groups(shapes, weights, group)
    coded: dict[str, Coded] = {}
    parts: dict[str, list[FileTensor]] = {}
    for tensor in checkpoint.tensors:
        if tensor.name not in slots:  # derived
            continue
        slot = slots[tensor.name]
        parts.setdefault(slot.leaf, []).append(tensor)
        change = changes.get(slot.hf)
        if weights == "checkpoint":
            if slot.transposed and tensor.uncoded is not None:
                raise NotImplementedError(
                    f"{checkpoint.where}: {tensor.uncoded}, which weights='checkpoint' cannot "
                    "keep; weights=None makes floats of all"
                )
            if tensor.coded is None or slot.leaf not in may_be:
                continue
            if change is not None:
                floats = "" if checkpoint.keeps_codes else ", weights=None leaves them floats"
                raise ValueError(
                    f"{checkpoint.where}: the adapter changes {tensor.name}, whose codes are kept; "
                    "weights='int8', 'int4' or 'fp8' merges it into floats and rounds these again"
                    f"{floats}"
                )
            if tensor.coded.dtype == CODE_DTYPES["fp8"]:
                require_fp8(f"{checkpoint.where}: {tensor.name}, whose codes are fp8,")
            coded[tensor.name] = tensor.coded
        elif checkpoint.keeps_codes and tensor.coded is not None and change is None:
            coded[tensor.name] = tensor.coded
        elif slot.leaf in kinds:
            rows, kind = _rows(tensor, change), kinds[slot.leaf]
            coded[tensor.name] = rounded(rows, tensor.shape[1], kind, group)
    leaves = {}
    for leaf, tensors in parts.items():
        found = [coded[tensor.name] for tensor in tensors if tensor.name in coded]
        if len(found) == len(tensors) and CodedLeaf.holds(found):
            shape = slots[tensors[0].name].leaf_shape
            leaves[leaf] = CodedLeaf(leaf, shape, found)
    if weights == "checkpoint" and not leaves:
        raise ValueError(
            f"{checkpoint.where} holds no quantised matrices, whose codes weights='checkpoint' "
            "would keep"
        )
    return leaves, coded


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
