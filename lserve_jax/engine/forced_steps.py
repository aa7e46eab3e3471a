"""Decode steps of given tokens: what the model thinks of them, jitted."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from lserve_jax.engine.state import (
    Caches,
    DecodeTables,
    ForcedSteps,
    Program,
    StepRows,
    StepScores,
)
from lserve_jax.engine.steps import decode_step, run_interval, verify
from lserve_jax.model.bound import bind
from lserve_jax.model.params import Params


@functools.partial(
    jax.jit,
    static_argnames=("program", "distributions", "keep_hidden"),
    donate_argnames=("caches",),
)
def score_steps(
    program: Program,
    params: Params,
    caches: Caches,
    tables: DecodeTables,
    forced: ForcedSteps,
    first: Int[Array, ""],
    *,
    distributions: bool,
    keep_hidden: bool,
) -> tuple[StepScores, Caches]:
    """Decode steps ``first`` to ``first + N - 1`` of given tokens, until all rows have finished.

    The rows' tokens of these steps are ``forced.tokens``; row b takes part in steps below
    ``forced.length[b]``. ``first`` and N are multiples of ``reuse_interval``.
    """
    spec, (N, B), start = program.spec, forced.tokens.shape, jnp.asarray(forced.start)
    model = bind(program.config, params)

    def step(n: Array, carry: tuple, *, select: bool) -> tuple:
        caches, tail, scores = carry
        i = first + n
        # Finished rows stay where they are.
        position = start + jnp.clip(i, 0, jnp.maximum(forced.length - 1, 0))
        rows = StepRows(
            token=forced.tokens[n], position=position, active=i < forced.length, tail=tail
        )
        if spec.max_drafts is None:
            hidden, caches, tail, _ = decode_step(
                program, params, caches, rows, tables, select=select
            )
        else:  # in exact mode dense attention judges
            token, count = rows.token[:, None], rows.active.astype(jnp.int32)
            hidden, caches, _ = verify(
                program, params, caches, token, position, count, tables.page_table
            )
            hidden = hidden[:, 0]
        logprobs = jax.nn.log_softmax(model.unembed(hidden))
        new = StepScores(
            logprobs=jnp.take_along_axis(logprobs, forced.wanted[n][:, None], axis=1)[:, 0],
            likeliest=jnp.argmax(logprobs, axis=-1).astype(jnp.int32),
            distributions=logprobs if distributions else logprobs[:, :0],
            hidden=hidden if keep_hidden else hidden[:, :0],
        )
        return caches, tail, jax.tree.map(lambda x, row: x.at[n].set(row), scores, new)

    def interval(number: Array, carry: tuple) -> tuple:
        interval = spec.reuse_interval
        return run_interval(spec, step, number * interval, carry, length=interval)

    scores = StepScores(
        logprobs=jnp.zeros((N, B)),
        likeliest=jnp.zeros((N, B), jnp.int32),
        distributions=jnp.zeros((N, B, program.config.vocab_size if distributions else 0)),
        hidden=jnp.zeros(
            (N, B, program.config.hidden_size if keep_hidden else 0),
            params["norm"]["scale"].dtype,
        ),
    )
    steps = jnp.clip(forced.length.max() - first, 0, N)
    intervals = (steps + spec.reuse_interval - 1) // spec.reuse_interval
    tail = jnp.zeros_like(start)
    caches, _, scores = lax.fori_loop(0, intervals, interval, (caches, tail, scores))
    return scores, caches
