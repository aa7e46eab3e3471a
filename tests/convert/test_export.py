"""The way back to Hugging Face: exact round trips, shards, configs, adapters, refusals."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file
from tiny_checkpoints import LLAMA, model_config, random_tensors, write_chat_model, write_hf

import convert
from convert.__main__ import main
from convert.names import flatten
from lserve_jax import RopeConfig, logits
from lserve_jax.model import lora
from lserve_jax.model.llama import init_params
from lserve_jax.model.quantise import quantise_params
from pallas_kernels import api

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"
NAMES = sorted(path.name for path in CONFORMANCE.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_what_was_exported_loads_as_the_same(tmp_path: Path, name: str) -> None:
    """Config and every bit, in the checkpoint's own dtype; several files."""
    config, params = convert.load(CONFORMANCE / name)
    convert.export_hf(tmp_path / "out", config, params, max_shard_bytes=100_000)
    again, same = convert.load(tmp_path / "out")
    assert again == config
    for leaf, x in flatten(same).items():
        assert x.dtype == flatten(params)[leaf].dtype
        assert_array_equal(
            np.asarray(x).view(np.uint16), np.asarray(flatten(params)[leaf]).view(np.uint16)
        )


def test_whoever_may_read_the_directory_may_read_its_files(tmp_path: Path) -> None:
    config, params = convert.load(CONFORMANCE / NAMES[0])
    convert.export_hf(tmp_path / "out", config, params, max_shard_bytes=100_000)
    readers = (tmp_path / "out").stat().st_mode & 0o444
    assert {path.stat().st_mode & 0o444 for path in (tmp_path / "out").iterdir()} == {readers}


def test_tensors_are_those_of_the_original(tmp_path: Path) -> None:
    """Names, orientation and values, read by somebody else."""
    config = LLAMA | {"attention_bias": True, "mlp_bias": True}
    tensors = random_tensors(config)
    convert.export_hf(tmp_path / "out", *convert.load(write_hf(tmp_path / "in", config, tensors)))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert_array_equal(found[name], x, err_msg=name)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["torch_dtype"] == "float32"
    assert {name: written[name] for name in config} == config


def test_shards_are_no_larger_than_asked_and_the_index_names_all(tmp_path: Path) -> None:
    config, params = convert.load(CONFORMANCE / "llama-tied", dtype=jnp.float32)
    convert.export_hf(tmp_path / "out", config, params, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert {tensor: name for name, tensors in files.items() for tensor in tensors} == index[
        "weight_map"
    ]
    sizes = [sum(x.nbytes for x in tensors.values()) for tensors in files.values()]
    assert max(sizes) <= 60_000 and len(files) > 3
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "llama"),
        ({"sliding_window": 512}, "mistral"),
        ({"attention_bias": True, "sliding_window": 128}, "qwen2"),
        ({"qk_norm": True, "attention_bias": True, "attention_out_bias": True}, "qwen3"),
        ({"nope_layers": (1,), "mlp_bias": True}, "smollm3"),
        ({"rope": RopeConfig(rope_type="linear", factor=3.0), "eos_token_ids": (2, 5)}, "llama"),
    ],
    ids=str,
)
def test_configs(tmp_path: Path, changes: dict, kind: str) -> None:
    config = model_config(LLAMA, bos_token_id=1, **changes)
    convert.export_hf(tmp_path / "out", config, init_params(config))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
    assert convert.load(tmp_path / "out")[0] == config


def test_the_command(tmp_path: Path) -> None:
    """To Orbax and back: the tokenizer comes along, and all is as it was."""
    source = write_chat_model(tmp_path / "in")
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    assert main([str(tmp_path / "orbax"), str(tmp_path / "out"), "--format", "safetensors"]) == 0
    (config, params), (again, same) = convert.load(source), convert.load(tmp_path / "out")
    assert again == config
    jax.tree.map(assert_array_equal, same, params)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = convert.load_tokenizer(tmp_path / "out")
    assert tokenizer is not None and tokenizer.encode("sea") == [83, 69, 65]


def test_codes_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    there = [str(tmp_path / "nothing"), str(tmp_path / "out"), "--format", "safetensors"]
    assert main([*there, "--weights", "int8"]) == 2
    assert "--weights int8 with --format safetensors" in capsys.readouterr().err


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    config = model_config(LLAMA)
    params = init_params(config)
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(ValueError, match="out must be new or empty"):
        convert.export_hf(out, config, params)
    with pytest.raises(ValueError, match="tokenizer_from='no-such' does not exist"):
        convert.export_hf(tmp_path / "other", config, params, tokenizer_from="no-such")
    with pytest.raises(ValueError, match="is int32: parameters must all be of one dtype"):
        convert.export_hf(tmp_path / "other", config, jax.tree.map(jnp.int32, params))
    with pytest.raises(ValueError, match="max_shard_bytes must be an integer of at least 1, got 0"):
        convert.export_hf(tmp_path / "other", config, params, max_shard_bytes=0)
    both = dataclasses.replace(config, qk_norm=True, nope_layers=(1,))
    with pytest.raises(NotImplementedError, match=r"none of llama, mistral, .* has all of what"):
        convert.export_hf(tmp_path / "other", both, init_params(both))
    wider = dataclasses.replace(config, intermediate_size=65)
    with pytest.raises(ValueError, match="params does not hold the tensors"):
        convert.export_hf(tmp_path / "other", wider, params)
    params["lm_head"]["kernel"] = api.quantize_weight(params["lm_head"]["kernel"], kind="int8")
    with pytest.raises(NotImplementedError, match="quantised weights cannot be exported"):
        convert.export_hf(tmp_path / "other", config, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing half-written


def trained(config, params) -> lora.Adapter:
    adapter = lora.init_adapter(config, rank=3, targets=("qkv_proj", "gate_up_proj", "down_proj"))
    tokens = jnp.arange(20).reshape(2, 10)

    def loss(adapter: lora.Adapter) -> jax.Array:
        return logits(config, lora.merge(params, adapter, alpha=6.0), tokens).var()

    @jax.jit
    def step(adapter: lora.Adapter) -> lora.Adapter:
        gradient = jax.grad(loss)(adapter)
        return jax.tree.map(lambda x, g: x + 0.1 * g / (jnp.abs(g).max() + 1e-9), adapter, gradient)

    return step(adapter)


def test_an_adapter_begins_without_effect_and_is_all_that_is_trained() -> None:
    config = model_config(LLAMA)
    params = init_params(config)
    adapter = lora.init_adapter(config, rank=3)
    merge = jax.jit(lora.merge, static_argnames="alpha")
    jax.tree.map(assert_array_equal, merge(params, adapter, alpha=6.0), params)
    adapter = trained(config, params)
    changed, before = (
        {leaf: np.asarray(x) for leaf, x in flatten(tree).items()}
        for tree in (merge(params, adapter, alpha=6.0), params)
    )
    assert {leaf for leaf in changed if (changed[leaf] != before[leaf]).any()} == set(adapter)


def test_a_saved_adapter_merges_to_the_same_weights(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "in", LLAMA, random_tensors(LLAMA))
    config, params = convert.load(source)
    adapter = trained(config, params)
    convert.save_adapter(tmp_path / "adapter", config, adapter, alpha=6.0, base_model="in")
    _, loaded = convert.load(source, adapter=tmp_path / "adapter")
    wanted = lora.merge(params, adapter, alpha=6.0)
    # Both add the same product of rank 3 in float32; its sums may differ in their last bit.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=0), loaded, wanted)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    parts = ["down_proj", "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert written["target_modules"] == parts and written["base_model_name_or_path"] == "in"


def test_bad_adapters(tmp_path: Path) -> None:
    config = model_config(LLAMA)
    good = lora.init_adapter(config, rank=3)
    leaf = "layers.0.self_attn.o_proj.kernel"
    for bad, message in (
        (good | {"norm.scale": good[leaf]}, "adapter has 'norm.scale', which is no projection"),
        (good | {leaf: {"a": good[leaf]["a"], "b": good[leaf]["b"][:2]}}, "o_proj.kernel: a and b"),
        (good | lora.init_adapter(config, rank=2, targets=("o_proj",)), r"one rank, got \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.save_adapter(tmp_path / "out", config, bad, alpha=1.0)
    with pytest.raises(ValueError, match="target 'q_proj' is unknown; known: qkv_proj, o_proj"):
        lora.init_adapter(config, rank=3, targets=("q_proj",))
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        lora.init_adapter(config, rank=0)
    with pytest.raises(ValueError, match=r"adapter has 'layers.9.x', which params does not have"):
        lora.merge(init_params(config), {"layers.9.x": good[leaf]}, alpha=1.0)
    thin = good[leaf] | {"b": good[leaf]["b"][:, :1]}  # which would broadcast
    for bad, message in (
        ({leaf: thin}, "o_proj.kernel: a and b have shapes"),
        ({leaf: {"a": good[leaf]["a"]}}, "o_proj.kernel: a and b have shapes"),
        ({"norm.scale": good[leaf]}, "norm.scale: a and b have shapes"),
        ({"layers.0.self_attn": good[leaf]}, "which params does not have"),
        ({f"{leaf}.more": good[leaf]}, "which params does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.merge(init_params(config), bad, alpha=1.0)
    quantised = quantise_params(init_params(config), "int8")
    with pytest.raises(ValueError, match=r"proj.kernel is quantised"):
        lora.merge(quantised, good, alpha=1.0)
    for alpha in (None, float("nan")):
        with pytest.raises(ValueError, match=r"alpha=.* must be a finite number"):
            convert.save_adapter(tmp_path / "out", config, good, alpha=alpha)
    with pytest.raises(ValueError, match="targets='qkv_proj' must be a sequence"):
        lora.init_adapter(config, rank=3, targets="qkv_proj")
