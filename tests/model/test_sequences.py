"""logits and hidden_states of packed and padded rows, with remat, and under own attention.

Every sequence must get the numbers that it gets alone: the same sums, in another order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from numpy.testing import assert_allclose, assert_array_equal
from tiny_llm import VOCAB, tiny_config, tiny_params

from lserve_jax import ModelConfig, RopeConfig, hidden_states, logits, unembed
from lserve_jax.model.bound import bind
from lserve_jax.model.params import abstract_params
from lserve_jax.model.rope import layer_angles, rotary_angles
from pallas_kernels import api

CONFIG = tiny_config(layers=2, kv_heads=2, group=2)
ONE_LAYER = dataclasses.replace(CONFIG, num_hidden_layers=1)
DYNAMIC = RopeConfig(rope_type="dynamic", factor=2.0)
LONG = RopeConfig(rope_type="longrope", short_factor=(1.0,) * 8, long_factor=(2.0,) * 8)
# Their angles depend on a sequence's length, and some of the sequences below are longer than this.
SHORT = {"max_position_embeddings": 8}
CONFIGS = {
    "default": CONFIG,
    # All layers have the same angles.
    "dynamic": dataclasses.replace(ONE_LAYER, rope=DYNAMIC, **SHORT),
    "longrope": dataclasses.replace(
        ONE_LAYER, rope=dataclasses.replace(LONG, original_max_position_embeddings=8)
    ),
}
SAME = {"atol": 1e-5, "rtol": 0}  # logits of size 10
jit_logits = jax.jit(logits, static_argnums=0, static_argnames="remat")


def sequences(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


def alone(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jit_logits(config, tiny_params(config), jnp.asarray(tokens[None]))[0])


@pytest.mark.parametrize("rope", CONFIGS)
def test_packed_sequences(rope: str) -> None:
    """Three in a row, one after another, padding between them; ids in no order."""
    config, (a, b, c) = CONFIGS[rope], sequences(5, 20, 9)
    row = np.concatenate([a, [0], b, c, [0, 0]])
    ids = np.repeat([2, 0, 9, 4, 0], [5, 1, 20, 9, 2]).astype(np.int32)
    made = jit_logits(config, tiny_params(config), row[None], segment_ids=jnp.asarray(ids[None]))
    assert np.isfinite(made).all()
    for sequence, number in ((a, 2), (b, 9), (c, 4)):
        assert_allclose(made[0, ids == number], alone(config, sequence), **SAME)


@pytest.mark.parametrize(
    ("rope", "side", "dtype"),
    [
        ("default", "left", bool),
        ("default", "right", np.int32),
        ("dynamic", "left", np.int32),
        ("dynamic", "right", bool),
        ("longrope", "left", bool),
        ("longrope", "right", np.int32),
    ],
)
def test_padding(rope: str, side: str, dtype: type) -> None:
    config, rows = CONFIGS[rope], sequences(5, 20)  # as above, so that the same programs run
    padded = np.zeros((2, 21), np.int32)
    mask = np.zeros((2, 21), dtype)
    for i, row in enumerate(rows):
        place = slice(21 - len(row), 21) if side == "left" else slice(0, len(row))
        padded[i, place], mask[i, place] = row, 1
    made = jit_logits(config, tiny_params(config), padded, attention_mask=mask)
    for i, row in enumerate(rows):
        assert_allclose(made[i][mask[i] == 1], alone(config, row), **SAME)


def test_positions_are_those_given() -> None:
    """Rotary embedding sees distances only, so a shift changes nothing and a stretch does."""
    (row,) = sequences(12)
    counted = np.arange(12, dtype=np.int32)[None]
    shifted, stretched = (
        jit_logits(CONFIG, tiny_params(CONFIG), row[None], positions=x)[0]
        for x in (counted + 40, 2 * counted)
    )
    assert_allclose(shifted, alone(CONFIG, row), atol=1e-4, rtol=0)
    assert np.abs(stretched - alone(CONFIG, row)).max() > 0.1


def test_positions_within_segments() -> None:
    """The same as those that are counted; a segment's length is its own last position."""
    config, (a, b) = CONFIGS["dynamic"], sequences(6, 20)
    positions = np.concatenate([np.arange(6), np.arange(20)]).astype(np.int32)
    ids = np.repeat(np.int32([1, 2]), [6, 20])
    args = config, tiny_params(config), np.concatenate([a, b])[None]
    counted = jit_logits(*args, segment_ids=ids[None])
    assert_array_equal(jit_logits(*args, segment_ids=ids[None], positions=positions[None]), counted)


def test_hidden_states_and_unembed_are_logits() -> None:
    (row,) = sequences(10)
    params = tiny_params(CONFIG)
    hidden = jax.jit(hidden_states, static_argnums=0)(CONFIG, params, jnp.asarray(row[None]))
    assert hidden.shape == (1, 10, CONFIG.hidden_size)
    assert_allclose(unembed(CONFIG, params, hidden)[0], alone(CONFIG, row), **SAME)


def loss(params: dict, tokens: jax.Array, remat: bool) -> jax.Array:
    return jax.nn.log_softmax(logits(CONFIG, params, tokens, remat=remat))[:, :, 0].mean()


def test_remat_has_the_same_gradient() -> None:
    tokens = jnp.asarray(np.stack(sequences(40, 40)))
    plain, again = (
        jax.jit(jax.grad(loss), static_argnums=2)(tiny_params(CONFIG), tokens, remat)
        for remat in (False, True)
    )
    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=1e-6, rtol=0), plain, again)


def test_remat_keeps_less() -> None:
    """What a layer more costs: its input and its attention's output, not what its MLP made."""
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def temporary(layers: int, remat: bool) -> int:
        config = dataclasses.replace(CONFIG, num_hidden_layers=layers)
        params = abstract_params(config)  # those of tiny_params are kept, and must be arrays

        def sum_of(params: dict, tokens: jax.Array) -> jax.Array:
            return hidden_states(config, params, tokens, remat=remat).sum()

        compiled = jax.jit(jax.grad(sum_of)).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, again = (temporary(2, remat) - temporary(1, remat) for remat in (False, True))
    kept = 512 * (CONFIG.hidden_size + 4 * CONFIG.head_dim) * 4
    assert again < 3 * kept and plain > 2 * again


def window_attend(config: ModelConfig, positions: jax.Array, window: int) -> Any:
    """Sliding-window attention by somebody else; it keeps the keys that it saw."""
    cos, sin = rotary_angles(config, positions, positions.max(axis=1) + 1)
    T = positions.shape[1]
    seen = jnp.tril(jnp.ones((T, T), bool)) & ~jnp.tril(jnp.ones((T, T), bool), -window)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple:
        q, k = (api.apply_rotary(x, *layer_angles(config, layer, cos, sin)) for x in (q, k))
        wide, values = (jnp.repeat(x, config.group_size, axis=2) for x in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, wide) * config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, values), k

    return attend


@pytest.mark.parametrize("remat", [False, True])
def test_attention_of_ones_own(remat: bool) -> None:
    """As wide as the sequence it is causal attention; narrower it is not; a derivative exists."""
    (row,) = sequences(12)
    tokens, params = jnp.asarray(row[None]), tiny_params(CONFIG)
    positions = jnp.arange(12)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def run(params: dict, window: int) -> jax.Array:
        attend = window_attend(CONFIG, positions, window)
        return logits(CONFIG, params, tokens, attend=attend, remat=remat)[0]

    assert_allclose(run(params, 12), alone(CONFIG, row), **SAME)
    narrow = run(params, 3)
    assert_allclose(narrow[:3], alone(CONFIG, row)[:3], **SAME)
    assert np.abs(narrow[3:] - alone(CONFIG, row)[3:]).max() > 0.1
    gradient = jax.jit(jax.grad(lambda params: run(params, 3).sum()))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_what_attend_keeps_comes_back() -> None:
    (row,) = sequences(12)
    positions = jnp.arange(12)[None]

    @jax.jit
    def keys_of(params: dict) -> list:
        attend = window_attend(CONFIG, positions, 12)
        return bind(CONFIG, params)(jnp.asarray(row[None]), attend, [None, None])[1]

    keys = keys_of(tiny_params(CONFIG))
    assert [k.shape for k in keys] == [(1, 12, 2, 16)] * 2


ROW = np.zeros((1, 4), np.int32)
ONES = np.ones_like(ROW)
# What is wrong with the values; the message is the same when it is found later.
BAD_VALUES = [
    (
        {"tokens": np.int32([[0, 0, VOCAB, 0]])},
        f"tokens must lie in [0, {VOCAB - 1}], got 0 to {VOCAB}",
    ),
    ({"tokens": ROW - 1}, "tokens must lie in"),
    ({"positions": ROW - 1}, "positions must lie in [0, 2147483647], got -1 to -1"),
    ({"segment_ids": ROW - 1}, "segment_ids must lie in"),
    ({"attention_mask": ROW + 2}, "attention_mask must lie in [0, 1], got 2 to 2"),
    (
        {"attention_mask": ONES, "segment_ids": np.int32([[1, 0, 1, 1]])},
        "places where attention_mask and segment_ids differ must lie in [0, 0], got 0 to 1",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD_VALUES)
@pytest.mark.parametrize("traced", [False, True])
def test_bad_values(bad: dict[str, np.ndarray], message: str, traced: bool) -> None:
    arguments = jax.tree.map(jnp.asarray, {"tokens": ROW} | bad)
    if not traced:
        with pytest.raises(ValueError) as caught:
            logits(ONE_LAYER, tiny_params(ONE_LAYER), **arguments)
        assert message in str(caught.value)
        return
    with api.value_checks():
        run = jax.jit(lambda arguments: logits(ONE_LAYER, tiny_params(ONE_LAYER), **arguments))
        error, _ = checkify.checkify(run)(arguments)
    assert message in str(error.get())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tokens": ROW[:, :0]}, r"tokens must be an integer array \[B, T\], got int32 \(1, 0\)"),
        ({"positions": ROW[:, :3]}, r"positions must be an integer array \[1, 4\], as tokens"),
        ({"segment_ids": ROW.astype(np.float32)}, "segment_ids must be an integer array"),
        ({"attention_mask": ROW[0]}, r"attention_mask must be an integer array \[1, 4\]"),
        (
            {"attend": window_attend(CONFIG, ROW, 2), "segment_ids": ONES},
            "attend decides about positions and masks itself, so segment_ids must be None",
        ),
    ],
)
def test_bad_arguments(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logits(CONFIG, tiny_params(CONFIG), **{"tokens": ROW} | bad)


def test_params_and_attend_are_held_against_the_config() -> None:
    """Neither may be clamped, broadcast or read with its axes swapped."""
    config, params = CONFIG, tiny_params(CONFIG)
    table = params["embed_tokens"]["embedding"]
    few = params | {"embed_tokens": {"embedding": table[:5]}}
    with pytest.raises(ValueError, match=r"embed_tokens.*shape"):
        logits(config, few, ROW)
    with pytest.raises(ValueError, match=r"norm.*shape"):
        logits(config, params | {"norm": {"scale": jnp.ones((1,))}}, ROW)

    def swapped(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: object) -> tuple:
        return q.swapaxes(1, 2), cache

    with pytest.raises(ValueError, match="attend returned o of shape"):
        logits(config, params, ROW[:, :3], attend=swapped)
    with pytest.raises(ValueError, match="attend must return"):
        logits(config, params, ROW, attend=lambda layer, q, k, v, cache: q)
    with pytest.raises(ValueError, match="tokens must be an integer array"):
        logits(config, params, [[1, 2]])  # pyrefly: ignore
