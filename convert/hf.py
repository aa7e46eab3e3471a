"""Hugging Face directories: ``config.json`` and safetensors, one file or an index of shards."""

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np

from convert.config_json import canonical
from convert.files import is_file
from convert.json_values import positive_int, read_json, token_ids
from convert.quantisation_config import QUANTISED_KEYS, quantisation
from convert.quantised import RawTensor, dequantised
from convert.safetensors_file import FLOATS, SafetensorsFile
from convert.stream import Checkpoint, FileTensor, parse_dtype

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_EMBEDDING = "model.embed_tokens.weight"
_FLOATS = frozenset(FLOATS.values())
# Files that only quantised checkpoints have, from before config.json said so.
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` in canonical form.

    Where ``generation_config.json`` names tokens to stop at, those count, as in Hugging Face.
    What it says of quantised weights is left out: they become others on the way here. Raises
    ``NotImplementedError`` for a method of quantising that is not read.
    """
    where = str(directory / "config.json")
    config = read_json(directory / "config.json")
    if quantisation(config, where) is None:
        for name in _QUANTISED:
            if is_file(directory / name):
                raise NotImplementedError(
                    f"{directory / name} says how the checkpoint is quantised, config.json does "
                    "not: give config.json its quantization_config"
                )
    config = {key: value for key, value in config.items() if key not in QUANTISED_KEYS}
    generation = directory / "generation_config.json"
    if is_file(generation):
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            vocab_size = positive_int("vocab_size", config.get("vocab_size"), where)
            ids = token_ids("eos_token_id", eos, vocab_size, str(generation))
            config["eos_token_id"] = list(ids)
    return canonical(config, where=where)


def read_hf(directory: Path) -> Checkpoint:
    """Describes the checkpoint in ``directory`` without reading any weights.

    Raises ``ValueError`` for missing or truncated files, ``NotImplementedError`` for tensors that
    are not F32, F16 or BF16, nor codes of a checkpoint that says how it is quantised.
    """
    path = directory / "config.json"
    quantised = quantisation(read_json(path), str(path))
    config = read_config(directory)
    shards = _OneShard(codes=quantised is not None)
    raw: dict[str, RawTensor] = {}
    dtypes: dict[str, str] = {}
    for path in _weight_files(directory):
        shard = shards.open(path)
        for name, shape in shard.shapes.items():
            if name in raw:
                raise ValueError(f"{directory} holds tensor {name} twice, again in {path.name}")
            raw[name] = RawTensor(
                name=name,
                shape=shape,
                dtype=shard.dtypes[name],
                read=functools.partial(shards.part, path, name),
            )
        dtypes |= {name: dtype for name, dtype in shard.dtypes.items() if dtype in _FLOATS}
    if not raw:
        raise ValueError(f"{directory} holds no tensors")
    if quantised is None:
        tensors = {
            name: FileTensor(name=name, shape=x.shape, rows=x.read) for name, x in raw.items()
        }
    else:
        tensors = dequantised(raw, quantised, str(directory))
    return Checkpoint(
        where=str(directory),
        config=config,
        naming="phi3" if config.get("model_type") == "phi3" else "hf",
        dtype=parse_dtype(dtypes.get(_EMBEDDING) or next(iter(dtypes.values()), "float32")),
        tensors=list(tensors.values()),
    )


def weight_file(directory: Path) -> Path | None:
    """The file that leads to the weights in ``directory``, None if there is none.

    The single file where there is one, as in Hugging Face; else the index of the shards.
    """
    files = (directory / name for name in (_SINGLE, _INDEX))
    return next((path for path in files if is_file(path)), None)


def _weight_files(directory: Path) -> list[Path]:
    index = weight_file(directory)
    if index is None:
        raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}")
    if index.name == _SINGLE:
        return [index]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, or one that is not an object")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{index}: weight_map has {tensor} in {name!r}, which is not a file name"
            )
    return [directory / name for name in sorted(set(weight_map.values()))]


class _OneShard:
    """Keeps one shard mapped at a time: mapped pages that were read count as our memory."""

    def __init__(self, *, codes: bool):
        self._codes = codes
        self._shard: SafetensorsFile | None = None
        self._lock = threading.Lock()  # a module's codes and scales may lie in two shards

    def open(self, path: Path) -> SafetensorsFile:
        with self._lock:
            if self._shard is None or self._shard.path != path:
                self._shard = None  # unmap before mapping the next
                self._shard = SafetensorsFile(path, codes=self._codes)
            return self._shard

    def part(self, path: Path, name: str, *bounds: int) -> np.ndarray:
        return self.open(path).part(name, *bounds)
