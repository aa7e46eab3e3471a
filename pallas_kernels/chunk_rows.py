"""Ops on chunks of R prompts that also take a single one."""

import functools
import inspect
from collections.abc import Callable

import jax
from jax import lax


def rows_or_one[**P, X](*names: str, results: bool) -> Callable[[Callable[P, X]], Callable[P, X]]:
    """Lets an op of R chunks take one, too, whose arrays ``names`` have no axis of rows.

    The first of them has four axes with it. ``results``: what the op returns has one as well.
    """

    def decorate(op: Callable[P, X]) -> Callable[P, X]:
        signature = inspect.signature(op)

        @functools.wraps(op)
        def call(*args: P.args, **how: P.kwargs) -> X:
            given = signature.bind(*args, **how)
            if given.arguments[names[0]].ndim == 4:
                return op(*given.args, **given.kwargs)
            for name in names:
                if name in given.arguments:
                    value = given.arguments[name]
                    given.arguments[name] = jax.tree.map(lambda x: x[None], value)
            out = op(*given.args, **given.kwargs)
            return jax.tree.map(lambda x: x[0], out) if results else out

        return call

    return decorate


def scan_rows[C, X](step: Callable[..., tuple[C, X]], carry: C, rows: tuple) -> tuple[C, X]:
    """``lax.scan`` over the first axis of ``rows``; a single row runs without a loop."""
    if jax.tree.leaves(rows)[0].shape[0] > 1:
        return lax.scan(step, carry, rows)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], rows))
    return carry, jax.tree.map(lambda x: x[None], out)
