"""The way back to Hugging Face: safetensors, config, tokenizer, and adapters as PEFT has them."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from convert.config_out import to_hugging_face
from convert.names import TensorSlot, check_tensors, flatten, tensor_slots
from convert.orbax import check_tokenizer_path, keep_tokenizer, require_empty
from lserve_jax.checks import check_integer, is_real
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.lora import Adapter
from lserve_jax.model.params import Params, abstract_params, is_quantised

_DTYPES = ("float32", "bfloat16", "float16")
_METADATA = {"format": "pt"}  # transformers refuses files without it


def export_hf(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face checkpoint, which transformers, vLLM and ``load`` read.

    Tensors have the parameters' values and dtypes, bit for bit; a file holds up to
    ``max_shard_bytes`` of them, and several come with an index. ``model_type`` is one that has what
    ``config`` describes; it may be another than that of the checkpoint it came from (Phi-3
    becomes a Llama). ``tokenizer_from`` is as in ``save``. All or nothing, as there.

    Raises ``ValueError`` if ``path`` is not new or empty or ``params`` does not fit ``config``,
    ``NotImplementedError`` for quantised weights and for a config that no ``model_type`` has,
    ``OSError`` if it cannot be written.
    """
    check_integer("max_shard_bytes", max_shard_bytes, 1, float("inf"))
    flat = flatten(params)
    if any(is_quantised(value) for value in flat.values()):
        raise NotImplementedError("quantised weights cannot be exported; load them as floats")
    check_tensors(
        {leaf: value.shape for leaf, value in flatten(abstract_params(config)).items()},
        {leaf: value.shape for leaf, value in flat.items()},
        where="params",
    )
    dtype = str(flat["embed_tokens.embedding"].dtype)
    for leaf, value in flat.items():
        if str(value.dtype) not in (dtype, "float32") or dtype not in _DTYPES:
            raise ValueError(
                f"{leaf} is {value.dtype}: parameters must all be of one dtype of "
                f"{', '.join(_DTYPES)}"
            )
    check_tokenizer_path(tokenizer_from)
    attributes = {**to_hugging_face(config), "torch_dtype": dtype}
    size = sum(value.nbytes for value in flat.values())
    with _directory(Path(path), size) as partial:
        _write_tensors(partial, flat, tensor_slots(config), max_shard_bytes)
        if tokenizer_from is not None:
            keep_tokenizer(Path(tokenizer_from), partial)
        _write_json(partial / "config.json", attributes)


def save_adapter(
    path: str | os.PathLike[str],
    config: ModelConfig,
    adapter: Adapter,
    *,
    alpha: float,
    base_model: str | None = None,
) -> None:
    """Writes a LoRA adapter in PEFT's format, which PEFT, vLLM and ``load(adapter=...)`` read.

    ``adapter`` is a tree of ``lora.init_adapter``, ``alpha`` as in ``lora.merge``. The matrices of
    q|k|v and of gate|up become those of their parts, which share ``a``. ``base_model`` is what the
    file names as the model it belongs to.

    Raises ``ValueError`` if ``path`` is not new or empty, for a leaf that is no matrix of the
    model, and for matrices of a wrong shape or of unlike ranks.
    """
    if not is_real(alpha) or not math.isfinite(alpha):
        raise ValueError(f"{alpha=} must be a finite number")
    kernels = {leaf: x.shape for leaf, x in flatten(abstract_params(config)).items()}
    ranks = set()
    for leaf, matrices in adapter.items():
        shapes = [np.shape(matrices[name]) for name in ("a", "b")]
        if not leaf.endswith("_proj.kernel") or leaf not in kernels:
            raise ValueError(f"adapter has {leaf!r}, which is no projection of the model")
        (rows, columns), rank = kernels[leaf], shapes[0][-1]
        if shapes != [(rows, rank), (rank, columns)]:
            raise ValueError(f"{leaf}: a and b have shapes {shapes}, the kernel {kernels[leaf]}")
        ranks.add(rank)
    if len(ranks) != 1:
        raise ValueError(f"the matrices of an adapter must have one rank, got {sorted(ranks)}")
    tensors, modules = {}, set()
    for slot in tensor_slots(config):
        if slot.leaf in adapter:
            module = slot.hf.removesuffix(".weight")
            a, b = (np.asarray(adapter[slot.leaf][name]) for name in ("a", "b"))
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(
                b[:, slot.columns].T
            )
            modules.add(module.rpartition(".")[2])
    attributes = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": ranks.pop(),
        "lora_alpha": float(alpha),
        "target_modules": sorted(modules),
        "bias": "none",
    }
    with _directory(Path(path), sum(x.nbytes for x in tensors.values())) as partial:
        _save(tensors, partial / "adapter_model.safetensors")
        _write_json(partial / "adapter_config.json", attributes)


@contextlib.contextmanager
def _directory(path: Path, size: int) -> Generator[Path]:
    """A directory beside ``path``, renamed to it when all went well."""
    path = path.absolute()
    require_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC, f"the tensors take {size} bytes, and {free} are free", str(path)
        )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    save_file(tensors, path, metadata=_METADATA)
    # The library's file is its owner's alone. Those of the directory may be read as it is.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _write_tensors(
    directory: Path, flat: Mapping[str, Any], slots: list[TensorSlot], max_shard_bytes: int
) -> None:
    """One file's tensors are on the host at a time."""
    shards: list[list[TensorSlot]] = [[]]
    used = 0
    for slot in slots:
        size = int(np.prod(slot.shape)) * flat[slot.leaf].dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(slot)
        used += size
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        leaves = {leaf: jax.device_get(flat[leaf]) for leaf in {slot.leaf for slot in shard}}
        tensors = {slot.hf: np.ascontiguousarray(slot.view(leaves[slot.leaf])) for slot in shard}
        _save(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(value.nbytes for value in flat.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
