"""Our own checkpoints: a directory with Orbax arrays, ``config.json`` and the tokenizer's files.

``params/`` holds one array per leaf, keyed by its dotted path, so that each can be restored
straight into its sharding. ``config.json`` is the explicit form of ``config_json``; it alone
describes the model. ``files.json`` has the size of every file of ``params/``, so that a checkpoint
cut short is known before Orbax reads it, which ends in pages of errors.
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
from convert.stream import Checkpoint, FileTensor, Placement, require_finite, sharding_of
from convert.tokenizers import load_tokenizer
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params, abstract_params
from pallas_kernels.api import Weight

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
            lines = str(reason).splitlines() or [""]
            raise kind(f"{what}: {type(reason).__name__}: {lines[0][:500]}") from error
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
    """Writes ``config`` and ``params`` as a checkpoint that ``load`` reads.

    ``tokenizer_from`` is the directory or ``.gguf`` file whose tokenizer, chat template and
    generation config to keep beside them; None keeps none. All or nothing: the checkpoint is
    written under another name and renamed when complete.

    Raises ``ValueError`` if ``path`` is not new or empty, or ``params`` does not fit ``config``,
    and ``OSError`` if it cannot be written, such as for lack of room.
    """
    path = Path(path).absolute()
    require_empty(path)
    flat = flatten(params)
    if any(isinstance(value, Weight) for value in flat.values()):
        raise NotImplementedError("quantised weights cannot be saved yet; load them as floats")
    check_tensors(
        {leaf: value.shape for leaf, value in flatten(abstract_params(config)).items()},
        {leaf: value.shape for leaf, value in flat.items()},
        where="params",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    size, free = sum(value.nbytes for value in flat.values()), shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC, f"the parameters take {size} bytes, and {free} are free", str(path)
        )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        with _errors_as(OSError, f"{path} cannot be written"), _checkpointer() as checkpointer:
            checkpointer.save(partial / _PARAMS, flat)
        sizes = json.dumps(_file_sizes(partial / _PARAMS), indent=2)
        (partial / _FILES).write_text(sizes + "\n", encoding="utf-8")
        if tokenizer_from is not None:
            keep_tokenizer(Path(tokenizer_from), partial)
        text = json.dumps(to_json(config), indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    directory: Path, config: ModelConfig, *, dtype: np.dtype | None, placement: Placement
) -> Params:
    """Parameters that ``save`` wrote, in ``dtype`` (None: as stored) and placed as asked.

    Each array goes from disk to its devices, read in the shards they need. Raises ``ValueError``
    for arrays that are missing, unexpected, misshapen, damaged or not finite.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        leaf: jax.ShapeDtypeStruct(
            value.shape, dtype or value.dtype, sharding=sharding_of(placement, leaf) or here
        )
        for leaf, value in _stored(directory, config).items()
    }
    flat = _restore(directory, wanted)
    for leaf, value in flat.items():
        require_finite(leaf, value, str(directory))
    return unflatten(flat)


def read_orbax(directory: Path, config: ModelConfig) -> Checkpoint:
    """The same checkpoint as Hugging Face's tensors, which is what an adapter fits.

    The first look at a value reads all arrays to the host.
    """
    stored = _stored(directory, config)

    @functools.cache
    def arrays() -> dict[str, np.ndarray]:
        empty = {leaf: np.empty(value.shape, value.dtype) for leaf, value in stored.items()}
        return _restore(directory, empty)

    def rows(slot: TensorSlot, start: int, stop: int) -> np.ndarray:
        return slot.view(arrays()[slot.leaf])[start:stop]

    return Checkpoint(
        where=str(directory),
        config={},
        naming="hf",
        dtype=np.dtype(stored["embed_tokens.embedding"].dtype),
        tensors=[
            FileTensor(name=slot.hf, shape=slot.shape, rows=functools.partial(rows, slot))
            for slot in tensor_slots(config)
        ],
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
    """Shape and dtype of every array on disk, which must be those of ``config``."""
    _check_files(directory)
    path = (directory / _PARAMS).absolute()
    with _errors_as(ValueError, f"{path} cannot be read"), _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        stored = {} if metadata is None else dict(metadata.items())
    if metadata is None:
        raise ValueError(f"{path} is not a complete Orbax checkpoint")
    refuse_more_layers(config.num_hidden_layers, len(stored), where=str(directory))
    check_tensors(
        {leaf: value.shape for leaf, value in flatten(abstract_params(config)).items()},
        {leaf: tuple(value.shape) for leaf, value in stored.items()},
        where=str(directory),
    )
    return stored


def _restore(directory: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    path = (directory / _PARAMS).absolute()
    with _errors_as(ValueError, f"{path} cannot be read"), _checkpointer() as checkpointer:
        return checkpointer.restore(path, wanted)
