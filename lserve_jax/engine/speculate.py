"""Exact mode on the device: tokens are drafted, and dense attention verifies them.

A round drafts up to K tokens a row, by sparse decode steps or by looking up what followed the
newest tokens before (prompt lookup: apoorvumang/prompt-lookup-decoding on GitHub). It runs them,
behind the row's newest token, through one dense pass (``attention/verify.py``). Each place is then
sampled from the dense logits with the noise that a dense step of that number would draw, and a
draft is confirmed if it is that token. So the tokens are those of dense attention, drawn ones too:
no second distribution comes in, and the seed decides as it does there. Sparse steps draw with the
same noise, so that the two agree as often as their distributions let them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lserve_jax.attention.selection import first_tail_page
from lserve_jax.attention.verify import confirm
from lserve_jax.engine.sampling import SamplingMode
from lserve_jax.engine.state import (
    Burst,
    Caches,
    DecodeState,
    DecodeTables,
    Program,
    Sample,
    StepRows,
)
from lserve_jax.engine.steps import BURST_OPTIONS, decode_step, sample_rows, verify
from lserve_jax.engine.token_rules import TokenRules
from lserve_jax.model.bound import bind
from lserve_jax.model.params import Params


@functools.partial(
    jax.jit,
    static_argnames=("program", "mode", "most_drafts"),
    donate_argnames=("caches", "state"),
    compiler_options=BURST_OPTIONS,
)
def exact_burst(
    program: Program,
    params: Params,
    caches: Caches,
    state: DecodeState,
    tables: DecodeTables,
    forced: Int[Array, "burst B"],
    num_steps: Int[Array, ""],
    drafts: Int[Array, " B"],
    rules: TokenRules | None = None,
    draft_params: Params | None = None,
    *,
    mode: SamplingMode,
    most_drafts: int,
) -> tuple[DecodeState, Caches, Burst]:
    """``num_steps`` tokens for each of slots 0 to B - 1, or as many as it has until its end.

    A row drafts up to ``drafts[b]`` tokens a round, at most the static ``most_drafts`` (K); 0 is a
    step of dense attention. Rows that have their tokens wait for the others. ``tables``, ``forced``
    and ``rules`` are those of ``decode_burst``; no row reads its prefix with others. With rows that
    take one step a burst, ``num_steps`` is 1. ``draft_params``: the model by which sparse steps
    draft, the heads in the same order; None: ``params``.
    """
    burst, B = forced.shape
    whole = state
    state = jax.tree.map(lambda x: x[:B], whole)

    def one_round(carry: tuple) -> tuple:
        state, caches, result = carry
        left = jnp.minimum(num_steps - result.steps, state.max_tokens - state.generated)
        left = jnp.where(state.active, jnp.maximum(left, 0), 0)
        # The token after the last one that is left would be thrown away.
        wanted = jnp.clip(jnp.minimum(drafts, left - 1), 0, most_drafts)
        wanted_tokens = _forced_from(forced, result.steps, most_drafts + 1)
        if program.spec.draft == "ngram":
            tokens, wanted = look_up(state, wanted, most_drafts)
            tokens = tokens.at[:, 1:].set(
                jnp.where(wanted_tokens[:, :-1] >= 0, wanted_tokens[:, :-1], tokens[:, 1:])
            )
            attended = jnp.zeros((B,), jnp.float32)
        else:
            by = params if draft_params is None else draft_params
            tokens, caches, attended = draft_sparse(
                program, by, caches, state, tables, wanted_tokens, wanted, mode, rules
            )
        position, count = state.position, jnp.where(left > 0, wanted + 1, 0)
        hidden, caches, keys = verify(
            program, params, caches, tokens, position, count, tables.page_table
        )
        logits = bind(program.config, params).unembed(hidden)
        samples = _sample_places(logits, state, tokens, wanted_tokens, mode, rules)
        state, emitted = _confirmed(state, samples.token, tokens, wanted, left)
        caches = [
            confirm(program.spec, cache, k, tables.page_table, position, emitted)
            for cache, k in zip(caches, keys, strict=True)
        ]
        heads = program.config.num_hidden_layers * program.config.num_key_value_heads
        seen = jnp.where(left > 0, position + count, 0).astype(jnp.float32)
        tail = first_tail_page(position, program.spec.selected_page_size)
        pruned = (wanted > 0) & program.spec.prunes(tail)
        # Tokens of a replay are known: that they come again is nobody's merit.
        known = (wanted_tokens[:, :-1] >= 0) & (jnp.arange(most_drafts)[None] < wanted[:, None])
        known = known.sum(axis=1)
        result = dataclasses.replace(
            result,
            samples=_put(result.samples, samples, result.steps, emitted),
            steps=result.steps + emitted,
            bypassed=result.bypassed + jnp.where(pruned, 0, emitted),
            selections=result.selections + pruned.astype(jnp.int32),
            scored=result.scored + jnp.where(pruned, position // program.spec.page_size + 1, 0),
            attended=result.attended + attended + heads * seen,
            verified=result.verified + (left > 0).astype(jnp.int32),
            judging=result.judging + (wanted > known).astype(jnp.int32),
            drafted=result.drafted + wanted - known,
            confirmed=result.confirmed + jnp.maximum(emitted - 1 - known, 0),
        )
        return state, caches, result

    def more(carry: tuple) -> Array:
        state, _, result = carry
        return jnp.any(state.active & (result.steps < num_steps))

    result = Burst.empty(burst, B, min(mode.top_logprobs, program.config.vocab_size))
    state, caches, result = lax.while_loop(more, one_round, (state, caches, result))
    state = jax.tree.map(lambda full, part: full.at[:B].set(part), whole, state)
    return state, caches, result


def _forced_from(
    forced: Int[Array, "burst B"], steps: Int[Array, " B"], count: int
) -> Int[Array, "B T"]:
    """Each row's forced tokens from its step on; -1 where a token is sampled."""
    index = steps[:, None] + jnp.arange(count)[None]
    found = jnp.take_along_axis(forced.T, index, axis=1, mode="clip")
    return jnp.where(index < forced.shape[0], found, -1)


def look_up(
    state: DecodeState, wanted: Int[Array, " B"], most_drafts: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Each row's newest token and what followed it last time, and how many of these there are.

    Prompt lookup: the newest place before the end where the last three tokens stood, else the last
    two; where there is none, nothing is drafted. As many as ``wanted`` at most.
    """
    history = state.history
    assert history is not None  # it is there where drafts are looked up
    N, end = history.shape[1], state.position[:, None]
    place = jnp.arange(N)[None]
    one, two, three = (
        jnp.roll(history, n, axis=1) == jnp.take_along_axis(history, end - n, axis=1, mode="clip")
        for n in range(3)
    )
    two = one & two & (place >= 1) & (end >= 1)
    three = two & three & (place >= 2) & (end >= 2)
    # Those of three tokens before those of two; of equal ones the newest.
    rank = jnp.where(two & (place < end), place + jnp.where(three, N, 0), -1)
    at = jnp.argmax(rank, axis=1)
    found = jnp.take_along_axis(rank, at[:, None], axis=1)[:, 0] >= 0
    following = at[:, None] + 1 + jnp.arange(most_drafts)[None]
    drafts = jnp.take_along_axis(history, following, axis=1, mode="clip")
    count = jnp.where(found, jnp.minimum(wanted, state.position - at), 0)
    return jnp.concatenate([state.token[:, None], drafts], axis=1), count


def draft_sparse(
    program: Program,
    params: Params,
    caches: Caches,
    state: DecodeState,
    tables: DecodeTables,
    forced: Int[Array, "B T"],
    wanted: Int[Array, " B"],
    mode: SamplingMode,
    rules: TokenRules | None,
) -> tuple[Int[Array, "B T"], Caches, Float[Array, " B"]]:
    """Each row's newest token and ``wanted`` drafts behind it, and what drafting attended."""
    B, most_drafts = len(state.token), forced.shape[1] - 1
    tokens = jnp.zeros((B, most_drafts + 1), jnp.int32).at[:, 0].set(state.token)
    attended = jnp.zeros((B,), jnp.float32)
    if most_drafts == 0:
        return tokens, caches, attended
    tail = first_tail_page(state.position, program.spec.selected_page_size)
    mode = dataclasses.replace(mode, top_logprobs=0)
    # ``sample_rows`` reads what was generated before each draft.
    drafting = state

    def step(i: Array, carry: tuple, *, select: bool) -> tuple:
        tokens, caches, attended, drafting = carry
        active = i < wanted
        rows = StepRows(token=tokens[:, i], position=state.position + i, active=active, tail=tail)
        hidden, caches, _, read = decode_step(program, params, caches, rows, tables, select=select)
        logits = bind(program.config, params).unembed(hidden)
        new = sample_rows(logits, drafting, mode, rules).token
        new = jnp.where(forced[:, i] >= 0, forced[:, i], new)
        counts = drafting.output_counts
        if counts is not None:
            counts = counts.at[jnp.arange(B), new].add(active.astype(jnp.int32))
        drafting = dataclasses.replace(
            drafting, generated=drafting.generated + 1, output_counts=counts
        )
        tokens = tokens.at[:, i + 1].set(jnp.where(active, new, 0))
        return tokens, caches, attended + read.astype(jnp.float32), drafting

    carry, most = (tokens, caches, attended, drafting), wanted.max()
    carry = lax.fori_loop(0, jnp.minimum(most, 1), functools.partial(step, select=True), carry)
    carry = lax.fori_loop(1, most, functools.partial(step, select=False), carry)
    tokens, caches, attended, _ = carry
    return tokens, caches, attended


def _sample_places(
    logits: Float[Array, "B T V"],
    state: DecodeState,
    tokens: Int[Array, "B T"],
    forced: Int[Array, "B T"],
    mode: SamplingMode,
    rules: TokenRules | None,
) -> Sample:
    """What dense attention samples at each place, had all drafts before it been right."""
    B, T, V = logits.shape
    rows = dataclasses.replace(state, history=None)  # which is long, and nothing is looked up
    rows = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), rows)
    counts = rows.output_counts
    if counts is not None:
        drafted = jax.nn.one_hot(tokens[:, 1:], V, dtype=jnp.int32)
        before = jnp.pad(jnp.cumsum(drafted, axis=1), ((0, 0), (1, 0), (0, 0)))
        counts = counts + before.reshape(B * T, V)
    generated = rows.generated + jnp.tile(jnp.arange(T), B)
    rows = dataclasses.replace(rows, generated=generated, output_counts=counts)
    rules = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), rules)
    new = sample_rows(logits.reshape(B * T, V), rows, mode, rules)
    new = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), new)
    return dataclasses.replace(new, token=jnp.where(forced >= 0, forced, new.token))


def _confirmed(
    state: DecodeState,
    sampled: Int[Array, "B T"],
    tokens: Int[Array, "B T"],
    wanted: Int[Array, " B"],
    left: Int[Array, " B"],
) -> tuple[DecodeState, Int[Array, " B"]]:
    """The state behind the sampled tokens that count, and how many they are.

    Those are the confirmed drafts and the token after them, up to the first that ends the row.
    """
    B, T = sampled.shape
    agrees = (sampled[:, :-1] == tokens[:, 1:]) & (jnp.arange(T - 1)[None] < wanted[:, None])
    confirmed = jnp.cumprod(agrees.astype(jnp.int32), axis=1).sum(axis=1)
    stops = (sampled[:, :, None] == state.sampling.stop_token_ids[:, None]).any(axis=2)
    first_stop = jnp.where(stops.any(axis=1), stops.argmax(axis=1), T)
    emitted = jnp.where(left > 0, jnp.minimum(confirmed, first_stop) + 1, 0)
    stopped = (emitted > 0) & (first_stop < emitted)
    last = jnp.take_along_axis(sampled, jnp.maximum(emitted - 1, 0)[:, None], axis=1)[:, 0]
    generated = state.generated + emitted
    counts = state.output_counts
    if counts is not None:
        counted = (jnp.arange(T)[None] < emitted[:, None]).astype(jnp.int32)
        counts = counts.at[jnp.arange(B)[:, None], sampled].add(counted)
    history = state.history
    if history is not None:
        place = state.position[:, None] + 1 + jnp.arange(T)[None]
        place = jnp.where(jnp.arange(T)[None] < emitted[:, None], place, history.shape[1])
        history = history.at[jnp.arange(B)[:, None], place].set(sampled, mode="drop")
    state = dataclasses.replace(
        state,
        history=history,
        token=jnp.where(emitted > 0, last, state.token),
        position=state.position + emitted,
        active=state.active & ~stopped & (generated < state.max_tokens),
        generated=generated,
        output_counts=counts,
    )
    return state, emitted


def _put(
    results: Sample, samples: Sample, steps: Int[Array, " B"], emitted: Int[Array, " B"]
) -> Sample:
    """``results`` [steps, B, ...] with each row's first ``emitted`` samples [B, T, ...] added."""
    burst, B = results.token.shape
    T = samples.token.shape[1]
    at = steps[:, None] + jnp.arange(T)[None]
    at = jnp.where(jnp.arange(T)[None] < emitted[:, None], at, burst)  # out of range: dropped
    rows = jnp.arange(B)[:, None]
    return jax.tree.map(lambda x, new: x.at[at, rows].set(new, mode="drop"), results, samples)
