"""Quantised trees placed over four CPU devices, from every kind of file; then heads are moved.

A script, run by test_codes.py: the number of devices is set before JAX starts. Its arguments are a
directory to write to and that of the compilation cache.
"""

import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from tiny_checkpoints import LLAMA, random_tensors, write_hf

import convert
import lserve_jax
from lserve_jax.model.heads import HeadPartition, permute_heads
from pallas_kernels.api import WEIGHT_KINDS, Weight

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

MESH = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
RAW = LLAMA | {
    **{"hidden_size": 128, "intermediate_size": 384, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1},
}
# Inputs are cut in these, outputs in the other matrices.
BY_INPUTS = ("o_proj.kernel", "down_proj.kernel")


def place(leaf: str) -> NamedSharding:
    if leaf.endswith(BY_INPUTS):
        return NamedSharding(MESH, Spec("model"))
    return NamedSharding(MESH, Spec(None, "model") if leaf.endswith("kernel") else Spec())


def check(params: dict, alone: dict) -> None:
    """Every part where its codes are, and the same numbers as on one device."""
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    layer = params["layers"][0]
    for matrix, by_inputs in (
        (layer["self_attn"]["qkv_proj"]["kernel"], False),
        (layer["self_attn"]["o_proj"]["kernel"], True),
        (layer["mlp"]["gate_up_proj"]["kernel"], False),
        (layer["mlp"]["down_proj"]["kernel"], True),
        (params["lm_head"]["kernel"], False),
    ):
        assert isinstance(matrix, Weight)
        out = matrix.shape[1]
        for part in matrix:
            if part is None:
                continue
            cut = (part.shape[0] // 2, out) if by_inputs else (part.shape[0], out // 2)
            if by_inputs and part.shape[0] == 1:
                cut = (1, out)  # one scale for all inputs
            shapes = {shard.data.shape for shard in part.addressable_shards}
            assert shapes == {cut}, (part.shape, shapes)
            assert len(part.addressable_shards) == 4


def main(directory: Path) -> None:
    assert jax.device_count() == 4
    source = write_hf(directory / "hf", RAW, random_tensors(RAW, ml_dtypes.bfloat16))
    convert.save(directory / "floats", *convert.load(source))
    tokens = np.array([[3, 1, 4, 1, 5]], np.int32)
    score = jax.jit(lserve_jax.logits, static_argnums=0)
    partition = HeadPartition(retrieval=((1, 3),), streaming=((0, 2),))
    for kind in WEIGHT_KINDS:
        # Groups of 64 are cut where heads of 32 move.
        how = {"weights": kind, "weight_group": 64, "dtype": "float32"}
        config, alone = convert.load(source, **how)
        convert.save(directory / kind, config, alone)
        for path in (source, directory / "floats", directory / kind):
            _, params = convert.load(path, **how, sharding=place)
            check(params, alone)
        # Sums of shards are added in another order.
        wanted = score(config, alone, tokens)
        np.testing.assert_allclose(score(config, params, tokens), wanted, atol=1e-4)
        moved = permute_heads(config, params, partition)
        check(moved, permute_heads(config, alone, partition))
        np.testing.assert_allclose(score(config, moved, tokens), wanted, atol=1e-4)
    how = {"weights": "int4", "weight_group": 128}
    convert.save(directory / "coarse", *convert.load(source, **how))
    for path in (source, directory / "coarse"):
        try:
            convert.load(path, **how, sharding=place)
        except ValueError as error:
            assert "down_proj.kernel is quantised in 3 groups of inputs, which 2 shards" in str(
                error
            )
        else:
            raise AssertionError("a shard has a part of a group")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
