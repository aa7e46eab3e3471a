"""Gate training: its attention against explicit masks, its gradient, and what it finds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny_llm import random_prompts, tiny_config, tiny_params

from lserve_jax import ModelConfig
from lserve_jax.attention.attend import causal_attend
from lserve_jax.calibrate.gates import (
    GateTraining,
    Sample,
    blended_attend,
    distillation_loss,
    learning_rate,
    streaming_attention,
    teacher_attend,
    train_gates,
)
from lserve_jax.calibrate.layers import stack_layers
from lserve_jax.model.bound import bind
from lserve_jax.model.config import RopeConfig
from lserve_jax.model.llama import init_params
from lserve_jax.model.rope import rotary_angles
from pallas_kernels.api import apply_rotary

# Attention


def random_qkv(T, H, Hk, D, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.standard_normal((1, T, heads, D)), jnp.float32) for heads in (H, Hk, Hk)
    )


def masked_attention(q, k, v, mask):
    """Float64; q [T, H, D], k and v [T, Hk, D], mask [T, T]."""
    out = np.zeros(q.shape)
    for h in range(q.shape[1]):
        head = h // (q.shape[1] // k.shape[1])
        for t in range(len(q)):
            keys = mask[t]
            out[t, h], _ = oracle.softmax_attention(q[t, h], k[keys, head], v[keys, head])
    return out


@pytest.mark.parametrize(
    ("T", "sink", "recent"),
    [
        (48, 4, 16),  # whole blocks
        (45, 20, 16),  # a part of a block at the end, sinks that reach into the second
        (45, 0, 7),  # no sinks
        (45, 3, 1),  # only itself and the sinks
        (10, 16, 32),  # shorter than either
    ],
)
def test_streaming_attention_sees_sinks_and_window(T, sink, recent):
    q, k, v = random_qkv(T, 4, 2, 8)
    out = jax.jit(partial(streaming_attention, sink=sink, recent=recent))(q, k, v)
    arrays = (np.asarray(x[0], np.float64) for x in (q, k, v))
    expected = masked_attention(*arrays, oracle.lambda_mask(np.arange(T), T, sink, recent))
    np.testing.assert_allclose(out[0], expected, atol=2e-6)  # float32 sums of up to 48 terms


def test_streaming_attention_has_the_gradient_of_masked_attention():
    T, sink, recent = 45, 5, 16
    q, k, v = random_qkv(T, 4, 2, 8)
    weight = random_qkv(T, 4, 2, 8, seed=1)[0]
    mask = jnp.asarray(oracle.lambda_mask(np.arange(T), T, sink, recent))

    def plain(q, k, v):
        grouped = q.reshape(1, T, 2, 2, 8)
        scores = jnp.einsum("bqkgd,btkd->bkgqt", grouped, k) * 8**-0.5
        shares = jax.nn.softmax(jnp.where(mask[None, None, None], scores, -jnp.inf))
        return jnp.einsum("bkgqt,btkd->bqkgd", shares, v).reshape(q.shape)

    def ours(q, k, v):
        return streaming_attention(q, k, v, sink=sink, recent=recent)

    def gradients(attention):
        return jax.jit(jax.grad(lambda *x: (attention(*x) * weight).sum(), argnums=(0, 1, 2)))

    for gradient, wanted in zip(gradients(ours)(q, k, v), gradients(plain)(q, k, v), strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5)  # float32 on both sides


def test_blended_attention_between_its_ends():
    config = tiny_config(layers=1, kv_heads=2, group=2)
    T, sink, recent = 45, 5, 16
    q, k, v = random_qkv(T, 4, 2, 16)
    positions = np.arange(T)[None]

    def run(attend, gates_and_full=None):
        return jax.jit(partial(attend, 0))(q, k, v, gates_and_full)

    causal, _ = map(np.asarray, run(causal_attend(config, positions)))
    full, handed_on = run(teacher_attend(config, T, backend="reference"))
    np.testing.assert_allclose(full, causal, atol=2e-6)
    np.testing.assert_array_equal(handed_on, full)

    attend = blended_attend(config, T, sink=sink, recent=recent)
    ones, _ = run(attend, (np.ones(2, np.float32), full))
    np.testing.assert_allclose(ones, causal, atol=2e-6)

    cos, sin = jax.jit(partial(rotary_angles, config))(positions, np.array([T]))
    rotated = [jax.jit(apply_rotary)(x, cos, sin) for x in (q, k)]
    arrays = (np.asarray(x, np.float64)[0] for x in (*rotated, v))
    streaming = masked_attention(*arrays, oracle.lambda_mask(np.arange(T), T, sink, recent))
    assert np.abs(streaming - causal[0]).max() > 0.1  # else the ends could not be told apart
    zeros, _ = map(np.asarray, run(attend, (np.zeros(2, np.float32), full)))
    np.testing.assert_allclose(zeros[0], streaming, atol=2e-6)

    gates = np.array([0.25, 1.0], np.float32)
    mixed, _ = map(np.asarray, run(attend, (gates, full)))
    np.testing.assert_allclose(
        mixed[0, :, :2], 0.25 * causal[0, :, :2] + 0.75 * streaming[:, :2], atol=2e-6
    )
    np.testing.assert_allclose(mixed[0, :, 2:], causal[0, :, 2:], atol=2e-6)


# The loss

CONFIG = tiny_config(layers=3, kv_heads=2, group=2)
TRAINING = GateTraining(steps=4, sink=8, recent=16)
TOKENS = np.asarray(random_prompts(3, [90])[0], np.int32)
FIRST_LABEL = 70


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


@jax.jit
def loss_of(params, gates):
    return distillation_loss(
        CONFIG,
        TRAINING,
        stack_layers(params),
        gates,
        jnp.asarray(TOKENS),
        jnp.int32(FIRST_LABEL),
        backend="reference",
    )


def test_loss_is_the_distance_of_two_models(params):
    """The same loss with the unrolled model, an explicit mask, and the mean written out."""
    gates = np.random.default_rng(0).uniform(size=(3, 2))
    T = len(TOKENS)
    positions = jnp.arange(T)[None]
    cos, sin = rotary_angles(CONFIG, positions, jnp.array([T]))
    masks = {
        "full": oracle.causal_mask(np.arange(T), T),
        "streaming": oracle.lambda_mask(np.arange(T), T, TRAINING.sink, TRAINING.recent),
    }
    full = {}

    def masked(q, k, v, mask):
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return masked_attention(*(np.asarray(x[0], np.float64) for x in (q, k, v)), mask)

    def teacher(layer, q, k, v, cache):
        full[layer] = masked(q, k, v, masks["full"])
        return jnp.asarray(full[layer][None], jnp.float32), None

    def student(layer, q, k, v, cache):
        gate = np.repeat(gates[layer], 2)[:, None]
        out = gate * full[layer] + (1 - gate) * masked(q, k, v, masks["streaming"])
        return jnp.asarray(out[None], jnp.float32), None

    model = bind(CONFIG, params)
    hidden = [
        np.asarray(model(jnp.asarray(TOKENS)[None], attend, [None] * 3)[0][0], np.float64)
        for attend in (teacher, student)
    ]
    expected = ((hidden[1] - hidden[0])[FIRST_LABEL:] ** 2).mean()
    assert expected > 1e-3
    # Squares of differences of float32 hidden states.
    np.testing.assert_allclose(
        loss_of(params, jnp.asarray(gates, jnp.float32)), expected, rtol=1e-4
    )


def test_open_gates_lose_nothing(params):
    assert loss_of(params, jnp.ones((3, 2))) < 1e-10


def test_bfloat16_computes_the_same_loss_roughly(params):
    gates = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 2)), jnp.float32)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    # A mean of 1000 squared differences, each of two bf16 hidden states of relative error 1e-2.
    np.testing.assert_allclose(loss_of(rounded, gates), loss_of(params, gates), rtol=0.1)


def test_gradient_by_finite_differences(params):
    gates = np.random.default_rng(1).uniform(0.2, 0.8, (3, 2)).astype(np.float32)
    gradient = jax.grad(loss_of, argnums=1)(params, gates)
    step = 0.02  # the loss is float32: smaller steps drown in its rounding
    differences = np.zeros((3, 2))
    for index in np.ndindex(3, 2):
        moved = np.zeros_like(gates)
        moved[index] = step
        up, down = (float(loss_of(params, gates + sign * moved)) for sign in (1, -1))
        differences[index] = (up - down) / (2 * step)
    assert (differences < 0).any()  # opening a gate brings the student nearer
    # The loss is not quite quadratic in a gate.
    np.testing.assert_allclose(gradient, differences, atol=0.01 * np.abs(differences).max())


def test_learning_rate_is_a_trapezoid():
    training = GateTraining(steps=50, learning_rate=0.5)
    rates = [float(learning_rate(training, jnp.int32(step))) for step in range(50)]
    factors = [min(1, max((n + 1) / 10, 0.1), max((50 - n) / 10, 0.1)) for n in range(50)]
    np.testing.assert_allclose(rates, 0.5 * np.array(factors), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"sink": -1}, "sink=-1 must be at least 0"),
        ({"recent": 0}, "recent=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"regularization": -0.1}, "regularization=-0.1 must not be negative"),
        ({"ramp": 0.6}, r"ramp=0.6 must lie in \(0, 0.5\]"),
        ({"ramp_floor": 1.5}, r"ramp_floor=1.5 must lie in \[0, 1\]"),
        ({"initial_gate": float("nan")}, r"initial_gate=nan must lie in \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        GateTraining(**change)


def test_a_loss_that_is_not_finite_ends_training(params):
    broken = params | {"norm": {"scale": params["norm"]["scale"] * jnp.nan}}
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        train_gates(CONFIG, broken, lambda step: Sample(TOKENS, FIRST_LABEL), TRAINING)


# A model in which one head is known to retrieve

NEEDLES, QUESTIONS, FILLERS = (range(i, i + 8) for i in (0, 8, 16))  # token ids, one-hot channels
CONSTANT = 24  # a channel that is 1 in every token
PLANTED = (1, 2)  # layer and KV head
PLANTED_CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=48,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    max_position_embeddings=512,
    # Rotary pair i turns by 10^-i radians a token: pairs 0 to 2 tell positions apart, pairs 4 to 7
    # nearly stand still over 400 tokens and can match content.
    rope=RopeConfig(rope_theta=1e8),
)


def planted_params():
    """Six KV heads, of which ``PLANTED`` copies the needle of the same number to a question.

    The others attend sharply to their nearest tokens and write to channels of their own.
    """
    H, Hk, D = 6, 3, 16
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(x).copy(), init_params(PLANTED_CONFIG))
    embedding = np.eye(24, 48)
    embedding[:, CONSTANT] = 1.0
    params["embed_tokens"]["embedding"] = embedding
    size = np.sqrt(48 / 2)  # RMSNorm makes of a token's two ones so much
    for layer, weights in params["layers"].items():
        qkv, out = np.zeros((48, H + 2 * Hk, D)), np.zeros((H, D, 48))
        for head in range(Hk):
            queries, key, value = slice(2 * head, 2 * head + 2), H + head, H + Hk + head
            if (layer, head) == PLANTED:
                # Score of a match: about 20, of all else 0; values go to channels 40 to 47.
                for i, channel in enumerate((4, 5, 6, 7, 12, 13, 14, 15)):
                    qkv[QUESTIONS[i], queries, channel] = np.sqrt(20 * 4) / size
                    qkv[NEEDLES[i], key, channel] = np.sqrt(20 * 4) / size
                    qkv[NEEDLES[i], value, i] = 1 / size
                    out[queries, i, 40 + i] = 0.5
            else:
                # Score at distance d: 40 (cos d + cos 0.1 d + 3 cos 0.01 d), somewhat less in
                # layer 1. At 96 tokens and more it is below three quarters of its peak.
                for channel, weight in enumerate((1, 1, 3)):
                    amplitude = np.sqrt(40 * weight * 4) / size
                    qkv[CONSTANT, queries, channel] = qkv[CONSTANT, key, channel] = amplitude
                qkv[:CONSTANT, value] = rng.standard_normal((CONSTANT, D)) / size
                out[queries, :, 25:40] = 0.02 * rng.standard_normal((2, D, 15))
        weights["self_attn"]["qkv_proj"]["kernel"] = qkv.reshape(48, -1)
        weights["self_attn"]["o_proj"]["kernel"] = out.reshape(-1, 48)
        weights["mlp"] = jax.tree.map(lambda x: 0.1 * x, weights["mlp"])
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def needles_and_questions(step):
    """Needles far before the last 32 tokens, questions among those."""
    rng = np.random.default_rng(step)
    tokens = rng.choice(FILLERS, 384)
    tokens[rng.choice(np.arange(32, 256), 8, replace=False)] = NEEDLES
    tokens[rng.choice(np.arange(352, 384), 8, replace=False)] = QUESTIONS
    return Sample(tokens.astype(np.int32), 352)


def test_the_planted_retrieval_head_is_found():
    training = GateTraining(steps=50, learning_rate=0.08, sink=16, recent=96)
    trained = train_gates(PLANTED_CONFIG, planted_params(), needles_and_questions, training)
    gates = trained.gates
    others = np.delete(gates.reshape(-1), PLANTED[0] * 3 + PLANTED[1])
    assert gates[PLANTED] > 0.9
    assert others.max() < 0.1


def test_nothing_stays_open_where_nothing_is_far():
    """The same model asked nothing: then the planted head falls too."""

    def fillers_only(step):
        sample = needles_and_questions(step)
        return Sample(np.where(sample.tokens < 16, FILLERS[0], sample.tokens), sample.first_label)

    training = GateTraining(steps=50, learning_rate=0.08, sink=16, recent=96)
    trained = train_gates(PLANTED_CONFIG, planted_params(), fillers_only, training)
    assert trained.gates.max() < 0.1
