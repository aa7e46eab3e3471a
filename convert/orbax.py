"""Our own checkpoints: a directory with Orbax arrays, ``config.json`` and the tokenizer's files.

``params/`` holds one array per leaf, keyed by its dotted path, so that each can be restored
straight into its sharding; of a quantised leaf one for each part, such as ``….kernel.codes``.
``config.json`` is the explicit form of ``config_json``; it alone describes the model.
``files.json`` has the size of every file of ``params/``, so that a checkpoint cut short is known
before Orbax reads it, which ends in pages of errors.
"""

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from convert.codes import (
    coded_leaves,
    joined,
    numbers,
    place,
    stored,
    stored_parts,
    stored_rows,
)
from convert.config_json import canonical, to_json
from convert.json_values import read_json
from convert.names import (
    TensorSlot,
    check_tensors,
    flatten,
    refuse_more_layers,
    tensor_slots,
    unflatten,
)
from convert.stream import (
    Checkpoint,
    FileTensor,
    Placement,
    require_finite,
    require_finite_weight,
    sharding_of,
)
from convert.tokenizers import load_tokenizer
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params, abstract_params
from lserve_jax.model.quantise import (
    CODE_DTYPES,
    TABLE,
    WeightForm,
    axis_of,
    check_groups,
    expect_kinds,
    kinds_of,
    require_fp8,
)
from pallas_kernels.api import PackedWeight, Weight, quantize_weight

_PARAMS = "params"
_FILES = "files.json"
_MAX_WAIT = 60.0  # seconds, for what is written beside an array that cannot be
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def _checkpointer():
    import orbax.checkpoint  # here: half a second that loading other formats need not wait

    return orbax.checkpoint.StandardCheckpointer()


# One thread at a time is in Orbax: what is changed below is the whole process's, and its writers of
# two checkpoints get in each other's way (FileExistsError).
_turn = threading.Lock()


class _WaitingLoop(asyncio.SelectorEventLoop):
    """Closes when what runs in it has ended.

    Orbax closes its loop at the first array that cannot be written or read. The others go on: each
    ended in a traceback on stderr, and some put files into a directory that was being removed.
    """

    def close(self) -> None:
        tasks = set() if self.is_closed() else asyncio.all_tasks(self)
        if tasks:
            self.run_until_complete(asyncio.wait(tasks, timeout=_MAX_WAIT))
        super().close()


@contextlib.contextmanager
def _errors_as(kind: type[Exception], what: str) -> Generator[None]:
    """Whatever Orbax raises inside, as one ``kind`` of one line that begins with ``what``.

    It raises ``Exception`` itself for damaged data and a full disk, ``KeyError`` and the like for
    damaged metadata, and logs each with its traceback.
    """
    logger = logging.getLogger("absl")
    with _turn:
        level, new_event_loop = logger.level, asyncio.new_event_loop
        logger.setLevel(logging.CRITICAL)
        asyncio.new_event_loop = _WaitingLoop  # there is no other way to give Orbax a loop
        try:
            yield
        except Exception as error:
            reason = error.__cause__ or error
            line = (str(reason).splitlines() or [""])[0].partition(" [tensorstore_spec=")[0]
            if len(line) > 500:  # paths take most of it, and what went wrong stands at the end
                line = f"{line[:200]} … {line[-300:]}"
            raise kind(f"{what}: {type(reason).__name__}: {line}") from error
        finally:
            asyncio.new_event_loop = new_event_loop
            logger.setLevel(level)


def is_orbax(path: Path) -> bool:
    return (path / _PARAMS).is_dir()


def read_config(directory: Path) -> dict[str, Any]:
    """The canonical config of a checkpoint that ``save`` wrote."""
    path = directory / "config.json"
    return canonical(read_json(path), where=str(path))


def require_empty(directory: Path) -> None:
    """Raises ``ValueError`` unless ``directory`` does not exist or is an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"output directory {directory} must be new or empty")


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes ``config`` and ``params`` as a checkpoint that ``load`` reads, codes as codes.

    ``tokenizer_from`` is the directory or ``.gguf`` file whose tokenizer, chat template and
    generation config to keep beside them; None keeps none. All or nothing: the checkpoint is
    written under another name and renamed when complete.

    Raises ``ValueError`` if ``path`` is not new or empty, or ``params`` does not fit ``config``,
    and ``OSError`` if it cannot be written, such as for lack of room.
    """
    write(path, config, flatten(params), tokenizer_from=tokenizer_from)


def write(
    path: str | os.PathLike[str],
    config: ModelConfig,
    flat: dict[str, Array | Weight | PackedWeight],
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """``save`` for leaves by dotted path. Empties ``flat``, so that codes can go once packed."""
    path = Path(path).absolute()
    require_empty(path)
    check_tokenizer_path(tokenizer_from)
    check_tensors(
        {leaf: value.shape for leaf, value in flatten(abstract_params(config)).items()},
        {leaf: value.shape for leaf, value in flat.items()},
        where="params",
    )
    arrays = dict(stored(flat))
    path.parent.mkdir(parents=True, exist_ok=True)
    size, free = sum(value.nbytes for value in arrays.values()), shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC, f"the parameters take {size} bytes, and {free} are free", str(path)
        )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        with _errors_as(OSError, f"{path} cannot be written"), _checkpointer() as checkpointer:
            checkpointer.save(partial / _PARAMS, arrays)
        sizes = json.dumps(_file_sizes(partial / _PARAMS), indent=2)
        (partial / _FILES).write_text(sizes + "\n", encoding="utf-8")
        if tokenizer_from is not None:
            keep_tokenizer(Path(tokenizer_from), partial)
        text = json.dumps(to_json(config), indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_tokenizer_path(source: str | os.PathLike[str] | None) -> None:
    """Raises ``ValueError`` unless there is such a path, before anything is written."""
    if source is not None and not os.path.exists(source):
        raise ValueError(
            f"tokenizer_from={os.fspath(source)!r} does not exist; of an alias or a Hugging Face "
            "id it is convert.resolve(model).path"
        )


def keep_tokenizer(source: Path, destination: Path) -> None:
    """Copies tokenizer, chat template and generation config of a directory or ``.gguf`` file."""
    if source.is_dir():
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, destination / name)
        return
    tokenizer = load_tokenizer(source)
    if tokenizer is not None:
        tokenizer.save(destination)


def restore(
    directory: Path,
    config: ModelConfig,
    *,
    dtype: np.dtype | None,
    placement: Placement,
    weights: WeightForm | None = None,
    weight_group: int = 32,
) -> Params:
    """Parameters that ``save`` wrote, in ``dtype`` (None: as stored) and placed as asked.

    Each array goes from disk to its devices, read in the shards they need. Codes stay codes.
    ``weights`` of a kind rounds matrices that are floats, a layer after another.

    Raises ``ValueError`` for arrays that are missing, unexpected, misshapen, damaged or not finite,
    for codes of another kind than ``weights``, and for "checkpoint" where there are none.
    """
    leaves = _stored(directory, config)
    if weights == "checkpoint" and not any(isinstance(x, Weight) for x in leaves.values()):
        raise ValueError(f"{directory} holds no quantised weights, whose codes could be kept")
    for leaf, value in leaves.items():
        if isinstance(value, Weight) and value.codes.dtype == CODE_DTYPES["fp8"]:
            require_fp8(f"{directory}: {leaf}, whose codes are fp8,")
    kind = None if weights == "checkpoint" else weights
    kinds = {} if kind is None else kinds_of(leaves, kind)
    if kind is not None:
        expect_kinds(leaves, kind, weight_group, where=f"{directory}: ")
        check_groups({leaf: value.shape for leaf, value in leaves.items()}, kind, weight_group)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    flat: dict[str, Array | Weight] = {}
    for portion in [leaves] if kind is None else _layers(leaves):
        wanted: dict[str, jax.ShapeDtypeStruct] = {}
        for leaf, value in portion.items():
            sharding = sharding_of(placement, leaf) or here
            if isinstance(value, Weight):
                wanted |= stored_parts(leaf, value, sharding)
            else:
                kept = value.dtype if dtype is None or leaf in kinds else dtype
                wanted[leaf] = jax.ShapeDtypeStruct(value.shape, kept, sharding=sharding)
        arrays = _restore(directory, wanted)
        for leaf, value in portion.items():
            if isinstance(value, Weight):
                weight = flat[leaf] = joined(leaf, arrays)
                require_finite_weight(leaf, weight, str(directory))
                continue
            array = flat[leaf] = arrays.pop(leaf)
            require_finite(leaf, array, str(directory))
            if leaf in kinds:
                how = {"kind": kinds[leaf], "group": weight_group, "axis": axis_of(leaf)}
                weight = quantize_weight(array, **how)
                flat[leaf] = jax.block_until_ready(place(leaf, weight, array.sharding))
    return unflatten(flat)


def _layers(leaves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same leaves, those of a layer together."""
    layers: dict[str, dict[str, Any]] = {}
    for leaf, value in leaves.items():
        layers.setdefault(".".join(leaf.split(".")[:2]), {})[leaf] = value
    return list(layers.values())


def read_orbax(
    directory: Path, config: ModelConfig, *, weights: WeightForm | None, weight_group: int
) -> Checkpoint:
    """The same checkpoint as Hugging Face's tensors, which is what an adapter fits.

    The first look at a value reads all arrays to the host. ``weights`` and ``weight_group`` are
    what will become of it: raises ``ValueError`` for codes of another kind.
    """
    leaves = _stored(directory, config)
    if weights is not None and weights != "checkpoint":
        expect_kinds(leaves, weights, weight_group, where=f"{directory}: ")

    @functools.cache
    def arrays() -> dict[str, np.ndarray]:
        wanted: dict[str, Any] = {}
        for leaf, value in leaves.items():
            is_coded = isinstance(value, Weight)
            wanted |= stored_parts(leaf, value, None) if is_coded else {leaf: value}
        return _restore(directory, {name: np.empty(x.shape, x.dtype) for name, x in wanted.items()})

    def rows(slot: TensorSlot, start: int, stop: int) -> np.ndarray:
        return slot.view(arrays()[slot.leaf])[start:stop]

    def tensor(slot: TensorSlot) -> FileTensor:
        value, read, coded = leaves[slot.leaf], functools.partial(rows, slot), None
        if isinstance(value, Weight):
            coded = stored_rows(slot.leaf, value, arrays, slot.columns.start)
            read = functools.partial(numbers, coded)
        return FileTensor(name=slot.hf, shape=slot.shape, rows=read, coded=coded)

    table = leaves[TABLE]
    return Checkpoint(
        where=str(directory),
        config={},
        naming="hf",
        # Of a table in codes that of the activations, which its rows become.
        dtype=np.dtype((leaves["norm.scale"] if isinstance(table, Weight) else table).dtype),
        tensors=[tensor(slot) for slot in tensor_slots(config)],
        keeps_codes=any(isinstance(value, Weight) for value in leaves.values()),
    )


def _file_sizes(directory: Path) -> dict[str, int]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _check_files(directory: Path) -> None:
    """Raises ``ValueError`` naming a file that is missing or not as long as it was written.

    Checkpoints of before ``files.json`` pass.
    """
    if not (directory / _FILES).is_file():
        return
    found = _file_sizes(directory / _PARAMS)
    for name, size in read_json(directory / _FILES).items():
        if name not in found:
            raise ValueError(f"{directory / _PARAMS / name} is missing")
        if found[name] != size:
            raise ValueError(
                f"{directory / _PARAMS / name} is damaged: {found[name]} bytes, not {size}"
            )


def _stored(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """Shape and dtype of every leaf on disk, which must be those of ``config``.

    Those of a quantised leaf are a ``Weight`` of them.
    """
    _check_files(directory)
    path = (directory / _PARAMS).absolute()
    with _errors_as(ValueError, f"{path} cannot be read"), _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        arrays = {} if metadata is None else dict(metadata.items())
    if metadata is None:
        raise ValueError(f"{path} is not a complete Orbax checkpoint")
    refuse_more_layers(config.num_hidden_layers, len(arrays), where=str(directory))
    coded = coded_leaves(arrays, str(directory))
    parts = {f"{leaf}.{part}" for leaf in coded for part in Weight._fields}
    leaves = {name: value for name, value in arrays.items() if name not in parts} | coded
    check_tensors(
        {leaf: value.shape for leaf, value in flatten(abstract_params(config)).items()},
        {leaf: tuple(value.shape) for leaf, value in leaves.items()},
        where=str(directory),
    )
    return leaves


def _restore(directory: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp  # here: as above

    path = (directory / _PARAMS).absolute()
    restore = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with _errors_as(ValueError, f"{path} cannot be read"), ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path, args=restore)
