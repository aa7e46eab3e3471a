"""Peak host memory of loading: the parameters plus less than 1.3 of the largest file.

Measured as resident memory of a fresh process, which counts the pages of mapped files too.
"""

import dataclasses
import json
from pathlib import Path

import gguf
import jax.numpy as jnp
import load_memory
import numpy as np
import pytest
from tiny_checkpoints import (
    LLAMA,
    Tensors,
    model_config,
    random_tensors,
    run_script,
    write_gguf,
    write_hf,
)

from lserve_jax.model.config import ModelConfig

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from /proc"
)

# What the allocator keeps of what was freed is none of ours.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
# Programs as users have them, and compiled before what is measured.
PROGRAMS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0"}

MEMORY = """
import ctypes
import sys
import jax
import convert

def kilobytes(field):  # not getrusage: its peak is inherited from the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

weights = sys.argv[3] if len(sys.argv) > 3 else None
convert.load(sys.argv[1], weights=weights)  # whatever is allocated once
ctypes.CDLL(None).malloc_trim(0)  # what is free counts for nothing
before = kilobytes("VmRSS")
params = convert.load(sys.argv[2], weights=weights)[1]
used = (kilobytes("VmHWM") - before) * 1024
print(used, sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(params)))
"""


def measure(*arguments: object, **environment: str) -> tuple[int, int]:
    """Bytes that loading took at its peak, and those of the parameters."""
    used, params = map(int, run_script(MEMORY, *arguments, **PROGRAMS, **environment).split())
    return used, params


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, int]:
    """A checkpoint in three files, and the bytes of its parameters."""
    config = {
        **LLAMA,
        **{"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 256},
        **{"num_hidden_layers": 6, "num_key_value_heads": 4},
    }
    names = random_tensors({**config, "num_hidden_layers": 0}, jnp.bfloat16)
    shards: list[Tensors] = [names, {}, {}]
    layer = random_tensors({**config, "num_hidden_layers": 1}, jnp.bfloat16)
    for i in range(6):
        for name, value in layer.items():
            if ".layers.0." in name:
                shards[i // 2][name.replace(".0.", f".{i}.")] = value
    directory = write_hf(tmp_path_factory.mktemp("shards") / "model", config, *shards)
    return directory, sum(value.nbytes for shard in shards for value in shard.values())


def largest(directory: Path) -> int:
    return max(path.stat().st_size for path in directory.glob("*.safetensors"))


def test_shards_of_bfloat16(shards):
    directory, total = shards
    shard = largest(directory)
    used, params = measure(CONFORMANCE / "llama-tied", directory)
    assert params == total
    # 65 MB a shard, 200 MB in all: a second copy of the parameters would be found out.
    assert used < params + 1.3 * shard


@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_rounded(tmp_path, shards, weights):
    """Floats never exist beside the codes; nor do codes of a byte beside those of half a byte."""
    directory, total = shards
    # The same sizes: what their programs take is allocated once.
    config = {**json.loads((directory / "config.json").read_text()), "num_hidden_layers": 1}
    one = write_hf(tmp_path / "one", config, random_tensors(config, jnp.bfloat16))
    used, params = measure(one, directory, weights, **ALLOCATOR)
    assert params < (0.52 if weights == "int8" else 0.38) * total
    assert used < params + 1.3 * largest(directory)


def test_codes_that_are_kept(tmp_path):
    """Neither floats nor another copy of the codes exist on the way."""
    config = ModelConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=1024,
    )
    # The same sizes: what their programs take is allocated once.
    few, directory = tmp_path / "few", tmp_path / "int4"
    for path, layers in ((few, 4), (directory, 32)):
        path.mkdir()
        load_memory.write(path, dataclasses.replace(config, num_hidden_layers=layers))
    used, params = measure(few, directory, "checkpoint", **ALLOCATOR)
    # 15.7 million codes a layer, half a byte each; for 128 of them a scale and a zero point.
    assert params == pytest.approx(32 * 15.73e6 * (1 / 2 + 8 / 128), rel=0.01)
    assert used < params + 1.3 * largest(directory)


def test_quantised_gguf(tmp_path):
    config = {
        **LLAMA,
        **{"vocab_size": 65536, "hidden_size": 1024, "head_dim": 256, "num_hidden_layers": 1},
        **{"tie_word_embeddings": True},
    }
    tensors = random_tensors({**config, "vocab_size": 1})
    del tensors["model.embed_tokens.weight"]
    blocks = np.zeros((65536, 1024 // 32 * 34), np.uint8)

    def embedding(writer: gguf.GGUFWriter) -> None:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)

    path = write_gguf(tmp_path / "m.gguf", model_config(config), tensors, metadata=embedding)
    used, params = measure(CONFORMANCE / "llama-tied", path)
    # The table takes 128 MB, its file 71 MB; dequantised at once it would take 256 MB more.
    assert used < params + 1.3 * path.stat().st_size
