"""What a model thinks of given tokens, through the decode path: teacher forcing.

Page selection and streaming windows act in decode steps; prefill is nearly dense. So the sparse
path is judged by feeding a text's tokens through decode steps and reading the distribution of each.
Where attention is dense, prefill says the same and is faster (``judging.py``).
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
from lserve_jax.engine.state import ForcedSteps, Sample
from lserve_jax.sampling_params import SamplingParams

_STEPS = 32  # decode steps between two looks of the host, rounded up to whole reuse intervals


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the model thought of one continuation of n tokens, of T tokens with its prompt."""

    logprobs: Float[np.ndarray, " n"]  # float32, of each token given those before it
    likeliest: Int[np.ndarray, " n"]  # int32, the token that greedy decoding would have taken
    # float32, over the whole vocabulary, where asked for
    distributions: Float[np.ndarray, "n V"] | None
    # Of every token, after the last norm, in the dtype of the weights, where asked for
    hidden: Float[np.ndarray, "T E"] | None = None


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A prompt and a continuation, cut into what prefill and what decode steps run."""

    prefilled: PromptIds
    sampling: SamplingParams  # with room for the continuation
    first: int | None  # the token that prefill judges
    fed: np.ndarray  # [m] int32
    wanted: np.ndarray  # [m] int32, those judged as they are fed
    start: int  # position of the first one fed


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
    pairs = zip(prompts, continuations, strict=True)
    items = [_item(engine, prompt, continuation) for prompt, continuation in pairs]
    return _score_items(engine, items, distributions, keep_hidden=False)


def score_rollouts(
    engine: Engine,
    prompts: Sequence[Sequence[int] | np.ndarray],
    continuations: Sequence[Sequence[int] | np.ndarray],
    *,
    keep_hidden: bool,
) -> list[Score]:
    """As ``score``, by the very steps that would have generated the continuations.

    The whole prompt runs through prefill, which judges the first token; decode steps, which begin
    with a selection there, judge the others. A continuation may be empty. Raises where ``score``
    does.
    """
    pairs = zip(prompts, continuations, strict=True)
    items = [_rollout(engine, prompt, new, keep_hidden) for prompt, new in pairs]
    return _score_items(engine, items, distributions=False, keep_hidden=keep_hidden)


def check_idle(engine: Engine) -> None:
    """Raises ``ValueError`` while requests of others run."""
    if engine.unfinished:
        raise ValueError("the engine is still busy with another call's requests")


def check_finite(logprobs: np.ndarray) -> None:
    """Raises ``FloatingPointError`` for logits that were not finite."""
    if not np.isfinite(logprobs).all():
        raise FloatingPointError(
            "the model's logits are not finite: its weights or constants hold NaN or "
            "infinity, or its numbers overflow the dtype"
        )


def _checked(
    engine: Engine, prompt: Sequence[int] | np.ndarray, continuation: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    vocab_size = engine.config.vocab_size
    ids = PromptIds.check(prompt, vocab_size).ids
    return ids, PromptIds.check(continuation, vocab_size, what="continuation").ids


def _item(
    engine: Engine,
    prompt: Sequence[int] | np.ndarray,
    continuation: Sequence[int] | np.ndarray,
) -> _Item:
    if len(prompt) == 0 or len(continuation) == 0:
        raise ValueError("scoring needs at least one token of prompt and one of continuation")
    ids, following = _checked(engine, prompt, continuation)
    # The engine admits no empty prompt. So a single token runs through prefill as well; the
    # first decode step then writes it over itself.
    prefilled = ids[: max(len(ids) - 1, 1)]
    room = max(len(ids) + len(following) - len(prefilled), 2)
    sampling = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True)
    return _Item(
        prefilled=engine.check_request(prefilled, sampling),
        sampling=sampling,
        first=None,
        fed=np.concatenate([ids[-1:], following[:-1]]),
        wanted=following,
        start=len(ids) - 1,
    )


def _rollout(
    engine: Engine,
    prompt: Sequence[int] | np.ndarray,
    continuation: Sequence[int] | np.ndarray,
    keep_hidden: bool,
) -> _Item:
    ids, following = _checked(engine, prompt, continuation)
    # Nothing is judged by the last token; it is fed for its hidden state.
    fed = following if keep_hidden else following[:-1]
    wanted = np.zeros_like(fed)
    wanted[: len(following[1:])] = following[1:]
    sampling = SamplingParams(
        temperature=0,
        max_tokens=len(fed) + 1,
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=0 if keep_hidden else None,
    )
    return _Item(
        prefilled=engine.check_request(ids, sampling),
        sampling=sampling,
        first=int(following[0]) if len(following) else None,
        fed=fed,
        wanted=wanted,
        start=len(ids),
    )


def _score_items(
    engine: Engine, items: Sequence[_Item], distributions: bool, keep_hidden: bool
) -> list[Score]:
    check_idle(engine)
    scores: list[Score] = []
    while items:
        batch = items[: _fitting(engine, items)]
        items = items[len(batch) :]
        scores += _score_batch(engine, batch, distributions, keep_hidden)
    return scores


def _fitting(engine: Engine, items: Sequence[_Item]) -> int:
    """How many of the first items the engine can hold at the same time: at least one."""
    spec, scheduler, pages = engine.spec, engine.scheduler, 0
    for count, item in enumerate(items[: spec.max_num_seqs]):
        pages += scheduler.most_pages(item.prefilled.ids, item.sampling)
        if pages > spec.num_pages - scheduler.prefix_cache.pinned_pages:
            return count
    return min(len(items), spec.max_num_seqs)


def _score_batch(
    engine: Engine, batch: Sequence[_Item], distributions: bool, keep_hidden: bool
) -> list[Score]:
    names = [f"score-{number}" for number in range(len(batch))]
    try:
        for name, item in zip(names, batch, strict=True):
            engine.add_request(name, item.prefilled, item.sampling, seed=0)
            engine.unfinished[name].keeps_hidden = keep_hidden
            if item.first is not None:  # taken, and judged, instead of what is sampled
                engine.unfinished[name].tokens = [item.first]
        engine.prefill.run_waiting()
        engine.scheduler.reserve(max(item.sampling.max_tokens for item in batch))
        firsts = {
            request.request_id: first for request, first in engine.prefill.take_first_samples()
        }
        judged = jax.device_get([(firsts[n], engine.unfinished[n].judged) for n in names])
        scores = _force(engine, batch, distributions, keep_hidden)
        for name in names:
            engine.finish(name)
    except BaseException:  # an error on the device, or Ctrl-C: the engine holds half a batch
        engine.abandon(names)
        raise
    scores = [_join(*each) for each in zip(batch, judged, scores, strict=True)]
    for new in scores:
        check_finite(new.logprobs)
    return scores


def _join(item: _Item, judged: tuple[Sample, list[Sample]], steps: Score) -> Score:
    """What prefill thought, in front of what decode steps did."""
    first, chunks = judged
    logprobs, likeliest, hidden = steps.logprobs, steps.likeliest, steps.hidden
    if item.first is not None:
        logprobs = np.concatenate([first.logprob, logprobs])
        likeliest = np.concatenate([first.top_ids[:, 0], likeliest])
    if hidden is not None:
        # The last token was fed for its hidden state only.
        logprobs, likeliest = logprobs[: len(item.fed)], likeliest[: len(item.fed)]
        prompt = np.concatenate([np.asarray(chunk.hidden) for chunk in chunks])
        hidden = np.concatenate([prompt[: len(item.prefilled)], hidden])
    return Score(
        logprobs=logprobs, likeliest=likeliest, distributions=steps.distributions, hidden=hidden
    )


def _force(
    engine: Engine, batch: Sequence[_Item], distributions: bool, keep_hidden: bool
) -> list[Score]:
    """The decode steps of prefilled requests."""
    slot_of = {request.request_id: slot for slot, request in engine.scheduler.running.items()}
    # Who has nothing to decode has no slot any more.
    slots = [slot_of.get(f"score-{number}", 0) for number in range(len(batch))]
    rows = bucket(max(slots) + 1, 1, engine.spec.max_num_seqs)
    page_table = engine.scheduler.tables(rows)
    interval = engine.spec.reuse_interval
    steps = -(-_STEPS // interval) * interval
    lengths = [len(item.fed) for item in batch]
    padded = max(-(-max(lengths) // steps), 1) * steps
    fed, wanted = (np.zeros((padded, rows), np.int32) for _ in range(2))
    start, length = (np.zeros((rows,), np.int32) for _ in range(2))
    for slot, n, item in zip(slots, lengths, batch, strict=True):
        if n:
            fed[:n, slot], wanted[:n, slot] = item.fed, item.wanted
            start[slot], length[slot] = item.start, n
    whole = ForcedSteps(tokens=fed, wanted=wanted, start=start, length=length)
    parts = []
    for first in range(0, padded, steps):
        part = dataclasses.replace(
            whole, tokens=fed[first : first + steps], wanted=wanted[first : first + steps]
        )
        scores = engine.runner.score(
            part,
            first,
            page_table=page_table,
            distributions=distributions,
            keep_hidden=keep_hidden,
        )
        parts.append(jax.device_get(scores))
    all_steps = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return [
        Score(
            logprobs=all_steps.logprobs[:n, slot],
            likeliest=all_steps.likeliest[:n, slot],
            distributions=all_steps.distributions[:n, slot] if distributions else None,
            hidden=all_steps.hidden[:n, slot] if keep_hidden else None,
        )
        for slot, n in zip(slots, lengths, strict=True)
    ]
