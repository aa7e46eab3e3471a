"""The jitted steps of generation: a prefill chunk, admission to a slot, a burst of decode steps.

All state that decode reads or writes is one pytree, ``DecodeState``, donated to every call together
with the caches. Functions here know slots, never requests or text.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lserve_jax.attention.attend import PrefixGroups, decode_attend, prefill_attend
from lserve_jax.attention.cache import CacheSpec, LayerCache, fill_decode_window, keep_sinks
from lserve_jax.attention.selection import first_tail_page
from lserve_jax.engine.sampling import (
    SamplingArrays,
    SamplingMode,
    is_stop_token,
    sample,
    top_logprobs,
)
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params, bind
from pallas_kernels import api
from pallas_kernels.api import Backend, KVPages

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
    tail: Int[Array, " S"]  # first listed page attended without being selected; 0 when dense
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
    attended: Float[Array, " B"]  # tokens attended, summed over steps, layers and KV heads


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
def insert(
    spec: CacheSpec,
    caches: Caches,
    state: DecodeState,
    slot: Int[Array, ""],
    logits: Float[Array, " V"],
    prompt_length: Int[Array, ""],
    max_tokens: Int[Array, ""],
    forced: Int[Array, ""],
    own_sinks: Bool[Array, ""],
    prompt_mask: Bool[Array, " V"] | None,
    *,
    mode: SamplingMode,
) -> tuple[DecodeState, Caches, Sample]:
    """Gives a slot to a prefilled prompt and samples its first token from the prompt's logits.

    The slot's row of ``state.sampling`` is set already. ``forced`` is the first token of a request
    that begins anew, else -1. ``own_sinks``: the slot does not read the sinks of a prefix.
    ``prompt_mask`` marks the prompt's tokens and is given exactly when the state counts tokens for
    penalties. Returns the new state, the caches with the slot's ring filled, and the first sample
    (one row).
    """
    caches = [
        fill_decode_window(cache, spec, slot, prompt_length, own_sinks=own_sinks)
        for cache in caches
    ]
    counts, mask = state.output_counts, state.prompt_mask
    if counts is not None and mask is not None and prompt_mask is not None:
        counts, mask = counts.at[slot].set(0), mask.at[slot].set(prompt_mask)
    row = dataclasses.replace(
        state, generated=state.generated.at[slot].set(0), output_counts=counts, prompt_mask=mask
    )
    row = jax.tree.map(lambda x: x[slot][None], row)
    first = _sample(logits[None], row, mode)
    token = jnp.where(forced >= 0, forced, first.token[0])
    stopped = is_stop_token(token[None], row.sampling)[0] | (max_tokens <= 1)

    def put(rows: Array, value: Array | int | bool) -> Array:
        return rows.at[slot].set(value)

    state = dataclasses.replace(
        state,
        token=put(state.token, token),
        position=put(state.position, prompt_length),
        active=put(state.active, ~stopped),
        generated=put(state.generated, 1),
        max_tokens=put(state.max_tokens, max_tokens),
        tail=put(state.tail, 0),
        output_counts=None if counts is None else counts.at[slot, token].add(1),
        prompt_mask=mask,
    )
    return state, caches, first


@functools.partial(jax.jit, static_argnames=("spec", "num_pages"), donate_argnames=("caches",))
def keep_prefix(
    spec: CacheSpec, caches: Caches, sink_page: Int[Array, ""], *, num_pages: int
) -> tuple[Caches, list[KVPages]]:
    """After a prefix was prefilled: what its requests will need of the streaming heads.

    Its sinks go to the streaming pool, from ``sink_page`` on. Returned beside the caches: the first
    ``num_pages`` pages of each layer's prefill window, ``[Ks, num_pages, P, D]``; with fewer pages
    than the window has, those of a prefix that fills no more.
    """
    caches = [keep_sinks(cache, spec, sink_page) for cache in caches]
    windows = [jax.tree.map(lambda x: x[:, :num_pages], cache.prefill_window) for cache in caches]
    return caches, windows


@functools.partial(jax.jit, donate_argnames=("state",))
def deactivate(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """The slot's request is no longer there: it takes no further steps."""
    return dataclasses.replace(state, active=state.active.at[slot].set(False))


@jax.jit
def read_prefix_pages(
    caches: Caches, pages: Int[Array, " n"], sink_pages: Int[Array, " m"]
) -> list[dict]:
    """Of each layer, the prefix's retrieval pages, their statistics, and its sinks."""
    return [
        {
            "retrieval": jax.tree.map(lambda x: x[:, pages], cache.retrieval),
            "key_stats": None if cache.key_stats is None else cache.key_stats[:, pages],
            "sinks": jax.tree.map(lambda x: x[:, sink_pages], cache.streaming),
        }
        for cache in caches
    ]


@functools.partial(jax.jit, donate_argnames=("caches",))
def write_prefix_pages(
    caches: Caches, kept: list[dict], pages: Int[Array, " n"], sink_pages: Int[Array, " m"]
) -> Caches:
    """Puts back what ``read_prefix_pages`` read, on other pages."""

    def put(ids: Array) -> Callable[[Array, Array], Array]:
        return lambda pool, part: pool.at[:, ids].set(part)

    return [
        dataclasses.replace(
            cache,
            retrieval=jax.tree.map(put(pages), cache.retrieval, part["retrieval"]),
            key_stats=jax.tree.map(put(pages), cache.key_stats, part["key_stats"]),
            streaming=jax.tree.map(put(sink_pages), cache.streaming, part["sinks"]),
        )
        for cache, part in zip(caches, kept, strict=True)
    ]


@functools.partial(jax.jit, donate_argnames=("caches",))
def restore_window(caches: Caches, windows: list[KVPages]) -> Caches:
    """Puts a prefix's ``keep_prefix`` back: the next chunk continues the prefix."""

    def put(window: Array, kept: Array) -> Array:
        return window.at[:, : kept.shape[1]].set(kept)

    return [
        dataclasses.replace(cache, prefill_window=jax.tree.map(put, cache.prefill_window, kept))
        for cache, kept in zip(caches, windows, strict=True)
    ]


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
    page_table: Int[Array, "B M"],
    sink_page: Int[Array, " B"],
    relay: PrefixGroups | None,
    forced: Int[Array, " B"],
    mode: SamplingMode,
    *,
    select: bool,
    backend: Backend,
) -> tuple[DecodeState, Caches, Sample, Array]:
    """One token for every row of ``state``. Finished rows compute but write nothing."""
    tail = state.tail
    if select:
        own = state.position if relay is None else state.position - relay.private_start()
        tail = first_tail_page(own, spec.selected_page_size)
    attend, attended = decode_attend(
        config,
        spec,
        page_table,
        sink_page,
        relay,
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
    new = dataclasses.replace(new, token=jnp.where(forced >= 0, forced, new.token))
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


# XLA's choice of what a CUDA graph may hold, and loops: a burst is then one graph that the device
# runs without the host. In it kernels wait only for those whose results they read, so a prefix and
# the rows' own parts are attended at the same time. Other devices ignore both. They go before
# XLA_FLAGS, and JAX takes options of a whole program only: inside another jitted function, call
# ``decode_burst.__wrapped__``.
_BURST_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,"
    "CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}


@functools.partial(
    jax.jit,
    static_argnames=("config", "spec", "rows", "burst", "mode", "backend"),
    donate_argnames=("caches", "state"),
    compiler_options=_BURST_OPTIONS,
)
def decode_burst(
    config: ModelConfig,
    spec: CacheSpec,
    params: Params,
    caches: Caches,
    state: DecodeState,
    page_table: Int[Array, "S M"],
    sink_page: Int[Array, " S"],
    relay: PrefixGroups | None,
    forced: Int[Array, "burst rows"],
    num_steps: Int[Array, ""],
    *,
    rows: int,
    burst: int,
    mode: SamplingMode,
    backend: Backend,
) -> tuple[DecodeState, Caches, Burst]:
    """Up to ``num_steps`` decode steps for slots 0 to ``rows - 1``, until all have finished.

    ``page_table`` holds the physical page of each page of a slot's sequence, as far as this burst
    can reach. ``sink_page`` is the streaming page where its sinks begin. Where ``forced`` is not
    negative, that token is taken instead of a sampled one: a request that begins anew makes the
    same cache again. ``relay`` has ``rows`` rows, or is None where no prefix is read together.

    The loop body is one selection step and ``reuse_interval - 1`` steps that reuse it: requests
    are admitted between bursts only and ``burst`` and ``num_steps`` are multiples of the interval,
    so every sequence's reuse clock agrees with the loop's and no layer needs a conditional.
    """
    interval = spec.reuse_interval
    whole = state
    state = jax.tree.map(lambda x: x[:rows], whole)
    page_table, sink_page, private_start = page_table[:rows], sink_page[:rows], 0
    if relay is not None:
        # From here on a row's table begins with the first page after its prefix.
        private_start = relay.private_start()
        entry = jnp.arange(page_table.shape[1])[None] + (private_start // spec.page_size)[:, None]
        page_table = jnp.take_along_axis(page_table, entry, axis=1, mode="clip")

    def step(i: Array, carry: tuple, *, select: bool) -> tuple:
        state, caches, result = carry
        was_active = state.active.astype(jnp.int32)
        pages = (state.position - private_start) // spec.page_size + 1
        state, caches, new, attended = _decode_step(
            config,
            spec,
            params,
            caches,
            state,
            page_table,
            sink_page,
            relay,
            forced[i],
            mode,
            select=select,
            backend=backend,
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
