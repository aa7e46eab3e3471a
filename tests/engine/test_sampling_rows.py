"""What a row draws whoever is beside it; penalties, stop ids and log probabilities."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import (
    edited_logits,
    jit_sample,
    make_arrays,
    many,
    random_logits,
    softmax,
)

from lserve_jax.engine.sampling import (
    SamplingMode,
    is_stop_token,
    sampling_row,
    top_logprobs,
)
from lserve_jax.sampling_params import SamplingParams

# --- determinism ------------------------------------------------------------------------------


def test_a_seeded_row_does_not_depend_on_its_batch():
    mine = SamplingParams(seed=1234, temperature=1.3, top_p=0.95, top_k=50)
    others = [SamplingParams(seed=i, temperature=0 if i % 2 else 2, top_k=i) for i in range(7)]
    logits = random_logits(8)
    alone = []
    for step in range(20):
        steps = jnp.full((1,), step, jnp.int32)
        arrays = make_arrays([mine])
        alone.append(int(jit_sample(logits[:1], arrays, step=steps, mode=SamplingMode())[0][0]))
    assert len(set(alone)) > 5  # not one token only
    for place in (0, 3, 7):
        batch = [*others[:place], mine, *others[place:]]
        mixed = jnp.concatenate([logits[1 : place + 1], logits[:1], logits[place + 1 :]])
        # The default seeds are the others' affair.
        arrays = make_arrays(batch, default_seeds=range(90, 98))
        for step in range(20):
            steps = jnp.full((8,), 5, jnp.int32).at[place].set(step)
            tokens, _ = jit_sample(mixed, arrays, step=steps, mode=SamplingMode())
            assert tokens[place] == alone[step]


@pytest.mark.parametrize(
    "mode", [SamplingMode(penalties=True), SamplingMode(filters=True, top_logprobs=3)]
)
def test_a_mode_that_covers_more_gives_the_same_tokens(mode):
    params = SamplingParams(min_p=0.01, min_tokens=2, stop_token_ids=(3,))
    batch = [dataclasses.replace(params, seed=i) for i in range(8)]
    arrays, logits = make_arrays(batch), random_logits(8)
    none = {"output_counts": jnp.zeros((8, 64), jnp.int32), "prompt_mask": logits > 0}
    least = SamplingMode.of(batch)
    assert least == SamplingMode(filters=False)
    for i in range(10):
        step = jnp.full((8,), i, jnp.int32)
        expected = jit_sample(logits, arrays, step=step, mode=least)
        actual = jit_sample(logits, arrays, step=step, mode=mode, **none)
        assert jnp.array_equal(expected[0], actual[0])
        assert jnp.allclose(expected[1], actual[1], rtol=1e-6)


def test_seeds_and_completions_have_streams_of_their_own():
    def key(seed, default_seed=0, completion=0):
        row = sampling_row(
            SamplingParams(seed=seed),
            eos_token_ids=(),
            default_seed=default_seed,
            completion=completion,
        )
        return tuple(row["seed"].tolist())

    keys = [key(seed, completion=i) for seed in (0, 1, 2, 2**40, 2**40 + 1) for i in range(4)]
    assert len(set(keys)) == len(keys)
    assert key(7, default_seed=1) == key(7, default_seed=2)
    assert key(0, default_seed=1) == key(0, default_seed=2)
    assert key(None, default_seed=1) != key(None, default_seed=2)
    assert key(None, default_seed=7) == key(7)


# --- greedy, penalties, min_tokens ------------------------------------------------------------


def test_greedy_rows_of_a_mixed_batch_are_the_argmax():
    logits = random_logits(8)
    logits = logits.at[:4, 7].set(20.0).at[:4, 3].set(20.0)  # a tie: the lower id wins
    batch = [SamplingParams(temperature=0 if i % 2 else 1.0, top_k=5, top_p=0.5) for i in range(8)]
    step = jnp.zeros((8,), jnp.int32)
    tokens, _ = jit_sample(logits, make_arrays(batch), step=step, mode=SamplingMode())
    expected = np.argmax(np.asarray(logits), axis=-1)
    assert np.array_equal(np.asarray(tokens)[1::2], expected[1::2])
    assert expected[0] == 3
    greedy, _ = jit_sample(
        logits,
        make_arrays([SamplingParams(temperature=1e-6)] * 8),
        step=step,
        mode=SamplingMode(greedy_only=True, filters=False),
    )
    assert np.array_equal(np.asarray(greedy), expected)


@settings(deadline=None, max_examples=40)
@given(
    params=st.builds(
        SamplingParams,
        temperature=st.just(0),
        repetition_penalty=st.floats(0.5, 2.0),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        min_tokens=st.integers(0, 4),
        stop_token_ids=st.lists(st.integers(0, 15), max_size=2),
        ignore_eos=st.booleans(),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_greedy_after_penalties(params, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(2, 16)) * 3).astype(np.float32)
    counts = rng.integers(0, 3, size=(2, 16)).astype(np.int32)
    prompt = rng.random((2, 16)) < 0.3
    tokens, _ = jit_sample(
        jnp.asarray(logits),
        make_arrays([params, params], eos=(2, 9)),
        step=jnp.asarray([2, 3], jnp.int32),
        output_counts=jnp.asarray(counts),
        prompt_mask=jnp.asarray(prompt),
        mode=SamplingMode(greedy_only=True, penalties=True),
    )
    for row, step in ((0, 2), (1, 3)):
        history = {"counts": counts[row], "prompt": prompt[row], "step": step, "eos": (2, 9)}
        expected = edited_logits(logits[row], params, **history)
        # The best in float32 is the best in float64 up to rounding of values around 10.
        assert expected[tokens[row]] >= expected.max() - 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_id_before_min_tokens(temperature):
    params = SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=[5, 999])
    arrays = make_arrays([params] * 4, eos=(6,))
    logits = jnp.zeros((4, 8), jnp.float32).at[:, 5].set(50.0).at[:, 6].set(51.0).at[:, 1].set(9.0)
    step = jnp.asarray([0, 2, 3, 4], jnp.int32)
    tokens, logprobs = jit_sample(logits, arrays, step=step, mode=SamplingMode(filters=False))
    assert tokens[:2].tolist() == [1, 1]
    assert set(tokens[2:].tolist()) <= {5, 6}
    assert is_stop_token(tokens, arrays).tolist() == [False, False, True, True]
    # Log probabilities are the model's, which knows nothing of min_tokens.
    assert np.allclose(logprobs[:2], 9 - 51 - np.log1p(np.exp(-1.0)), atol=1e-4)


def test_unused_room_for_stop_ids_forbids_nothing():
    # -1 fills the room up; as an index it would be the last token.
    arrays = make_arrays([SamplingParams(temperature=0, min_tokens=3)])
    logits = jnp.zeros((1, 8), jnp.float32).at[0, 7].set(1.0)
    mode = SamplingMode(greedy_only=True)
    tokens, _ = jit_sample(logits, arrays, step=jnp.zeros((1,), jnp.int32), mode=mode)
    assert tokens.tolist() == [7]
    assert is_stop_token(tokens, arrays).tolist() == [False]


def test_ignore_eos_keeps_the_requests_own_stop_ids():
    params = SamplingParams(ignore_eos=True, stop_token_ids=(4, 4))
    row = sampling_row(params, eos_token_ids=(1, 2), default_seed=0)
    assert row["stop_token_ids"].tolist() == [4]
    params = SamplingParams(stop_token_ids=(4, 1))
    row = sampling_row(params, eos_token_ids=(1, 2), default_seed=0)
    assert row["stop_token_ids"].tolist() == [4, 1, 2]


# --- log probabilities ------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own():
    logits = random_logits(8, seed=3)
    params = SamplingParams(temperature=0.2, top_k=3, repetition_penalty=2.0)
    tokens, logprobs = jit_sample(
        logits,
        many(params, 8),
        step=jnp.zeros((8,), jnp.int32),
        output_counts=jnp.ones((8, 64), jnp.int32),
        prompt_mask=jnp.ones((8, 64), bool),
        mode=SamplingMode(penalties=True),
    )
    reference = np.array([np.log(softmax(row)) for row in np.asarray(logits, np.float64)])
    chosen = reference[np.arange(8), np.asarray(tokens)]
    assert np.allclose(logprobs, chosen, atol=1e-5)  # float32 of values around 10
    ids, values = top_logprobs(logits, 5)
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :5]
    assert np.array_equal(ids, order)
    assert np.allclose(values, np.take_along_axis(reference, order, axis=-1), atol=1e-5)
    assert (ids.dtype, values.dtype) == (jnp.int32, jnp.float32)


def test_top_log_probabilities_of_ties_and_small_vocabularies():
    ids, values = top_logprobs(jnp.zeros((1, 4), jnp.float32), 9)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert np.allclose(values, -math.log(4), atol=1e-6)
    ids, values = top_logprobs(jnp.zeros((2, 4), jnp.float32), 0)
    assert ids.shape == values.shape == (2, 0)
