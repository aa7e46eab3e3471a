"""The jitted steps of generation: a prefill chunk, admission to a slot, a burst of decode steps.

All state that decode reads or writes is one pytree, ``DecodeState``, donated to every call together
with the caches. Functions here know slots, never requests or text.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lserve_jax.attention import decode_attend, prefill_attend
from lserve_jax.cache import CacheSpec, LayerCache, window_to_ring
from lserve_jax.config import ModelConfig
from lserve_jax.llama import Params, bind
from lserve_jax.page_selection import first_tail_page
from lserve_jax.sampling import SamplingArrays, SamplingMode, is_stop_token, sample, top_logprobs
from pallas_kernels import api
from pallas_kernels.api import Backend

Caches = list[LayerCache]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """What the decode loop knows of every slot (S of them)."""

    token: Int[Array, " S"]  # the token that the next step feeds to the model
    position: Int[Array, " S"]  # its position in the sequence
    active: Bool[Array, " S"]  # False: the slot is free or its request is finished
    generated: Int[Array, " S"]  # tokens generated so far, the first one from prefill included
    max_tokens: Int[Array, " S"]  # generation ends here
    page_table: Int[Array, "S M"]  # physical page of each page of the sequence; 0 beyond its pages
    tail: Int[Array, " S"]  # first page that is attended without being selected; 0 when dense
    sampling: SamplingArrays  # per-slot sampling parameters
    # Present once some request has used penalties: they cost S * V entries.
    output_counts: Int[Array, "S V"] | None
    prompt_mask: Bool[Array, "S V"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sampled tokens and what the model thought of them; a burst adds a leading axis of steps."""

    token: Int[Array, " B"]  # -1 where nothing was sampled
    logprob: Float[Array, " B"]  # of the token, under the model's own distribution
    top_ids: Int[Array, "B N"]  # the N likeliest tokens, N = SamplingMode.top_logprobs
    top_logprobs: Float[Array, "B N"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Burst:
    """What a burst of decode steps produced, for its first B slots."""

    samples: Sample  # leaves [steps, B, ...]; steps past a slot's end hold token -1
    steps: Int[Array, " B"]  # steps in which the slot was active
    bypassed: Int[Array, " B"]  # of these, steps whose history fitted the budget: nothing pruned
    selections: Int[Array, " B"]  # steps that chose pages anew
    scored: Int[Array, " B"]  # pages whose statistics these read, summed; one layer and KV head
    attended: Float[Array, " B"]  # token slots attended, summed over steps, layers and KV heads


@functools.partial(
    jax.jit, static_argnames=("config", "spec", "backend"), donate_argnames=("caches",)
)
def prefill_chunk(
    config: ModelConfig,
    spec: CacheSpec,
    params: Params,
    caches: Caches,
    tokens: Int[Array, " T"],
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    prompt_length: Int[Array, ""],
    *,
    backend: Backend,
) -> tuple[Float[Array, " V"], Caches]:
    """Runs one chunk of a prompt: tokens at positions ``start`` to ``start + length - 1``.

    ``tokens`` is padded to its bucket T; padding is neither cached nor attended. Returns the logits
    after the chunk's last token (float32) and the caches.
    """
    model = bind(config, params)
    attend = prefill_attend(
        config,
        spec,
        page_table,
        start,
        length,
        prompt_length,
        tokens.shape[0],
        backend=backend,
    )
    hidden, caches = model(tokens[None], attend, caches)
    return model.unembed(hidden[0, length - 1]), caches


@functools.partial(jax.jit, static_argnames=("spec", "mode"), donate_argnames=("caches", "state"))
def admit(
    spec: CacheSpec,
    caches: Caches,
    state: DecodeState,
    slot: Int[Array, ""],
    logits: Float[Array, " V"],
    prompt_length: Int[Array, ""],
    max_tokens: Int[Array, ""],
    page_table: Int[Array, " M"],
    prompt_mask: Bool[Array, " V"] | None,
    *,
    mode: SamplingMode,
) -> tuple[DecodeState, Caches, Sample]:
    """Gives a slot to a prefilled prompt and samples its first token from the prompt's logits.

    The slot's row of ``state.sampling`` is set already. ``prompt_mask`` marks the prompt's tokens
    and is given exactly when the state counts tokens for penalties. Returns the new state, the
    caches with the slot's ring filled, and the first sample (one row).
    """
    caches = [window_to_ring(cache, spec, slot, prompt_length) for cache in caches]
    counts, mask = state.output_counts, state.prompt_mask
    if counts is not None and mask is not None and prompt_mask is not None:
        counts, mask = counts.at[slot].set(0), mask.at[slot].set(prompt_mask)
    row = dataclasses.replace(
        state, generated=state.generated.at[slot].set(0), output_counts=counts, prompt_mask=mask
    )
    row = jax.tree.map(lambda x: x[slot][None], row)
    first = _sample(logits[None], row, mode)
    token = first.token[0]
    stopped = is_stop_token(first.token, row.sampling)[0] | (max_tokens <= 1)

    def put(rows: Array, value: Array | int | bool) -> Array:
        return rows.at[slot].set(value)

    state = dataclasses.replace(
        state,
        token=put(state.token, token),
        position=put(state.position, prompt_length),
        active=put(state.active, ~stopped),
        generated=put(state.generated, 1),
        max_tokens=put(state.max_tokens, max_tokens),
        page_table=put(state.page_table, page_table),
        tail=put(state.tail, 0),
        output_counts=None if counts is None else counts.at[slot, token].add(1),
        prompt_mask=mask,
    )
    return state, caches, first


def _sample(logits: Float[Array, "B V"], state: DecodeState, mode: SamplingMode) -> Sample:
    """The next token of every row of ``state``."""
    token, logprob = sample(
        logits,
        state.sampling,
        step=state.generated,
        mode=mode,
        output_counts=state.output_counts,
        prompt_mask=state.prompt_mask,
    )
    ids, values = top_logprobs(logits, mode.top_logprobs)
    return Sample(token=token, logprob=logprob, top_ids=ids, top_logprobs=values)


def _decode_step(
    config: ModelConfig,
    spec: CacheSpec,
    params: Params,
    caches: Caches,
    state: DecodeState,
    mode: SamplingMode,
    *,
    select: bool,
    backend: Backend,
) -> tuple[DecodeState, Caches, Sample, Array]:
    """One token for every row of ``state``. Finished rows compute but write nothing."""
    tail = state.tail
    if select:
        tail = first_tail_page(state.position, spec.page_size)
    attend, attended = decode_attend(
        config,
        spec,
        state.page_table,
        state.position,
        state.active,
        tail,
        select=select,
        backend=backend,
    )
    model = bind(config, params)
    few = state.token.shape[0] <= api.MOST_LINEAR_ROWS
    hidden, caches = model(
        state.token[:, None], attend, caches, backend=backend if few else "reference"
    )
    logits = model.unembed(hidden[:, 0])  # [B, V]
    new = _sample(logits, state, mode)
    active = state.active
    generated = state.generated + active.astype(jnp.int32)
    stopped = is_stop_token(new.token, state.sampling)
    counts = state.output_counts
    if counts is not None:
        rows = jnp.arange(counts.shape[0])
        counts = counts.at[rows, new.token].add(active.astype(jnp.int32))
    state = dataclasses.replace(
        state,
        token=jnp.where(active, new.token, state.token),
        position=state.position + active.astype(jnp.int32),
        active=active & ~stopped & (generated < state.max_tokens),
        generated=generated,
        tail=tail,
        output_counts=counts,
    )
    new = dataclasses.replace(new, token=jnp.where(active, new.token, -1))
    return state, caches, new, attended.astype(jnp.float32)


@functools.partial(
    jax.jit,
    static_argnames=("config", "spec", "rows", "burst", "mode", "backend"),
    donate_argnames=("caches", "state"),
)
def decode_burst(
    config: ModelConfig,
    spec: CacheSpec,
    params: Params,
    caches: Caches,
    state: DecodeState,
    num_steps: Int[Array, ""],
    *,
    rows: int,
    burst: int,
    mode: SamplingMode,
    backend: Backend,
) -> tuple[DecodeState, Caches, Burst]:
    """Up to ``num_steps`` decode steps for slots 0 to ``rows - 1``, until all have finished.

    The loop body is one selection step and ``reuse_interval - 1`` steps that reuse it: requests
    are admitted between bursts only and ``burst`` and ``num_steps`` are multiples of the interval,
    so every sequence's reuse clock agrees with the loop's and no layer needs a conditional.
    """
    interval = spec.reuse_interval
    whole = state
    state = jax.tree.map(lambda x: x[:rows], whole)

    def step(i: Array, carry: tuple, *, select: bool) -> tuple:
        state, caches, result = carry
        was_active = state.active.astype(jnp.int32)
        pages = state.position // spec.page_size + 1
        state, caches, new, attended = _decode_step(
            config, spec, params, caches, state, mode, select=select, backend=backend
        )
        pruned = (state.tail > spec.num_ranked).astype(jnp.int32)
        result = Burst(
            samples=jax.tree.map(lambda x, row: x.at[i].set(row), result.samples, new),
            steps=result.steps + was_active,
            bypassed=result.bypassed + was_active * (1 - pruned),
            selections=result.selections + (was_active * pruned if select else 0),
            scored=result.scored + (was_active * pruned * pages if select else 0),
            attended=result.attended + attended,
        )
        return state, caches, result

    def body(carry: tuple) -> tuple:
        i, inner = carry
        inner = step(i, inner, select=spec.sparsity is not None)
        if interval > 1:
            # Bounds known when compiling: XLA asks the device for them after every step otherwise.
            def reuse(n: Array, inner: tuple) -> tuple:
                return step(i + 1 + n, inner, select=False)

            inner = lax.fori_loop(0, interval - 1, reuse, inner)
        return i + interval, inner

    def more(carry: tuple) -> Array:
        i, (state, _, _) = carry
        return (i < num_steps) & jnp.any(state.active)

    none, top = jnp.zeros((rows,), jnp.int32), min(mode.top_logprobs, config.vocab_size)
    result = Burst(
        samples=Sample(
            token=jnp.full((burst, rows), -1, jnp.int32),
            logprob=jnp.zeros((burst, rows), jnp.float32),
            top_ids=jnp.zeros((burst, rows, top), jnp.int32),
            top_logprobs=jnp.zeros((burst, rows, top), jnp.float32),
        ),
        steps=none,
        bypassed=none,
        selections=none,
        scored=none,
        attended=jnp.zeros((rows,), jnp.float32),
    )
    _, (state, caches, result) = lax.while_loop(
        more, body, (jnp.zeros((), jnp.int32), (state, caches, result))
    )
    state = jax.tree.map(lambda full, part: full.at[:rows].set(part), whole, state)
    return state, caches, result
