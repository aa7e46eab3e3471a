"""The jitted steps of generation: chunks of prompts, the start of slots, bursts of decode steps.

All state that decode reads or writes is one pytree, ``DecodeState``, donated to every call together
with the caches. Functions here know slots, never requests or text. ``runner.py`` calls them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lserve_jax.attention.attend import (
    ChunkRows,
    alike_layers,
    attended_by_choice,
    decode_attend,
    prefill_attend,
)
from lserve_jax.attention.cache import CacheSpec, fill_decode_windows
from lserve_jax.attention.selection import first_tail_page
from lserve_jax.attention.verify import verify_attend
from lserve_jax.engine.prompt_logprobs import judge_tokens
from lserve_jax.engine.sampling import (
    SamplingMode,
    is_stop_token,
    sample,
    token_logprobs,
    top_logprobs,
)
from lserve_jax.engine.state import (
    Burst,
    Caches,
    DecodeState,
    DecodeTables,
    Program,
    Sample,
    SlotStarts,
    StepRows,
)
from lserve_jax.engine.token_rules import TokenRules
from lserve_jax.model.bound import bind
from lserve_jax.model.params import Params
from lserve_jax.model.quantise import with_w8a8

# XLA would compile and time dozens of Triton kernels for each product, in place of a cuBLAS one. On
# an H200 none was faster (docs/startup.md), and a prompt chunk took up to twice as long to compile.
# On a CPU LLVM prefers vectors of 256 bits, also where there are 512, which makes the softmax slow.
# About options of a program see BURST_OPTIONS.
CHUNK_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_cpu_prefer_vector_width": 512}


@functools.partial(
    jax.jit,
    static_argnames=("program", "block_sparse", "top", "keep_hidden"),
    donate_argnames=("caches",),
    compiler_options=CHUNK_OPTIONS,
)
def prefill_chunks(
    program: Program,
    params: Params,
    caches: Caches,
    tokens: Int[Array, "R T"],
    rows: ChunkRows,
    following: Int[Array, " T"] | None,
    *,
    block_sparse: bool = False,
    top: int,
    keep_hidden: bool = False,
) -> tuple[Float[Array, "R V"], Caches, Sample | None, Int[Array, ""] | None]:
    """Runs one chunk of each of R prompts: positions ``start`` to ``start + length - 1``.

    ``tokens`` are padded to their bucket T; padding is neither cached nor attended. Linear layers
    see all tokens at once; ``params`` are those of prefill. Returns the logits after each chunk's
    last token (float32), the caches, and what the model thought of ``following``, the token after
    each of the only row (T rows, with the ``top`` likeliest tokens beside it and, with
    ``keep_hidden``, the hidden states); None is for None. Last, if ``block_sparse``, the blocks
    that tiles of queries attended, summed over layers and retrieval heads.
    """
    model = bind(program.config, with_w8a8(params, program.prefill_dtype, program.backend))
    attend = prefill_attend(
        program.config,
        program.spec,
        rows,
        tokens.shape[1],
        block_sparse=block_sparse,
        backend=program.backend,
    )
    alike = alike_layers(program.config, program.spec)
    hidden, caches = model(tokens, attend, caches, alike=alike)
    judged = attended = None
    if block_sparse:
        caches, counts = ([pair[i] for pair in caches] for i in (0, 1))
        attended = jnp.stack(counts).sum()
    if following is not None:
        judged = judge_tokens(model.unembed, hidden[0], following, top, program.config.vocab_size)
        if keep_hidden:
            judged = dataclasses.replace(judged, hidden=hidden[0])
    last = hidden[jnp.arange(tokens.shape[0]), jnp.maximum(rows.length - 1, 0)]
    return model.unembed(last), caches, judged, attended


@functools.partial(
    jax.jit, static_argnames=("program", "mode"), donate_argnames=("caches", "state")
)
def insert(
    program: Program,
    caches: Caches,
    state: DecodeState,
    logits: Float[Array, "R V"],
    start: SlotStarts,
    rules: TokenRules | None = None,
    *,
    mode: SamplingMode,
) -> tuple[DecodeState, Caches, Sample]:
    """Gives slots to R prefilled prompts and samples their first tokens from their logits.

    The slots' rows of ``state.sampling`` are set already. ``rules`` have R rows. Returns the new
    state, the caches with the slots' decode windows filled, and the first samples (R rows).
    """
    slot = start.slot
    caches = [
        fill_decode_windows(cache, program.spec, slot, start.prompt_length, start.window_table)
        for cache in caches
    ]

    def put(rows: Array, value: Array | int | bool) -> Array:
        return rows.at[slot].set(value, mode="drop")

    counts, mask = state.output_counts, state.prompt_mask
    if counts is not None and mask is not None and start.prompt_mask is not None:
        counts, mask = put(counts, 0), put(mask, start.prompt_mask)
    rows = dataclasses.replace(
        state,
        generated=put(state.generated, 0),
        output_counts=counts,
        prompt_mask=mask,
        history=None,
    )
    rows = jax.tree.map(lambda x: x.at[slot].get(mode="clip"), rows)
    first = sample_rows(logits, rows, mode, rules)
    token = jnp.where(start.forced >= 0, start.forced, first.token)
    stopped = is_stop_token(token, rows.sampling) | (start.max_tokens <= 1)
    # Of the token that is taken: a forced one is judged.
    first = dataclasses.replace(first, logprob=token_logprobs(logits, token))
    history = state.history
    if history is not None and start.history is not None:
        row = jnp.arange(token.shape[0])
        known = start.history.at[row, start.prompt_length].set(token, mode="drop")
        history = put(history, known)
    state = dataclasses.replace(
        state,
        token=put(state.token, token),
        position=put(state.position, start.prompt_length),
        active=put(state.active, ~stopped),
        generated=put(state.generated, 1),
        max_tokens=put(state.max_tokens, start.max_tokens),
        tail=put(state.tail, 0),
        output_counts=None if counts is None else counts.at[slot, token].add(1, mode="drop"),
        prompt_mask=mask,
        history=history,
    )
    return state, caches, first


@functools.partial(jax.jit, donate_argnames=("state",))
def deactivate(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """The slot's request is no longer there: it takes no further steps."""
    return dataclasses.replace(state, active=state.active.at[slot].set(False))


@jax.jit
def read_pages(caches: Caches, pages: Int[Array, " n"], windows: Int[Array, " m"]) -> list[dict]:
    """Of each layer, the given retrieval pages with their statistics, and window pages."""
    return [
        {
            "retrieval": jax.tree.map(lambda x: x[:, pages], cache.retrieval),
            "key_stats": None if cache.key_stats is None else cache.key_stats[:, pages],
            "window": jax.tree.map(lambda x: x[:, windows], cache.prefill_window),
        }
        for cache in caches
    ]


@functools.partial(jax.jit, donate_argnames=("caches",))
def write_pages(
    caches: Caches, kept: list[dict], pages: Int[Array, " n"], windows: Int[Array, " m"]
) -> Caches:
    """Puts back what ``read_pages`` read, on other pages; on none where a pool has no such page."""

    def put(ids: Array) -> Callable[[Array, Array], Array]:
        return lambda pool, part: pool.at[:, ids].set(part, mode="drop")

    return [
        dataclasses.replace(
            cache,
            retrieval=jax.tree.map(put(pages), cache.retrieval, part["retrieval"]),
            key_stats=jax.tree.map(put(pages), cache.key_stats, part["key_stats"]),
            prefill_window=jax.tree.map(put(windows), cache.prefill_window, part["window"]),
        )
        for cache, part in zip(caches, kept, strict=True)
    ]


@jax.jit
def read_block(caches: Caches, pages: Int[Array, " n"], windows: Int[Array, " m"]) -> list[Array]:
    """What ``read_pages`` returns, all that has one dtype in one array: transfers are few."""
    leaves = jax.tree.leaves(read_pages(caches, pages, windows))
    return [
        jnp.concatenate([x.ravel() for x in leaves if x.dtype == dtype])
        for dtype in dict.fromkeys(x.dtype for x in leaves)
    ]


@functools.partial(jax.jit, donate_argnames=("caches",))
def write_block(
    caches: Caches, block: list[Array], pages: Int[Array, " n"], windows: Int[Array, " m"]
) -> Caches:
    """Puts back what ``read_block`` read, on other pages; on none where a pool has no such page."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(read_pages, caches, pages, windows))
    parts = {}
    for joined in block:
        sizes = [x.size for x in leaves if x.dtype == joined.dtype]
        parts[joined.dtype] = iter(jnp.split(joined, list(itertools.accumulate(sizes[:-1]))))
    kept = [next(parts[x.dtype]).reshape(x.shape) for x in leaves]
    return write_pages(caches, jax.tree.unflatten(tree, kept), pages, windows)


def sample_rows(
    logits: Float[Array, "B V"], state: DecodeState, mode: SamplingMode, rules: TokenRules | None
) -> Sample:
    """The next token of every row of ``state``, as far as ``rules`` allow it."""
    token, logprob = sample(
        logits,
        state.sampling,
        step=state.generated,
        mode=mode,
        output_counts=state.output_counts,
        prompt_mask=state.prompt_mask,
        rules=rules,
    )
    ids, values = top_logprobs(logits, mode.top_logprobs)
    return Sample(token=token, logprob=logprob, top_ids=ids, top_logprobs=values)


@functools.partial(jax.jit, static_argnames=("program", "select"))
def decode_step(
    program: Program,
    params: Params,
    caches: Caches,
    rows: StepRows,
    tables: DecodeTables,
    *,
    select: bool,
) -> tuple[Float[Array, "B E"], Caches, Int[Array, " B"], Array]:
    """Runs one token of every row through the model, over the paged cache.

    Jitted for programs that differ in what they do with its results: they share its trace.

    With ``select`` every ranked head chooses its pages anew. Where rows read their prefix
    together, their page tables begin with the first page after it.

    Returns hidden states for ``unembed``, the caches, the tail of each row's last selection, and
    the tokens that each row attended, summed over layers and KV heads.
    """
    spec, tail = program.spec, rows.tail
    own = rows.position
    if tables.groups is not None:
        own = own - tables.groups.private_start()
    if select:
        tail = first_tail_page(own, spec.selected_page_size)
    attend, attended = decode_attend(
        program.config,
        spec,
        tables.page_table,
        tables.groups,
        rows.position,
        rows.active,
        tail,
        select=select,
        backend=program.backend,
    )
    model = bind(program.config, params)
    alike = alike_layers(program.config, spec)
    hidden, caches = model(
        rows.token[:, None], attend, caches, backend=program.backend, alike=alike
    )
    if spec.sparsity is not None and spec.sparsity.select is not None:
        attended += attended_by_choice(spec, caches, tail, own, rows.active)
    return hidden[:, 0], caches, tail, attended


def verify(
    program: Program,
    params: Params,
    caches: Caches,
    tokens: Int[Array, "B T"],
    position: Int[Array, " B"],
    count: Int[Array, " B"],
    page_table: Int[Array, "B M"],
) -> tuple[Float[Array, "B T E"], Caches, list[Array]]:
    """Runs the first ``count`` of each row's tokens, at ``position`` on, through dense attention.

    Returns hidden states for ``unembed``, the caches with the tokens' keys and values but without
    their statistics, and the rotated keys of each layer's ranked heads, for ``confirm``.
    """
    attend = verify_attend(
        program.config,
        program.spec,
        page_table,
        position,
        count,
        tokens.shape[1],
        backend=program.backend,
    )
    model = bind(program.config, params)
    alike = alike_layers(program.config, program.spec)
    hidden, pairs = model(tokens, attend, caches, backend=program.backend, alike=alike)
    caches, keys = ([pair[i] for pair in pairs] for i in (0, 1))
    return hidden, caches, keys


def run_interval(
    spec: CacheSpec, step: Callable[..., Any], first: Int[Array, ""], carry: Any, *, length: int
) -> Any:
    """``carry`` after steps ``first`` to ``first + length - 1``; the first one selects.

    ``step(i, carry, select=...)`` runs step i.
    """
    carry = step(first, carry, select=spec.sparsity is not None)
    if length > 1:
        # Bounds known when compiling: XLA asks the device for them after every step otherwise.
        def reuse(n: Array, carry: Any) -> Any:
            return step(first + 1 + n, carry, select=False)

        carry = lax.fori_loop(0, length - 1, reuse, carry)
    return carry


# XLA's choice of what a CUDA graph may hold, and loops: a burst is then one graph that the device
# runs without the host. In it kernels wait only for those whose results they read, so a prefix and
# the rows' own parts are attended at the same time. Other devices ignore both. They go before
# XLA_FLAGS, and JAX takes options of a whole program only: inside another jitted function, call
# ``decode_burst.__wrapped__``.
BURST_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,"
    "CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}


@functools.partial(
    jax.jit,
    static_argnames=("program", "mode"),
    donate_argnames=("caches", "state"),
    compiler_options=BURST_OPTIONS,
)
def decode_burst(
    program: Program,
    params: Params,
    caches: Caches,
    state: DecodeState,
    tables: DecodeTables,
    forced: Int[Array, "burst B"],
    num_steps: Int[Array, ""],
    rules: TokenRules | None = None,
    *,
    mode: SamplingMode,
) -> tuple[DecodeState, Caches, Burst]:
    """Up to ``num_steps`` decode steps for slots 0 to B - 1, until all have finished.

    ``tables`` and ``rules`` have B rows. Where ``forced`` is not negative, that token is taken
    instead of a sampled one: a request that begins anew makes the same cache again.

    The loop body is one selection step and ``reuse_interval - 1`` steps that reuse it: requests
    start between bursts only, and ``burst`` and ``num_steps`` are multiples of the interval, so
    every sequence's reuse clock agrees with the loop's and no layer needs a conditional. A burst
    of one step is an interval cut short, for rows that take one step a burst (``rules``). Such rows
    sit out the other steps of a longer burst: each of their steps is one that selects.
    """
    spec, (burst, num_rows) = program.spec, forced.shape
    interval = min(spec.reuse_interval, burst)
    whole = state
    state = jax.tree.map(lambda x: x[:num_rows], whole)
    private_start = jnp.zeros((num_rows,), jnp.int32)
    if tables.groups is not None:
        # From here on a row's table begins with the first page after its prefix.
        private_start = tables.groups.private_start()
        page_table = tables.page_table
        entry = jnp.arange(page_table.shape[1])[None] + (private_start // spec.page_size)[:, None]
        page_table = jnp.take_along_axis(page_table, entry, axis=1, mode="clip")
        tables = dataclasses.replace(tables, page_table=page_table)

    def step(i: Array, carry: tuple, *, select: bool) -> tuple:
        state, caches, result = carry
        waiting = None if rules is None else state.active & rules.stepwise & (i > 0)
        if waiting is not None:
            state = dataclasses.replace(state, active=state.active & ~waiting)
        was_active = state.active.astype(jnp.int32)
        pages = (state.position - private_start) // spec.page_size + 1
        rows = StepRows(
            token=state.token, position=state.position, active=state.active, tail=state.tail
        )
        hidden, caches, tail, attended = decode_step(
            program, params, caches, rows, tables, select=select
        )
        logits = bind(program.config, params).unembed(hidden)
        state, new = _take_token(state, logits, forced[i], tail, mode, rules)
        if waiting is not None:
            state = dataclasses.replace(state, active=state.active | waiting)
        pruned = spec.prunes(tail).astype(jnp.int32)
        result = dataclasses.replace(
            result,
            samples=jax.tree.map(lambda x, row: x.at[i].set(row), result.samples, new),
            steps=result.steps + was_active,
            bypassed=result.bypassed + was_active * (1 - pruned),
            selections=result.selections + (was_active * pruned if select else 0),
            scored=result.scored + (was_active * pruned * pages if select else 0),
            attended=result.attended + attended.astype(jnp.float32),
        )
        return state, caches, result

    def body(carry: tuple) -> tuple:
        i, inner = carry
        return i + interval, run_interval(spec, step, i, inner, length=interval)

    def more(carry: tuple) -> Array:
        i, (state, _, _) = carry
        return (i < num_steps) & jnp.any(state.active)

    result = Burst.empty(burst, num_rows, min(mode.top_logprobs, program.config.vocab_size))
    _, (state, caches, result) = lax.while_loop(
        more, body, (jnp.zeros((), jnp.int32), (state, caches, result))
    )
    state = jax.tree.map(lambda full, part: full.at[:num_rows].set(part), whole, state)
    return state, caches, result


def _take_token(
    state: DecodeState,
    logits: Float[Array, "B V"],
    forced: Int[Array, " B"],
    tail: Int[Array, " B"],
    mode: SamplingMode,
    rules: TokenRules | None,
) -> tuple[DecodeState, Sample]:
    """Samples every row's next token, or takes the forced one; the state that follows it."""
    new = sample_rows(logits, state, mode, rules)
    new = dataclasses.replace(new, token=jnp.where(forced >= 0, forced, new.token))
    active = state.active
    generated = state.generated + active.astype(jnp.int32)
    stopped = is_stop_token(new.token, state.sampling)
    counts = state.output_counts
    if counts is not None:
        counts = counts.at[jnp.arange(counts.shape[0]), new.token].add(active.astype(jnp.int32))
    state = dataclasses.replace(
        state,
        token=jnp.where(active, new.token, state.token),
        position=state.position + active.astype(jnp.int32),
        active=active & ~stopped & (generated < state.max_tokens),
        generated=generated,
        tail=tail,
        output_counts=counts,
    )
    return state, dataclasses.replace(new, token=jnp.where(active, new.token, -1))
