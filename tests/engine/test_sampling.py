"""Which tokens sampling may draw, and how often, against float64 NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import (
    distribution,
    jit_sample,
    kept_tokens,
    make_arrays,
    many,
)

from lserve_jax.engine import sampling
from lserve_jax.engine.sampling import (
    SamplingMode,
)
from lserve_jax.sampling_params import SamplingParams

# Tokens whose place relative to a threshold differs by less than this may fall on either side:
# float32 sums of up to 128k probabilities and 1 - top_p carry rounding of about 1e-6.
MARGIN = 2e-6


# --- what may be drawn ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="use_top")
def filtered(logits, arrays, use_top=True):
    """The logits that ``sample`` adds its noise to."""
    scaled = sampling._keep_min_p(logits / arrays.temperature[:, None], arrays.min_p)
    return sampling._keep_top(scaled, arrays.top_k, arrays.top_p) if use_top else scaled


def check_filters(logits: np.ndarray, batch: list[SamplingParams]) -> None:
    found = np.asarray(filtered(jnp.asarray(logits), make_arrays(batch)))
    for row, params, out in zip(logits, batch, found, strict=True):
        scaled = (row / np.float32(params.temperature)).astype(np.float64)
        surely, perhaps = (kept_tokens(scaled, params, slack) for slack in (-MARGIN, MARGIN))
        # A token e^87 times less likely than the best has float32 weight 0: out or in is the same.
        surely &= scaled > scaled.max() - 80
        kept = np.isfinite(out)
        assert kept.any()
        assert not (surely & ~kept).any(), (params, np.flatnonzero(surely & ~kept)[:5])
        assert not (kept & ~perhaps).any(), (params, np.flatnonzero(kept & ~perhaps)[:5])
        assert np.allclose(out[kept], scaled[kept], rtol=1e-6)


filter_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(-1, 40),
    top_p=st.floats(1e-3, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.lists(filter_params, min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(["normal", "ties", "flat", "steep"]),
)
def test_filters_keep_what_the_oracle_keeps(batch, seed, shape):
    rng = np.random.default_rng(seed)
    logits = {
        "normal": rng.normal(size=(4, 33)) * 2,
        "ties": np.round(rng.normal(size=(4, 33))),
        "flat": np.zeros((4, 33)),
        "steep": rng.normal(size=(4, 33)) * 50,
    }[shape].astype(np.float32)
    check_filters(logits, batch)


def test_filters_of_a_large_vocabulary():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(5, 128256)) * 2).astype(np.float32)
    batch = [
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.999),
        SamplingParams(top_k=1000, top_p=0.95),
        SamplingParams(top_k=50),
        SamplingParams(min_p=0.001, top_p=0.99, temperature=1.7),
    ]
    check_filters(logits, batch)


def test_top_p_counts_the_small_tokens_of_a_large_vocabulary():
    # One token holds 0.9, the others 0.1 together: 0.95 takes half of them. Summed from the head
    # in float32 each would add 7.8e-7 to 0.9 with a rounding of 6e-8, and thousands go astray.
    vocab_size = 128256
    logits = np.full((1, vocab_size), math.log(0.1 / (vocab_size - 1)), np.float32)
    logits[0, 777] = math.log(0.9)
    out = np.asarray(filtered(jnp.asarray(logits), make_arrays([SamplingParams(top_p=0.95)])))
    assert abs(np.isfinite(out).sum() - (1 + 0.5 * (vocab_size - 1))) < 10
    assert np.isfinite(out[0, 777])


def test_ties_keep_exactly_k_of_the_lowest_ids():
    logits = np.array([[1, 3, 2, 3, 3, 2, 2, 0.0]], np.float32)
    for top_k, kept in ((1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5])):
        out = filtered(jnp.asarray(logits), make_arrays([SamplingParams(top_k=top_k)]))
        assert np.flatnonzero(np.isfinite(out[0])).tolist() == kept


def test_filters_run_step_by_step_too():
    """As under ``jax.disable_jit``, where a loop counts in Python's numbers."""
    logits, arrays = jnp.asarray([[2.0, 1.0, 0.0, -1.0]]), make_arrays([SamplingParams(top_p=0.8)])
    wanted = filtered(logits, arrays)
    with jax.disable_jit():
        np.testing.assert_array_equal(filtered(logits, arrays), wanted)


def test_ties_at_the_end_of_top_p_keep_the_lowest_ids():
    arrays = make_arrays([SamplingParams(top_p=0.45)])
    for zero in (0.0, -0.0):  # which of the two zeros a logit is must not matter
        logits = np.zeros((1, 10), np.float32)
        logits[0, ::2] = zero
        out = filtered(jnp.asarray(logits), arrays)
        assert np.flatnonzero(np.isfinite(out[0])).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("top_p", [1e-9, 1e-3, 0.5])
def test_one_token_always_stays(top_p):
    logits = np.array([[0.0, 5.0, 1.0]], np.float32)
    out = filtered(jnp.asarray(logits), make_arrays([SamplingParams(top_p=top_p)]))
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == [1]


# --- how often it is drawn --------------------------------------------------------------------


LOGITS = np.array([2.0, 1.5, -1.0, 0.3, 1.5, 0.0, -3.0, 0.8, -0.5, 1.1, -7.0, 0.6], np.float32)
COUNTS = np.array([3, 0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0], np.int32)
PROMPT = np.array([1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0], bool)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.4),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.35),
        SamplingParams(temperature=1.5, top_k=7, top_p=0.8, min_p=0.1),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.6, top_p=0.9),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.7),
        SamplingParams(
            temperature=0.8, presence_penalty=-1, frequency_penalty=0.5, repetition_penalty=1.2
        ),
        SamplingParams(min_tokens=3, stop_token_ids=(0, 4), top_k=3),
    ],
    ids=lambda params: ",".join(
        f"{f.name}={getattr(params, f.name)}"
        for f in dataclasses.fields(params)
        if getattr(params, f.name) != f.default
    ),
)
def test_frequencies(params):
    draws = 20_000
    expected = distribution(LOGITS, params, counts=COUNTS, prompt=PROMPT, step=2, eos=(1,))

    def rows(value):
        return jnp.broadcast_to(jnp.asarray(value), (draws, len(LOGITS)))

    tokens, _ = jit_sample(
        rows(LOGITS),
        many(params, draws, eos=(1,)),
        step=jnp.full((draws,), 2, jnp.int32),
        output_counts=rows(COUNTS),
        prompt_mask=rows(PROMPT),
        mode=SamplingMode(filters=True, penalties=True),
    )
    observed = np.bincount(np.asarray(tokens), minlength=len(LOGITS))
    assert observed[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = ((observed - draws * expected)[likely] ** 2 / (draws * expected[likely])).sum()
    freedom = max(int(likely.sum()) - 1, 1)
    # Mean and variance of chi square are freedom and 2 freedom; the seeds are fixed.
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_successive_steps_and_neighbouring_seeds_are_unrelated():
    rows = many(SamplingParams(), 2000)
    logits = jnp.zeros((2000, 2), jnp.float32)
    mode = SamplingMode(filters=False)
    a, b = (
        np.asarray(jit_sample(logits, rows, step=jnp.full((2000,), i, jnp.int32), mode=mode)[0])
        for i in (0, 1)
    )
    # Agreement of fair coins: 1/2 with a standard deviation of 0.011.
    assert abs(np.mean(a == b) - 0.5) < 0.04
    assert abs(np.mean(a[1:] == a[:-1]) - 0.5) < 0.04


def test_noise_is_fine_where_it_is_large():
    # With 23 random bits the top thousand of two million values would share about 4,200 levels,
    # and some 100 of them would tie.
    noise = sampling._gumbel_noise(
        1 << 21, jnp.asarray([[1, 2]], jnp.uint32), jnp.zeros((1,), jnp.int32)
    )
    top = np.sort(np.asarray(noise[0]))[-1000:]
    assert len(np.unique(top)) >= 998
