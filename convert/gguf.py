"""GGUF checkpoints of Llama, Mistral, Qwen2 and Qwen3 models.

Two quirks of the format end here. llama.cpp rotates neighbouring pairs where the model rotates
halves, so files of architecture ``llama`` hold the rows of Q and K in another order. And Llama
3's rope scaling is stored as a tensor of frequency factors, not as the numbers that made it.
"""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.config_json import EXPLICIT, canonical, refuse_unknown
from convert.gguf_codes import coded_rows
from convert.gguf_file import GGUFFile, GGUFTensor, read_gguf_file
from convert.gguf_tokenizer import end_token_ids
from convert.stream import Checkpoint, FileTensor, parse_dtype

_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama
_FREQUENCY_FACTORS = "rope_freqs.weight"

# Metadata key under the architecture's prefix -> attribute of config.json and its type.
_ATTRIBUTES = {
    "embedding_length": ("hidden_size", int),
    "feed_forward_length": ("intermediate_size", int),
    "block_count": ("num_hidden_layers", int),
    "attention.head_count": ("num_attention_heads", int),
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.key_length": ("head_dim", int),
    "attention.sliding_window": ("sliding_window", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
    "context_length": ("max_position_embeddings", int),
}
_ROPE_ATTRIBUTES = {
    "rope.freq_base": ("rope_theta", float),
    "rope.scaling.type": ("rope_type", str),
    "rope.scaling.factor": ("factor", float),
    "rope.scaling.original_context_length": ("original_max_position_embeddings", int),
    "rope.scaling.yarn_beta_fast": ("beta_fast", float),
    "rope.scaling.yarn_beta_slow": ("beta_slow", float),
}
_POSITIVE = ("block_count", "attention.head_count", "attention.head_count_kv", "embedding_length")
_CHECKED = ("attention.value_length", "rope.dimension_count")  # must equal head_dim
# Supported at these values only, where they have no effect.
_NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")


def read_gguf(path: Path) -> Checkpoint:
    """Describes the checkpoint in a GGUF file without reading any weights.

    The checkpoint's own dtype is that of its embedding table, bfloat16 if anything is quantised.
    Raises ``ValueError`` for a missing, truncated or damaged file, ``NotImplementedError`` for an
    architecture or attribute that the model does not have.
    """
    file = read_gguf_file(path)
    _refuse_kinds(file)
    config = _config(file)
    quantised = any(tensor.is_quantised for tensor in file.tensors.values())
    embedding = file.tensors["token_embd.weight"]
    dtype = np.dtype(jnp.bfloat16) if quantised else embedding.rows(slice(0, 1)).dtype
    return Checkpoint(
        where=str(path),
        config=config,
        naming="gguf",
        dtype=parse_dtype(dtype),
        tensors=[
            _tensor(tensor, _row_order(tensor, file, config)) for tensor in file.tensors.values()
        ],
    )


def _refuse_kinds(file: GGUFFile) -> None:
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise NotImplementedError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    if file.metadata.get("general.type", "model") != "model":
        raise NotImplementedError(
            f"{file.path}: it holds {file.metadata['general.type']!r}, not a model"
        )
    parts = file.typed.get("split.count", int, 1)
    if parts > 1:
        raise NotImplementedError(
            f"{file.path}: a GGUF split into {parts} files is not supported; merge it first"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no token_embd.weight")


def _tensor(tensor: GGUFTensor, order: np.ndarray | None) -> FileTensor:
    """A tensor whose rows come in ``order``, None: as they are stored."""

    def index(start: int, stop: int) -> slice | np.ndarray:
        return slice(start, stop) if order is None else order[start:stop]

    coded = uncoded = None
    if len(tensor.shape) == 2 and tensor.is_quantised:
        coded = coded_rows(
            tensor.kind, tensor.shape[1], lambda start, stop: tensor.blocks(index(start, stop))
        )
        uncoded = None if coded else f"{tensor.name} is stored as {tensor.kind.name}"
    return FileTensor(
        name=tensor.name,
        shape=tensor.shape,
        rows=lambda start, stop: tensor.rows(index(start, stop)),
        coded=coded,
        uncoded=uncoded,
    )


def _row_order(tensor: GGUFTensor, file: GGUFFile, config: dict[str, Any]) -> np.ndarray | None:
    kind = tensor.name.rpartition(".")[0].rpartition(".")[2]
    if file.metadata["general.architecture"] == "llama" and kind in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
        if tensor.shape[0] % (2 * heads):
            raise ValueError(
                f"{file.path}: {tensor.name} has {tensor.shape[0]} rows, not {heads} heads of "
                "even size"
            )
        return _rows_by_half(tensor.shape[0], heads)
    return None


def _rows_by_half(rows: int, heads: int) -> np.ndarray:
    """Where in a llama.cpp file each row of Q or K is: within a head, pairs become halves."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def _config(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata as a canonical config in explicit form (see ``config_json``)."""
    architecture = file.metadata["general.architecture"]
    prefix, metadata = f"{architecture}.", file.typed
    values = {
        key.removeprefix(prefix): _shortest(value)
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    known = {*_ATTRIBUTES, *_ROPE_ATTRIBUTES, *_CHECKED, *_NEUTRAL, *_HARMLESS}
    refuse_unknown(values, known, where=str(file.path))
    for key, neutral in _NEUTRAL.items():
        if values.get(key, neutral) != neutral:
            raise NotImplementedError(
                f"{file.path}: {prefix}{key}={values[key]} is not supported; only {neutral} is"
            )
    values.setdefault("attention.head_count_kv", values.get("attention.head_count"))
    for key in _POSITIVE:
        # An array, which the format allows, is a size for each layer.
        if not isinstance(values.get(key), int) or values[key] < 1:
            raise NotImplementedError(
                f"{file.path}: {prefix}{key} must be one positive number, got {values.get(key)!r}"
            )
    for key, (_, kind) in (_ATTRIBUTES | _ROPE_ATTRIBUTES).items():
        metadata.get(prefix + key, kind)
    config = {name: values[key] for key, (name, _) in _ATTRIBUTES.items() if key in values}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key in _CHECKED:
        if values.get(key, config["head_dim"]) != config["head_dim"]:
            raise NotImplementedError(
                f"{file.path}: {prefix}{key}={values[key]} must equal the head size "
                f"{config['head_dim']}"
            )
    biases = {
        "attention_bias": "attn_q.bias",
        "attention_out_bias": "attn_output.bias",
        "mlp_bias": "ffn_down.bias",
    }
    return canonical(
        {
            "model_type": EXPLICIT,
            **config,
            **{flag: f"blk.0.{name}" in file.tensors for flag, name in biases.items()},
            "qk_norm": architecture == "qwen3",
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "rope_parameters": _rope(file, values, config["head_dim"]),
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", int),
            "eos_token_id": list(end_token_ids(metadata)),
        },
        where=str(file.path),
    )


def _rope(file: GGUFFile, values: dict[str, Any], head_dim: int) -> dict[str, Any]:
    rope = {name: values[key] for key, (name, _) in _ROPE_ATTRIBUTES.items() if key in values}
    if rope.get("rope_type") == "none":
        rope["rope_type"] = "default"
    if rope.get("rope_type") == "longrope":  # its numbers are tensors here
        raise NotImplementedError(f"{file.path}: rope type 'longrope' is not supported in GGUF")
    if _FREQUENCY_FACTORS not in file.tensors:
        return rope
    if rope.get("rope_type", "default") != "default":
        raise NotImplementedError(
            f"{file.path}: {_FREQUENCY_FACTORS} together with rope scaling "
            f"{rope['rope_type']!r} is not supported"
        )
    theta = rope.get("rope_theta", 10000.0)
    found = file.tensors[_FREQUENCY_FACTORS].rows(slice(None)).astype(np.float64)
    for name, numbers in (("rope.freq_base", np.float64(theta)), (_FREQUENCY_FACTORS, found)):
        if not np.all(np.isfinite(numbers) & (numbers > 0)):
            raise ValueError(f"{file.path}: {name} must be positive and finite, got {numbers}")
    return {"rope_theta": theta, **_llama3(found, theta, head_dim, str(file.path))}


def _llama3(found: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """The llama3 scaling whose frequency factors are ``found``.

    Published models differ in ``factor`` alone, which is the largest factor; the other numbers
    are taken as Llama 3.1's and must reproduce what was found.
    """
    factor = _shortest(float(found.max(initial=1.0)))
    published = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    keep = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / (keep + (1 - keep) / factor)
    # The file's factors went through float32 frequencies: rounding errors of some 1e-6.
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise NotImplementedError(
            f"{where}: {_FREQUENCY_FACTORS} is not Llama 3.1's rope scaling of any factor"
        )
    return {"rope_type": "llama3", **published}


def _shortest(value: Any) -> Any:
    """A float32's shortest decimal: 1e-05, where its exact value is 9.9999997e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
