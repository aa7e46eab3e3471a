"""The families of fuzz cases, by the kind of file that is mutated."""

from gguf_cases import gguf_cases
from json_cases import config_cases, orbax_cases, tokenizer_cases
from safetensors_cases import lora_cases, safetensors_cases

FAMILIES = {
    "gguf": gguf_cases,
    "safetensors": safetensors_cases,
    "tokenizer": tokenizer_cases,
    "config": config_cases,
    "lora": lora_cases,
    "orbax": orbax_cases,
}
