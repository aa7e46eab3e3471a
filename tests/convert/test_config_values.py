"""Values of config.json that are of the wrong kind or make no sense: refused by file and field."""

import math

import pytest
from tiny_checkpoints import LLAMA

from convert.config_json import canonical, parse
from lserve_jax.model.config import ModelConfig


def parsed(raw: dict) -> ModelConfig:
    return parse(canonical(raw, where="config.json"), where="config.json")


MALFORMED = {
    "hidden_size must be a positive integer below 2.31, got None": {"hidden_size": None},
    "vocab_size must be a positive integer below 2.31, got '48'": {"vocab_size": "48"},
    "head_dim must be a positive integer below 2.31, got 8.5": {"head_dim": 8.5},
    "must be a multiple of": {"num_key_value_heads": 3},
    "rope type 'linear' needs factor": {"rope_scaling": {"type": "linear"}},
    "rope factor must be a finite number, got '2'": {
        "rope_scaling": {"type": "linear", "factor": "2"}
    },
    "eos_token_id must be": {"eos_token_id": ["</s>"]},
    r"eos_token_id must be .* in \[0, 48\), got 2147483648": {"eos_token_id": 2**31},
    r"eos_token_id must be .* in \[0, 48\), got -1": {"eos_token_id": -1},
    "eos_token_id must be .* got True": {"eos_token_id": True},
    r"bos_token_id must be one token id, got \(1, 2\)": {"bos_token_id": [1, 2]},
    "bos_token_id must be .* got 48": {"bos_token_id": 48},
    "rms_norm_eps must be a finite number, got nan": {"rms_norm_eps": math.nan},
    "rms_norm_eps must be a finite number, got inf": {"rms_norm_eps": math.inf},
    "rms_norm_eps must be a finite number, got .1, 2": {"rms_norm_eps": [1, 2]},
    "rms_norm_eps must be a finite number, got None": {"rms_norm_eps": None},
    r"rms_norm_eps=-1.0 must lie in \[0, 1\)": {"rms_norm_eps": -1},
    "rope_theta must be a finite number, got nan": {"rope_theta": math.nan},
    "rope_theta must be a finite number, got 1000": {"rope_theta": 10**400},
    "rope_theta=0.0 must be finite and exceed 1": {"rope_theta": 0},
    "rope_theta=-1.0 must be finite and exceed 1": {"rope_theta": -1},
    "num_key_value_heads must be a positive integer": {"num_key_value_heads": 0},
    "head_dim must be .* got 0": {"head_dim": 0},
    "vocab_size must be .* got 1000000000000": {"vocab_size": 10**12},
    "tie_word_embeddings must be true or false, got 'false'": {"tie_word_embeddings": "false"},
    "attention_bias must be true or false, got 1": {"attention_bias": 1},
    "rope_scaling must be an object, got 5": {"rope_scaling": 5},
    "rope_parameters must be an object, got .1": {"rope_parameters": [1]},
    "rope_parameters must be an object, got 'x'": {"rope_parameters": {"full_attention": "x"}},
    "layer_types must be a list of 2 kinds.* got 5": {"layer_types": 5},
    "layer_types must be a list of 2 kinds.* got .'full": {"layer_types": ["full_attention"]},
    "'sliding_attention', but no sliding_window": {"layer_types": ["sliding_attention"] * 2},
    "sliding_window must be a positive integer": {"sliding_window": "64"},
    "use_sliding_window must be true or false": {"use_sliding_window": "no"},
    "max_window_layers must be a finite number": {"model_type": "qwen2", "max_window_layers": "2"},
    "no_rope_layers must be a list of 0 and 1": {"model_type": "smollm3", "no_rope_layers": [1]},
    "no_rope_layer_interval must be": {"model_type": "smollm3", "no_rope_layer_interval": 0},
}
ROPE_NUMBERS = {
    "the sequence length 128000000000 .*must be below 2.31": ("linear", {"factor": 1e9}),
    "rope factor must be a finite number, got nan": ("linear", {"factor": math.nan}),
    "rope factor must be a finite number, got True": ("linear", {"factor": True}),
    "rope factor=-2.0 must be finite and at least 1": ("dynamic", {"factor": -2.0}),
    "low_freq_factor=4.0 must be below": ("llama3", {"factor": 2.0, "low_freq_factor": 4.0}),
    "rope low_freq_factor must be a finite": ("llama3", {"factor": 2.0, "low_freq_factor": "1"}),
    "rope original_max_position_embeddings must be a positive integer below 2.31, got -1": (
        "yarn",
        {"factor": 2.0, "original_max_position_embeddings": -1},
    ),
    "rope beta_fast must be a finite number, got inf": ("yarn", {"beta_fast": math.inf}),
    "beta_slow=64.0 must not exceed beta_fast=32.0": ("yarn", {"beta_slow": 64.0}),
    "rope truncate must be true or false, got 'no'": ("yarn", {"truncate": "no"}),
    "rope long_factor must be a list of numbers, got 2.0": ("longrope", {"long_factor": 2.0}),
    "rope long_factor must be a finite number": ("longrope", {"long_factor": [1.0, "a"]}),
    "long_factor=-1.0 must be positive": ("longrope", {"long_factor": [1.0, 1.0, 1.0, -1.0]}),
    "rope long_factor must hold head_dim/2=4 numbers, got 3": (
        "longrope",
        {"long_factor": [1.0] * 3},
    ),
    "rope type 'longrope' needs short_factor": ("longrope", {"short_factor": None}),
}


@pytest.mark.parametrize("message", ROPE_NUMBERS)
def test_rope_numbers_that_make_no_sense_are_refused_by_name(message):
    kind, changes = ROPE_NUMBERS[message]
    rope = {
        "llama3": {"high_freq_factor": 4.0},
        "longrope": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    }
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        parsed({**LLAMA, "rope_scaling": {"rope_type": kind, **rope.get(kind, {}), **changes}})


@pytest.mark.parametrize("kind", [["llama"], 5, {"a": 1}, "", False, 0])
def test_types_that_are_not_names_are_refused(kind):
    with pytest.raises(NotImplementedError, match=r"model_type .* is not supported"):
        parsed({**LLAMA, "model_type": kind})
    with pytest.raises(NotImplementedError, match=r"rope type .* is not supported"):
        parsed({**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_configs_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        parsed({**LLAMA, **MALFORMED[message]})
