"""What a model thinks of given tokens, through the decode path: teacher forcing.

Page selection and streaming windows act in decode steps; prefill is nearly dense. So the sparse
path is judged by feeding a text's tokens through decode steps and reading the distribution of each.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from lserve_jax.engine.buckets import bucket
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.request import PromptIds
from lserve_jax.engine.state import ForcedSteps
from lserve_jax.sampling_params import SamplingParams

_STEPS = 32  # decode steps between two looks of the host, rounded up to whole reuse intervals


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the model thought of one continuation of n tokens."""

    logprobs: Float[np.ndarray, " n"]  # float32, of each token given those before it
    likeliest: Int[np.ndarray, " n"]  # int32, the token that greedy decoding would have taken
    # float32, over the whole vocabulary, where asked for
    distributions: Float[np.ndarray, "n V"] | None


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A prompt and a continuation, cut into what prefill and what decode steps run."""

    prefilled: PromptIds
    sampling: SamplingParams  # with room for the continuation
    tokens: np.ndarray  # [n + 1] int32: the prompt's last token and the continuation
    start: int  # position of the first of them


def score(
    engine: Engine,
    prompts: Sequence[Sequence[int] | np.ndarray],
    continuations: Sequence[Sequence[int] | np.ndarray],
    *,
    distributions: bool = False,
) -> list[Score]:
    """Scores continuations of prompts (token ids), each by decode steps of ``engine``.

    A prompt's tokens before its last run through prefill; its last token and the continuation's
    run through decode steps, as many as the continuation has tokens, so that every distribution
    comes out of one. Pages are selected at the first of these and every ``reuse_interval`` after.
    Prompts that fit the engine together run together.

    ``distributions`` returns the log probabilities of the whole vocabulary too: 4 V bytes a token.

    Raises ``ValueError`` for an empty prompt or continuation, where the engine would for the two
    together, and while requests of others run. Logits that are not finite raise
    ``FloatingPointError``.
    """
    if engine.has_unfinished_requests:
        raise ValueError("the engine is still busy with another call's requests")
    pairs = zip(prompts, continuations, strict=True)
    items = [_item(engine, prompt, continuation) for prompt, continuation in pairs]
    scores: list[Score] = []
    while items:
        batch = items[: _fitting(engine, items)]
        items = items[len(batch) :]
        scores += _score_batch(engine, batch, distributions)
    return scores


def _item(
    engine: Engine,
    prompt: Sequence[int] | np.ndarray,
    continuation: Sequence[int] | np.ndarray,
) -> _Item:
    if len(prompt) == 0 or len(continuation) == 0:
        raise ValueError("scoring needs at least one token of prompt and one of continuation")
    vocab_size = engine.config.vocab_size
    ids = PromptIds.check(prompt, vocab_size).ids
    tokens = np.concatenate([ids[-1:], PromptIds.check(continuation, vocab_size).ids])
    # The engine admits no empty prompt. So a single token runs through prefill as well; the
    # first decode step then writes it over itself.
    prefilled = ids[: max(len(ids) - 1, 1)]
    room = max(len(ids) + len(tokens) - 1 - len(prefilled), 2)
    sampling = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True)
    return _Item(
        prefilled=engine.check_request(prefilled, sampling),
        sampling=sampling,
        tokens=tokens,
        start=len(ids) - 1,
    )


def _fitting(engine: Engine, items: Sequence[_Item]) -> int:
    """How many of the first items the engine can hold at the same time: at least one."""
    spec, scheduler, pages = engine.spec, engine.scheduler, 0
    for count, item in enumerate(items[: spec.max_num_seqs]):
        pages += scheduler.most_pages(item.prefilled.ids, item.sampling)
        if pages > spec.num_pages - scheduler.prefix_cache.pinned_pages:
            return count
    return min(len(items), spec.max_num_seqs)


def _score_batch(engine: Engine, batch: Sequence[_Item], distributions: bool) -> list[Score]:
    try:
        for number, item in enumerate(batch):
            engine.add_request(f"score-{number}", item.prefilled, item.sampling, seed=0)
        engine.prefill_waiting()  # the tokens sampled after it are not used
        engine.scheduler.reserve(max(item.sampling.max_tokens for item in batch))
        scores = _force(engine, batch, distributions)
        for number in range(len(batch)):
            engine.finish(f"score-{number}")
    except BaseException:  # an error on the device, or Ctrl-C: the engine holds half a batch
        engine.abandon([f"score-{number}" for number in range(len(batch))])
        raise
    return scores


def _force(engine: Engine, batch: Sequence[_Item], distributions: bool) -> list[Score]:
    """The decode steps of prefilled requests."""
    slot_of = {request.request_id: slot for slot, request in engine.scheduler.running.items()}
    slots = [slot_of[f"score-{number}"] for number in range(len(batch))]
    rows = bucket(max(slots) + 1, 1, engine.spec.max_num_seqs)
    page_table, sink_page = engine.scheduler.tables(rows)
    interval = engine.spec.reuse_interval
    steps = -(-_STEPS // interval) * interval
    lengths = [len(item.tokens) - 1 for item in batch]
    padded = -(-max(lengths) // steps) * steps
    fed, wanted = (np.zeros((padded, rows), np.int32) for _ in range(2))
    start, length = (np.zeros((rows,), np.int32) for _ in range(2))
    for slot, n, item in zip(slots, lengths, batch, strict=True):
        fed[:n, slot], wanted[:n, slot] = item.tokens[:-1], item.tokens[1:]
        start[slot], length[slot] = item.start, n
    whole = ForcedSteps(tokens=fed, wanted=wanted, start=start, length=length)
    parts = []
    for first in range(0, padded, steps):
        part = dataclasses.replace(
            whole, tokens=fed[first : first + steps], wanted=wanted[first : first + steps]
        )
        scores = engine.runner.score(
            part, first, page_table=page_table, sink_page=sink_page, distributions=distributions
        )
        parts.append(jax.device_get(scores))
    all_steps = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    for slot, n in zip(slots, lengths, strict=True):
        if not np.isfinite(all_steps.logprobs[:n, slot]).all():
            raise FloatingPointError(
                "the model's logits are not finite: its weights or constants hold NaN or "
                "infinity, or its numbers overflow the dtype"
            )
    return [
        Score(
            logprobs=all_steps.logprobs[:n, slot],
            likeliest=all_steps.likeliest[:n, slot],
            distributions=all_steps.distributions[:n, slot] if distributions else None,
        )
        for slot, n in zip(slots, lengths, strict=True)
    ]
