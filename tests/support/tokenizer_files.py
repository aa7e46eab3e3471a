"""What tests of tokenizers share: trimmed vocabularies, GGUF files of them, text as it streams."""

import json
from pathlib import Path

import gguf

from lserve_jax.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
USER = [{"role": "user", "content": "Hi"}]


def golden(name: str) -> dict:
    return json.loads((DATA / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))


def write_gguf(path: Path, vocabulary: dict, **changes) -> Path:
    """A GGUF file with this vocabulary and no tensors. A change of None leaves the key out."""
    keys = {
        "model": vocabulary["model"],
        "pre": vocabulary["pre"],
        "tokens": vocabulary["tokens"],
        "token_type": vocabulary["types"],
        "merges": vocabulary.get("merges"),
        "scores": vocabulary.get("scores"),
        "bos_token_id": vocabulary["bos"],
        "eos_token_id": vocabulary["eos"],
        **changes,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        name = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens)
    return [*map(stream.step, ids), stream.flush()]
