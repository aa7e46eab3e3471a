"""Hugging Face directories: values, dtypes, shards, memory, and every broken input its error."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import (
    LLAMA,
    Tensors,
    expected_leaves,
    put_no_file,
    random_tensors,
    run_script,
    write_hf,
)

import convert
from convert.__main__ import main
from convert.names import flatten
from lserve_jax import logits
from lserve_jax.model.params import abstract_params

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
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    _, params = convert.load(write_hf(tmp_path, config, {**tensors, **extra}))
    assert_leaves(params, expected_leaves(tensors))


@pytest.mark.parametrize("head", ["other", "zeros", "one value"])
def test_another_output_layer_counts_more_than_the_flag(tmp_path, head):
    """As in transformers 5: the flag ties only what is not stored, or stored equal."""
    config = {**LLAMA, "vocab_size": 300, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    other = tensors["model.embed_tokens.weight"].copy()
    if head == "one value":
        other[-1, -1] += 1e-3
    else:
        other *= {"other": -1, "zeros": 0}[head]
    tensors["lm_head.weight"] = other
    write_hf(tmp_path / "hf", config, tensors)
    loaded, params = convert.load(tmp_path / "hf")
    assert not loaded.tie_word_embeddings
    assert convert.read_config(convert.resolve(tmp_path / "hf")) == loaded
    assert_leaves(params, expected_leaves(tensors))
    assert main([str(tmp_path / "hf"), str(tmp_path / "orbax")]) == 0
    converted, params = convert.load(tmp_path / "orbax")
    assert converted == loaded
    assert_leaves(params, expected_leaves(tensors))


@pytest.mark.parametrize("same", [True, False])
def test_embedding_and_output_layer_in_two_shards_are_compared(tmp_path, same):
    config = {**LLAMA, "vocab_size": 300, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    head = tensors["model.embed_tokens.weight"] * (1 if same else 2)
    write_hf(tmp_path, config, tensors, {"lm_head.weight": head})
    loaded, params = convert.load(tmp_path)
    assert loaded.tie_word_embeddings == same
    assert_leaves(params, expected_leaves(tensors if same else {**tensors, "lm_head.weight": head}))


def test_the_single_file_counts_more_than_an_index(tmp_path):
    """As in transformers, which looks for model.safetensors first."""
    shards, single = random_tensors(LLAMA, seed=1), random_tensors(LLAMA, seed=2)
    write_hf(tmp_path, LLAMA, shards, {})
    write_hf(tmp_path, LLAMA, single)
    _, params = convert.load(tmp_path)
    assert_leaves(params, expected_leaves(single))


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_two_models_in_one_directory_are_refused(tmp_path, file):
    config, params = convert.load(write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA)))
    convert.save(tmp_path / "orbax", config, params)
    (tmp_path / "orbax" / file).write_text("{}")
    with pytest.raises(ValueError, match=f"holds two models, params and {file}"):
        convert.load(tmp_path / "orbax")


@pytest.mark.parametrize("other", ["model.safetensors", "model.safetensors.index.json", "params"])
def test_a_gguf_file_beside_a_model_is_refused(tmp_path, other):
    directory = write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    if other == "params":
        config, params = convert.load(directory)
        directory = tmp_path / "orbax"
        convert.save(directory, config, params)
    else:
        (directory / "model.safetensors").rename(directory / other)
    (directory / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=f"holds two models, {other} and b.gguf: move one away"):
        convert.load(directory)


def test_a_directory_of_a_gguf_file_names_it(tmp_path):
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds a GGUF file: give its own path, '.*/b.gguf'"):
        convert.load(tmp_path)


@pytest.mark.parametrize("kind", ["a directory", "a link to nothing"])
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "adapter_config.json", "hf_quant_config.json"),
        *("model.safetensors", "model.safetensors.index.json", "shard.safetensors"),
    ],
)
def test_what_is_no_file_is_refused_by_name(tmp_path, name, kind):
    directory = write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    if name == "shard.safetensors":
        _index({"model.norm.weight": name})(directory)
    elif name == "model.safetensors.index.json":
        (directory / "model.safetensors").unlink()
    (directory / name).unlink(missing_ok=True)
    put_no_file(directory / name, kind)
    with pytest.raises(ValueError, match=rf"{name} must be a file, and is {kind}"):
        convert.load(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    tensors = random_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    write_hf(tmp_path, LLAMA, tensors)
    message = r"layers.1.mlp.gate_up_proj.kernel holds values that are not finite in float32"
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path)


def test_weights_too_large_for_the_dtype_are_refused(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.norm.weight"][:] = 7e4
    write_hf(tmp_path, LLAMA, tensors)
    convert.load(tmp_path, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"norm.scale holds values that are not finite in float16"):
        convert.load(tmp_path, dtype="float16")


@pytest.mark.parametrize("model_type", ["llama", "smollm3"])
def test_more_layers_than_tensors_are_refused_at_once(tmp_path, monkeypatch, model_type):
    config = {**LLAMA, "model_type": model_type, "num_hidden_layers": 10**9}
    write_hf(tmp_path, config, random_tensors(LLAMA))
    # Nothing that grows with the number of layers may run.
    monkeypatch.setattr(convert, "parse", None)
    monkeypatch.setattr(convert.stream, "tensor_slots", None)
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000, but there are 21 tensors"):
        convert.load(tmp_path)


def test_an_error_names_twenty_tensors_at_most(tmp_path):
    write_hf(tmp_path, {**LLAMA, "num_hidden_layers": 20}, random_tensors(LLAMA))
    with pytest.raises(ValueError) as caught:
        convert.load(tmp_path)
    message = str(caught.value)
    assert "(162 missing, 0 unexpected, 0 misshapen)" in message
    assert message.count("missing: ") == 20
    assert message.endswith("and 142 more")


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
    "config.json is nested too deeply": _replace("config.json", "[" * 100_000),
    "config.json is not valid JSON: 'utf-8'": lambda directory: (
        directory / "config.json"
    ).write_bytes(b"\xff\xfe"),
    "config.json: rope_scaling must be an object, got 5": _replace(
        "config.json", json.dumps({**LLAMA, "rope_scaling": 5})
    ),
    "the checkpoint is quantised by bitsandbytes .quantization_config.": _replace(
        "config.json",
        json.dumps({**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}),
    ),
    "quantised by a method that it does not name .compression_config.": _replace(
        "config.json", json.dumps({**LLAMA, "compression_config": {"bits": 4}})
    ),
    r"generation_config.json: eos_token_id must be .* in \[0, 48\), got 2147483648": _replace(
        "generation_config.json", '{"eos_token_id": 2147483648}'
    ),
    r"hf/config.json: rms_norm_eps must be a finite number, got nan": _replace(
        "config.json", json.dumps({**LLAMA, "rms_norm_eps": math.nan})
    ),
    "quantize_config.json says how the checkpoint is quantised, config.json does not": _replace(
        "quantize_config.json", "{}"
    ),
    "holds a LoRA adapter .adapter_config.json.": _replace("adapter_config.json", "{}"),
    "index.json: weight_map has x in .'a'., which is not a file name": _index({"x": ["a"]}),
    "index.json has no weight_map, or one that is not an object": _index(["a"]),
    "config.json does not exist": _without("config.json"),
    "config.json is not valid JSON": _replace("config.json", "{"),
    "config.json must hold a JSON object": _replace("config.json", "[]"),
    "has neither model.safetensors nor model.safetensors.index.json": _without("model.safetensors"),
    "model.safetensors is truncated or not a safetensors file": _truncate,
    "is truncated or not a safetensors file: .*header": _replace("model.safetensors", ""),
    "model.norm.weight is stored as I8": _integers,
    "gone.safetensors does not exist": _index({"model.norm.weight": "gone.safetensors"}),
    "index.json has no weight_map": _index({}),
    "weight_map has x in '../outside.safetensors', which is not a file name": _index(
        {"x": "../outside.safetensors"}
    ),
    "holds tensor lm_head.weight twice": _twice,
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_directories_are_refused_by_name(tmp_path, message):
    directory = write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    BROKEN[message](directory)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        convert.load(directory)


@pytest.mark.parametrize("dtype", ["float8", "int8", jnp.int32, "bf16"])
def test_unknown_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype '\w+' is unknown; known dtypes: float32, bfloat1"):
        convert.load(CONFORMANCE / "llama-tied", dtype=dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": 5}, "dtype=5 must be one of float32, bfloat16, float16"),
        ({"dtype": [1]}, r"dtype=\[1\] must be one of float32, bfloat16, float16"),
        ({"overrides": 5}, "overrides=5 must map attributes of config.json"),
        ({"overrides": np.zeros(2)}, "overrides=array.* must map attributes of config.json"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        convert.load(CONFORMANCE / "llama-tied", **options)


SHARDED = """
import sys
import jax, numpy as np
import convert
from convert.__main__ import main
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
