"""The model as a pure function, and rotary embedding in every scaling.

Agreement with Hugging Face is tested with the converters; here are formulas written out again and
what JAX's transformations must leave true.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import Oracle
from tiny_llm import VOCAB, fresh_params, generate, random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, ModelConfig, RopeConfig, logits
from lserve_jax.model.bound import bind
from lserve_jax.model.llama import init_params
from lserve_jax.model.params import abstract_params
from lserve_jax.model.rope import rotary_angles

CONFIG = tiny_config(layers=2, kv_heads=2, group=2)
ONE_LAYER = tiny_config(layers=1, kv_heads=2, group=2)
# As in test_lserve.py: logits of size 10, some dozens of roundings of 2^-24 of that.
ORACLE = {"atol": 2e-5, "rtol": 0}


jit_logits = jax.jit(logits, static_argnums=0)


def tokens(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


# The model.


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {}),
        (CONFIG, {"nope_layers": (1,)}),
        # Each is a term of its own in the sums of one layer.
        (ONE_LAYER, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        (
            ONE_LAYER,
            {
                "num_key_value_heads": 1,
                "attention_bias": True,
                "attention_out_bias": True,
                "mlp_bias": True,
            },
        ),
        (ONE_LAYER, {"qk_norm": True, "rms_norm_eps": 1e-5}),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_logits_equal_the_oracle(config: ModelConfig, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(config, **changes)
    rng = np.random.default_rng(0)
    # Biases and norms begin as zeros and ones, which would hide that they are not applied.

    def jitter(x: jax.Array) -> np.ndarray:
        return np.asarray(x) + rng.normal(0, 0.2 * (x.ndim == 1), x.shape).astype(np.float32)

    params, prompts = jax.tree.map(jitter, tiny_params(config)), tokens(1, 2, 70)
    made = jit_logits(config, params, prompts)
    assert made.dtype == jnp.float32
    for row, prompt in zip(made, np.asarray(prompts), strict=True):
        assert_allclose(row, Oracle(config, params).prefill(prompt), **ORACLE)


@pytest.mark.parametrize("remat", [False, True])
def test_layers_that_are_alike_are_traced_once(remat: bool) -> None:
    config = tiny_config(layers=4, kv_heads=2, group=2)
    params, prompts = tiny_params(config), tokens(2, 1, 9)

    def run(alike: list[int] | None) -> tuple[jax.Array, list[int]]:
        traced = []

        def attend(layer: int, q, k, v, cache):
            traced.append(layer)
            return q * (1 + cache), cache

        def hidden(params, caches):
            model = bind(config, params)
            return model(prompts, attend, caches, remat=remat, alike=alike)[0]

        return jax.jit(hidden)(params, [jnp.float32(i) for i in range(4)]), traced

    apart, each = run(None)
    together, some = run([0, 1, 0, 1])
    assert (each, some) == ([0, 1, 2, 3], [0, 1])
    assert_array_equal(apart, together)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1, "qk_norm": True},
        {"tie_word_embeddings": True, "attention_bias": True},
        {"attention_out_bias": True, "mlp_bias": True},
    ],
    ids=str,
)
def test_shapes_written_down_are_those_of_the_modules(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    made = jax.eval_shape(lambda: init_params(config, dtype=jnp.bfloat16))
    written = abstract_params(config, jnp.bfloat16)
    assert jax.tree.structure(written) == jax.tree.structure(made)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), written) == jax.tree.map(
        lambda x: (x.shape, x.dtype), made
    )


def test_later_tokens_change_nothing() -> None:
    params, prompts = tiny_params(CONFIG), tokens(2, 1, 40)
    changed = prompts.at[0, 25:].set((prompts[0, 25:] + 1) % VOCAB)
    one, other = (jit_logits(CONFIG, params, x)[0] for x in (prompts, changed))
    assert_array_equal(one[:25], other[:25])
    assert np.all(np.any(one[25:] != other[25:], axis=-1))


def test_jit_and_vmap() -> None:
    """Over batches of prompts and over stacked models."""
    prompts = tokens(3, 3, 2, 20)
    models = [tiny_params(CONFIG, seed) for seed in range(3)]
    wanted = [jit_logits(CONFIG, params, p) for params, p in zip(models, prompts, strict=True)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
    made = jax.jit(jax.vmap(lambda params, p: logits(CONFIG, params, p)))(stacked, prompts)
    assert_allclose(made, np.stack(wanted), atol=1e-5, rtol=0)
    shared = jax.jit(jax.vmap(lambda p: logits(CONFIG, models[0], p)))(prompts)
    assert_allclose(shared[0], wanted[0], atol=1e-5, rtol=0)


def test_grad() -> None:
    """The directional derivative of the loss, against a difference quotient of the oracle."""
    config = ONE_LAYER
    params, prompt = tiny_params(config), tokens(4, 1, 24)

    def loss(params: dict) -> jax.Array:
        rows = jax.nn.log_softmax(logits(config, params, prompt)[0, :-1])
        return -rows[jnp.arange(23), prompt[0, 1:]].mean()

    gradient = jax.jit(jax.grad(loss))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape) / x.size**0.5, params)

    def oracle_loss(step: float) -> float:
        moved = jax.tree.map(lambda x, d: np.asarray(x, float) + step * d, params, direction)
        made = Oracle(config, moved).prefill(np.asarray(prompt[0]))[:-1]
        picked = made[np.arange(23), np.asarray(prompt[0, 1:])]
        return float((np.log(np.exp(made).sum(axis=1)) - picked).mean())

    quotient = (oracle_loss(1e-5) - oracle_loss(-1e-5)) / 2e-5
    products = jax.tree.map(lambda g, d: float((np.asarray(g) * d).sum()), gradient, direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx(quotient, rel=1e-4)


@pytest.mark.parametrize(
    "bad", [jnp.zeros(5, jnp.int32), jnp.zeros((1, 5)), jnp.zeros((1, 1, 5), jnp.int32)]
)
def test_logits_refuses(bad: jax.Array) -> None:
    with pytest.raises(ValueError, match=r"integer array \[B, T\], got"):
        logits(CONFIG, tiny_params(CONFIG), bad)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_are_plain(dtype) -> None:
    """Nested dicts of arrays, and so is what the engine passes to its jitted functions."""

    def check(tree: Any) -> None:
        if isinstance(tree, dict):
            assert type(tree) is dict
            for child in tree.values():
                check(child)
        else:
            assert isinstance(tree, jax.Array)

    params = init_params(CONFIG, dtype=dtype)
    check(params)
    check(LLM((CONFIG, params)).engine.runner.params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert shapes == abstract_params(CONFIG, dtype)
    assert sorted(params["layers"]) == [0, 1]


def test_parameters_come_from_the_seed() -> None:
    one, again, other = (init_params(ONE_LAYER, seed) for seed in (1, 1, 2))
    # As tests make them: but for the last bit, which depends on what XLA compiles together.
    jax.tree.map(partial(assert_allclose, rtol=3e-7, atol=0), one, fresh_params(ONE_LAYER, 1))
    assert_array_equal(one["lm_head"]["kernel"], again["lm_head"]["kernel"])
    assert np.all(one["lm_head"]["kernel"] != other["lm_head"]["kernel"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 must be a multiple of .*=2"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan must lie in"),
        ({"rms_norm_eps": -1e-6}, r"rms_norm_eps=-1e-06 must lie in \[0, 1\)"),
        ({"nope_layers": (0, 2)}, r"nope_layers=\(0, 2\) must lie in \[0, 2\)"),
        ({"max_position_embeddings": 2**31}, "sequence length 2147483648 .* below 2.31"),
        ({"sliding_window": 8}, "must not exceed sliding_window=8"),
    ],
    ids=str,
)
def test_model_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


# Rotary embedding. Angles below 300 are known to 300 * 2^-24 = 2e-5 in float32.

POSITIONS = [0, 1, 2, 7, 63, 64, 100, 299]
LENGTH = 300
ROPE = {"atol": 5e-5, "rtol": 0}


def rope_of(D: int, rope: RopeConfig, length: int = LENGTH, limit: int = 128) -> tuple:
    config = ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=D,
        max_position_embeddings=limit,
        rope=rope,
    )
    angles = jax.jit(rotary_angles, static_argnums=0)  # one program, and not one an operation
    cos, sin = angles(config, np.array([POSITIONS], np.int32), np.array([length], np.int32))
    assert cos.dtype == sin.dtype == jnp.float32
    return np.asarray(cos[0]), np.asarray(sin[0])


def check_rope(made: tuple, wavelengths: list[float], magnitude: float = 1.0) -> None:
    """Channel pair d turns once in ``wavelengths[d]`` tokens."""
    for d, wavelength in enumerate(wavelengths):
        for i, position in enumerate(POSITIONS):
            angle = 2 * math.pi * position / wavelength
            assert_allclose(made[0][i, d], magnitude * math.cos(angle), **ROPE)
            assert_allclose(made[1][i, d], magnitude * math.sin(angle), **ROPE)


def wavelengths(D: int, theta: float) -> list[float]:
    return [2 * math.pi * theta ** (2 * d / D) for d in range(D // 2)]


@pytest.mark.parametrize(("D", "theta"), [(8, 10_000.0), (64, 500_000.0)])
def test_rope_default(D: int, theta: float) -> None:
    check_rope(rope_of(D, RopeConfig(rope_theta=theta)), wavelengths(D, theta))


def test_rope_linear() -> None:
    rope = RopeConfig(rope_type="linear", factor=4.0)
    check_rope(rope_of(16, rope), [4 * w for w in wavelengths(16, 10_000.0)])


def test_rope_llama3() -> None:
    """Wavelengths beyond original / low are stretched, those below original / high are kept."""
    original, factor, low, high = 64, 8.0, 1.0, 4.0
    rope = RopeConfig(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    wanted, kinds = [], set()
    for w in wavelengths(32, 10_000.0):
        if w > original / low:
            kinds.add("stretched")
            wanted.append(w * factor)
        elif w < original / high:
            kinds.add("kept")
            wanted.append(w)
        else:
            kinds.add("blended")
            smooth = (original / w - low) / (high - low)
            wanted.append(1 / (smooth / w + (1 - smooth) / (w * factor)))
    assert kinds == {"stretched", "kept", "blended"}
    check_rope(rope_of(32, rope), wanted)


@pytest.mark.parametrize("length", [100, 128, 129, 300, 1024])
def test_rope_dynamic(length: int) -> None:
    """NTK: the base grows with the length of the sequence once that exceeds the original."""
    D, limit, factor, theta = 16, 128, 2.0, 10_000.0
    rope = RopeConfig(rope_type="dynamic", factor=factor)
    if length > limit:
        theta *= (factor * length / limit - (factor - 1)) ** (D / (D - 2))
    check_rope(rope_of(D, rope, length, limit), wavelengths(D, theta))


def test_rope_dynamic_of_rows() -> None:
    """Each row by its own length."""
    config = dataclasses.replace(
        CONFIG, max_position_embeddings=128, rope=RopeConfig(rope_type="dynamic", factor=2.0)
    )
    positions = jnp.broadcast_to(jnp.arange(5)[None], (3, 5))
    lengths = jnp.array([100, 200, 900])
    cos, _ = rotary_angles(config, positions, lengths)
    for row in range(3):
        alone, _ = rotary_angles(config, positions[:1], lengths[row : row + 1])
        assert_array_equal(cos[row], alone[0])
    assert len({float(x) for x in cos[:, 4, 3]}) == 3


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("original", [64, None])
def test_rope_yarn(truncate: bool, original: int | None) -> None:
    """Pairs that turn beta_fast times in the original context are kept, those below beta_slow
    times are interpolated, and a straight ramp over the pair's number joins them.
    """
    D, theta, factor, limit, fast, slow = 32, 10_000.0, 4.0, 256, 8.0, 1.0
    rope = RopeConfig(
        rope_type="yarn",
        factor=factor,
        beta_fast=fast,
        beta_slow=slow,
        original_max_position_embeddings=original,
        truncate=truncate,
    )
    context = original or limit
    # Turns fall with the pair's number; read the number at which they are fast or slow off a
    # fine table.
    numbers = np.linspace(0, D, 1_000_001)
    turns = context / (2 * math.pi * theta ** (2 * numbers / D))
    first, last = (float(np.interp(-beta, -turns, numbers)) for beta in (fast, slow))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    wanted = []
    for d, w in enumerate(wavelengths(D, theta)):
        interpolated = min(max((d - first) / (last - first), 0), 1)
        wanted.append(1 / (interpolated / (factor * w) + (1 - interpolated) / w))
    assert wanted[0] == wavelengths(D, theta)[0]
    assert wanted[-1] == factor * wavelengths(D, theta)[-1]
    check_rope(rope_of(D, rope, limit=limit), wanted, magnitude=0.1 * math.log(factor) + 1)


@pytest.mark.parametrize(
    ("changes", "magnitude"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.707, "mscale_all_dim": 0.5},
         (0.0707 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"factor": 1.0}, 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_yarn_magnitude(changes: dict[str, float], magnitude: float) -> None:
    """Read at position 0, where cosines are 1."""
    settings = {"rope_type": "yarn", "factor": 4.0} | changes
    cos, sin = rope_of(16, RopeConfig(**settings))
    assert_allclose(cos[0], magnitude, rtol=1e-6)
    assert_array_equal(sin[0], 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "mrope"}, "rope_type='mrope' is unknown"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be finite and exceed 1"),
        ({"rope_theta": math.nan}, "rope_theta=nan must be finite and exceed 1"),
        ({"factor": 0.5}, "rope factor=0.5 must be finite and at least 1"),
        ({"factor": math.inf}, "rope factor=inf must be finite and at least 1"),
        ({"beta_fast": -1.0}, "beta_fast=-1.0 must be positive"),
        ({"attention_factor": math.nan}, "attention_factor=nan must be positive"),
        ({"mscale": math.inf}, "mscale=inf must be finite"),
        ({"original_max_position_embeddings": -1}, "original_max_position_embeddings=-1 must be"),
        (
            {"rope_type": "llama3", "low_freq_factor": 4.0},
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        (
            {"rope_type": "yarn", "beta_fast": 1.0, "beta_slow": 2.0},
            "beta_slow=2.0 must not exceed beta_fast=1.0",
        ),
        ({"rope_theta": 1.0}, "rope_theta=1.0 must be finite and exceed 1"),
        ({"rope_type": "longrope", "long_factor": (1.0, math.nan)}, "long_factor=nan must be"),
    ],
    ids=str,
)
def test_rope_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**settings)


def test_rope_in_the_engine() -> None:
    """Whatever the chunks, the engine turns keys as the model without a cache does.

    Not for dynamic: there, keys that are cached keep the angles of their time.
    """
    rope = RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    config = dataclasses.replace(ONE_LAYER, rope=rope)
    params = tiny_params(config)
    llm = LLM((config, params), max_num_seqs=1, prefill_chunk_size=64)
    [prompt] = random_prompts(6, [150])
    [made] = generate(llm, [prompt], 30)
    every = jit_logits(config, params, jnp.asarray([[*prompt, *made.tokens[:-1]]], jnp.int32))[0]
    wanted = jax.nn.log_softmax(every[len(prompt) - 1 :])
    assert_allclose(made.logprobs, wanted, atol=1e-5, rtol=0)
