"""Page selection for decode: the candidates with the best scores, Hopper (Mosaic GPU).

A candidate is what one score speaks for: a page, or a part of one. The entries of the result are
dealt out: the grid is (row b, KV head k, share of the entries). Scores become int32 keys of the
same order; a search with two thresholds a step finds the key of the last candidate chosen, counting
all keys each step; among keys equal to it a second search finds the number up to which they are
chosen. Their numbers are then compacted without a scatter, by exact products of 0 and 1 in bf16,
over the matrix of candidates [strips, 64]:

      prefix [strips, 64]  = chosen [strips, 64] @ upper triangle [64, 64]
      begin [strips]       = how many are chosen in the strips before
      found [entries, 64]  = (entry lies in strip) [entries, strips] @ prefix
      number at an entry   = 64 * its strip + how many of found are too small

A list longer than one CTA can hold is cut into parts; what is selected is then the best of the best
of every part.

What must move: 4 bytes a score, from L2. The time is that of a chain of dependent steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.device import MOST_SELECTED_PAGES
from pallas_kernels.hopper.mosaic import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    SM_COUNT,
    full,
    matmul,
    refuse,
    spread_columns,
    spread_rows,
    store_unoptimised,
    tile_transforms,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared, sizes

STRIP = 64  # scores in a row of the matrix that compaction works on
SQUARE = (64, 64)
# Scores of one list that a CTA ranks, their keys in registers.
PART = 8192
LOWEST_KEY = -(2**31)  # below the key of -inf
HIGHEST_KEY = 2**31 - 1  # above the key of inf
UPPER = 1 << 16  # two counts in one int32, so that one reduction makes both


class _Buffers(NamedTuple):
    """Shared memory and barrier of a CTA."""

    scores: Any  # [strips, 64] float32
    flags: Any  # [64, 64] bf16, an operand of zeros and ones
    triangle: Any  # [64, 64] bf16
    prefix: Any  # [strips, 64] bf16, how many are chosen of a strip up to a column, it included
    begin: Any  # [strips] float32, how many are chosen in the strips before
    count: Any  # [strips] float32, how many are chosen in the strip
    scores_ready: Any  # barrier


class _Chosen(NamedTuple):
    """Which candidates are selected: the sinks, and those by score."""

    threshold: Any  # the least key
    cutoff: Any  # those with this key only below this number
    sinks: Any  # all below this number
    candidates: Any  # none from this number on

    def includes(self, key, number):
        by_score = (key > self.threshold) | ((key == self.threshold) & (number < self.cutoff))
        return (by_score | (number < self.sinks)) & (number < self.candidates)


def _order_preserving(scores):
    """int32 keys in the order of the float32 scores; both zeros give one key."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0.0, 0.0, scores), jnp.int32)
    return bits ^ (lax.shift_right_arithmetic(bits, jnp.full_like(bits, 31)) & HIGHEST_KEY)


def _flags(condition):
    """1.0 where ``condition`` holds, else 0.0."""
    return plgpu.layout_cast(jnp.where(condition, 1.0, 0.0), MATRIX)


@partial(jax.jit, static_argnames=("num_pages", "sink_pages", "most_heads"))
def select_pages(
    scores: Float[Array, "B Kq M"],
    num_candidates: Int[Array, " B"],
    wanted: Int[Array, "B Kq"],
    *,
    num_pages: int,
    sink_pages: int,
    most_heads: int | None = None,
) -> Int[Array, "B Kq R"]:
    """``pallas_kernels.api.select_pages`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    float32 scores; at most 4096 pages selected. Raises ``NotImplementedError`` for anything else.
    """
    _refuse_unsupported(scores, num_pages)
    B, K, M = scores.shape
    how = {"num_pages": num_pages, "most_heads": K if most_heads is None else most_heads}
    if M <= PART:
        return _select_in_cta(scores, num_candidates, wanted, sink_pages=sink_pages, **how)
    num_candidates = jnp.clip(num_candidates, 0, M)
    # The best of every part, which are among the best of their part; then the best of those. Both
    # steps keep the order of the sequence, so the lower number wins a tie in the second one too. A
    # part gives num_pages of them whatever a head wants: -1 between them could win a tie of -inf.
    # As num_pages is at most half a PART, the second list is shorter than the first.
    parts = pl.cdiv(M, PART)
    size = 128 * pl.cdiv(M, 128 * parts)
    scores = jnp.where(jnp.arange(M)[None, None] < sink_pages, jnp.inf, scores)
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, parts * size - M)))
    scores = scores.reshape(B, K, parts, size).swapaxes(1, 2)
    first = jnp.arange(parts)[None] * size
    of_part = jnp.clip(num_candidates[:, None] - first, 0, size)
    selected = _select_in_cta(
        scores.reshape(B * parts, K, size),
        of_part.reshape(-1),
        jnp.full((B * parts, K), num_pages),
        sink_pages=0,
        **how,
    ).reshape(B, parts, K, num_pages)
    best = jnp.take_along_axis(scores, jnp.maximum(selected, 0), axis=3)
    # Only the last parts can have too few, and then there are enough before them.
    best = jnp.where(selected >= 0, best, -jnp.inf).swapaxes(1, 2).reshape(B, K, -1)
    number = (selected + first[:, :, None, None]).swapaxes(1, 2).reshape(B, K, -1)
    of_best = jnp.minimum(num_candidates, parts * num_pages)
    chosen = select_pages(best, of_best, wanted, sink_pages=0, **how)
    number = jnp.take_along_axis(number, jnp.maximum(chosen, 0), axis=2)
    return jnp.where(chosen >= 0, number, -1)


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    rows: int
    most_heads: int
    candidates: int  # M
    num_pages: int
    sink_pages: int


def _select_in_cta(
    scores: Float[Array, "B Kq M"],
    num_candidates: Int[Array, " B"],
    wanted: Int[Array, "B Kq"],
    *,
    num_pages: int,
    sink_pages: int,
    most_heads: int,
) -> Int[Array, "B Kq R"]:
    """``select_pages`` for lists of up to ``PART`` candidates."""
    B, K, M = scores.shape
    padding = -M % 128  # what one register of each of 128 threads holds
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, padding)))
    size = M + padding
    of_heads = scores.reshape(B * K, size)
    operands = (
        of_heads,
        of_heads.reshape(B * K, size // STRIP, STRIP),
        num_candidates,
        wanted.reshape(B * K),
        sizes(K),
    )
    settings = _Settings(B, most_heads, M, num_pages, sink_pages)
    tiles_of_share, shares = _shares(settings)
    entries, most = 64 * tiles_of_share * shares, B * most_heads
    (selected,) = call_shared(
        _make_kernel,
        settings,
        operands,
        (jax.ShapeDtypeStruct((B * K, entries), jnp.int32),),
        longest=(most, most, None, most, None),
        longest_results=(most,),
    )
    return selected.reshape(B, K, entries)[:, :, :num_pages]


def _shares(settings: _Settings) -> tuple[int, int]:
    """Tiles of 64 entries that a share has, and shares of a head."""
    tiles = pl.cdiv(settings.num_pages, 64)
    # Every share finds the threshold anew: worth it while there are SMs for all of them.
    ctas = max(SM_COUNT // (settings.rows * settings.most_heads), 1)
    tiles_of_share = pl.cdiv(tiles, ctas)
    return tiles_of_share, pl.cdiv(tiles, tiles_of_share)


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    M, num_pages = settings.candidates, settings.num_pages
    size = 128 * pl.cdiv(M, 128)
    blocks = pl.cdiv(size, 64 * STRIP)  # of 64 strips
    tiles_of_share, shares = _shares(settings)
    vector = next(n for n in (4, 2, 1) if size % (128 * n) == 0)
    flat = plgpu.Layout.WG_STRIDED((size,), vec_size=vector)

    def select(
        flat_gmem,  # [B * Kq, size] float32
        scores_gmem,  # [B * Kq, size / 64, 64] float32, the same
        candidates_gmem,  # [B] int32
        wanted_gmem,  # [B * Kq] int32
        sizes_gmem,  # int32: Kq
        selected_gmem,  # [B * Kq, entries] int32, output
        buffers,  # see _Buffers
    ):
        b, k, share = (lax.axis_index(name) for name in ("row", "head", "share"))
        heads, candidates = sizes_gmem[0], jnp.clip(candidates_gmem[b], 0, M)

        @pl.when(k < heads)
        def _():
            pair = b * heads + k
            strips = pl.ds(0, size // STRIP)
            plgpu.copy_gmem_to_smem(
                scores_gmem.at[pair], buffers.scores.at[strips], buffers.scores_ready
            )
            total = jnp.minimum(jnp.clip(wanted_gmem[pair], 0, num_pages), candidates)
            sinks = jnp.minimum(settings.sink_pages, total)

            # Lowest for sinks and what is no candidate.
            number = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=flat)
            key = plgpu.load(flat_gmem.at[pair], layout=flat, optimized=False)
            key = jnp.where(
                (number >= sinks) & (number < candidates), _order_preserving(key), LOWEST_KEY
            )
            chosen = _choose(key, number, total - sinks, sinks, candidates)
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=MATRIX) for axis in (0, 1)
            )
            _mark_chosen(chosen, row, column, buffers, blocks)

            def write_tile(i, _):
                tile = share * tiles_of_share + i
                # A head that wants little has tiles without entries, which need no search.
                found = _find_chosen(
                    tile, row, column, buffers, jnp.where(tile * 64 < total, blocks, 0)
                )
                entry = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=PER_ROW) + tile * 64
                found = jnp.where(entry < total, found, -1)
                store_unoptimised(selected_gmem.at[pair, pl.ds(tile * 64, 64)], found)
                return ()

            lax.fori_loop(0, tiles_of_share, write_tile, ())

    strips = 64 * blocks
    transforms = tile_transforms(64, jnp.bfloat16)
    square = plgpu.SMEM(SQUARE, jnp.bfloat16, transforms=transforms)
    buffers = _Buffers(
        scores=plgpu.SMEM((strips, STRIP), jnp.float32),
        flags=square,
        triangle=square,
        prefix=plgpu.SMEM((strips, STRIP), jnp.bfloat16, transforms=transforms),
        begin=plgpu.SMEM((strips,), jnp.float32),
        count=plgpu.SMEM((strips,), jnp.float32),
        scores_ready=plgpu.Barrier(),
    )
    return plgpu.kernel(
        select,
        out_type=results[0],
        grid=(settings.rows, settings.most_heads, shares),
        grid_names=("row", "head", "share"),
        scratch_types=[buffers],
    )


def _choose(key, number, wanted, sinks, candidates) -> _Chosen:
    """The ``wanted`` highest keys, of equal ones those of lower number, and the sinks.

    ``key`` and ``number`` are one a candidate.
    """

    def narrow(bounds):
        """``low`` has at least ``wanted`` keys at or above it, every key above ``high`` fewer.

        Two thresholds near a third and two thirds of the way; done where a count is exact.
        """
        low, high = bounds
        span = high - low  # unsigned
        third = sum(lax.shift_right_logical(span, jnp.int32(n)) for n in (2, 4, 6))
        third = jnp.maximum(third, 1)
        first, second = low + third, low + 2 * third
        both = jnp.where(key >= second, UPPER + 1, jnp.where(key >= first, 1, 0)).sum()
        above_second, above_first = lax.shift_right_logical(both, jnp.int32(16)), both % UPPER
        new_low = jnp.where(above_first >= wanted, first, low)
        new_low = jnp.where(above_second >= wanted, second, new_low)
        new_high = jnp.where(above_second < wanted, second - 1, high)
        new_high = jnp.where(above_first < wanted, first - 1, new_high)
        exact = jnp.where(above_first == wanted, first, second)
        done = (above_first == wanted) | (above_second == wanted)
        return jnp.where(done, exact, new_low), jnp.where(done, exact, new_high)

    # From the least to the greatest key: real scores are much closer than all of float32.
    # ~key is in reverse order; keys that cannot be selected are lowest either way.
    least = ~jnp.max(jnp.where(key == LOWEST_KEY, key, ~key))
    greatest = jnp.max(key)
    low = jnp.where(wanted > 0, least, HIGHEST_KEY)
    high = jnp.where(wanted > 0, greatest, HIGHEST_KEY)
    threshold, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], narrow, (low, high))

    both = jnp.where(key > threshold, UPPER, jnp.where(key == threshold, 1, 0)).sum()
    ties = wanted - lax.shift_right_logical(both, jnp.int32(16))

    def halve(bounds):
        low, high = bounds
        middle = lax.div(low + high, jnp.int32(2))
        below = jnp.where((key == threshold) & (number < middle), 1, 0).sum()
        enough = below >= ties
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    # The number below which keys equal to the threshold are chosen: mostly all are.
    low = jnp.where(both % UPPER > ties, 0, candidates)
    cutoff, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, candidates))
    return _Chosen(threshold, cutoff, sinks, candidates)


def _mark_chosen(chosen: _Chosen, row, column, buffers: _Buffers, blocks: int) -> None:
    """Fills prefix, begin and count of all strips.

    ``row`` and ``column`` [64, 64] are those of each element of a matrix.
    """
    buffers.triangle[...] = _flags(row <= column).astype(jnp.bfloat16)
    plgpu.barrier_wait(buffers.scores_ready)

    def mark(block, before):
        """64 strips; ``before`` candidates are chosen in earlier ones."""
        strips = pl.ds(block * 64, 64)
        scores = plgpu.load(buffers.scores.at[strips], layout=MATRIX, optimized=False)
        key = _order_preserving(scores)
        number = (block * 64 + row) * STRIP + column
        flags = _flags(chosen.includes(key, number))
        buffers.flags[...] = flags.astype(jnp.bfloat16)
        buffers.count[strips] = flags.sum(axis=1)
        plgpu.commit_smem()
        prefix = matmul(buffers.flags, buffers.triangle, *SQUARE)
        buffers.prefix[strips] = prefix.astype(jnp.bfloat16)
        count = plgpu.load(buffers.count.at[strips], layout=PER_COLUMN)
        earlier = jnp.where(column < row, spread_columns(count, prefix), 0.0)
        buffers.begin[strips] = earlier.sum(axis=1) + before
        plgpu.commit_smem()
        return before + jnp.sum(count)

    if blocks == 1:
        mark(0, 0.0)
    else:
        lax.fori_loop(0, blocks, mark, jnp.float32(0))


def _find_chosen(tile, row, column, buffers: _Buffers, blocks):
    """Numbers of the candidates at 64 entries [64] of the result, from entry 64 * ``tile`` on.

    ``blocks`` of 64 strips are searched.
    """
    entry = (row + tile * 64).astype(jnp.float32)

    def gather(block, found):
        prefix, strip, rank = found  # [64, 64]; [64]; [64], of the entry in its strip
        strips = pl.ds(block * 64, 64)
        begin = spread_columns(plgpu.load(buffers.begin.at[strips], layout=PER_COLUMN), entry)
        count = spread_columns(plgpu.load(buffers.count.at[strips], layout=PER_COLUMN), entry)
        in_strip = _flags((begin <= entry) & (entry < begin + count))
        buffers.flags[...] = in_strip.astype(jnp.bfloat16)
        plgpu.commit_smem()
        prefix += matmul(buffers.flags, buffers.prefix.at[strips], *SQUARE)
        strip += (in_strip * (column + block * 64).astype(jnp.float32)).sum(axis=1)
        rank += (in_strip * (entry - begin)).sum(axis=1)
        return prefix, strip, rank

    zeros = full((64,), 0.0, PER_ROW)
    prefix, strip, rank = lax.fori_loop(
        0, blocks, gather, (full(SQUARE, 0.0, MATRIX), zeros, zeros)
    )
    within = _flags(prefix <= spread_rows(rank, prefix)).sum(axis=1)
    return (strip * STRIP + within).astype(jnp.int32)


def _refuse_unsupported(scores: Array, num_pages: int) -> None:
    reasons = []
    if scores.dtype != jnp.float32:
        reasons.append(f"scores must be float32, got {scores.dtype}")
    if not 1 <= num_pages <= MOST_SELECTED_PAGES:
        reasons.append(f"1 to {MOST_SELECTED_PAGES} pages can be selected, got {num_pages}")
    refuse("select_pages", reasons)
