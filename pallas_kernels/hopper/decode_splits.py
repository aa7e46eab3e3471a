"""How many splits each KV head of decode attention is cut into, and which head a split is of.

A CTA attends a split of the tokens of one (row, KV head). Heads that attend many tokens are cut
into many splits, so that one that reads all of its pages beside some that read a few keeps all
multiprocessors busy. The splits of a row are numbered through, which is an axis of the grid:

      KV head          |    0    |    1    |               2                |  3  |
      split of it      | 0  1  2 | 0  1  2 |  0   1   2   3   4   5   6   7 |  0  |
      number           | 0  1  2   3  4  5    6   7   8   9  10  11  12  13   14  |
      run              |         0         |               1                |  2  |

Neighbouring heads of as many splits are a run. There are few, so a few comparisons find the head of
a number, and no table has to be read before anything else can be.
"""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.decode_tiles import TILE

# Parts of one head that are worth combining: four loads of 33. A lone head of 128K tokens then has
# a CTA on every multiprocessor; two on each would save less than twice as many loads cost.
MOST_SPLITS = 132


class _Run(NamedTuple):
    """Neighbouring heads of as many splits."""

    head: int  # the first
    number: int  # of its first split
    splits: int  # of each head


def deal_splits(rows: int, most_tokens: tuple[int, ...], ctas: int) -> tuple[int, ...]:
    """Splits of each KV head, for ``rows`` rows whose lists attend up to ``most_tokens`` a head.

    ``ctas`` is how many CTAs the GPU runs at once.
    """
    tiles = [pl.cdiv(tokens, TILE) for tokens in most_tokens]

    def of_size(size: int) -> tuple[int, ...]:
        return tuple(min(pl.cdiv(count, size), MOST_SPLITS) for count in tiles)

    # The smallest splits that all run at once. Those of one tile save less than combining costs.
    of_row = max(ctas // rows, len(tiles))
    size = next(size for size in itertools.count(2) if sum(of_size(size)) <= of_row)
    # Of many rows they cannot; then none may keep the last CTA busy for twice a fair share.
    return of_size(min(size, 2 * pl.cdiv(rows * sum(tiles), ctas)))


def _runs(splits: tuple[int, ...]) -> list[_Run]:
    runs, head, number = [], 0, 0
    for count, heads in itertools.groupby(splits):
        runs.append(_Run(head, number, count))
        together = len(list(heads))
        head, number = head + together, number + together * count
    return runs


def find_split(number, splits: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Of split ``number`` of a row: its KV head k, its number there, and how many k has."""

    def in_run(run: _Run) -> tuple[Any, Any, Any]:
        inside, count = number - run.number, jnp.int32(run.splits)
        return run.head + lax.div(inside, count), lax.rem(inside, count), run.splits

    first, *others = _runs(splits)
    found = in_run(first)
    for run in others:
        found = _where(number >= run.number, in_run(run), found)
    return found


def splits_of_head(head, splits: tuple[int, ...]) -> tuple[Any, Any]:
    """Number of the first split of a KV head in its row, and how many it has."""

    def in_run(run: _Run) -> tuple[Any, Any]:
        return run.number + (head - run.head) * run.splits, run.splits

    first, *others = _runs(splits)
    found = in_run(first)
    for run in others:
        found = _where(head >= run.head, in_run(run), found)
    return found


def _where(condition, xs: tuple, ys: tuple) -> tuple:
    return tuple(jnp.where(condition, x, y) for x, y in zip(xs, ys, strict=True))
