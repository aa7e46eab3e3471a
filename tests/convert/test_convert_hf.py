"""Hugging Face directories: values, dtypes, shards, memory, and every broken input its error."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import LLAMA, Tensors, expected_leaves, random_tensors, run_script, write_hf

import convert
from convert.names import flatten
from lserve_jax import logits
from lserve_jax.model.llama import abstract_params

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"
NAMES = sorted(path.name for path in CONFORMANCE.iterdir())
CONFIGS = {
    "plain": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "wide heads": {**LLAMA, "head_dim": 16},
}


def assert_leaves(params, expected: Tensors) -> None:
    found = flatten(params)
    assert found.keys() == expected.keys()
    for leaf, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[leaf]), value, err_msg=leaf)


@pytest.mark.parametrize("name", NAMES)
def test_conformance_models_give_the_logits_of_transformers(name):
    config, params = convert.load(CONFORMANCE / name, dtype=jnp.float32)
    golden = np.load(CONFORMANCE / name / "golden.npz")
    found = jax.jit(logits, static_argnums=0)(config, params, golden["input_ids"])
    found = np.asarray(found)[:, int(golden["logits_start"]) :]
    # Both sides compute in float32; sums of some hundred terms in another order differ by 1e-5.
    np.testing.assert_allclose(found, golden["logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_conformance_models_keep_their_own_dtype_and_shapes(name):
    config, params = convert.load(CONFORMANCE / name)
    expected = abstract_params(config, jnp.bfloat16)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_value_arrives_where_it_belongs(tmp_path, config):
    tensors = random_tensors(config)
    _, params = convert.load(write_hf(tmp_path, config, tensors))
    assert_leaves(params, expected_leaves(tensors))


def test_matrices_of_many_blocks_arrive_whole(tmp_path):
    # Blocks have 128 rows: less than one, exactly some, and some with a rest.
    config = {**LLAMA, "vocab_size": 300, "intermediate_size": 256, "num_hidden_layers": 1}
    tensors = random_tensors(config)
    _, params = convert.load(write_hf(tmp_path, config, tensors))
    assert_leaves(params, expected_leaves(tensors))


def test_shards_may_split_a_fused_projection(tmp_path):
    tensors = random_tensors(LLAMA)
    shards: list[Tensors] = [{}, {}, {}]
    for number, (name, value) in enumerate(sorted(tensors.items())):
        shards[number % 3][name] = value
    _, params = convert.load(write_hf(tmp_path, LLAMA, *shards))
    assert_leaves(params, expected_leaves(tensors))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", jnp.float16, jnp.bfloat16])
def test_dtypes(tmp_path, stored, wanted):
    tensors = random_tensors(LLAMA, jnp.dtype(stored))
    _, params = convert.load(write_hf(tmp_path, LLAMA, tensors), dtype=wanted)
    dtype = jnp.dtype(stored if wanted is None else wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {dtype}
    assert_leaves(params, {k: v.astype(dtype) for k, v in expected_leaves(tensors).items()})


def test_a_single_sharding_and_a_chosen_one(tmp_path):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))
    spec = jax.sharding.PartitionSpec

    def choose(leaf: str) -> jax.sharding.Sharding:
        return jax.sharding.NamedSharding(
            mesh, spec(None, "model") if leaf.endswith("kernel") else spec()
        )

    directory = write_hf(tmp_path, LLAMA, random_tensors(LLAMA))
    _, params = convert.load(directory, sharding=choose)
    assert params["layers"][1]["mlp"]["down_proj"]["kernel"].sharding == choose("kernel")
    assert params["norm"]["scale"].sharding == choose("scale")
    _, params = convert.load(directory, sharding=choose("scale"))
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {choose("scale")}


def test_redundant_tensors_are_left_out(tmp_path):
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    extra = {
        "lm_head.weight": np.zeros((48, 32), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    _, params = convert.load(write_hf(tmp_path, config, {**tensors, **extra}))
    assert_leaves(params, expected_leaves(tensors))


def test_stop_tokens_of_the_generation_config_count(tmp_path):
    write_hf(tmp_path, LLAMA, random_tensors(LLAMA))
    assert convert.load(tmp_path)[0].eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert convert.load(tmp_path)[0].eos_token_ids == (7, 8)
    assert convert.load(tmp_path, overrides={"eos_token_id": 9})[0].eos_token_ids == (9,)


def test_progress_is_on_stderr_and_only_when_asked(tmp_path, capsys):
    write_hf(tmp_path, LLAMA, random_tensors(LLAMA))
    convert.load(tmp_path)
    assert capsys.readouterr() == ("", "")
    convert.load(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "loading" in err and "21/21" in err


def test_all_wrong_tensors_are_reported_at_once(tmp_path):
    tensors = random_tensors(LLAMA)
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
    tensors["lm_head.weight"] = np.zeros((), np.float32)
    tensors["surplus.weight"] = np.zeros((7,), np.float32)
    with pytest.raises(ValueError) as caught:
        convert.load(write_hf(tmp_path, LLAMA, tensors))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "(2 missing, 1 unexpected, 2 misshapen)" in message
    for line in (
        "missing: model.layers.0.self_attn.k_proj.weight, expected (16, 32)",
        "missing: model.norm.weight, expected (32,)",
        "unexpected: surplus.weight, found (7,)",
        "misshapen: model.layers.1.mlp.up_proj.weight, found (3, 5), expected (64, 32)",
        "misshapen: lm_head.weight, found (), expected (48, 32)",
    ):
        assert line in message


def _without(name: str):
    return lambda directory: (directory / name).unlink()


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _replace(name: str, text: str):
    return lambda directory: (directory / name).write_text(text)


def _integers(directory: Path) -> None:
    tensors = random_tensors(LLAMA)
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    write_hf(directory, LLAMA, tensors)


def _index(weight_map: object):
    def damage(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        text = json.dumps({"weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)

    return damage


def _twice(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    tensors = random_tensors(LLAMA)
    write_hf(directory, LLAMA, tensors, {"lm_head.weight": tensors["lm_head.weight"]})


BROKEN = {
    "config.json does not exist": _without("config.json"),
    "config.json is not valid JSON": _replace("config.json", "{"),
    "config.json must hold a JSON object": _replace("config.json", "[]"),
    "has neither model.safetensors nor model.safetensors.index.json": _without("model.safetensors"),
    "model.safetensors is truncated or not a safetensors file": _truncate,
    "is truncated or not a safetensors file: .*header": _replace("model.safetensors", ""),
    "model.norm.weight is stored as I8": _integers,
    "gone.safetensors does not exist": _index({"model.norm.weight": "gone.safetensors"}),
    "index.json has no weight_map": _index({}),
    "'../outside.safetensors' is not a file name": _index({"x": "../outside.safetensors"}),
    "holds tensor lm_head.weight twice": _twice,
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_directories_are_refused_by_name(tmp_path, message):
    directory = write_hf(tmp_path, LLAMA, random_tensors(LLAMA))
    BROKEN[message](directory)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        convert.load(directory)


@pytest.mark.parametrize("dtype", ["float8", "int8", jnp.int32, "bf16"])
def test_unknown_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype '\w+' is unknown; known dtypes: float32, bfloat1"):
        convert.load(CONFORMANCE / "llama-tied", dtype=dtype)


SHARDED = """
import sys
import jax, numpy as np
import convert
from convert.names import flatten

mesh = jax.sharding.Mesh(jax.devices(), ("model",))
spec = jax.sharding.PartitionSpec

def choose(leaf):
    return jax.sharding.NamedSharding(mesh, spec(None, "model") if "kernel" in leaf else spec())

config, whole = convert.load(sys.argv[1])
convert.save(sys.argv[2], config, whole)
for path in sys.argv[1:]:
    _, params = convert.load(path, sharding=choose)
    for leaf, value in flatten(params).items():
        assert value.sharding == choose(leaf), (path, leaf, value.sharding)
        assert len(value.addressable_shards) == 2
        np.testing.assert_array_equal(np.asarray(value), np.asarray(flatten(whole)[leaf]))
"""


def test_loading_into_shards_on_two_devices(tmp_path):
    directory = write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    run_script(SHARDED, directory, tmp_path / "orbax", JAX_NUM_CPU_DEVICES="2")
