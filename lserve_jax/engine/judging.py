"""What a model thinks of whole texts: the log probability of each token, and hidden states.

Three ways, by what the engine is like and how long a text is:

* dense attention, short texts: several texts in a row of tokens, rows in batches, no cache;
* dense attention, long texts: prefill, chunk by chunk, as the engine runs a prompt;
* sparse attention, keys and values in 8 or 4 bits, or prefill in 8 bits: as generation would
  (``scoring.score_rollouts``).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lserve_jax.attention.attend import causal_attend
from lserve_jax.engine.buckets import bucket
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.prompt_logprobs import judge_tokens
from lserve_jax.engine.scoring import Score, check_finite, check_idle, score_rollouts
from lserve_jax.engine.state import Sample
from lserve_jax.model.bound import bind
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params
from lserve_jax.sampling_params import SamplingParams

# Tokens of a batch of rows. A row's attention reads all of the row: short rows are cheap to read,
# long ones waste less of their ends.
_BATCH_TOKENS = 2048
_SHORTEST_ROW = 512
_EMBEDDED_AT_ONCE = 64  # prompts whose hidden states the host holds


def judge(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    continuations: Sequence[np.ndarray],
    *,
    keep_hidden: bool = False,
) -> list[Score]:
    """Scores continuations (checked token ids, there may be none) of prompts (at least one).

    Nothing is compiled but for a few shapes. Raises ``ValueError`` for a text that the engine
    cannot hold and while requests run, ``FloatingPointError`` for logits that are not finite.
    """
    check_idle(engine)
    engine.runner.check_params()
    if not is_judged_by_prefill(engine):
        return score_rollouts(engine, prompts, continuations, keep_hidden=keep_hidden)
    texts = [np.concatenate(pair) for pair in zip(prompts, continuations, strict=True)]
    for text in texts:
        if len(text) > engine.max_model_len:
            raise ValueError(
                f"a text of {len(text)} tokens is longer than max_model_len={engine.max_model_len}"
            )
    short = [text for text in texts if len(text) <= _BATCH_TOKENS]
    packed = iter(_packed(engine, short, keep_hidden))
    scores = []
    for text, continuation in zip(texts, continuations, strict=True):
        if len(text) <= _BATCH_TOKENS:
            judged = next(packed)
        else:
            judged = _prefilled(engine, text, keep_hidden)
        n = len(text) - len(continuation) - 1  # judged tokens of the prompt
        logprobs = np.asarray(judged.logprob[n:])
        check_finite(logprobs)
        scores.append(
            Score(
                logprobs=logprobs,
                likeliest=np.asarray(judged.top_ids[n:, 0]),
                distributions=None,
                hidden=None if judged.hidden is None else np.asarray(judged.hidden),
            )
        )
    return scores


def embed(
    engine: Engine, prompts: Sequence[np.ndarray], pooling: Literal["mean", "last"]
) -> Float[np.ndarray, "N E"]:
    """Of each prompt (checked token ids), its hidden states' mean or the last one, float32."""
    embeddings = [np.zeros((0, engine.config.hidden_size), np.float32)]
    for first in range(0, len(prompts), _EMBEDDED_AT_ONCE):
        batch = prompts[first : first + _EMBEDDED_AT_ONCE]
        nothing = [np.zeros(0, np.int32)] * len(batch)
        for new in judge(engine, batch, nothing, keep_hidden=True):
            assert new.hidden is not None  # it was asked for
            hidden = new.hidden.astype(np.float32)
            embeddings.append(hidden.mean(axis=0)[None] if pooling == "mean" else hidden[-1:])
    return np.concatenate(embeddings)


def is_judged_by_prefill(engine: Engine) -> bool:
    """Whether prefill says of a token what a decode step would."""
    spec = engine.spec
    alike = spec.kv_dtype == "auto" and engine.runner.prefill_dtype is None
    return alike and (spec.sparsity is None or spec.max_drafts is not None)


def _prefilled(engine: Engine, text: np.ndarray, keep_hidden: bool) -> Sample:
    """Leaves [T - 1, ...], hidden states [T, E]."""
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=1)
    name = "judged"
    try:
        engine.add_request(name, text, sampling, seed=0)
        engine.unfinished[name].keeps_hidden = keep_hidden
        engine.prefill.run_waiting()
        [(request, _)] = engine.prefill.take_first_samples()
        chunks = jax.device_get(request.judged)
        engine.finish(name)
    except BaseException:  # an error on the device, or Ctrl-C
        engine.abandon([name])
        raise
    whole: Sample = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
    return _cut(whole, 0, len(text))


def _cut(judged: Sample, start: int, length: int) -> Sample:
    """Of the text that begins at ``start``; its last token has no following one."""
    hidden = judged.hidden
    judged = jax.tree.map(lambda x: x[start : start + length - 1], judged)
    if hidden is None:
        return judged
    return dataclasses.replace(judged, hidden=hidden[start : start + length])


# A row of tokens: its texts one after the other, each with the place where it begins.
_Row = list[tuple[int, int]]


def _packed(engine: Engine, texts: Sequence[np.ndarray], keep_hidden: bool) -> list[Sample]:
    """Of each text leaves [T - 1, ...] and hidden states [T, E]."""
    found: dict[int, Sample] = {}

    def take(rows: list[_Row], judged: Sample) -> None:
        for row, of_row in zip(rows, _by_row(jax.device_get(judged)), strict=False):
            found.update((i, _cut(of_row, start, len(texts[i]))) for i, start in row)

    lengths = [len(text) for text in texts]
    behind: tuple[list[_Row], Sample] | None = None
    for rows, shape in _batches(lengths):
        # Segment 0 is padding.
        tokens, positions, segments, whole, following = (
            np.zeros(shape, np.int32) for _ in range(5)
        )
        for at, row in enumerate(rows):
            for i, start in row:
                end = start + lengths[i]
                tokens[at, start:end], segments[at, start:end] = texts[i], i + 1
                positions[at, start:end], whole[at, start:end] = np.arange(lengths[i]), lengths[i]
                following[at, start : end - 1] = texts[i][1:]
        engine.runner.count_shape("judge_rows", shape, keep_hidden)
        arrays = map(jnp.asarray, (tokens, positions, segments, whole, following))
        judged = judge_rows(engine.config, engine.params, *arrays, keep_hidden=keep_hidden)
        if behind is not None:  # fetched while the device works
            take(*behind)
        behind = rows, judged
    if behind is not None:
        take(*behind)
    return [found[i] for i in range(len(texts))]


def _by_row(judged: Sample) -> Iterator[Sample]:
    for at in range(len(judged.token)):
        yield jax.tree.map(lambda x, at=at: x[at], judged)


def _batches(lengths: Sequence[int]) -> Iterator[tuple[list[_Row], tuple[int, int]]]:
    """Texts of up to ``_BATCH_TOKENS`` tokens in rows, rows in batches of at most as many.

    Yields the rows of each batch with its shape (rows, tokens), which may have more rows. Texts are
    taken by length, the longest first, each to the first row of its size that has room.
    """
    sizes: dict[int, tuple[list[_Row], list[int]]] = {}  # rows of each size, and what is free
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = bucket(lengths[i], _SHORTEST_ROW, _BATCH_TOKENS)
        rows, free = sizes.setdefault(size, ([], []))
        room = next((at for at, left in enumerate(free) if left >= lengths[i]), None)
        if room is None:
            room = len(rows)
            rows.append([])
            free.append(size)
        rows[room].append((i, size - free[room]))
        free[room] -= lengths[i]
    for size, (rows, _) in sizes.items():
        count = bucket(len(rows), 1, _BATCH_TOKENS // size)  # one shape for all of a size
        for first in range(0, len(rows), count):
            yield rows[first : first + count], (count, size)


@functools.partial(jax.jit, static_argnames=("config", "keep_hidden"))
def judge_rows(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    lengths: Int[Array, "B T"],
    following: Int[Array, "B T"],
    *,
    keep_hidden: bool,
) -> Sample:
    """What the model thinks of the token ``following`` each; B T is a power of two.

    Tokens attend those before them in the row that have their ``segment_ids``; ``lengths`` are
    those of their sequences. Leaves are [B, T, ...], one likeliest token among them.
    """
    model = bind(config, params)
    attend = causal_attend(config, positions, lengths=lengths, segment_ids=segment_ids)
    hidden, _ = model(tokens, attend, [None] * config.num_hidden_layers)
    flat = hidden.reshape(tokens.size, -1)
    judged = judge_tokens(model.unembed, flat, following.reshape(-1), 1, config.vocab_size)
    judged = jax.tree.map(lambda x: x.reshape(*tokens.shape, *x.shape[1:]), judged)
    return dataclasses.replace(judged, hidden=hidden) if keep_hidden else judged
