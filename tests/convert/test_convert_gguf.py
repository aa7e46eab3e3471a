"""GGUF files, written here with the ``gguf`` library as llama.cpp's converter lays them out."""

import math
import struct
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file
from tiny_checkpoints import (
    LLAMA,
    Tensors,
    expected_leaves,
    interleave,
    model_config,
    random_tensors,
    write_gguf,
)

import convert
from convert.gguf_file import read_gguf_file
from convert.names import flatten
from lserve_jax.model.config import RopeConfig
from pallas_kernels.api import Weight, dequantize_weight

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"


def hf_tensors(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama-tied", "llama"),
        ("llama-yarn", "llama"),
        ("llama2-mha", "llama"),
        ("mistral", "llama"),
        ("qwen2-bias", "qwen2"),
        ("qwen3-qknorm", "qwen3"),
    ],
)
def test_a_model_is_the_same_from_gguf_and_from_hugging_face(tmp_path, name, arch):
    config, params = convert.load(CONFORMANCE / name, dtype=jnp.float32)
    tensors = hf_tensors(CONFORMANCE / name)
    path = write_gguf(tmp_path / "model.gguf", config, tensors, arch=arch)
    found_config, found = convert.load(path)
    assert found_config == config
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
    "biases",
    [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "down_proj")],
    ids=lambda names: names[0],
)
def test_biases_are_there_when_the_file_has_them(tmp_path, biases):
    tensors = random_tensors({**LLAMA, "attention_bias": True, "mlp_bias": True})
    tensors = {
        name: value
        for name, value in tensors.items()
        if name.endswith("weight") or name.split(".")[-2] in biases
    }
    config, params = convert.load(write_gguf(tmp_path / "m.gguf", model_config(), tensors))
    assert config == model_config(
        attention_bias="q_proj" in biases,
        attention_out_bias="o_proj" in biases,
        mlp_bias="up_proj" in biases,
    )
    expected = expected_leaves(tensors)
    for leaf, value in flatten(params).items():
        np.testing.assert_array_equal(value, expected[leaf], err_msg=leaf)


WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "vocab_size": 200}
ROUND = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)


@pytest.mark.parametrize("kind", ROUND, ids=lambda kind: kind.name)
def test_stored_types(tmp_path, kind):
    config = {**WIDE, "num_hidden_layers": 1}
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "m.gguf", model_config(config), tensors, kind=lambda name: kind)
    # What the file can hold, and that in each row: quantising commutes with permuting rows.
    held = {
        name: value
        if value.ndim == 1
        else gguf.dequantize(gguf.quantize(value, kind), kind).reshape(value.shape)
        for name, value in tensors.items()
    }
    found = flatten(convert.load(path, dtype=jnp.float32)[1])
    for leaf, value in expected_leaves(held).items():
        np.testing.assert_array_equal(found[leaf], value, err_msg=leaf)

    own = {"F32": "float32", "F16": "float16"}.get(kind.name, "bfloat16")
    found = flatten(convert.load(path)[1])
    for leaf, value in expected_leaves(held).items():
        np.testing.assert_array_equal(found[leaf], value.astype(own), err_msg=leaf)


CODED = {
    **dict.fromkeys((Kind.Q4_0, Kind.Q4_1), "uint4"),
    **dict.fromkeys((Kind.Q5_0, Kind.Q5_1, Kind.Q8_0), "int8"),
}


@pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)
def test_codes_are_kept(tmp_path, kind):
    """Blocks as they are stored, one of them flat, with the rows of Q and K put in order."""
    config = {**WIDE, "num_hidden_layers": 1}
    tensors = random_tensors(config)
    tensors["model.layers.0.self_attn.k_proj.weight"][5, 32:64] = 0.25
    tensors["model.layers.0.mlp.up_proj.weight"][7, :32] = 0
    path = write_gguf(tmp_path / "m.gguf", model_config(config), tensors, kind=lambda name: kind)
    floats = flatten(convert.load(path, dtype=jnp.float32)[1])
    kept = flatten(convert.load(path, dtype=jnp.float32, weights="checkpoint")[1])
    coded = {leaf for leaf, value in kept.items() if isinstance(value, Weight)}
    assert coded == {x for x in floats if x.endswith("kernel")} | {"embed_tokens.embedding"}
    for leaf in coded:
        assert kept[leaf].codes.dtype == CODED[kind]
        # Q4_1, Q5_1: a minimum becomes a zero point, which rounds once more.
        tolerance = 1e-6 if kind.name.endswith("_1") else 0
        np.testing.assert_allclose(
            dequantize_weight(kept[leaf]), floats[leaf], rtol=0, atol=tolerance, err_msg=leaf
        )
    for leaf in floats.keys() - coded:
        np.testing.assert_array_equal(kept[leaf], floats[leaf], err_msg=leaf)


K_QUANTS = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_k_quants(tmp_path, kind):
    """The library cannot make these, so the file holds arbitrary blocks of them."""
    config = {**WIDE, "num_hidden_layers": 1}
    tensors = random_tensors(config)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 60 keep every float16 scale in them positive and small.
    blocks = np.random.default_rng(0).integers(0, 60, (256, block_bytes), np.uint8)
    held = {**tensors, "model.layers.0.self_attn.q_proj.weight": gguf.dequantize(blocks, kind)}

    def also_raw(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.weight", interleave(blocks, 4), raw_dtype=kind)

    del tensors["model.layers.0.self_attn.q_proj.weight"]
    path = write_gguf(tmp_path / "m.gguf", model_config(config), tensors, metadata=also_raw)
    found = flatten(convert.load(path, dtype=jnp.float32)[1])
    for leaf, value in expected_leaves(held).items():
        np.testing.assert_array_equal(found[leaf], value, err_msg=leaf)


def any_blocks(kind: Kind, count: int, seed: int = 0) -> np.ndarray:
    """Blocks of arbitrary bytes, but for scales of the block: half-precision numbers near 1."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, block_bytes), np.uint8)
    place = {Kind.Q2_K: slice(80, 84), Kind.Q3_K: slice(108, 110), Kind.Q6_K: slice(208, 210)}
    place = place.get(kind, slice(0, 4))
    halves = rng.uniform(-1, 1, (count, (place.stop - place.start) // 2)).astype(np.float16)
    halves[3] = 0  # a block of one number
    blocks[:, place] = halves.view(np.uint8)
    return blocks


WEIGHTS = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_k_quants_are_kept(tmp_path, kind):
    """As the library undoes them; beside Q8_0 and Q4_0, as files mix them."""
    config = {**WIDE, "num_hidden_layers": 1}
    tensors = random_tensors(config)
    for part in ("q", "k", "v"):
        del tensors[f"model.layers.0.self_attn.{part}_proj.weight"]
    del tensors["model.layers.0.mlp.down_proj.weight"]
    mixed = {
        "blk.0.attn_q.weight": (Kind.Q8_0, 256 * 8),
        "blk.0.attn_k.weight": (Kind.Q4_0, 128 * 8),
        "blk.0.attn_v.weight": (kind, 128),
        "blk.0.ffn_down.weight": (kind, 256),
    }
    held = {}

    def also_raw(writer: gguf.GGUFWriter) -> None:
        for seed, (name, (stored, count)) in enumerate(mixed.items()):
            blocks = any_blocks(stored, count, seed)
            if stored in (Kind.Q8_0, Kind.Q4_0):
                half = np.full((count, 1), 0.25 + seed, np.float16)
                blocks[:, :2] = half.view(np.uint8)
            held[name] = gguf.dequantize(blocks, stored).reshape(-1, 256)
            writer.add_tensor(name, blocks.reshape(len(held[name]), -1), raw_dtype=stored)

    path = write_gguf(
        tmp_path / "m.gguf",
        model_config(config),
        tensors,
        arch="qwen2",
        kind=lambda name: Kind.Q8_0,
        metadata=also_raw,
    )
    layer = convert.load(path, weights="checkpoint")[1]["layers"][0]
    down, qkv = layer["mlp"]["down_proj"]["kernel"], layer["self_attn"]["qkv_proj"]["kernel"]
    few_bits = kind in (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K)
    assert down.codes.dtype == ("uint4" if few_bits else "int8")
    assert qkv.codes.dtype == "int8"  # 8 bits in one part
    group = 32 if kind in (Kind.Q4_K, Kind.Q5_K) else 16
    assert down.scale.shape[0] == qkv.scale.shape[0] == 256 // group
    for found, names in ((down, ["blk.0.ffn_down.weight"]), (qkv, WEIGHTS)):
        wanted = np.concatenate([held[name] for name in names]).T
        # Without minima it is the same product. A minimum is a zero point here: that rounds, and
        # so do the difference from it and the product, each by 2^-24 of what it is.
        exact = kind in (Kind.Q3_K, Kind.Q6_K)
        allowed = 0 if exact else 4 * 2.0**-24 * np.abs(wanted).max()
        np.testing.assert_allclose(dequantize_weight(found), wanted, rtol=0, atol=allowed)


def test_codes_that_cannot_be_kept_are_refused(tmp_path):
    config = {**WIDE, "num_hidden_layers": 1}
    tensors = random_tensors(config)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    blocks = np.full((256, 66), 60, np.uint8)

    def also_raw(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_down.weight", blocks, raw_dtype=Kind.IQ2_XXS)

    path = write_gguf(tmp_path / "m.gguf", model_config(config), tensors, metadata=also_raw)
    convert.load(path)
    with pytest.raises(
        NotImplementedError,
        match=r"m.gguf: blk.0.ffn_down.weight is stored as IQ2_XXS, which weights='checkpoint'",
    ):
        convert.load(path, weights="checkpoint")


def frequency_factors(factor: float, theta: float, head_dim: int, original: int = 8192):
    """By wavelength, as Llama 3.1 published its scaling: kept, divided, or in between."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original / 1:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_frequency_factors(tmp_path, factor):
    raw = {**LLAMA, "head_dim": 64}
    config = model_config(raw, rope=RopeConfig(rope_theta=5e5), max_position_embeddings=131072)
    factors = {"rope_freqs.weight": frequency_factors(factor, 5e5, 64)}
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(raw), extra=factors)
    assert convert.load(path)[0].rope == RopeConfig(
        rope_theta=5e5,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


@pytest.mark.parametrize(
    "factors",
    [
        frequency_factors(8.0, 5e5, 8, original=64),
        frequency_factors(8.0, 1e4, 8) * 1.01,
        np.ones(5, np.float32),
    ],
    ids=["other length", "other values", "other size"],
)
def test_other_frequency_factors_are_refused(tmp_path, factors):
    path = write_gguf(
        tmp_path / "m.gguf",
        model_config(rope=RopeConfig(rope_theta=5e5)),
        random_tensors(LLAMA),
        extra={"rope_freqs.weight": factors},
    )
    with pytest.raises(NotImplementedError, match=r"rope_freqs\.weight is not Llama 3\.1's"):
        convert.load(path)


def test_linear_scaling_ends_of_turn_and_overrides(tmp_path):
    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        writer.add_eot_token_id(7)

    path = write_gguf(tmp_path / "m.gguf", model_config(), random_tensors(LLAMA), metadata=metadata)
    config, _ = convert.load(path)
    assert config.rope == RopeConfig(rope_type="linear", factor=4.0)
    assert config.eos_token_ids == (2, 7)
    changes = {"rope_theta": 2e6, "max_position_embeddings": 999}
    config, _ = convert.load(path, overrides=changes)
    assert config.rope == RopeConfig(rope_type="linear", factor=4.0, rope_theta=2e6)
    assert config.max_position_embeddings == 999


def test_the_header_reader_agrees_with_the_library(tmp_path):
    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_array("test.strings", ["a", "", "\N{GRINNING FACE}"])
        writer.add_array("test.numbers", [1, -2, 3])
        writer.add_array("test.floats", [0.5, 1.5])
        writer.add_bool("test.bool", True)
        writer.add_int8("test.int8", -5)
        writer.add_uint64("test.uint64", 2**40)
        writer.add_float64("test.float64", 1e-300)

    path = write_gguf(
        tmp_path / "m.gguf",
        model_config(),
        random_tensors(LLAMA),
        kind=lambda name: Kind.Q8_0,
        metadata=metadata,
    )
    reader = gguf.GGUFReader(path)
    found = read_gguf_file(path)
    expected = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert found.metadata == expected
    assert list(found.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = found.tensors[tensor.name]
        assert mine.kind == tensor.tensor_type
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(mine.raw.reshape(-1), tensor.data.view(np.uint8).reshape(-1))


def test_all_wrong_tensors_are_reported_at_once_by_their_names_in_the_file(tmp_path):
    tensors = random_tensors(LLAMA)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((32, 32), np.float32)
    path = write_gguf(
        tmp_path / "m.gguf",
        model_config(),
        tensors,
        extra={"blk.0.ffn_sub_norm.weight": np.zeros(64, np.float32)},
    )
    with pytest.raises(ValueError) as caught:
        convert.load(path)
    for line in (
        "missing: blk.0.ffn_up.weight, expected (64, 32)",
        "unexpected: blk.0.ffn_sub_norm.weight, found (64,)",
        "misshapen: blk.1.ffn_down.weight, found (32, 32), expected (32, 64)",
    ):
        assert line in str(caught.value)


REFUSED = {
    "GGUF architecture 'gemma2' is not supported": {"arch": "gemma2"},
    "expert_count=8": {"metadata": lambda writer: writer.add_expert_count(8)},
    "attn_logit_softcapping=50.0": {
        "metadata": lambda writer: writer.add_attn_logit_softcapping(50.0)
    },
    "sliding_window=64": {"metadata": lambda writer: writer.add_sliding_window(64)},
    "rope type 'longrope'": {
        "metadata": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    },
    "scaling.yarn_ext_factor=0.5": {
        "metadata": lambda writer: writer.add_rope_scaling_yarn_ext_factor(0.5)
    },
    "attention.causal": {"metadata": lambda writer: writer.add_causal_attention(False)},
    "rope.dimension_count=4 must equal the head size 8": {
        "metadata": lambda writer: writer.add_rope_dimension_count(4)
    },
    "it holds 'adapter', not a model": {"metadata": lambda writer: writer.add_type("adapter")},
    "split into 2 files": {"metadata": lambda writer: writer.add_uint16("split.count", 2)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_files_are_refused_by_name(tmp_path, message):
    path = write_gguf(
        tmp_path / "m.gguf", model_config(), random_tensors(LLAMA), **REFUSED[message]
    )
    with pytest.raises(NotImplementedError, match=message):
        convert.load(path)


def test_heads_that_differ_by_layer_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count([4, 2])
    writer.add_tensor("token_embd.weight", np.zeros((48, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotImplementedError, match=r"llama.attention.head_count must be one posit"):
        convert.load(path)


def _cut(size: int):
    return lambda data: data[:size]


def _put(offset: int, code: str, value: int):
    packed = struct.pack(code, value)
    return lambda data: data[:offset] + packed + data[offset + len(packed) :]


DAMAGES = {
    r"is not a GGUF file: it has only 0 bytes": _cut(0),
    r"is not a GGUF file: it does not begin with 'GGUF'": _put(0, "<I", 0),
    r"has GGUF version 1; versions 2 and 3": _put(4, "<I", 1),
    # A big-endian file's version, read as little-endian.
    r"has GGUF version 50331648": _put(4, ">I", 3),
    r"truncated or damaged: its header cannot be read": _cut(300),
    r"truncated or damaged": _put(8, "<Q", 2**40),
    r"damaged: its header": _put(16, "<Q", 2**40),
    r"is truncated: output.weight ends at byte \d+, the file has \d+": _cut(-10),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_refused(tmp_path, message):
    tensors = random_tensors(LLAMA)
    path = write_gguf(tmp_path / "m.gguf", model_config(), tensors)
    whole = path.read_bytes()
    while not whole[-1:].strip(b"\0"):  # padding after the last tensor may be missing
        whole = whole[:-1]
    path.write_bytes(DAMAGES[message](whole))
    with pytest.raises(ValueError, match=message):
        convert.load(path)


def test_a_type_that_cannot_be_dequantised_is_refused_by_name(tmp_path):
    tensors = random_tensors(LLAMA)
    path = write_gguf(tmp_path / "m.gguf", model_config(), tensors)
    integers = {"blk.0.ffn_norm.weight": np.zeros(32, np.int32)}
    del tensors["model.layers.0.post_attention_layernorm.weight"]
    path = write_gguf(tmp_path / "m.gguf", model_config(), tensors, extra=integers)
    with pytest.raises(
        NotImplementedError, match=r"m\.gguf: blk.0.ffn_norm.weight is stored as I32"
    ):
        convert.load(path)
