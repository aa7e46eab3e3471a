"""Rows of requests for ``sample``, and a float64 NumPy implementation of what it should draw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.engine.sampling import SamplingArrays, sample, sampling_row
from lserve_jax.sampling_params import SamplingParams

jit_sample = jax.jit(sample, static_argnames="mode")


def make_arrays(batch: list[SamplingParams], *, eos=(), default_seeds=None) -> SamplingArrays:
    arrays = SamplingArrays.empty(len(batch), 4)
    for i, params in enumerate(batch):
        seed = i if default_seeds is None else default_seeds[i]
        arrays = arrays.with_rows([(i, sampling_row(params, eos_token_ids=eos, default_seed=seed))])
    return arrays


def many(params: SamplingParams, count: int, *, eos=()) -> SamplingArrays:
    """``count`` rows of the same request that differ in their seeds."""
    rows = [sampling_row(params, eos_token_ids=eos, default_seed=i) for i in range(count)]
    arrays = SamplingArrays.empty(1, 4).with_rows([(0, rows[0])])
    arrays = jax.tree.map(lambda value: jnp.repeat(value, count, axis=0), arrays)
    return dataclasses.replace(arrays, seed=jnp.asarray(np.stack([row["seed"] for row in rows])))


def random_logits(rows: int, vocab_size: int = 64, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(rows, vocab_size)) * 2, jnp.float32)


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
