"""The right inputs that fuzz cases are made from: one small model in every form."""

import json
import random
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file
from tiny_checkpoints import LLAMA, model_config, random_tensors, write_gguf, write_hf

import convert

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKENS = ["<|bos|>", "<|eos|>", "<|user|>", *LETTERS, "Ġ", "ĠA", "A", ":", "Ċ", "th", "the", "Ġthe"]
TOKENS += list("0123456789!")
MERGES = ["t h", "th e", "Ġ A", "Ġ the"]
PIECES = ["<unk>", "<s>", "</s>", "▁", *LETTERS, "th", "the", "▁the", "A", "▁A"]
PIECES += [f"<0x{byte:02X}>" for byte in range(48 - len(PIECES))]
TEMPLATE = "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}{% endfor %}"
assert len(TOKENS) == len(PIECES) == LLAMA["vocab_size"]
CONFIG = LLAMA | {"bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "rope_scaling": None}


def byte_level(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(i) for i in range(len(PIECES))])
    writer.add_token_types([2, 3, 3] + [1] * (len(PIECES) - 3))
    writer.add_unk_token_id(0)


def make(base: Path) -> None:
    """Writes all of them under ``base``: three GGUF files, and directories of the other kinds."""
    base.mkdir(parents=True)
    tensors = random_tensors(CONFIG)
    ids = {"bos_token_id": 0, "eos_token_ids": (1,)}
    config = model_config(**ids)
    write_gguf(base / "f32.gguf", config, tensors, metadata=byte_level)
    write_gguf(base / "q8.gguf", config, tensors, kind=lambda _: Kind.Q8_0, metadata=byte_level)
    write_gguf(
        base / "pieces.gguf",
        model_config(bos_token_id=1, eos_token_ids=(2,)),
        tensors,
        metadata=sentencepiece,
    )
    tokenizer = convert.load_tokenizer(base / "f32.gguf")
    tokenizer.save(write_hf(base / "hf", CONFIG, tensors))
    (base / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    names = sorted(tensors)
    random.Random(0).shuffle(names)
    parts = [{name: tensors[name] for name in names[i::3]} for i in range(3)]
    tokenizer.save(write_hf(base / "sharded", CONFIG, *parts))
    convert.save(
        base / "orbax",
        *convert.load(base / "f32.gguf", dtype=jnp.float32),
        tokenizer_from=base / "f32.gguf",
    )
    _write_lora(base / "lora")


def _write_lora(directory: Path) -> None:
    directory.mkdir()
    draw = np.random.default_rng(0).standard_normal
    width, rank = CONFIG["hidden_size"], 4
    rows = {"q_proj": 32, "v_proj": 16}
    tensors = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for module, size in rows.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = draw((rank, width)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = draw((size, rank)).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        **{"peft_type": "LORA", "r": rank, "lora_alpha": 8, "use_rslora": False, "bias": "none"},
        **{"target_modules": list(rows), "rank_pattern": {}, "alpha_pattern": {}},
        **{"init_lora_weights": True, "lora_dropout": 0.0},
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
