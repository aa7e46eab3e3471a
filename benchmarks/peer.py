"""Hugging Face transformers in its own process, on a checkpoint written from our parameters.

Its environment is apart, since this project does not depend on torch:

    python3 -m venv PEER
    PEER/bin/pip install torch transformers

and PEER/bin/python is what ``--peer-python`` wants.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lserve_jax import ModelConfig

HERE = Path(__file__).resolve().parent


def export(config: ModelConfig, params: dict, directory: Path) -> None:
    """Writes ``params`` as a Hugging Face Llama checkpoint (float32 safetensors).

    Raises ``ValueError`` for a model that is not a plain Llama.
    """
    if config.rope.rope_type != "default" or config.attention_bias or config.qk_norm:
        raise ValueError("only a plain Llama is exported for the peer; this model is none")
    H, Hk, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    tensors = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    for i, layer in params["layers"].items():
        attention, mlp, name = layer["self_attn"], layer["mlp"], f"model.layers.{i}"
        q, k, v = np.split(attention["qkv_proj"]["kernel"], [H * D, (H + Hk) * D], axis=1)
        gate, up = np.split(mlp["gate_up_proj"]["kernel"], 2, axis=1)
        tensors |= {
            f"{name}.input_layernorm.weight": layer["input_layernorm"]["scale"],
            f"{name}.post_attention_layernorm.weight": layer["post_attention_layernorm"]["scale"],
            f"{name}.self_attn.q_proj.weight": q.T,
            f"{name}.self_attn.k_proj.weight": k.T,
            f"{name}.self_attn.v_proj.weight": v.T,
            f"{name}.self_attn.o_proj.weight": attention["o_proj"]["kernel"].T,
            f"{name}.mlp.gate_proj.weight": gate.T,
            f"{name}.mlp.up_proj.weight": up.T,
            f"{name}.mlp.down_proj.weight": mlp["down_proj"]["kernel"].T,
        }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = params["lm_head"]["kernel"].T
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields += ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
    fields += ("max_position_embeddings", "tie_word_embeddings")
    settings = {name: getattr(config, name) for name in fields}
    settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    settings |= {"rope_theta": config.rope.rope_theta, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(settings))


class Peer:
    """The other process, ready when it is made: the checkpoint is no longer needed then."""

    def __init__(self, python: str, directory: Path):
        self._process = subprocess.Popen(
            # -P: this folder's modules must not be found under the names of the peer's packages.
            [python, "-P", str(HERE / "peer_transformers.py"), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer process ended; its error is above")
        return json.loads(line)

    def generate(
        self, dtype: str, prompts: Sequence[Sequence[int]], num_tokens: int, *, batch_size: int
    ) -> tuple[list[list[int]], float]:
        """Greedy continuations of ``num_tokens`` each, in padded batches, and the seconds taken."""
        request = {
            "dtype": dtype,
            "prompts": prompts,
            "num_tokens": num_tokens,
            "batch_size": batch_size,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["token_ids"], answer["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
