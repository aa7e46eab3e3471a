"""Page selection for decode: scores of all pages, then the best of them, Hopper (Mosaic GPU).

``page_scores``. For a weight w of the lower bound between 0 and 1

    max(q * kmax, q * kmin) + w * min(q * kmax, q * kmin) = q+ * kmax + q- * kmin

with q+ = max(q, w * q) and q- = min(q, w * q), so the score of a logical page is one product, 2 D
long, of [q+ | q-] with its statistics [kmax | kmin]. The grid is (row b, KV head k, chunk of
pages), one warpgroup of 128 threads each; a chunk is a few tiles:

      page_table[b]      |  page 7  |  page 2  |  page 9  |  ...            one copy (TMA) a page
      statistics of 7    | 0: kmax kmin | 1: kmax kmin | 2: ... | 3: ... |  g logical pages
      tile [64, 2 D]     a row for each logical page, in the order of the sequence

      scores [64, N] = tile [64, 2 D] @ [q+ | q-]^T [2 D, N]    N = 8 or 16, the group's query heads
      maximum over the columns, then over the logical pages that are selected together

wgmma needs rows in units of eight and a page has fewer, so a page lands in plain shared memory and
passes through registers into the tile.

What must move: B * Kr * M pages of 4 * g * D bytes, once. A page past ``length`` is never fetched;
scores of logical pages without tokens are replaced, so what their statistics hold is of no account.

``select_pages``. The grid is (row b, KV head k, share of the slots). Scores become int32 keys of
the same order; a search with two thresholds a step finds the key of the last page selected,
counting all keys each step; among keys equal to it a second search finds the page number up to
which they are selected. Pages are then compacted without a scatter, by exact products of 0 and 1 in
bf16, over the matrix of pages [strips, 64]:

      prefix [strips, 64] = chosen [strips, 64] @ upper triangle [64, 64]
      begin [strips]      = chosen pages in the strips before
      found [slots, 64]   = (slot lies in strip) [slots, strips] @ prefix
      page of a slot      = 64 * its strip + how many of found are too small

A list longer than one CTA can hold is cut into parts; what is selected is then the best of the best
of every part.

What must move: 4 bytes a score, from L2. The time is that of a chain of dependent steps.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.device import MOST_SELECTED_PAGES
from pallas_kernels.hopper.mosaic import (
    MATRIX,
    MATRIX_TRANSPOSED,
    PER_COLUMN,
    PER_ROW,
    SM_COUNT,
    cdiv,
    full,
    matmul,
    refuse,
    spread_columns,
    spread_rows,
    store_unoptimised,
    tile_transforms,
)

ROWS = 64  # rows of a tile: wgmma's M
STRIP = 64  # pages in a row of the matrix that compaction works on
SQUARE = (64, 64)
# Pages of one list that a CTA ranks, their keys in registers.
PART = 8192
LOWEST_KEY = -(2**31)  # below the key of -inf
HIGHEST_KEY = 2**31 - 1  # above the key of inf
UPPER = 1 << 16  # two counts in one int32, so that one reduction makes both


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of ``page_scores``; ``choose_config`` gives a good one."""

    tiles: int  # tiles of 64 rows a chunk
    stages: int = 2  # tiles in flight

    def __post_init__(self) -> None:
        for name in ("tiles", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def choose_config(rows: int, kv_heads: int, tiles: int) -> Config:
    """The configuration for ``rows`` x ``kv_heads`` lists of ``tiles`` tiles each."""
    # One wave of two CTAs an SM: where a tile is left over for each, nothing hides its latency.
    # Two tiles in flight: with more, shared memory has room for one CTA only, which is slower.
    # Beyond eight tiles a CTA there is nothing more to gain.
    return Config(tiles=min(max(pl.cdiv(rows * kv_heads * tiles, 2 * SM_COUNT), 1), 8))


@partial(
    jax.jit, static_argnames=("page_size", "selected_page_size", "lower_bound_weight", "config")
)
def page_scores(
    q: Float[Array, "B Hr D"],
    key_stats: Float[Array, "Kr N g 2 D"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
    *,
    page_size: int,
    selected_page_size: int,
    lower_bound_weight: float = 0.0,
    config: Config | None = None,
) -> Float[Array, "B Kr M*m"]:
    """``pallas_kernels.api.page_scores`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    Query and statistics bf16; D 64 or 128; 1, 2, 4 or 8 logical pages a page; up to 16 query heads
    a KV head. ``lower_bound_weight * q`` is rounded to bf16, which a power of two makes exact.
    Raises ``NotImplementedError`` for anything else.
    """
    _refuse_unsupported_scores(q, key_stats)
    B, Hr, D = q.shape
    Kr, N, g = key_stats.shape[:3]
    M, G = page_table.shape[1], Hr // Kr
    columns = 8 * pl.cdiv(G, 8)
    tile_pages = ROWS // g
    logical_page_size = page_size // g
    together = selected_page_size // logical_page_size  # logical pages that have one score
    tile_scores = ROWS // together
    if config is None:
        config = choose_config(B, Kr, pl.cdiv(M, tile_pages))
    tiles, stages = config.tiles, min(config.stages, config.tiles)
    chunk_pages = tiles * tile_pages
    chunks = pl.cdiv(M, chunk_pages)

    queries = q.reshape(B * Hr, D)
    if B * Hr < columns:  # a tile of query rows must lie inside the array
        queries = jnp.pad(queries, ((0, columns - B * Hr), (0, 0)))
    last_query_tile = len(queries) - columns

    def score_pages(
        q_gmem,  # [rows, D] bf16
        stats_gmem,  # [Kr, N, g, 2 D] bf16
        table_gmem,  # [B, M] int32
        length_gmem,  # [B] int32
        scores_gmem,  # [B, Kr, chunks * tiles * tile_scores] float32, output
        page_smem,  # [stages, 64, 2 D] bf16, pages as fetched
        tile_smem,  # [64, 2 D] bf16
        q_smem,  # [columns, 2 D] bf16, [q+ | q-]
        best_smem,  # [64] float32
        ready,  # [stages] barriers
    ):
        b, k, c = (lax.axis_index(name) for name in ("row", "head", "chunk"))
        first_of_chunk = c * chunk_pages

        def page_ids(step):
            first = first_of_chunk + step * tile_pages
            return [table_gmem[b, jnp.minimum(first + j, M - 1)] for j in range(tile_pages)]

        # Loaded before anything that depends on ``length``: one trip to memory instead of two.
        ids = [page_ids(step) for step in range(stages)]
        tokens = length_gmem[b]
        pages = jnp.clip(cdiv(tokens, page_size) - first_of_chunk, 0, chunk_pages)

        def fetch(step, ids):
            """Starts the copies of one tile."""
            slot = lax.rem(step, jnp.int32(stages))
            for j, page in enumerate(ids):
                if j:  # the tile's first page stands in for those past ``length``
                    page = jnp.where(step * tile_pages + j < pages, page, ids[0])
                plgpu.copy_gmem_to_smem(
                    stats_gmem.at[k, page], page_smem.at[slot, pl.ds(j * g, g)], ready.at[slot]
                )

        for step in range(stages):
            pl.when(step * tile_pages < pages)(lambda step=step: fetch(jnp.int32(step), ids[step]))

        # The pair's own query rows start at ``own``. The tile of rows runs on into the next pair's,
        # which are masked; at the end of the array it starts early instead.
        own = (b * Kr + k) * G
        first_query = jnp.minimum(own, last_query_tile)
        query = plgpu.load(
            q_gmem.at[pl.ds(first_query, columns)].transpose((1, 0)),
            layout=MATRIX_TRANSPOSED,
            optimized=False,  # D * columns elements once a chunk
        )
        weighted = query * lower_bound_weight
        for half, part in enumerate((jnp.maximum(query, weighted), jnp.minimum(query, weighted))):
            q_smem.at[:, pl.ds(half * D, D)].transpose((1, 0))[...] = part
        plgpu.commit_smem()

        shape = (ROWS, columns)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX) - (own - first_query)
        of_group = (column >= 0) & (column < G)

        def score_tile(step, _):
            slot = lax.rem(step, jnp.int32(stages))
            tile = c * tiles + step

            @pl.when(step * tile_pages < pages)
            def _():
                plgpu.barrier_wait(ready.at[slot])
                tile_smem[...] = plgpu.load(
                    page_smem.at[slot],
                    layout=plgpu.Layout.SMEM_GMEM_COPY((ROWS, 2 * D), q.dtype, 128),
                    optimized=False,  # in whatever pattern suits storing the tile
                )
                plgpu.commit_smem()

                @pl.when((step + stages) * tile_pages < pages)
                def _():
                    fetch(step + stages, page_ids(step + stages))

            # In a tile without pages this multiplies leftovers, and every score is replaced.
            score = matmul(tile_smem, q_smem.transpose((1, 0)), *shape)
            holds_tokens = (tile * ROWS + row) * logical_page_size < tokens
            best = jnp.where(holds_tokens & of_group, score, -jnp.inf).max(axis=1)
            scores = scores_gmem.at[b, k, pl.ds(tile * tile_scores, tile_scores)]
            if together == 1:
                store_unoptimised(scores, best)
                return ()
            # Row i of a matrix gets the logical pages that are selected together as page i.
            best_smem[...] = best
            plgpu.commit_smem()
            best = plgpu.load(best_smem, layout=PER_COLUMN)
            i = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=MATRIX)
            logical = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=MATRIX)
            of_page = (logical >> (together.bit_length() - 1)) == i  # a power of two
            best_smem[...] = jnp.where(of_page, spread_columns(best, i), -jnp.inf).max(axis=1)
            plgpu.commit_smem()
            best = plgpu.load(best_smem.at[pl.ds(0, tile_scores)], layout=PER_COLUMN)
            store_unoptimised(scores, best)
            return ()

        lax.fori_loop(0, tiles, score_tile, ())

    # A page starts at a multiple of 256 bytes. Copies follow a swizzle by the address itself, so
    # this one fits them; it repeats every 512 bytes and the tile is loaded as a whole.
    page_transforms = (plgpu.TilingTransform((32,)), plgpu.SwizzleTransform(64))
    scores = plgpu.kernel(
        score_pages,
        out_type=jax.ShapeDtypeStruct((B, Kr, chunks * tiles * tile_scores), jnp.float32),
        grid=(B, Kr, chunks),
        grid_names=("row", "head", "chunk"),
        scratch_types=[
            plgpu.SMEM((stages, ROWS, 2 * D), q.dtype, transforms=page_transforms),
            plgpu.SMEM((ROWS, 2 * D), q.dtype, transforms=tile_transforms(2 * D, q.dtype)),
            plgpu.SMEM((columns, 2 * D), q.dtype, transforms=tile_transforms(2 * D, q.dtype)),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=tile_pages, num_barriers=stages),
        ],
    )(queries, key_stats.reshape(Kr, N, g, 2 * D), page_table, length)
    return scores[:, :, : M * g // together]


def _refuse_unsupported_scores(q: Array, key_stats: Array) -> None:
    head_dim, logical_pages = q.shape[2], key_stats.shape[2]
    group = q.shape[1] // key_stats.shape[0]
    reasons = []
    for name, x in (("queries", q), ("key statistics", key_stats)):
        if x.dtype != jnp.bfloat16:
            reasons.append(f"{name} must be bfloat16, got {x.dtype}")
    if head_dim not in (64, 128):
        reasons.append(f"head_dim must be 64 or 128, got {head_dim}")
    if logical_pages not in (1, 2, 4, 8):
        reasons.append(f"a page must hold 1, 2, 4 or 8 logical pages, got {logical_pages}")
    if group > 16:
        reasons.append(f"at most 16 query heads a KV head, got {group}")
    refuse("page_scores", reasons)


def _order_preserving(scores):
    """int32 keys in the order of the float32 scores; both zeros give one key."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0.0, 0.0, scores), jnp.int32)
    return bits ^ (lax.shift_right_arithmetic(bits, jnp.full_like(bits, 31)) & HIGHEST_KEY)


def _flags(condition):
    """1.0 where ``condition`` holds, else 0.0."""
    return plgpu.layout_cast(jnp.where(condition, 1.0, 0.0), MATRIX)


@partial(jax.jit, static_argnames=("num_pages", "sink_pages"))
def select_pages(
    scores: Float[Array, "B Kr M"],
    num_candidates: Int[Array, " B"],
    *,
    num_pages: int,
    sink_pages: int,
) -> Int[Array, "B Kr R"]:
    """``pallas_kernels.api.select_pages`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    float32 scores; at most 2048 pages selected. Raises ``NotImplementedError`` for anything else.
    """
    _refuse_unsupported_selection(scores, num_pages)
    B, Kr, M = scores.shape
    if M <= PART:
        return _select_in_cta(scores, num_candidates, num_pages, sink_pages)
    num_candidates = jnp.clip(num_candidates, 0, M)
    # The best of every part, which are among the best of their part; then the best of those. Both
    # times the order is that of the sequence, so the lower number wins a tie here too.
    parts = pl.cdiv(M, PART)
    size = 128 * pl.cdiv(M, 128 * parts)
    scores = jnp.where(jnp.arange(M)[None, None] < sink_pages, jnp.inf, scores)
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, parts * size - M)))
    scores = scores.reshape(B, Kr, parts, size).swapaxes(1, 2)
    first = jnp.arange(parts)[None] * size
    of_part = jnp.clip(num_candidates[:, None] - first, 0, size)
    selected = _select_in_cta(
        scores.reshape(B * parts, Kr, size), of_part.reshape(-1), num_pages, 0
    ).reshape(B, parts, Kr, num_pages)
    best = jnp.take_along_axis(scores, jnp.maximum(selected, 0), axis=3)
    # Only the last parts can have too few, and then there are enough before them.
    best = jnp.where(selected >= 0, best, -jnp.inf).swapaxes(1, 2).reshape(B, Kr, -1)
    page = (selected + first[:, :, None, None]).swapaxes(1, 2).reshape(B, Kr, -1)
    chosen = select_pages(
        best, jnp.minimum(num_candidates, parts * num_pages), num_pages=num_pages, sink_pages=0
    )
    page = jnp.take_along_axis(page, jnp.maximum(chosen, 0), axis=2)
    valid = jnp.arange(num_pages)[None, None] < num_candidates[:, None, None]
    return jnp.where(valid, page, -1)


def _select_in_cta(
    scores: Float[Array, "B Kr M"],
    num_candidates: Int[Array, " B"],
    num_pages: int,
    sink_pages: int,
) -> Int[Array, "B Kr R"]:
    """``select_pages`` for lists of up to ``PART`` pages."""
    B, Kr, M = scores.shape
    padding = -M % 128  # what one register of each of 128 threads holds
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, padding)))
    size = M + padding
    blocks = pl.cdiv(size, 64 * STRIP)  # of 64 strips
    slot_tiles = pl.cdiv(num_pages, 64)
    # Every share finds the threshold anew: worth it while there are SMs for all of them.
    shares = slot_tiles if B * Kr * slot_tiles <= SM_COUNT else 1
    tiles_of_share = slot_tiles // shares
    vector = next(n for n in (4, 2, 1) if size % (128 * n) == 0)
    flat = plgpu.Layout.WG_STRIDED((size,), vec_size=vector)

    def select(
        flat_gmem,  # [B, Kr, size] float32
        scores_gmem,  # [B, Kr, size / 64, 64] float32, the same
        candidates_gmem,  # [B] int32
        selected_gmem,  # [B, Kr, slots] int32, output
        scores_smem,  # [strips, 64] float32
        flags_smem,  # [64, 64] bf16, an operand of zeros and ones
        triangle_smem,  # [64, 64] bf16
        prefix_smem,  # [strips, 64] bf16, chosen pages of a strip up to a column, it included
        begin_smem,  # [strips] float32, chosen pages before a strip
        count_smem,  # [strips] float32, chosen pages in it
        ready,
    ):
        b, k, share = (lax.axis_index(name) for name in ("row", "head", "share"))
        strips = pl.ds(0, size // STRIP)
        plgpu.copy_gmem_to_smem(scores_gmem.at[b, k], scores_smem.at[strips], ready)
        candidates = jnp.clip(candidates_gmem[b], 0, M)
        sinks = jnp.minimum(sink_pages, candidates)
        total = jnp.minimum(num_pages, candidates)
        wanted = total - sinks  # pages to select by score

        # Lowest for sinks and what is no candidate.
        page = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=flat)
        key = plgpu.load(flat_gmem.at[b, k], layout=flat, optimized=False)
        key = jnp.where((page >= sinks) & (page < candidates), _order_preserving(key), LOWEST_KEY)

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
            below = jnp.where((key == threshold) & (page < middle), 1, 0).sum()
            enough = below >= ties
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        # The page number below which keys equal to the threshold are selected: mostly all are.
        low = jnp.where(both % UPPER > ties, 0, candidates)
        cutoff, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, candidates))

        row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=MATRIX)
        triangle_smem[...] = _flags(row <= column).astype(jnp.bfloat16)
        plgpu.barrier_wait(ready)

        def mark(block, before):
            """Fills prefix, begin and count of 64 strips; ``before`` pages are in earlier ones."""
            at = pl.ds(block * 64, 64)
            x = plgpu.load(scores_smem.at[at], layout=MATRIX, optimized=False)
            x = _order_preserving(x)
            number = (block * 64 + row) * STRIP + column
            chosen = (x > threshold) | ((x == threshold) & (number < cutoff)) | (number < sinks)
            chosen = _flags(chosen & (number < candidates))
            flags_smem[...] = chosen.astype(jnp.bfloat16)
            count_smem[at] = chosen.sum(axis=1)
            plgpu.commit_smem()
            prefix = matmul(flags_smem, triangle_smem, *SQUARE)
            prefix_smem[at] = prefix.astype(jnp.bfloat16)
            count = plgpu.load(count_smem.at[at], layout=PER_COLUMN)
            earlier = jnp.where(column < row, spread_columns(count, prefix), 0.0)
            begin_smem[at] = earlier.sum(axis=1) + before
            plgpu.commit_smem()
            return before + jnp.sum(count)

        if blocks == 1:
            mark(0, 0.0)
        else:
            lax.fori_loop(0, blocks, mark, jnp.float32(0))

        def find(i, _):
            """Writes the pages of 64 slots."""
            tile = share * tiles_of_share + i
            slot = (row + tile * 64).astype(jnp.float32)

            def gather(block, found):
                prefix, strip, place = found  # [64, 64], [64], [64]
                at = pl.ds(block * 64, 64)
                begin = spread_columns(plgpu.load(begin_smem.at[at], layout=PER_COLUMN), slot)
                count = spread_columns(plgpu.load(count_smem.at[at], layout=PER_COLUMN), slot)
                here = _flags((begin <= slot) & (slot < begin + count))
                flags_smem[...] = here.astype(jnp.bfloat16)
                plgpu.commit_smem()
                prefix += matmul(flags_smem, prefix_smem.at[at], *SQUARE)
                strip += (here * (column + block * 64).astype(jnp.float32)).sum(axis=1)
                place += (here * (slot - begin)).sum(axis=1)
                return prefix, strip, place

            nowhere = full((64,), 0.0, PER_ROW)
            prefix, strip, place = lax.fori_loop(
                0, blocks, gather, (full(SQUARE, 0.0, MATRIX), nowhere, nowhere)
            )
            within = _flags(prefix <= spread_rows(place, prefix)).sum(axis=1)
            found = (strip * STRIP + within).astype(jnp.int32)
            number = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=PER_ROW) + tile * 64
            found = jnp.where(number < total, found, -1)
            store_unoptimised(selected_gmem.at[b, k, pl.ds(tile * 64, 64)], found)
            return ()

        lax.fori_loop(0, tiles_of_share, find, ())

    strips, slots = 64 * blocks, 64 * slot_tiles
    transforms = tile_transforms(64, jnp.bfloat16)
    square = plgpu.SMEM(SQUARE, jnp.bfloat16, transforms=transforms)
    selected = plgpu.kernel(
        select,
        out_type=jax.ShapeDtypeStruct((B, Kr, slots), jnp.int32),
        grid=(B, Kr, shares),
        grid_names=("row", "head", "share"),
        scratch_types=[
            plgpu.SMEM((strips, STRIP), jnp.float32),
            square,
            square,
            plgpu.SMEM((strips, STRIP), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((strips,), jnp.float32),
            plgpu.SMEM((strips,), jnp.float32),
            plgpu.Barrier(),
        ],
    )(scores, scores.reshape(B, Kr, size // STRIP, STRIP), num_candidates)
    return selected[:, :, :num_pages]


def _refuse_unsupported_selection(scores: Array, num_pages: int) -> None:
    reasons = []
    if scores.dtype != jnp.float32:
        reasons.append(f"scores must be float32, got {scores.dtype}")
    if not 1 <= num_pages <= MOST_SELECTED_PAGES:
        reasons.append(f"1 to {MOST_SELECTED_PAGES} pages can be selected, got {num_pages}")
    refuse("select_pages", reasons)
