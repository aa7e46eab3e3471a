"""Sampling against an independent float64 NumPy implementation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve_jax.engine import sampling
from lserve_jax.engine.sampling import (
    SamplingArrays,
    SamplingMode,
    is_stop_token,
    sample,
    sampling_row,
    top_logprobs,
)
from lserve_jax.sampling_params import SamplingParams

jit_sample = jax.jit(sample, static_argnames="mode")

# Tokens whose place relative to a threshold differs by less than this may fall on either side:
# float32 sums of up to 128k probabilities and 1 - top_p carry rounding of about 1e-6.
MARGIN = 2e-6


def make_arrays(batch: list[SamplingParams], *, eos=(), default_seeds=None) -> SamplingArrays:
    arrays = SamplingArrays.empty(len(batch), 4)
    for i, params in enumerate(batch):
        seed = i if default_seeds is None else default_seeds[i]
        arrays = arrays.with_row(i, sampling_row(params, eos_token_ids=eos, default_seed=seed))
    return arrays


def many(params: SamplingParams, count: int, *, eos=()) -> SamplingArrays:
    """``count`` rows of the same request that differ in their seeds."""
    rows = [sampling_row(params, eos_token_ids=eos, default_seed=i) for i in range(count)]
    arrays = SamplingArrays.empty(1, 4).with_row(0, rows[0])
    arrays = jax.tree.map(lambda value: jnp.repeat(value, count, axis=0), arrays)
    return dataclasses.replace(arrays, seed=jnp.asarray(np.stack([row["seed"] for row in rows])))


# --- the oracle -------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def edited_logits(logits, params, *, counts=None, prompt=None, step=0, eos=()) -> np.ndarray:
    """Logits of one row after penalties and ``min_tokens``, token by token."""
    out = np.array(logits, np.float64)
    for token in range(len(out)):
        count = 0 if counts is None else int(counts[token])
        in_prompt = prompt is not None and bool(prompt[token])
        if in_prompt or count:
            if out[token] > 0:
                out[token] /= params.repetition_penalty
            else:
                out[token] *= params.repetition_penalty
        out[token] -= params.frequency_penalty * count
        if count:
            out[token] -= params.presence_penalty
    if step < params.min_tokens:
        stops = [*params.stop_token_ids, *(() if params.ignore_eos else eos)]
        out[[token for token in stops if token < len(out)]] = -np.inf
    return out


def kept_tokens(logits: np.ndarray, params: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """Mask of what the filters leave of float64 logits (temperature applied already).

    A positive ``slack`` is added to what top_p and min_p leave room for, a negative one taken
    from it.
    """
    probabilities = softmax(logits)
    kept = probabilities >= params.min_p * probabilities.max() * (1 - slack)
    ranking = np.argsort(-logits, kind="stable")  # the lower id first in a tie
    ranking = ranking[kept[ranking]]
    if params.top_k > 0:
        ranking = ranking[: params.top_k]
    weights = probabilities[ranking] / probabilities[ranking].sum()
    # A token stays while those before it have not reached top_p.
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    # The oracle's own sum is off by some 1e-16, which matters where all tokens tie.
    reached = np.flatnonzero(before >= params.top_p + slack - 1e-13)
    size = len(ranking)
    if params.top_p < 1 and len(reached):
        size = max(int(reached[0]), 1)
    mask = np.zeros(len(logits), bool)
    mask[ranking[:size]] = True
    return mask


def distribution(logits, params, **history) -> np.ndarray:
    """Probabilities of the next token, float64."""
    logits = edited_logits(logits, params, **history) / params.temperature
    return softmax(np.where(kept_tokens(logits, params), logits, -np.inf))


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


# --- determinism ------------------------------------------------------------------------------


def random_logits(rows: int, vocab_size: int = 64, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(rows, vocab_size)) * 2, jnp.float32)


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


# --- parameters and rows ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"n": 2, "temperature": 0}, "n=2 needs temperature > 0"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number at least 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"top_k": -2}, "top_k must be an integer of at least -1, got -2"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"top_p": 0}, "top_p=0 must be greater than 0"),
        ({"top_p": 1.01}, r"top_p=1.01 must be a finite number in \[0.0, 1.0\]"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.0}, "seed must be an integer"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": None}, "max_tokens must be an integer"),
        ({"min_tokens": -1}, "min_tokens must be an integer of at least 0"),
        ({"min_tokens": 17}, "min_tokens=17 must not exceed max_tokens=16"),
        ({"stop": ""}, "non-empty strings"),
        ({"stop": ["a", ""]}, "non-empty strings"),
        ({"stop": [1]}, "non-empty strings"),
        ({"stop_token_ids": [-1]}, "every entry of stop_token_ids must be an integer"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is too close to 0"),
        ({"repetition_penalty": -1}, "repetition_penalty=-1"),
        ({"presence_penalty": 2.1}, r"presence_penalty=2.1 must be a finite number in \[-2.0"),
        ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1"),
        ({"logprobs": -1}, "logprobs must be an integer of at least 0"),
    ],
)
def test_wrong_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


def test_parameters_keep_sequences_as_tuples():
    params = SamplingParams(stop="\n", stop_token_ids=[1, np.int64(2)], logprobs=0, top_k=-1)
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert hash(params) == hash(dataclasses.replace(params))


def test_mode_is_the_least_that_covers_the_batch():
    greedy = SamplingParams(temperature=0, top_k=5)
    assert SamplingMode.of([greedy, greedy]) == SamplingMode(greedy_only=True, filters=False)
    mode = SamplingMode.of([greedy, SamplingParams(logprobs=3), SamplingParams(logprobs=1)])
    assert mode == SamplingMode(filters=False, top_logprobs=4)  # a power of two
    assert SamplingMode.of([SamplingParams(top_p=0.9)]).filters
    assert SamplingMode.of([SamplingParams(top_k=1)]).filters
    assert not SamplingMode.of([SamplingParams(top_k=-1, min_p=0.1)]).filters
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingMode.of([greedy, SamplingParams(**{name: 0.5})]).penalties


def test_rows_change_without_recompilation():
    traces = 0

    @functools.partial(jax.jit, static_argnames="mode")
    def counted(logits, arrays, step, mode):
        nonlocal traces
        traces += 1
        return sample(logits, arrays, step=step, mode=mode)

    mode = SamplingMode(filters=False)
    logits, step = random_logits(3), jnp.zeros((3,), jnp.int32)
    arrays = SamplingArrays.empty(3, 4)
    rows_compiled = sampling._set_row._cache_size()
    for i, params in enumerate(
        [
            SamplingParams(temperature=0.5, top_k=3, stop_token_ids=(1, 2)),
            SamplingParams(top_p=0.5, seed=3, min_tokens=2),
            SamplingParams(temperature=0, stop_token_ids=(1, 2, 3)),
        ]
    ):
        row = sampling_row(params, eos_token_ids=(9,), default_seed=0)
        arrays = arrays.with_row(i, row)
        counted(logits, arrays, step, mode)
    assert traces == 1
    assert sampling._set_row._cache_size() <= rows_compiled + 1
    assert arrays.stop_token_ids.tolist() == [[1, 2, 9, -1], [9, -1, -1, -1], [1, 2, 3, 9]]
    assert arrays.temperature.tolist() == [0.5, 1.0, 0.0]


def test_rows_that_do_not_fit_are_refused():
    arrays = SamplingArrays.empty(2, 2)
    row = sampling_row(SamplingParams(stop_token_ids=(1, 2)), eos_token_ids=(3,), default_seed=0)
    with pytest.raises(ValueError, match=r"3 stop ids.* room for 2"):
        arrays.with_row(0, row)
    row["stop_token_ids"] = row["stop_token_ids"][:2]
    for index in (-1, 2):
        with pytest.raises(ValueError, match=rf"row {index} must lie in \[0, 2\)"):
            arrays.with_row(index, row)


def test_sample_refuses_other_logits_and_missing_counts():
    arrays, step = SamplingArrays.empty(1, 1), jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="logits must be float32, got bfloat16"):
        sample(jnp.zeros((1, 4), jnp.bfloat16), arrays, step=step, mode=SamplingMode())
    with pytest.raises(ValueError, match="needs output_counts and prompt_mask"):
        sample(jnp.zeros((1, 4), jnp.float32), arrays, step=step, mode=SamplingMode(penalties=True))
