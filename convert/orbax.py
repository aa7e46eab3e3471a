"""Our own checkpoints: a directory with Orbax arrays, ``config.json`` and the tokenizer's files.

``params/`` holds one array per leaf, keyed by its dotted path, so that each can be restored
straight into its sharding. ``config.json`` is the explicit form of ``config_json``; it alone
describes the model.
"""

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.config_json import canonical, read_json, to_json
from convert.lora import Delta
from convert.names import check_tensors, flatten, tensor_slots, unflatten
from convert.stream import Checkpoint, FileTensor, Placement, assemble, sharding_of
from convert.tokenizers import load_tokenizer
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params, abstract_params

_PARAMS = "params"
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


def is_orbax(path: Path) -> bool:
    return (path / _PARAMS).is_dir()


def read_config(directory: Path) -> dict[str, Any]:
    """The canonical config of a checkpoint that ``save`` wrote."""
    return canonical(read_json(directory / "config.json"))


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

    Raises ``ValueError`` if ``path`` is not new or empty, or ``params`` does not fit ``config``.
    """
    path = Path(path).absolute()
    require_empty(path)
    flat = flatten(params)
    check_tensors(
        {leaf: value.shape for leaf, value in flatten(abstract_params(config)).items()},
        {leaf: value.shape for leaf, value in flat.items()},
        where="params",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / _PARAMS, flat)
        if tokenizer_from is not None:
            _keep_tokenizer(Path(tokenizer_from), partial)
        text = json.dumps(to_json(config), indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _keep_tokenizer(source: Path, destination: Path) -> None:
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
    deltas: Mapping[str, Delta],
    placement: Placement,
    progress: bool,
) -> Params:
    """Parameters that ``save`` wrote, in ``dtype`` (None: as stored) and placed as asked.

    Without ``deltas`` each array goes from disk to its devices, read in the shards they need.
    With ``deltas`` the arrays are read to the host first and the deltas added there.

    Raises ``ValueError`` listing all arrays that are missing, unexpected or misshapen.
    """
    stored_in = (directory / _PARAMS).absolute()
    with _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(stored_in).item_metadata
        if metadata is None:
            raise ValueError(f"{stored_in} is not a complete Orbax checkpoint")
        stored = dict(metadata.items())
        check_tensors(
            {leaf: value.shape for leaf, value in flatten(abstract_params(config)).items()},
            {leaf: tuple(value.shape) for leaf, value in stored.items()},
            where=str(directory),
        )
        own_dtype = np.dtype(stored["embed_tokens.embedding"].dtype)
        if deltas:
            empty = {leaf: np.empty(value.shape, value.dtype) for leaf, value in stored.items()}
            arrays = checkpointer.restore(stored_in, empty)
            checkpoint = _as_file_tensors(arrays, config, own_dtype, directory)
            return assemble(
                checkpoint,
                config,
                dtype=dtype or own_dtype,
                deltas=deltas,
                placement=placement,
                progress=progress,
            )
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            leaf: jax.ShapeDtypeStruct(
                value.shape,
                dtype or value.dtype,
                sharding=sharding_of(placement, leaf) or here,
            )
            for leaf, value in stored.items()
        }
        return unflatten(checkpointer.restore(stored_in, wanted))


def _as_file_tensors(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, dtype: np.dtype, directory: Path
) -> Checkpoint:
    """The leaves taken apart again into Hugging Face's tensors, which is what deltas fit."""

    def rows(tensor: np.ndarray, start: int, stop: int) -> np.ndarray:
        return tensor[start:stop]

    return Checkpoint(
        where=str(directory),
        config={},
        naming="hf",
        dtype=dtype,
        tensors=[
            FileTensor(
                name=slot.hf,
                shape=slot.shape,
                rows=functools.partial(rows, slot.view(arrays[slot.leaf])),
            )
            for slot in tensor_slots(config)
        ],
    )
