"""How many splits each KV head of decode attention is cut into, and which head a split is of.

A CTA attends a split of the tokens of one (row, KV head). Heads that attend many tokens are cut
into many splits, so that one that reads all of its pages beside some that read a few keeps all
multiprocessors busy. The splits of a row are numbered through, which is an axis of the grid:

      KV head          |    0    |    1    |               2                |  3  |
      split of it      | 0  1  2 | 0  1  2 |  0   1   2   3   4   5   6   7 |  0  |
      number           | 0  1  2   3  4  5    6   7   8   9  10  11  12  13   14  |  15 ... unused

Where some heads stream, layers deal differently. Their kernels have as many numbers, and read in a
table whose split one is: so all layers have the same kernels (see ``shared_kernel``). Reading it is
a trip to memory in front of all others. Where all heads are alike a number says it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Int

from pallas_kernels.hopper.decode_tiles import TILE, Place
from pallas_kernels.types import PageList

# Parts of one head that are worth combining: four loads of 33. A lone head of 128K tokens then has
# a CTA on every multiprocessor; two on each would save less than twice as many loads cost.
MOST_SPLITS = 132


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


def most_splits(rows: int, heads: int, ctas: int) -> int:
    """Splits of a row that ``deal_splits`` never exceeds, whatever heads attend."""
    return max(ctas // rows, heads, ctas // (2 * rows) + heads)


def split_table(
    splits: tuple[int, ...], lists: Sequence[tuple[int, PageList]], numbers: int
) -> Int[np.ndarray, "numbers columns"]:
    """The ``Place`` of each number; ``lists`` are those of the pools, with each pool's heads.

    Row k ends with the number of the first split of KV head k, and how many it has. That is for the
    combining kernel, which so finds the row in L2: attention has just read it.
    """
    places, head = [], 0
    for of_second, (heads, page_list) in enumerate(lists):
        for pool_head in range(heads):
            places += [
                _place(page_list, head, s, splits[head], of_second, pool_head)
                for s in range(splits[head])
            ]
            head += 1
    nobody = jax.tree.map(lambda _: 0, places[0])
    places += [nobody] * (numbers - len(places))
    of_heads = np.zeros((numbers, 2), np.int32)
    of_heads[:head] = np.stack([np.cumsum((0, *splits[:-1])), splits], axis=1)
    return np.hstack([np.array([jax.tree.leaves(place) for place in places], np.int32), of_heads])


class Alike(NamedTuple):
    """Heads that are all of one pool and have equally many splits: so they are if none streams."""

    splits: int  # of each head
    lists: PageList  # shapes


def place_alike(number, alike: Alike) -> Place:
    """The ``Place`` of a number, for which nothing is read."""
    splits = jnp.int32(alike.splits)
    head, split = lax.div(number, splits), lax.rem(number, splits)
    return _place(alike.lists, head, split, alike.splits, 0, head)


def _place(lists: PageList, head, split, splits: int, of_second: int, pool_head) -> Place:
    """``lists`` are arrays or their shapes."""
    ids, start, stop = (_row_and_head(x, pool_head) for x in lists)
    last = lists.page_ids.shape[2] - 1
    return Place(head, split, splits, of_second, pool_head, last, ids, start, stop)


def _row_and_head(x: Any, head) -> tuple[Any, Any]:
    """Elements of a row of ``x`` [B, heads or 1, ...], and those before the head's."""
    size = math.prod(x.shape[2:])
    return x.shape[1] * size, head * size if x.shape[1] > 1 else 0
