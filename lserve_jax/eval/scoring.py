"""What a model thinks of given tokens, through the decode path: teacher forcing.

Page selection and streaming windows act in decode steps; prefill is nearly dense. So the sparse
path is judged by feeding a text's tokens through decode steps and reading the distribution of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from lserve_jax.attention.attend import decode_attend
from lserve_jax.attention.cache import CacheSpec
from lserve_jax.attention.selection import first_tail_page
from lserve_jax.engine.engine import bucket
from lserve_jax.engine.steps import Caches
from lserve_jax.llm import LLM
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params, bind
from lserve_jax.sampling_params import SamplingParams
from pallas_kernels import api
from pallas_kernels.api import Backend

_STEPS = 32  # decode steps between two looks of the host, rounded up to whole reuse intervals


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the model thought of one continuation of n tokens."""

    logprobs: Float[np.ndarray, " n"]  # float32, of each token given those before it
    likeliest: Int[np.ndarray, " n"]  # int32, the token that greedy decoding would have taken
    # float32, over the whole vocabulary, where asked for
    distributions: Float[np.ndarray, "n V"] | None


def score(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    distributions: bool = False,
) -> list[Score]:
    """Scores continuations of prompts (token ids), each by decode steps of ``llm``.

    A prompt's tokens before its last run through prefill; its last token and the continuation's
    run through decode steps, as many as the continuation has tokens, so that every distribution
    comes out of one. Pages are selected at the first of these and every ``reuse_interval`` after.
    Prompts that fit the engine together run together.

    ``distributions`` returns the log probabilities of the whole vocabulary too: 4 V bytes a token.

    Raises ``ValueError`` for an empty prompt or continuation, and where the engine would for the
    two together.
    """
    requests = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        if not prompt or not continuation:
            raise ValueError("scoring needs at least one token of prompt and one of continuation")
        # The engine admits no empty prompt. So a single token runs through prefill as well; the
        # first decode step then writes it over itself.
        prefilled = list(prompt[: max(len(prompt) - 1, 1)])
        room = max(len(prompt) + len(continuation) - len(prefilled), 2)
        sampling = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True)
        llm.engine.check_request(prefilled, sampling)
        for token in (prompt[-1], *continuation):
            if not 0 <= token < llm.config.vocab_size:
                raise ValueError(f"token id {token} must lie in [0, {llm.config.vocab_size})")
        requests.append((prefilled, sampling, [prompt[-1], *continuation], len(prompt) - 1))
    scores: list[Score] = []
    while requests:
        batch = requests[: _fitting(llm, requests)]
        requests = requests[len(batch) :]
        scores += _score_batch(llm, batch, distributions)
    return scores


def _fitting(llm: LLM, requests: list[tuple]) -> int:
    """How many of the first requests the engine can hold at the same time: at least one."""
    spec, pages = llm.engine.spec, 0
    for count, (prompt, sampling, *_) in enumerate(requests[: spec.max_num_seqs]):
        pages += llm.engine.scheduler.most_pages(np.asarray(prompt), sampling.max_tokens)
        if pages > spec.num_pages - llm.engine.scheduler.pinned_pages:
            return count
    return min(len(requests), spec.max_num_seqs)


def _score_batch(llm: LLM, batch: list[tuple], distributions: bool) -> list[Score]:
    engine = llm.engine
    if engine.has_unfinished_requests:
        raise ValueError("the engine is still busy with another call's requests")
    try:
        for number, (prompt, sampling, *_) in enumerate(batch):
            engine.add_request(f"score-{number}", prompt, sampling, seed=0)
        engine.prefill_waiting()  # the tokens sampled after it are not used
        engine.scheduler.reserve(max(sampling.max_tokens for _, sampling, *_ in batch))
        scores = _force(llm, batch, distributions)
        for number in range(len(batch)):
            engine.cancel(f"score-{number}")
    except BaseException:  # an error on the device, or Ctrl-C: the engine holds half a batch
        engine.reset()
        raise
    return scores


def _force(llm: LLM, batch: list[tuple], distributions: bool) -> list[Score]:
    """The decode steps of prefilled requests."""
    engine = llm.engine
    slot_of = {request.request_id: slot for slot, request in engine.scheduler.running.items()}
    slots = [slot_of[f"score-{number}"] for number in range(len(batch))]
    rows = bucket(max(slots) + 1, 1, engine.spec.max_num_seqs)
    C = engine.spec.reuse_interval
    steps = -(-_STEPS // C) * C
    page_table, sink_page = engine.decode_tables()
    lengths = [len(tokens) - 1 for *_, tokens, _ in batch]
    padded = -(-max(lengths) // steps) * steps
    fed, wanted = (np.zeros((padded, rows), np.int32) for _ in range(2))
    start, length = (np.zeros((rows,), np.int32) for _ in range(2))
    for slot, n, (*_, tokens, position) in zip(slots, lengths, batch, strict=True):
        fed[:n, slot], wanted[:n, slot] = tokens[:-1], tokens[1:]
        start[slot], length[slot] = position, n
    parts = []
    for first in range(0, padded, steps):
        part, engine.caches = _forced_steps(
            engine.config,
            engine.spec,
            engine.params,
            engine.caches,
            page_table[:rows],
            sink_page[:rows],
            jnp.asarray(fed[first : first + steps]),
            jnp.asarray(wanted[first : first + steps]),
            jnp.asarray(start),
            jnp.asarray(length),
            jnp.int32(first),
            distributions=distributions,
            backend=engine.backend,
        )
        parts.append(jax.device_get(part))
    logprobs, likeliest, full = (np.concatenate(x) for x in zip(*parts, strict=True))
    return [
        Score(
            logprobs=logprobs[:n, slot],
            likeliest=likeliest[:n, slot],
            distributions=full[:n, slot] if distributions else None,
        )
        for slot, n in zip(slots, lengths, strict=True)
    ]


@partial(
    jax.jit,
    static_argnames=("config", "spec", "distributions", "backend"),
    donate_argnames=("caches",),
)
def _forced_steps(
    config: ModelConfig,
    spec: CacheSpec,
    params: Params,
    caches: Caches,
    page_table: Int[Array, "B M"],
    sink_page: Int[Array, " B"],
    tokens: Int[Array, "N B"],
    wanted: Int[Array, "N B"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    first: Int[Array, ""],
    *,
    distributions: bool,
    backend: Backend,
) -> tuple[tuple[Float[Array, "N B"], Int[Array, "N B"], Float[Array, "N B V"]], Caches]:
    """Decode steps ``first`` to ``first + N - 1``, fed ``tokens``, until all rows have finished.

    Row b takes part in steps below ``length[b]``; that of step 0 is at position ``start[b]``.
    ``first`` and N are multiples of ``reuse_interval``. Returns per step the log probability of
    ``wanted``, the likeliest token and the log probabilities of all (V is 0 without
    ``distributions``); what stands in steps after a row's end has no meaning.
    """
    model, C, (N, B) = bind(config, params), spec.reuse_interval, tokens.shape
    few = "reference" if api.MOST_LINEAR_ROWS < B else backend
    sparse = spec.sparsity is not None

    def position(i: Array) -> Array:
        return start + jnp.clip(i, 0, jnp.maximum(length - 1, 0))  # finished rows stay in bounds

    def step(n: Array, tail: Array, carry: tuple, *, select: bool) -> tuple:
        caches, out = carry
        i = first + n
        attend, _ = decode_attend(
            config,
            spec,
            page_table,
            sink_page,
            None,
            position(i),
            i < length,
            tail,
            select=select,
            backend=backend,
        )
        hidden, caches = model(tokens[n][:, None], attend, caches, backend=few)
        logprobs = jax.nn.log_softmax(model.unembed(hidden[:, 0]))  # [B, V]
        new = (
            jnp.take_along_axis(logprobs, wanted[n][:, None], axis=1)[:, 0],
            jnp.argmax(logprobs, axis=-1).astype(jnp.int32),
            logprobs if distributions else logprobs[:, :0],
        )
        return caches, jax.tree.map(lambda x, row: x.at[n].set(row), out, new)

    def interval(number: Array, carry: tuple) -> tuple:
        n = number * C
        tail = jnp.zeros_like(start)
        if sparse:
            tail = first_tail_page(position(first + n), spec.selected_page_size)
        carry = step(n, tail, carry, select=sparse)

        def reuse(m: Array, carry: tuple) -> tuple:
            return step(n + 1 + m, tail, carry, select=False)

        return lax.fori_loop(0, C - 1, reuse, carry)

    V = config.vocab_size if distributions else 0
    out = (jnp.zeros((N, B)), jnp.zeros((N, B), jnp.int32), jnp.zeros((N, B, V)))
    steps = jnp.clip(length.max() - first, 0, N)
    caches, out = lax.fori_loop(0, (steps + C - 1) // C, interval, (caches, out))
    return out, caches
