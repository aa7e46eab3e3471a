"""Files in; architecture, parameters, tokenizers and head patterns out.

Checkpoints are Hugging Face directories, GGUF, Orbax, with LoRA adapters:

    config, params = convert.load("smollm2-135m-instruct", dtype=jnp.float32)

``python -m convert SRC DST`` writes any of them as an Orbax checkpoint, with ``--format
safetensors`` as a Hugging Face directory.
"""

import signal
import sys

# This file is imported before the program is, and takes a second. Until then argv begins with -m.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "convert"
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it, no traceback

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from convert import hf, orbax
from convert.attention_patterns import load_pattern, save_pattern
from convert.config_json import override, parse
from convert.export import export_hf, save_adapter
from convert.files import is_file
from convert.gguf import read_gguf
from convert.head_shares import load_head_shares, save_head_shares
from convert.lora import Change, load_adapter, refuse_missing
from convert.names import refuse_more_layers, tensor_slots, tied_names
from convert.orbax import save
from convert.sharding import fsdp, tensor_parallel
from convert.sources import ModelSource, resolve
from convert.stream import Checkpoint, Placement, assemble, parse_dtype, settle_tie
from convert.tokenizers import load_tokenizer
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params, abstract_params
from lserve_jax.model.quantise import WeightForm, check_weights, quantise_params

__all__ = [
    "ModelSource",
    "expected_params",
    "export_hf",
    "fsdp",
    "load",
    "load_head_shares",
    "load_pattern",
    "load_tokenizer",
    "read_config",
    "resolve",
    "save",
    "save_adapter",
    "save_head_shares",
    "save_pattern",
    "tensor_parallel",
]


def load(
    model: str | os.PathLike[str] | ModelSource,
    *,
    dtype: DTypeLike | None = None,
    adapter: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    sharding: Placement = None,
    weights: WeightForm | None = None,
    weight_group: int = 32,
    progress: bool = False,
) -> tuple[ModelConfig, Params]:
    """Reads a checkpoint: its architecture and its parameters as a nested dict of arrays.

    model: whatever ``resolve`` takes (alias, path, Hugging Face id), or what it returned.
    dtype: float32, bfloat16 or float16, also by name; None keeps the checkpoint's own (that of
        its embedding table; bfloat16 for a quantised GGUF).
    adapter: directory of a PEFT LoRA adapter, merged in float32 before the cast to ``dtype``.
        Where it changes the embedding table or the output layer of a model that ties them, the
        other keeps its values.
    overrides: attributes of ``config.json`` to replace, such as ``{"rope_theta": 2e6}``.
    sharding: one ``Sharding`` for every array, or a function from an array's dotted path
        (``layers.0.mlp.down_proj.kernel``) to its ``Sharding``, as ``tensor_parallel`` and ``fsdp``
        make; None is the default device.
    weights: None: floats, except that codes of an Orbax checkpoint stay codes. "int8", "int4" or
        "fp8": matrices are rounded as they come (``api.quantize_weight``; the output layer to int8
        beside "int4"), after an adapter is merged; so are rows of an embedding table with an output
        layer beside it (to int8 beside "fp8"). "checkpoint": matrices and such a table of a
        quantised checkpoint keep the codes that are stored, where the parts of a leaf are all
        quantised.
    weight_group: inputs that share a scale and a zero point in "int4": 32, 64 or 128.
    progress: progress bars on stderr.

    The tree is that of ``lserve_jax.model.llama.init_params``. Tensors are converted one after
    another: the host holds the parameters, one file's mapped pages and little else.

    Raises ``ValueError`` for a missing, damaged or inconsistent file and for wrong arguments (the
    missing, unexpected and misshapen tensors in one message), ``NotImplementedError`` for an
    architecture, attribute or tensor type that is not supported, by name. Codes of an Orbax
    checkpoint are not turned into others, and codes that are kept are not changed by an adapter:
    ``ValueError``.
    """
    check_weights(weights, weight_group)
    if not isinstance(overrides, Mapping | None):
        raise TypeError(f"{overrides=} must map attributes of config.json to values")
    wanted = None if dtype is None else parse_dtype(dtype)
    source = model if isinstance(model, ModelSource) else resolve(model, progress=progress)
    config, checkpoint, changes = _describe(
        source, overrides or {}, adapter, weights=weights, weight_group=weight_group
    )
    if checkpoint is None:
        return config, orbax.restore(
            source.path,
            config,
            dtype=wanted,
            placement=sharding,
            weights=weights,
            weight_group=weight_group,
        )
    return config, assemble(
        checkpoint,
        config,
        dtype=wanted or checkpoint.dtype,
        changes=changes,
        placement=sharding,
        progress=progress,
        weights=weights,
        weight_group=weight_group,
    )


def expected_params(
    source: ModelSource,
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    weights: WeightForm | None = None,
    weight_group: int = 32,
) -> Params | None:
    """Shapes and dtypes of what ``load`` returns of a model with that ``config``, unplaced.

    None where the files say what becomes codes: they are not read. Raises ``ValueError`` for a
    group that does not divide a matrix's inputs.
    """
    if weights == "checkpoint" or orbax.is_orbax(source.path):
        return None
    params = abstract_params(config, dtype)
    if weights is None:
        return params
    return jax.eval_shape(lambda tree: quantise_params(tree, weights, group=weight_group), params)


def read_config(
    source: ModelSource, *, adapter: str | os.PathLike[str] | None = None
) -> ModelConfig:
    """The architecture that ``load`` returns, with that adapter, without reading the weights.

    Of these it reads at most the two that may be tied: they decide ``tie_word_embeddings``, and so
    does an adapter that changes one of them. Raises what ``load`` raises for a configuration and
    for an adapter, and for files that are missing or whose headers are damaged.
    """
    return _describe(source, {}, adapter)[0]


def _describe(
    source: ModelSource,
    overrides: Mapping[str, Any],
    adapter: str | os.PathLike[str] | None,
    *,
    weights: WeightForm | None = None,
    weight_group: int = 32,
) -> tuple[ModelConfig, Checkpoint | None, dict[str, Change]]:
    """Architecture, tensors and changes to them; no tensors where ``orbax.restore`` reads them."""
    if adapter is not None and source.adapter is not None:
        raise ValueError(
            f"model {source.name!r} brings an adapter of its own, so adapter={str(adapter)!r} "
            "cannot be merged too"
        )
    path, chosen = source.path, source.adapter if adapter is None else adapter
    if chosen is None and is_file(path / "adapter_config.json"):
        raise ValueError(
            f"{path} holds a LoRA adapter (adapter_config.json): give the model and, to merge the "
            f"adapter, adapter={str(path)!r}; or move the adapter elsewhere"
        )
    changes = {} if chosen is None else load_adapter(chosen)
    where = str(path / "config.json" if path.is_dir() else path)
    overrides = {**source.overrides, **overrides}
    _refuse_two_models(path)
    if orbax.is_orbax(path):
        config = parse(override(orbax.read_config(path), overrides), where=where)
        if not changes:
            return config, None, {}
        checkpoint = orbax.read_orbax(path, config, weights=weights, weight_group=weight_group)
    else:
        checkpoint = hf.read_hf(path) if path.is_dir() else read_gguf(path)
        raw = override(checkpoint.config, overrides)
        refuse_more_layers(
            raw.get("num_hidden_layers"), len(checkpoint.tensors), where=checkpoint.where
        )
        config = parse(raw, where=where)
    checkpoint, config = settle_tie(checkpoint, config, changes)
    if chosen is not None:
        # A tied model has the module of its output layer too.
        tensors = [slot.hf for slot in tensor_slots(config, checkpoint.naming)]
        refuse_missing(chosen, changes, [*tensors, *tied_names("hf")])
    return config, checkpoint, changes


def _refuse_two_models(path: Path) -> None:
    """Raises ``ValueError`` for a directory of several models, or of a GGUF file alone."""
    weights, ggufs = hf.weight_file(path), sorted(path.glob("*.gguf"))
    models = ["params"] if orbax.is_orbax(path) else []
    models += [] if weights is None else [weights.name]
    if models and ggufs:
        models.append(ggufs[0].name)
    if len(models) > 1:
        raise ValueError(f"{path} holds two models, {models[0]} and {models[1]}: move one away")
    if ggufs and not models:
        raise ValueError(f"{path} holds a GGUF file: give its own path, {str(ggufs[0])!r}")
