"""Peak host memory of loading a checkpoint of Llama-3-8B's geometry in 4 bits, codes kept.

    python benchmarks/load_memory.py [--layers 32] [--directory DIR]

Writes a checkpoint of random codes in the format of compressed-tensors (pack-quantized, groups of
128; embedding and output layer bfloat16) in four shards, 5.7 GB, into DIR, and loads it in a fresh
process, which takes 8 GB. ``--layers`` makes it smaller. Writes
``benchmarks/results/load_memory.json``.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro
from llama_8b import CONFIG
from machine import provenance
from safetensors.numpy import save_file

from lserve_jax.model.config import ModelConfig

SHARDS, GROUP = 4, 128
SCHEME = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": SCHEME}},
    "ignore": ["lm_head"],
}
MEASURE = """
import json, sys
import jax
import convert

def kilobytes(field):  # not getrusage: its peak is inherited from the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

jax.devices()
before = kilobytes("VmRSS")
_, params = convert.load(sys.argv[1], weights="checkpoint", progress=True)
held = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(params))
print(json.dumps({"peak": 1024 * (kilobytes("VmHWM") - before), "parameters": held}))
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    layers: int = CONFIG.num_hidden_layers
    directory: Path | None = None  # None: a temporary one
    output: Path = Path(__file__).parent / "results" / "load_memory.json"


def write(directory: Path, model: ModelConfig) -> None:
    """A checkpoint, a shard after another; one that is there stays."""
    if (directory / "config.json").exists():
        return
    rng = np.random.default_rng(0)
    V, E, F = model.vocab_size, model.hidden_size, model.intermediate_size
    q, kv = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    layers = model.num_hidden_layers
    matrices = {
        **{"self_attn.q_proj": (q, E), "self_attn.k_proj": (kv, E), "self_attn.v_proj": (kv, E)},
        "self_attn.o_proj": (E, q),
        **{"mlp.gate_proj": (F, E), "mlp.up_proj": (F, E), "mlp.down_proj": (E, F)},
    }

    def floats(*shape: int) -> np.ndarray:
        return np.full(shape, 0.01, ml_dtypes.bfloat16)

    for shard in range(SHARDS):
        tensors = {}
        if shard == 0:
            tensors["model.embed_tokens.weight"] = floats(V, E)
        for layer in range(layers * shard // SHARDS, layers * (shard + 1) // SHARDS):
            at = f"model.layers.{layer}."
            for name, (out, inputs) in matrices.items():
                codes = rng.integers(-(2**31), 2**31, (out, inputs // 8), np.int32)
                tensors[f"{at}{name}.weight_packed"] = codes
                tensors[f"{at}{name}.weight_scale"] = floats(out, inputs // GROUP)
                tensors[f"{at}{name}.weight_shape"] = np.array([out, inputs])
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{at}{name}.weight"] = floats(E)
        if shard == SHARDS - 1:
            tensors |= {
                "model.norm.weight": floats(E),
                "lm_head.weight": floats(V, E),
            }
        save_file(tensors, directory / f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors")
    files = {path.name: path for path in sorted(directory.glob("*.safetensors"))}
    names = {}
    for name, path in files.items():
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        names |= {tensor: name for tensor in header if tensor != "__metadata__"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
        **{"vocab_size": V, "hidden_size": E, "intermediate_size": F},
        **{"num_hidden_layers": layers, "num_attention_heads": model.num_attention_heads},
        **{"num_key_value_heads": model.num_key_value_heads, "head_dim": model.head_dim},
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 500000.0},
        **{"tie_word_embeddings": False, "quantization_config": QUANTISATION},
    }
    (directory / "config.json").write_text(json.dumps(config))


def main(args: Args) -> None:
    result = {**provenance(), "layers": args.layers}
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        write(directory, dataclasses.replace(CONFIG, num_hidden_layers=args.layers))
        sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
        started = time.perf_counter()
        found = subprocess.run(
            [sys.executable, "-c", MEASURE, str(directory)], stdout=subprocess.PIPE, check=True
        )
    result |= json.loads(found.stdout) | {"files": sum(sizes), "largest_shard": max(sizes)}
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["beside_parameters_in_shards"] = round(
        (result["peak"] - result["parameters"]) / result["largest_shard"], 3
    )
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
