"""config.json to ModelConfig: both of Hugging Face's forms, and everything that must be refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_checkpoints import LLAMA, model_config, random_tensors, write_gguf, write_hf

import convert
from convert.config_json import canonical, override, parse, to_json
from lserve_jax.model.config import ModelConfig, RopeConfig

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"


def parsed(raw: dict, **overrides) -> ModelConfig:
    return parse(override(canonical(raw, where="config.json"), overrides), where="config.json")


def test_every_attribute_reaches_the_model_config():
    assert parsed(LLAMA) == ModelConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(rope_theta=10000.0),
        bos_token_id=1,
        eos_token_ids=(2,),
    )


# Attributes as published models have them, reduced to what parsing looks at. Sizes are LLAMA's.
REAL = {
    "Llama 1": {"max_sequence_length": 128, "pad_token_id": 0, "torch_dtype": "float16"},
    "Llama 2": {"pretraining_tp": 2, "rope_scaling": None, "_name_or_path": "x", "use_cache": True},
    "Llama 3.1": {
        "eos_token_id": [3, 4],
        "mlp_bias": False,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
    },
    "SmolLM2": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Yarn-Llama": {
        "rope_scaling": {
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "type": "yarn",
            "finetuned": True,
        },
    },
    "Mistral 0.2": {"model_type": "mistral", "sliding_window": None},
    "Ministral": {"model_type": "mistral", "sliding_window": 128},
    "Qwen2.5": {
        "model_type": "qwen2",
        "max_window_layers": 1,
        "sliding_window": 32,
        "use_sliding_window": False,
        "use_mrope": False,
    },
    "Qwen3": {
        "model_type": "qwen3",
        "attention_bias": False,
        "layer_types": ["full_attention"] * 2,
        "max_window_layers": 2,
        "sliding_window": None,
    },
    "nothing sized by default": {"num_key_value_heads": None, "head_dim": None},
}


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_accepted(name):
    config = parsed({**LLAMA, **REAL[name]})
    assert config.hidden_size == 32


def test_what_families_imply_where_a_config_says_nothing():
    """As transformers' config classes of these types have it."""
    raw = {**LLAMA, "max_position_embeddings": 8192}
    for name in ("rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        del raw[name]
    found = {}
    for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"):
        config = parsed({**raw, "model_type": kind, "sliding_window": None})
        found[kind] = (config.rms_norm_eps, config.rope.rope_theta, config.tie_word_embeddings)
    plain = (1e-6, 1e4, False)
    assert found == {
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), plain),
        "phi3": (1e-5, 1e4, False),
        "smollm3": (1e-6, 2e6, True),
    }
    rope = {"type": "su", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    phi3 = parsed({**raw, "model_type": "phi3", "rope_scaling": rope}).rope
    assert (phi3.rope_type, phi3.original_max_position_embeddings) == ("longrope", 4096)
    assert phi3.factor == 2.0


def test_sizes_left_out_follow_from_the_others():
    raw = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
    assert parsed(raw).num_key_value_heads == 4
    assert parsed(raw).head_dim == 8
    assert parsed({**raw, "model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize(
    ("attributes", "qkv", "out", "mlp", "qk_norm"),
    [
        ({}, False, False, False, False),
        ({"attention_bias": True}, True, True, False, False),
        ({"mlp_bias": True}, False, False, True, False),
        ({"model_type": "mistral", "sliding_window": None}, False, False, False, False),
        ({"model_type": "qwen2"}, True, False, False, False),
        ({"model_type": "qwen3"}, False, False, False, True),
        ({"model_type": "qwen3", "attention_bias": True}, True, True, False, True),
    ],
)
def test_families_imply_their_biases_and_norms(attributes, qkv, out, mlp, qk_norm):
    config = parsed({**LLAMA, **attributes})
    assert (config.attention_bias, config.attention_out_bias) == (qkv, out)
    assert (config.mlp_bias, config.qk_norm) == (mlp, qk_norm)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16, "mscale": 0.7}
ROPES = {
    "default": ({}, RopeConfig(rope_theta=5e5)),
    "linear": ({"factor": 2.0}, RopeConfig(rope_theta=5e5, rope_type="linear", factor=2.0)),
    # Hugging Face stretches from max_position_embeddings whatever the original length is.
    "dynamic": (
        {"factor": 2.0, "original_max_position_embeddings": 32},
        RopeConfig(rope_theta=5e5, rope_type="dynamic", factor=2.0),
    ),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 32,
        },
        RopeConfig(
            rope_theta=5e5,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.5,
            high_freq_factor=5.0,
            original_max_position_embeddings=32,
        ),
    ),
    "yarn": (
        YARN,
        RopeConfig(
            rope_theta=5e5,
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=16,
            mscale=0.7,
        ),
    ),
    "longrope": (
        {
            "original_max_position_embeddings": 32,
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "short_factor": [1.0, 1.0, 1.5, 2.0],
        },
        RopeConfig(
            rope_theta=5e5,
            rope_type="longrope",
            factor=4.0,  # 128 / 32
            original_max_position_embeddings=32,
            long_factor=(1.0, 2.0, 4.0, 8.0),
            short_factor=(1.0, 1.0, 1.5, 2.0),
        ),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("form", ["type", "rope_type", "rope_parameters", "per layer kind"])
def test_rope_in_every_spelling(kind, form):
    fields, expected = ROPES[kind]
    raw = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    if form in ("type", "rope_type"):
        scaling = {form: kind, **fields} if kind != "default" else None
        raw |= {"rope_theta": 5e5, "rope_scaling": scaling}
    else:
        rope = {"rope_theta": 5e5, "rope_type": kind, **fields}
        raw["rope_parameters"] = rope if form == "rope_parameters" else {"full_attention": rope}
    assert parsed(raw).rope == expected


def test_yarn_factor_follows_from_the_lengths_and_the_outer_original_length_counts():
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 32}
    assert parsed({**LLAMA, "rope_scaling": scaling}).rope.factor == 4.0
    outer = {**LLAMA, "rope_scaling": scaling, "original_max_position_embeddings": 64}
    assert parsed(outer).rope.original_max_position_embeddings == 64


OWN = [
    *[rope for _, rope in ROPES.values()],
    RopeConfig(rope_type="dynamic", factor=2.0, original_max_position_embeddings=32),
    RopeConfig(rope_type="yarn", factor=2.0, truncate=False, attention_factor=1.5),
    RopeConfig(rope_type="longrope", long_factor=(3.0,) * 4, short_factor=(2.0,) * 4),
]


@pytest.mark.parametrize("rope", OWN, ids=lambda rope: rope.rope_type)
@pytest.mark.parametrize("flag", ["attention_bias", "attention_out_bias", "mlp_bias", "qk_norm"])
def test_our_own_form_loses_nothing(rope, flag):
    config = ModelConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=3e-6,
        rope=rope,
        tie_word_embeddings=True,
        eos_token_ids=(5, 7),
        **{flag: True},
    )
    written = json.loads(json.dumps(to_json(config)))
    assert parse(canonical(written, where="x"), where="x") == config


def conformance_config(name: str) -> dict:
    return json.loads((CONFORMANCE / name / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama2-mha", "llama-yarn"])  # version 4's form, version 5's
def test_rope_overrides_reach_both_forms(name):
    raw = conformance_config(name)
    before = parsed(raw).rope
    changed = parsed(raw, rope_theta=2e6, max_position_embeddings=4096)
    assert changed.max_position_embeddings == 4096
    assert changed.rope.rope_theta == 2e6
    assert changed.rope.rope_type == before.rope_type
    assert changed.rope.factor == before.factor
    stretched = parsed(raw, rope_scaling={"type": "linear", "factor": 8.0}).rope
    assert stretched == RopeConfig(rope_theta=1e4, rope_type="linear", factor=8.0)
    plain = parsed(raw, rope_parameters={"rope_theta": 7.0}).rope
    assert plain == RopeConfig(rope_theta=7.0)


@pytest.mark.parametrize("form", ["hf", "gguf", "orbax"])
def test_the_config_of_a_source_is_read_without_its_weights(tmp_path, monkeypatch, form):
    path = write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    if form == "gguf":
        path = write_gguf(tmp_path / "model.gguf", model_config(), random_tensors(LLAMA))
    if form == "orbax":
        convert.save(tmp_path / "orbax", *convert.load(path))
        path = tmp_path / "orbax"
    changes = {"rope_theta": 2e6, "max_position_embeddings": 512}  # as an alias brings them
    loaded, _ = convert.load(path, overrides=changes)
    monkeypatch.setattr(convert, "assemble", None)
    monkeypatch.setattr(convert.orbax, "restore", None)
    source = convert.ModelSource(name="alias", path=path, overrides=changes)
    assert convert.read_config(source) == loaded
    assert (loaded.rope.rope_theta, loaded.max_position_embeddings) == (2e6, 512)


def test_unknown_override_is_refused_by_name():
    with pytest.raises(ValueError, match="config override 'rope_tetha' is unknown"):
        parsed(LLAMA, rope_tetha=1.0)


UNSUPPORTED = {
    "model_type 'gemma2'": {"model_type": "gemma2"},
    "model_type None": {"model_type": None},
    "sliding_window=64": {"model_type": "mistral", "sliding_window": 64},
    "sliding_window=16": {"sliding_window": 16},
    # Mistral's default window applies when its config has none.
    "sliding_window=4096": {"model_type": "mistral", "max_position_embeddings": 32768},
    "sliding_window=32": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 1,
    },
    "sliding_window=33": {
        "model_type": "qwen3",
        "sliding_window": 33,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "layer_types .'chunked_attention'.": {
        "layer_types": ["full_attention", "chunked_attention"],
    },
    "rope type 'mrope'": {"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 1]}},
    "mrope_section=": {"rope_scaling": {"type": "default", "mrope_section": [1, 1]}},
    "num_local_experts=8": {"num_local_experts": 8},
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor=0.25": {
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}
    },
    "attn_logit_softcapping=50.0": {"attn_logit_softcapping": 50.0},
    "rope_interleaved=True": {"rope_interleaved": True},
    # Settings that are on where they are absent: off must not pass for unset.
    "is_causal=False": {"is_causal": False},
    "scale_attn_weights=False": {"scale_attn_weights": False},
    "num_experts=0": {"num_experts": 0},
    "rope_parameters: .*scale_positions=False": {
        "rope_parameters": {"rope_theta": 1e4, "scale_positions": False}
    },
    "mlp_bias=True": {"model_type": "mistral", "sliding_window": None, "mlp_bias": True},
    "attention_bias=True": {"model_type": "mistral", "attention_bias": True},
    "qk_norm=True": {"qk_norm": True},  # only our own form may say so
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_other_mathematics_is_refused_by_name(message):
    with pytest.raises(NotImplementedError, match=message):
        parsed({**LLAMA, **UNSUPPORTED[message]})


def test_all_strange_attributes_are_named_at_once():
    with pytest.raises(NotImplementedError, match=r": first=1, off=False, empty=\[\]$"):
        parsed({**LLAMA, "first": 1, "off": False, "empty": [], "none": None})
    with pytest.raises(NotImplementedError, match=r"u19=1, and 280 more$"):
        parsed({**LLAMA, **{f"u{i}": 1 for i in range(300)}})


def test_neutral_attributes_pass_at_their_neutral_value():
    neutral = {
        "is_causal": True,
        "is_encoder_decoder": False,
        "mlp_bias": False,
        "pruned_heads": {},
    }
    assert parsed({**LLAMA, **neutral}) == parsed(LLAMA)


def test_a_window_is_accepted_when_the_context_is_cut_to_it():
    raw = {**LLAMA, "model_type": "mistral", "sliding_window": 64}
    config = parsed(raw, max_position_embeddings=64)
    assert (config.max_position_embeddings, config.sliding_window) == (64, 64)


@pytest.mark.parametrize(
    ("attributes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 128}, 128),
        ({"model_type": "mistral", "sliding_window": 200}, 200),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"sliding_window": 128}, 128),
        ({"sliding_window": 128, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 128}, None),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 128,
                "max_window_layers": 1,
            },
            128,
        ),
    ],
)
def test_a_window_too_wide_to_hide_a_token_bounds_the_sequences(attributes, window):
    config = parsed({**LLAMA, **attributes})
    assert config.sliding_window == window
    assert parse(canonical(to_json(config), where="x"), where="x") == config
    if window is not None:
        with pytest.raises(ValueError, match=f"must not exceed sliding_window={window}"):
            dataclasses.replace(config, max_position_embeddings=window + 1)


@pytest.mark.parametrize(
    ("attributes", "layers"),
    [
        ({}, (3, 7)),
        ({"no_rope_layer_interval": 3}, (2, 5)),
        ({"no_rope_layers": [1, 1, 0, 1, 1, 1, 1, 0]}, (2, 7)),
        ({"no_rope_layers": [1] * 8}, ()),
    ],
)
def test_layers_without_rotary_embedding(attributes, layers):
    config = parsed({**LLAMA, "model_type": "smollm3", "num_hidden_layers": 8, **attributes})
    assert config.nope_layers == layers
    assert parse(canonical(to_json(config), where="x"), where="x") == config


# Lengths as published: Vicuna 16K, Qwen2.5 with YaRN, a dynamic one, Llama 3.1, Phi-3.
LENGTHS = {
    "default": (4096, None, 4096),
    "linear": (4096, {"factor": 4.0}, 16384),
    "yarn, original length": (32768, {"factor": 4.0, "original": 32768}, 131072),
    "yarn, both lengths": (131072, {"factor": 4.0, "original": 32768}, 131072),
    "yarn, no original length": (1024, {"factor": 4.0}, 4096),
    "dynamic": (2048, {"factor": 2.0}, 4096),
    "llama3": (
        131072,
        {"factor": 8.0, "original": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        131072,
    ),
    "longrope": (
        131072,
        {"original": 4096, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4},
        131072,
    ),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_length_that_the_position_embedding_is_made_for(name):
    longest, rope, expected = LENGTHS[name]
    raw = {**LLAMA, "max_position_embeddings": longest}
    if rope is not None:
        rope = {"rope_type": name.partition(",")[0], **rope}
        if "original" in rope:
            rope["original_max_position_embeddings"] = rope.pop("original")
        raw["rope_scaling"] = rope
    assert parsed(raw).context_length == expected
