"""Head patterns, the partition made of them, and the permutation of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import run_script

from convert.attention_patterns import load_pattern, shipped_patterns
from lserve_jax import ModelConfig, logits
from lserve_jax.model.heads import HeadPartition, HeadPattern, partition_heads, permute_heads
from lserve_jax.model.params import abstract_params

# Of each shipped pattern: layers, KV heads, % of gates below 0.5, % at or above 0.999, median gate;
# and at half of the heads streaming: fewest and most retrieval heads of a layer, layers with no
# retrieval head, layers with no streaming head, and how many more heads the rule gate >= median
# would keep.
GOLDEN = {
    "Llama-2-7B-32K-Instruct": (32, 32, 56, 14, 0.237, 4, 28, 0, 0, 0),
    "Llama-3-8B-Instruct-Gradient-1048k": (32, 8, 19, 32, 0.961, 1, 8, 0, 1, 2),
    "Llama-3-8B-Instruct-Gradient-4194k": (32, 8, 19, 31, 0.965, 0, 8, 1, 1, 3),
    "Meta-Llama-3.1-8B-Instruct": (32, 8, 9, 22, 0.951, 1, 8, 0, 2, 0),
    "Mistral-7B-Instruct-v0.2": (32, 8, 5, 43, 0.996, 1, 7, 0, 0, 2),
    "Mistral-7B-Instruct-v0.3": (32, 8, 6, 42, 0.994, 1, 7, 0, 0, 0),
    "Mixtral-8x7B-Instruct-v0.1": (32, 8, 26, 36, 0.961, 1, 7, 0, 0, 3),
    "SmolLM2-135M-Instruct": (30, 3, 60, 8, 0.087, 0, 3, 9, 9, 0),
    "SmolLM2-135M-Instruct-32K": (30, 3, 50, 10, 0.497, 0, 3, 8, 10, 0),
}


def make_pattern(gates, name="made-up"):
    return HeadPattern(gates=np.array(gates), name=name, sink_size=128, recent_size=256)


def write_pattern(
    directory, gates="0.5\t1\n0\t0.25\n", config='{"sink_size":64,"recent_size":192}'
):
    directory.mkdir(parents=True)
    if gates is not None:
        (directory / "full_attention_heads.tsv").write_text(gates)
    if config is not None:
        (directory / "config.json").write_text(config)
    return directory


# Shipped patterns


def test_every_shipped_pattern_is_known():
    assert shipped_patterns() == tuple(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_gates_of_shipped_patterns(name):
    num_layers, num_kv_heads, below_half, nearly_one, median, *_ = GOLDEN[name]
    pattern = load_pattern(name)
    gates = pattern.gates
    assert (pattern.name, pattern.sink_size, pattern.recent_size) == (name, 128, 256)
    assert gates.shape == (num_layers, num_kv_heads)
    assert gates.dtype == np.float64
    assert gates.min() >= 0.0 and gates.max() <= 1.0
    assert round(100 * (gates < 0.5).mean()) == below_half
    assert round(100 * (gates >= 0.999).mean()) == nearly_one
    assert round(np.quantile(gates, 0.5), 3) == median


@pytest.mark.parametrize("name", GOLDEN)
def test_half_of_the_heads_of_shipped_patterns(name):
    num_layers, num_kv_heads, _, _, _, *of_half = GOLDEN[name]
    fewest, most, no_retrieval, no_streaming, extra = of_half
    pattern = load_pattern(name)
    partition = partition_heads(pattern, 0.5, num_layers=num_layers, num_kv_heads=num_kv_heads)
    counts = np.array(partition.num_retrieval)
    assert counts.sum() == num_layers * num_kv_heads // 2
    assert (counts.min(), counts.max()) == (fewest, most)
    assert (counts == 0).sum() == no_retrieval
    assert (counts == num_kv_heads).sum() == no_streaming

    # Against the rule of the published code, without its noise: only heads tied at the threshold
    # may differ, and they differ one way.
    threshold = np.quantile(pattern.gates, 0.5)
    by_threshold = pattern.gates >= threshold
    ours = np.zeros_like(by_threshold)
    for layer, heads in enumerate(partition.retrieval):
        ours[layer, list(heads)] = True
    differs = ours != by_threshold
    assert differs.sum() == extra
    assert (pattern.gates[differs] == threshold).all()
    assert by_threshold[differs].all()


def test_per_layer_counts_of_llama_3_1048k():
    pattern = load_pattern("Llama-3-8B-Instruct-Gradient-1048k")
    partition = partition_heads(pattern, 0.5, num_layers=32, num_kv_heads=8)
    # The rule gate >= quantile; three heads tie at the quantile, in layers 2, 25 and a later one.
    by_threshold = [1, 1, 3, 2, 2, 4, 2, 4, 6, 4, 5, 3, 2, 6, 5, 5, 5, 6, 3, 5, 6, 3, 3, 6, 4, 5]
    by_threshold += [3, 4, 6, 5, 8, 3]
    threshold = np.quantile(pattern.gates, 0.5)
    assert (pattern.gates >= threshold).sum(axis=1).tolist() == by_threshold
    # Two of the three must stream to make it half: the first two in layer order.
    ours = list(by_threshold)
    ours[2] -= 1
    ours[25] -= 1
    assert list(partition.num_retrieval) == ours


@pytest.mark.parametrize(
    "given, found",
    [
        ("mistral-7b-instruct-v0.2", "Mistral-7B-Instruct-v0.2"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v0.2"),
        ("gradientai/llama-3-8b-instruct-gradient-1048k", "Llama-3-8B-Instruct-Gradient-1048k"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("smollm2-135m-instruct-32k", "SmolLM2-135M-Instruct-32K"),
    ],
)
def test_shipped_pattern_by_other_spellings(given, found):
    assert load_pattern(given).name == found


@pytest.mark.parametrize(
    "name", ["Llama-9B", "./Mistral-7B-Instruct-v0.2", "/a/Mistral-7B-Instruct-v0.2", "a/b/c"]
)
def test_unknown_name_lists_what_is_shipped(name):
    with pytest.raises(ValueError, match=r"neither a directory nor.*Mixtral-8x7B-Instruct-v0\.1"):
        load_pattern(name)


# Directories


def test_directory(tmp_path):
    pattern = load_pattern(write_pattern(tmp_path / "tiny", gates="-0.5\t1.0\r\n1e-1\t1.25\r\n"))
    assert (pattern.name, pattern.sink_size, pattern.recent_size) == ("tiny", 64, 192)
    np.testing.assert_array_equal(pattern.gates, [[0.0, 1.0], [0.1, 1.0]])
    with pytest.raises(ValueError, match="read-only"):
        pattern.gates[0, 0] = 1.0


def test_nested_directory(tmp_path):
    write_pattern(tmp_path / "tiny" / "lr=0.02-reg=0.05")
    (tmp_path / "tiny" / "notes").mkdir()
    pattern = load_pattern(str(tmp_path / "tiny"))
    assert pattern.name == "tiny"
    np.testing.assert_array_equal(pattern.gates, [[0.5, 1.0], [0.0, 0.25]])


def test_files_in_the_directory_itself_win_over_nested_ones(tmp_path):
    write_pattern(tmp_path / "tiny", gates="0.75\n")
    write_pattern(tmp_path / "tiny" / "lr=0.02")
    assert load_pattern(tmp_path / "tiny").gates.tolist() == [[0.75]]


def test_several_nested_patterns_are_refused(tmp_path):
    write_pattern(tmp_path / "lr=0.01")
    write_pattern(tmp_path / "lr=0.02")
    with pytest.raises(ValueError, match=r"several patterns.*lr=0\.01, lr=0\.02"):
        load_pattern(tmp_path)


def test_a_checkpoint_folder_does_not_hide_the_shipped_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Mistral-7B-Instruct-v0.2").mkdir()
    assert load_pattern("Mistral-7B-Instruct-v0.2").gates.shape == (32, 8)
    (tmp_path / "Mistral-7B-Instruct-v0.2").rmdir()
    write_pattern(tmp_path / "Mistral-7B-Instruct-v0.2")
    assert load_pattern("Mistral-7B-Instruct-v0.2").gates.shape == (2, 2)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"gates": None}, r"holds no full_attention_heads\.tsv"),
        ({"config": None}, r"holds no config\.json"),
        ({"gates": ""}, "it is empty"),
        ({"gates": "1\t0\n1\n"}, "got 2 in layer 0 and 1 in layer 1"),
        ({"gates": "1\t0\n\n1\t0\n"}, "got 2 in layer 0 and 1 in layer 1"),
        ({"gates": "1\t0\n1\tnan\n"}, "must be finite, got nan at layer 1, head 1"),
        ({"gates": "1\tinf\n1\t0\n"}, "must be finite, got inf at layer 0, head 1"),
        ({"gates": "1\t0\nfull\t0\n"}, "must hold numbers, got 'full' at layer 1, head 0"),
        ({"gates": "1\t\t0\n"}, "must hold numbers, got '' at layer 0, head 1"),
        ({"config": "{"}, r"config\.json is not JSON"),
        ({"config": "[" * 100_000}, r"config\.json is not JSON"),
        ({"config": "[]"}, r"config\.json must be a JSON object"),
        ({"config": '{"sink_size": 4}'}, "must be a JSON object that has 'recent_size'"),
        ({"config": '{"sink_size": 1.5, "recent_size": 4}'}, "sink_size.*whole number.*got 1.5"),
        ({"config": '{"sink_size": 4, "recent_size": -4}'}, "recent_size.*whole number.*got -4"),
        ({"config": '{"sink_size": 4, "recent_size": null}'}, "recent_size.*got None"),
    ],
)
def test_broken_directory(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_pattern(write_pattern(tmp_path / "broken", **files))


def test_bytes_that_are_not_text(tmp_path):
    directory = write_pattern(tmp_path / "broken")
    (directory / "full_attention_heads.tsv").write_bytes(b"1\t\xff\n")
    with pytest.raises(ValueError, match=r"must hold numbers, got .* at layer 0, head 1"):
        load_pattern(directory)


def test_gates_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"layers x KV heads, got shape \(3,\)"):
        make_pattern([0.0, 1.0, 0.5])


# Partition


def test_ties_fall_to_the_earlier_layer_and_head():
    partition = partition_heads(make_pattern(np.ones((2, 4))), 0.75, num_layers=2, num_kv_heads=4)
    assert partition.streaming == ((0, 1, 2, 3), (0, 1))
    assert partition.retrieval == ((), (2, 3))
    assert partition.num_retrieval == (0, 2)
    assert partition.order == ((0, 1, 2, 3), (2, 3, 0, 1))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.22, 1 / 3, 0.5, 0.8, 1.0])
def test_partition_is_the_sort_by_gate_layer_head(fraction):
    # Few distinct values, negative ones among them: clipping makes ties too.
    gates = np.random.default_rng(0).integers(-2, 4, (5, 6)) / 4
    partition = partition_heads(make_pattern(gates), fraction, num_layers=5, num_kv_heads=6)
    heads = sorted((max(gates[i, j], 0.0), i, j) for i in range(5) for j in range(6))
    streaming = {(i, j) for _, i, j in heads[: round(fraction * 30)]}
    assert {(i, j) for i, layer in enumerate(partition.streaming) for j in layer} == streaming
    for retrieval, streams in zip(partition.retrieval, partition.streaming, strict=True):
        assert sorted(retrieval + streams) == list(range(6))
        assert list(retrieval) == sorted(retrieval) and list(streams) == sorted(streams)


def test_without_a_pattern_every_head_retrieves():
    partition = partition_heads(None, 0.0, num_layers=3, num_kv_heads=2)
    assert partition.retrieval == ((0, 1),) * 3
    assert partition.streaming == ((),) * 3


def test_partition_can_be_a_static_argument():
    first, second = (
        partition_heads(load_pattern(name), 0.5, num_layers=32, num_kv_heads=8)
        for name in ("Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b-instruct-v0.1")
    )
    assert first == second and hash(first) == hash(second)
    assert all(type(head) is int for layer in first.order for head in layer)


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan")])
def test_fraction_outside_the_unit_interval(fraction):
    with pytest.raises(ValueError, match=r"streaming_fraction=\S+ must lie in \[0, 1\]"):
        partition_heads(make_pattern([[1.0]]), fraction, num_layers=1, num_kv_heads=1)


def test_fraction_without_a_pattern():
    with pytest.raises(ValueError, match=r"streaming_fraction=0\.5 needs a pattern"):
        partition_heads(None, 0.5, num_layers=1, num_kv_heads=1)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_pattern_of_another_model(fraction):
    with pytest.raises(ValueError, match=r"'made-up' is of \(1, 2\).*the model has \(2, 1\)"):
        partition_heads(make_pattern([[1.0, 0.0]]), fraction, num_layers=2, num_kv_heads=1)


@pytest.mark.parametrize(
    "retrieval, streaming, message",
    [
        ((), (), "at least one, got 0 and 0 layers"),
        (((0,),), ((), ()), "got 1 and 2 layers"),
        (((0, 1), (0, 1)), ((2,), (1,)), "layer 1 must name each of 3 KV heads once"),
        (((1, 0),), ((2,),), "ascending in its class"),
        (((0,), (0,)), ((1,), (1, 2)), "layer 1 must name each of 2 KV heads"),
    ],
)
def test_partition_that_is_none(retrieval, streaming, message):
    with pytest.raises(ValueError, match=message):
        HeadPartition(retrieval=retrieval, streaming=streaming)


# Permutation


def tiny_config(**changes) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**(shape | changes))


# One layer permuted, one left alone because nothing streams, one all streaming but for a head.
PARTITION = HeadPartition(retrieval=((1, 3), (0, 1, 2, 3), (2,)), streaming=((0, 2), (), (0, 1, 3)))


def random_params(config, dtype=jnp.float32):
    """Random in every leaf: the zeros and ones of an untrained model would hide a mix-up."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.array(rng.normal(0.0, 0.4, leaf.shape), leaf.dtype),
        abstract_params(config, dtype),
    )


def test_permutation_moves_whole_groups():
    config = tiny_config(attention_bias=True, attention_out_bias=True, qk_norm=True)
    H, Hk, D, G, E = 8, 4, 6, 2, 24
    params = random_params(config)
    # Every column of qkv_proj carries its kind, head and channel; so does every row of o_proj.
    q = 10_000 + 100 * np.arange(H)[:, None] + np.arange(D)
    k = 20_000 + 100 * np.arange(Hk)[:, None] + np.arange(D)
    v = 30_000 + 100 * np.arange(Hk)[:, None] + np.arange(D)
    qkv = np.concatenate([q, k, v]).reshape(1, -1)
    row = np.arange(E)[:, None] * 100_000
    for layer in params["layers"].values():
        layer["self_attn"]["qkv_proj"] = {
            "kernel": jnp.array(row + qkv, jnp.int32),
            "bias": jnp.array(qkv[0], jnp.int32),
        }
        layer["self_attn"]["o_proj"]["kernel"] = jnp.array(q.reshape(-1, 1) + row.T, jnp.int32)

    moved = permute_heads(config, params, PARTITION)
    for layer, order in enumerate([(1, 3, 0, 2), (0, 1, 2, 3), (2, 0, 1, 3)]):
        attention = jax.tree.map(np.asarray, moved["layers"][layer]["self_attn"])
        kernel = attention["qkv_proj"]["kernel"].reshape(E, H + 2 * Hk, D)
        bias = attention["qkv_proj"]["bias"].reshape(H + 2 * Hk, D)
        out = attention["o_proj"]["kernel"].reshape(H, D, E)
        for place, head in enumerate(order):
            for g in range(G):
                np.testing.assert_array_equal(bias[place * G + g], q[head * G + g])
                np.testing.assert_array_equal(kernel[:, place * G + g], row + q[head * G + g])
                np.testing.assert_array_equal(out[place * G + g], q[head * G + g][:, None] + row.T)
            np.testing.assert_array_equal(bias[H + place], k[head])
            np.testing.assert_array_equal(kernel[:, H + place], row + k[head])
            np.testing.assert_array_equal(bias[H + Hk + place], v[head])
            np.testing.assert_array_equal(kernel[:, H + Hk + place], row + v[head])


def test_permutation_shares_what_stays_and_spares_its_input():
    config = tiny_config(attention_bias=True, attention_out_bias=True, qk_norm=True)
    params = random_params(config, dtype=jnp.bfloat16)
    before = jax.tree.leaves_with_path(params)
    moved = permute_heads(config, params, PARTITION)
    assert all(
        leaf is same
        for (_, leaf), (_, same) in zip(before, jax.tree.leaves_with_path(params), strict=True)
    )
    assert moved["layers"][1] is params["layers"][1]
    changed = set()
    for (path, old), (new_path, new) in zip(before, jax.tree.leaves_with_path(moved), strict=True):
        assert path == new_path and (old.shape, old.dtype) == (new.shape, new.dtype)
        if old is not new:
            changed.add(".".join(str(key.key) for key in path))
    assert changed == {
        f"layers.{layer}.self_attn.{leaf}"
        for layer in (0, 2)
        for leaf in ("qkv_proj.kernel", "qkv_proj.bias", "o_proj.kernel")
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 4},
        {"attention_bias": True, "attention_out_bias": True, "qk_norm": True},
    ],
    ids=["gqa", "mha", "biases and norms"],
)
def test_permuted_model_computes_the_same(changes):
    config = tiny_config(**changes)
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(2), (2, 11), 0, config.vocab_size)
    forward = jax.jit(logits, static_argnums=0)
    expected = np.asarray(forward(config, params, tokens))
    got = np.asarray(forward(config, permute_heads(config, params, PARTITION), tokens))
    # The output projection sums the same products in another order: a few float32 roundings
    # (2**-24 each) of the largest logit, through three layers.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    wrong = jax.tree.map(lambda leaf: leaf, params)
    for layer in wrong["layers"].values():
        layer["self_attn"]["o_proj"]["kernel"] = layer["self_attn"]["o_proj"]["kernel"][::-1]
    assert np.abs(np.asarray(forward(config, wrong, tokens)) - expected).max() > 0.1


def test_permutation_keeps_the_sharding():
    # Four devices need a process of their own.
    script = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lserve_jax.model.heads import (HeadPartition, permute_heads)
from lserve_jax import ModelConfig
from lserve_jax.model.llama import init_params
import numpy as np

config = ModelConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=2, max_position_embeddings=8,
)
params = init_params(config)
mesh = Mesh(np.array(jax.devices()), ("tensor",))
columns, rows = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((None, "tensor"), ("tensor",)))
attention = params["layers"][0]["self_attn"]
attention["qkv_proj"]["kernel"] = jax.device_put(attention["qkv_proj"]["kernel"], columns)
attention["o_proj"]["kernel"] = jax.device_put(attention["o_proj"]["kernel"], rows)
moved = permute_heads(config, params, HeadPartition(retrieval=((1,),), streaming=((0,),)))
moved = moved["layers"][0]["self_attn"]
assert moved["qkv_proj"]["kernel"].sharding == columns, moved["qkv_proj"]["kernel"].sharding
assert moved["o_proj"]["kernel"].sharding == rows, moved["o_proj"]["kernel"].sharding
assert (moved["o_proj"]["kernel"][:4] == attention["o_proj"]["kernel"][4:]).all()
"""
    run_script(script)


def test_partition_of_another_model():
    with pytest.raises(ValueError, match=r"partition is of \(3, 4\).*the model has \(2, 4\)"):
        permute_heads(tiny_config(num_hidden_layers=2), {}, PARTITION)
