"""Long contexts in the engine: how far a model reaches, and what transformers answers there.

The conformance models used here have limits of a few dozen tokens; their greedy tokens are those
of transformers' ``generate`` in float32, one prompt at a time.
"""

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tiny_llm import tiny_config, tiny_params

import convert
from lserve_jax import LLM, ModelConfig, RopeConfig, SamplingParams, logits
from lserve_jax.calibrate.gates import GateTraining, initial_state
from lserve_jax.model.rope import rotary_angles

# Both sides compute in float32: sums of some dozens of terms in another order.
CLOSE = {"atol": 2e-4, "rtol": 0}
jit_logits = jax.jit(logits, static_argnums=0)


def greedy(llm: LLM, prompts: np.ndarray, count: int) -> np.ndarray:
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in prompts], sampling)
    return np.array([output.outputs[0].token_ids for output in outputs])


# The dynamic model's original length is 32: its prompts of 24 tokens outgrow it in decode, and
# every step turns the new key by the length so far, as transformers does with a cache.
@pytest.mark.parametrize(
    "name", ["llama-dynamic", "llama-longrope", "phi3-longrope", "smollm3-nope"]
)
def test_greedy_tokens_of_transformers(conformance: Path, name: str) -> None:
    golden = np.load(conformance / name / "golden.npz")
    config, params = convert.load(conformance / name, dtype=jnp.float32)
    prompts = golden["input_ids"][:, : int(golden["greedy_prompt_len"])]
    wanted = golden["greedy_tokens"]
    llm = LLM((config, params), max_num_seqs=2)
    assert llm.max_model_len == 128
    assert_array_equal(greedy(llm, prompts, wanted.shape[1]), wanted)


def test_dynamic_scaling_of_a_prompt_in_chunks() -> None:
    """Every chunk turns by the length of the whole prompt."""
    rope = RopeConfig(rope_type="dynamic", factor=4.0)
    config = tiny_config(layers=1, kv_heads=2, max_len=64, rope=rope)
    params = tiny_params(config)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, 150))
    llm = LLM((config, params), max_num_seqs=1, prefill_chunk_size=64)
    assert llm.max_model_len == 256
    found = jit_logits(config, params, jnp.asarray(prompt))
    assert greedy(llm, prompt, 1)[0, 0] == found[0, -1].argmax()


def test_longrope_takes_its_frequencies_by_length(conformance: Path) -> None:
    golden = np.load(conformance / "llama-longrope" / "golden.npz")
    config, params = convert.load(conformance / "llama-longrope", dtype=jnp.float32)
    short = golden["input_ids"][:, :32]
    found = jit_logits(config, params, jnp.asarray(short))
    assert_allclose(found, golden["short_logits"], **CLOSE)
    # The engine takes one set for all its requests: the short one if none can be longer.
    llm = LLM((config, params), max_num_seqs=2, max_model_len=32)
    assert_array_equal(greedy(llm, short[:, :31], 1)[:, 0], found[:, 30].argmax(axis=-1))


def longrope(config: ModelConfig) -> ModelConfig:
    pairs = config.head_dim // 2
    rope = RopeConfig(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=64,
        short_factor=tuple(1 + 0.1 * d for d in range(pairs)),
        long_factor=tuple(2 + 0.5 * d for d in range(pairs)),
    )
    return dataclasses.replace(config, rope=rope, max_position_embeddings=256)


def test_longrope_formula() -> None:
    config = longrope(tiny_config(layers=1, kv_heads=2))
    positions = jnp.array([[0, 1, 5, 60], [0, 1, 5, 60]])
    cos, sin = rotary_angles(config, positions, jnp.array([64, 65]))
    magnitude = (1 + np.log(4.0) / np.log(64.0)) ** 0.5
    for row, factors in enumerate((config.rope.short_factor, config.rope.long_factor)):
        for d, factor in enumerate(factors):
            angle = np.array([0, 1, 5, 60]) / (factor * 10_000.0 ** (2 * d / config.head_dim))
            # Angles up to 60 are known to 60 * 2^-24 = 4e-6 in float32.
            assert_allclose(cos[row, :, d], magnitude * np.cos(angle), atol=2e-5, rtol=0)
            assert_allclose(sin[row, :, d], magnitude * np.sin(angle), atol=2e-5, rtol=0)


def test_longrope_of_an_engine_is_one_for_all_lengths() -> None:
    """A prompt that outgrows the original length keeps its cached keys, and may share them."""
    config = longrope(tiny_config(layers=1, kv_heads=2))
    params = tiny_params(config)
    rope = dataclasses.replace(config.rope, short_factor=config.rope.long_factor)
    long = dataclasses.replace(config, rope=rope)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, 50))
    made = greedy(LLM((config, params), max_num_seqs=1), prompt, 40)
    whole = jnp.asarray(np.concatenate([prompt, made], axis=1)[:, :-1])
    assert_array_equal(made[0], jit_logits(long, params, whole)[0, 49:].argmax(axis=-1))


def test_max_model_len_beyond_the_limit_warns_and_runs() -> None:
    config = tiny_config(layers=1, kv_heads=2, max_len=64)
    params = tiny_params(config)
    with pytest.warns(UserWarning, match=r"max_model_len=100 exceeds 64, the tokens that"):
        llm = LLM((config, params), max_num_seqs=1, max_model_len=100)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, 90))
    found = jit_logits(config, params, jnp.asarray(prompt))
    assert greedy(llm, prompt, 1)[0, 0] == found[0, -1].argmax()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLM((config, params), max_num_seqs=1, max_model_len=64)


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "64"])
def test_a_length_that_is_none_is_refused(length: object) -> None:
    config = tiny_config(layers=1, kv_heads=2)
    with pytest.raises(ValueError, match=r"max_model_len.* must be an? (positive )?integer"):
        LLM((config, tiny_params(config)), max_model_len=length)


def test_no_sequence_outgrows_a_sliding_window() -> None:
    config = tiny_config(layers=1, kv_heads=2, max_len=16, sliding_window=24)
    params, prompt = tiny_params(config), jnp.zeros((1, 25), jnp.int32)
    assert jit_logits(config, params, prompt[:, :24]).shape == (1, 24, config.vocab_size)
    with pytest.raises(ValueError, match=r"25 tokens exceed the model's sliding_window=24"):
        logits(config, params, prompt)
    with pytest.raises(ValueError, match=r"max_model_len=25 must not exceed .*sliding_window=24"):
        LLM((config, params), max_model_len=25)
    rope = RopeConfig(rope_type="linear", factor=4.0)
    assert dataclasses.replace(config, rope=rope).context_length == 24


def test_layers_without_rotary_embedding_are_not_calibrated() -> None:
    config = tiny_config(layers=2, kv_heads=2, nope_layers=(1,))
    with pytest.raises(NotImplementedError, match=r"without rotary embedding \(\(1,\)\)"):
        initial_state(config, GateTraining())
