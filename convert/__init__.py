"""Files in; architecture, parameters, tokenizers and head patterns out.

Checkpoints are Hugging Face directories, GGUF, Orbax, with LoRA adapters:

    config, params = convert.load("smollm2-135m-instruct", dtype=jnp.float32)

``python -m convert SRC DST`` writes any of them as an Orbax checkpoint.
"""

import os
from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from convert import orbax
from convert.attention_patterns import load_pattern, save_pattern
from convert.config_json import override, parse
from convert.gguf import read_gguf
from convert.hf import read_hf
from convert.lora import load_adapter
from convert.orbax import save
from convert.sources import ModelSource, resolve
from convert.stream import Checkpoint, Placement, assemble, parse_dtype
from convert.tokenizers import load_tokenizer
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params

__all__ = [
    "ModelSource",
    "load",
    "load_pattern",
    "load_tokenizer",
    "read_config",
    "resolve",
    "save",
    "save_pattern",
]


def load(
    model: str | os.PathLike[str] | ModelSource,
    *,
    dtype: DTypeLike | None = None,
    adapter: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    sharding: Placement = None,
    progress: bool = False,
) -> tuple[ModelConfig, Params]:
    """Reads a checkpoint: its architecture and its parameters as a nested dict of arrays.

    model: whatever ``resolve`` takes (alias, path, Hugging Face id), or what it returned.
    dtype: float32, bfloat16 or float16, also by name; None keeps the checkpoint's own (that of
        its embedding table; bfloat16 for a quantised GGUF).
    adapter: directory of a PEFT LoRA adapter, merged in float32 before the cast to ``dtype``.
    overrides: attributes of ``config.json`` to replace, such as ``{"rope_theta": 2e6}``.
    sharding: one ``Sharding`` for every array, or a function from an array's dotted path
        (``layers.0.mlp.down_proj.kernel``) to its ``Sharding``; None is the default device.
    progress: progress bars on stderr.

    The tree is that of ``lserve_jax.model.llama.init_params``. Tensors are converted one after
    another: the host holds the parameters, one file's mapped pages and little else.

    Raises ``ValueError`` for a missing, damaged or inconsistent file and for wrong arguments (all
    missing, unexpected and misshapen tensors in one message), ``NotImplementedError`` for an
    architecture, attribute or tensor type that is not supported, by name.
    """
    wanted = None if dtype is None else parse_dtype(dtype)
    source = model if isinstance(model, ModelSource) else resolve(model, progress=progress)
    if adapter is not None and source.adapter is not None:
        raise ValueError(
            f"model {source.name!r} brings an adapter of its own, so adapter={str(adapter)!r} "
            "cannot be merged too"
        )
    chosen = adapter or source.adapter
    deltas = {} if chosen is None else load_adapter(chosen)
    config, checkpoint = _describe(source, overrides or {})
    if checkpoint is None:
        return config, orbax.restore(
            source.path, config, dtype=wanted, deltas=deltas, placement=sharding, progress=progress
        )
    return config, assemble(
        checkpoint,
        config,
        dtype=wanted or checkpoint.dtype,
        deltas=deltas,
        placement=sharding,
        progress=progress,
    )


def read_config(source: ModelSource) -> ModelConfig:
    """The architecture that ``load`` returns, without reading any weights.

    An adapter changes weights alone, so it is not looked at. Raises what ``load`` raises for a
    configuration, and for files that are missing or whose headers are damaged.
    """
    return _describe(source, {})[0]


def _describe(
    source: ModelSource, overrides: Mapping[str, Any]
) -> tuple[ModelConfig, Checkpoint | None]:
    """Architecture and tensors of a checkpoint; None for Orbax, which ``orbax.restore`` reads."""
    path, checkpoint = source.path, None
    if orbax.is_orbax(path):
        raw = orbax.read_config(path)
    else:
        checkpoint = read_hf(path) if path.is_dir() else read_gguf(path)
        raw = checkpoint.config
    changes = {**source.overrides, **overrides}
    return parse(override(raw, changes), where=str(path)), checkpoint
