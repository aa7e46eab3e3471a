"""Small random checkpoints, written from Hugging Face's conventions and not from our own table."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from lserve_jax.model.config import ModelConfig
from lserve_jax.tokenizer import Tokenizer

Tensors = dict[str, np.ndarray]

LLAMA = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_tensors(config: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> Tensors:
    """All tensors of a Llama with ``config``, which must give every size explicitly."""
    rng = np.random.default_rng(seed)
    V, E, F = (config[k] for k in ("vocab_size", "hidden_size", "intermediate_size"))
    D = config["head_dim"]
    q, kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, E)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (E,),
            f"{layer}self_attn.q_proj.weight": (q, E),
            f"{layer}self_attn.k_proj.weight": (kv, E),
            f"{layer}self_attn.v_proj.weight": (kv, E),
            f"{layer}self_attn.o_proj.weight": (E, q),
            f"{layer}post_attention_layernorm.weight": (E,),
            f"{layer}mlp.gate_proj.weight": (F, E),
            f"{layer}mlp.up_proj.weight": (F, E),
            f"{layer}mlp.down_proj.weight": (E, F),
        }
        if config.get("attention_bias"):
            shapes |= {
                f"{layer}self_attn.q_proj.bias": (q,),
                f"{layer}self_attn.k_proj.bias": (kv,),
                f"{layer}self_attn.v_proj.bias": (kv,),
                f"{layer}self_attn.o_proj.bias": (E,),
            }
        if config.get("mlp_bias"):
            shapes |= {
                f"{layer}mlp.gate_proj.bias": (F,),
                f"{layer}mlp.up_proj.bias": (F,),
                f"{layer}mlp.down_proj.bias": (E,),
            }
    shapes["model.norm.weight"] = (E,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, E)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_hf(directory: Path, config: dict[str, Any], *shards: Tensors) -> Path:
    """A checkpoint directory; with several ``shards`` also their index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors")
        return directory
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def save_character_tokenizer(directory: Path, characters: Sequence[str]) -> None:
    """A tokenizer whose tokens are single characters, with a chat template that can be read."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[])
    )
    backend.decoder = tokenizers.decoders.Fuse()
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[answer]"
    Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=template).save(directory)


def write_chat_model(directory: Path) -> Path:
    """A random model of 512 tokens of context that knows the 95 printable ASCII characters."""
    config = LLAMA | {"vocab_size": 96, "eos_token_id": 95, "max_position_embeddings": 512}
    tensors = random_tensors(config)
    tensors["model.embed_tokens.weight"] *= 0.1  # else it repeats one character
    save_character_tokenizer(write_hf(directory, config, tensors), [chr(i) for i in range(32, 127)])
    return directory


def expected_leaves(tensors: Tensors) -> Tensors:
    """Our leaves for Hugging Face ``tensors``: projections transposed, q|k|v and gate|up fused."""
    leaves = {
        "embed_tokens.embedding": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        leaves["lm_head.kernel"] = tensors["lm_head.weight"].T
    layers = sum(name.endswith("input_layernorm.weight") for name in tensors)
    for i in range(layers):
        source, layer = f"model.layers.{i}.", f"layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            leaves[f"{layer}{norm}.scale"] = tensors[f"{source}{norm}.weight"]
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            if f"{source}{norm}.weight" in tensors:
                leaves[f"{layer}{norm}.scale"] = tensors[f"{source}{norm}.weight"]
        for fused, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("self_attn.o_proj", ("self_attn.o_proj",)),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.down_proj", ("mlp.down_proj",)),
        ):
            leaves[f"{layer}{fused}.kernel"] = np.concatenate(
                [tensors[f"{source}{part}.weight"].T for part in parts], axis=1
            )
            if f"{source}{parts[0]}.bias" in tensors:
                leaves[f"{layer}{fused}.bias"] = np.concatenate(
                    [tensors[f"{source}{part}.bias"] for part in parts]
                )
    return leaves


TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{IN_LAYER[module]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows: row j of a head's first half, then row j of its second."""
    D = weight.shape[0] // heads
    result = np.empty_like(weight)
    for head in range(heads):
        for j in range(D // 2):
            result[head * D + 2 * j] = weight[head * D + j]
            result[head * D + 2 * j + 1] = weight[head * D + D // 2 + j]
    return result


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Tensors,
    *,
    arch: str = "llama",
    kind: Callable[[str], Kind] = lambda name: Kind.F32,
    extra: dict[str, np.ndarray] | None = None,
    metadata: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
) -> Path:
    """Hugging Face ``tensors`` as a GGUF file, each stored as ``kind`` of its GGUF name says."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.rope_theta)
    if config.rope.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    for token_id in config.eos_token_ids:
        writer.add_eos_token_id(token_id)
    metadata(writer)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in tensors.items():
        name = gguf_name(name)
        module = name.split(".")[-2]
        if arch == "llama" and module in heads:
            value = interleave(value, heads[module])
        stored = Kind.F32 if value.ndim == 1 else kind(name)
        data = gguf.quantize(value.astype(np.float32), stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_config(raw: dict[str, Any] = LLAMA, **changes: Any) -> ModelConfig:
    fields = {k: v for k, v in raw.items() if k not in ("model_type", "rope_theta", "eos_token_id")}
    return ModelConfig(**{**fields, "eos_token_ids": (2,), **changes})


def process_environment(**more: str) -> dict[str, str]:
    """Variables of a Python that a test starts: this one's, the CPU, the tests' JAX settings."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(jax.config.read("jax_disable_most_optimizations")),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **settings, **more}


def run_script(script: str, *arguments: object, **environment: str) -> str:
    """What ``script`` prints, run by a Python of its own on the CPU."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=process_environment(**{"PYTHONPATH": str(root), **environment}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def put_no_file(path: Path, kind: str) -> None:
    """Where a file could be: "a directory", or "a link to nothing"."""
    if kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to("nothing")
