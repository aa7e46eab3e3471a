"""Quantised trees placed over four CPU devices, from every kind of file; then heads are moved.

A script, run by test_codes.py: the number of devices is set before JAX starts. Its argument is a
directory to write to.
"""

import sys
from collections.abc import Callable
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

jax.config.update("jax_num_cpu_devices", 4)

MESH = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
RAW = LLAMA | {
    **{"hidden_size": 128, "intermediate_size": 384, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1},
}
# Inputs are cut in these, outputs in the other matrices.
BY_INPUTS = ("o_proj.kernel", "down_proj.kernel")
TABLE = "embed_tokens.embedding"


def tensor_parallel(leaf: str) -> NamedSharding:
    if leaf.endswith(BY_INPUTS):
        return NamedSharding(MESH, Spec("model"))
    if leaf == TABLE:  # by tokens, as ``convert.tensor_parallel`` has it
        return NamedSharding(MESH, Spec("model"))
    return NamedSharding(MESH, Spec(None, "model") if leaf.endswith("kernel") else Spec())


def fsdp(leaf: str) -> NamedSharding:
    """Every array cut along its first axis, by all devices."""
    return NamedSharding(MESH, Spec(("data", "model")))


def both(leaf: str) -> NamedSharding:
    cut = leaf.endswith("kernel") or leaf == TABLE
    return NamedSharding(MESH, Spec("data", "model") if cut else Spec())


def check(params: dict, alone: dict, rule: Callable[[str], NamedSharding]) -> None:
    """Every part where its codes are, and the same numbers as on one device."""
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    layer = params["layers"][0]
    for matrix, leaf in (
        (layer["self_attn"]["qkv_proj"]["kernel"], "qkv_proj.kernel"),
        (layer["self_attn"]["o_proj"]["kernel"], "o_proj.kernel"),
        (layer["mlp"]["gate_up_proj"]["kernel"], "gate_up_proj.kernel"),
        (layer["mlp"]["down_proj"]["kernel"], "down_proj.kernel"),
        (params["lm_head"]["kernel"], "lm_head.kernel"),
        (params["embed_tokens"]["embedding"], TABLE),
    ):
        assert isinstance(matrix, Weight)
        shards = [
            size // shard
            for size, shard in zip(matrix.shape, rule(leaf).shard_shape(matrix.shape), strict=True)
        ]
        for part in matrix:
            if part is None:
                continue
            # One scale for all inputs is on every device.
            cut = tuple(
                size if size == 1 else size // count
                for size, count in zip(part.shape, shards, strict=True)
            )
            shapes = {shard.data.shape for shard in part.addressable_shards}
            assert shapes == {cut}, (leaf, part.shape, shapes)
            assert len(part.addressable_shards) == 4


def main(directory: Path) -> None:
    assert jax.device_count() == 4
    source = write_hf(directory / "hf", RAW, random_tensors(RAW, ml_dtypes.bfloat16))
    convert.save(directory / "floats", *convert.load(source))
    tokens = np.array([[3, 1, 4, 1, 5]], np.int32)
    score = jax.jit(lserve_jax.logits, static_argnums=0)
    partition = HeadPartition(retrieval=((1, 3),), streaming=((0, 2),))
    # Groups of 64 are cut where heads of 32 move; four shards of 128 inputs need groups of 32.
    for kind, group, rule in (
        *((kind, 64, tensor_parallel) for kind in WEIGHT_KINDS),
        ("int8", 64, both),
        ("int4", 64, both),
        ("int4", 32, fsdp),
    ):
        how = {"weights": kind, "weight_group": group, "dtype": "float32"}
        config, alone = convert.load(source, **how)
        saved = directory / f"{kind}-{rule.__name__}"
        convert.save(saved, config, alone)
        for path in (source, directory / "floats", saved):
            _, params = convert.load(path, **how, sharding=rule)
            check(params, alone, rule)
        # Sums of shards are added in another order; logits go to 25, and softmax multiplies errors.
        wanted = score(config, alone, tokens)
        np.testing.assert_allclose(score(config, params, tokens), wanted, atol=1e-3)
        moved = permute_heads(config, params, partition)
        check(moved, permute_heads(config, alone, partition), rule)
        np.testing.assert_allclose(score(config, moved, tokens), wanted, atol=1e-3)
    how = {"weights": "int4", "weight_group": 128}
    convert.save(directory / "coarse", *convert.load(source, **how))
    for path in (source, directory / "coarse"):
        try:
            convert.load(path, **how, sharding=tensor_parallel)
        except ValueError as error:
            assert "down_proj.kernel is quantised in 3 groups of inputs, which 2 shards" in str(
                error
            )
        else:
            raise AssertionError("a shard has a part of a group")
    by_channels = NamedSharding(MESH, Spec(None, ("data", "model")))
    try:
        convert.load(
            directory / "int4-both",
            sharding=lambda leaf: by_channels if leaf == TABLE else NamedSharding(MESH, Spec()),
        )
    except ValueError as error:
        assert f"{TABLE} is quantised in 2 groups of inputs, which 4 shards would cut" in str(error)
    else:
        raise AssertionError("a shard has a part of a group")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
