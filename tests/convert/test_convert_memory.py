"""Peak host memory of loading: the parameters plus less than 1.3 of the largest file.

Measured as resident memory of a fresh process, which counts the pages of mapped files too.
"""

from pathlib import Path

import gguf
import jax.numpy as jnp
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

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from /proc"
)

MEMORY = """
import sys
import jax
import convert

def kilobytes(field):  # not getrusage: its peak is inherited from the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

convert.load(sys.argv[1])  # whatever is allocated once
before = kilobytes("VmRSS")
params = convert.load(sys.argv[2])[1]
used = (kilobytes("VmHWM") - before) * 1024
print(used, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def test_shards_of_bfloat16(tmp_path):
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
    directory = write_hf(tmp_path, config, *shards)
    shard = max(path.stat().st_size for path in directory.glob("*.safetensors"))
    used, params = map(int, run_script(MEMORY, CONFORMANCE / "llama-tied", directory).split())
    assert params == sum(value.nbytes for shard in shards for value in shard.values())
    # 65 MB a shard, 200 MB in all: a second copy of the parameters would be found out.
    assert used < params + 1.3 * shard


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
    used, params = map(int, run_script(MEMORY, CONFORMANCE / "llama-tied", path).split())
    # The table takes 128 MB, its file 71 MB; dequantised at once it would take 256 MB more.
    assert used < params + 1.3 * path.stat().st_size
