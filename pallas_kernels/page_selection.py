"""Page selection for decode: scores of all pages, then the best of them, Hopper (Mosaic GPU).

``page_scores``. For a weight w of the lower bound between 0 and 1

    max(q * kmax, q * kmin) + w * min(q * kmax, q * kmin) = q+ * kmax + q- * kmin

with q+ = max(q, w * q) and q- = min(q, w * q), so the score of a logical page is one product, 2 D
long, of [q+ | q-] with its statistics [kmax | kmin]. The grid is (row b, KV head k, chunk of
pages), one warpgroup of 128 threads each; a chunk is a few tiles:

      page_table[b]      |  page 7  |  page 2  |  page 9  |  ...            one copy (TMA) a page
      statistics of 7    | 0: kmax kmin | 1: kmax kmin | 2: ... | 3: ... |  g logical pages
      tile [64, W]       logical 0 of every page; logical 1 of every page; ...

      scores [64, N] = tile [64, W] @ [q+ | q-]^T [W, N]    N = 8 or 16, the group's query heads
      maximum over the columns, then over the logical pages of a page

A row of the tile is one logical page, or for D = 64 two, whose scores are two products. wgmma needs
rows in units of eight and a page has fewer, so a page lands in plain shared memory and passes
through registers into the tile.

What must move: B * Kr * M pages of 4 * g * D bytes, once. A page past ``length`` is never fetched;
scores of logical pages without tokens are replaced, so what their statistics hold is of no account.

``select_pages``. The grid is (row b, KV head k). Scores become int32 keys of the same order; a
search with two thresholds a step finds the key of the last page selected, counting all keys each
step; among keys equal to it a second search finds the page number up to which they are selected.
Pages are then compacted without a scatter, by exact products of 0 and 1 in bf16, over the matrix
of pages [strips, 64]:

      prefix [strips, 64] = chosen [strips, 64] @ upper triangle [64, 64]
      begin [strips]      = chosen pages in the strips before
      found [slots, 64]   = (slot lies in strip) [slots, strips] @ prefix
      page of a slot      = 64 * its strip + how many of found are too small

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

from pallas_kernels.mosaic import (
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
    store_anyhow,
    tile_transforms,
)

ROWS = 64  # rows of a tile: wgmma's M
STRIP = 64  # pages in a row of the matrix that compaction works on
SQUARE = (64, 64)
# Keys that a thread block holds in registers while it counts: pages of 64 of 768K tokens.
MOST_IN_REGISTERS = 12288
# Longer lists are read anew each time, so many keys at once.
ROUND = 8192
MOST_PAGES = 32768
MOST_SELECTED = 512
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


@partial(jax.jit, static_argnames=("page_size", "lower_bound_weight", "config"))
def page_scores(
    q: Float[Array, "B Hr D"],
    key_stats: Float[Array, "Kr N g 2 D"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
    *,
    page_size: int,
    lower_bound_weight: float = 0.0,
    config: Config | None = None,
) -> Float[Array, "B Kr M"]:
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
    per_row = min(g, 128 // D)  # logical pages in a row of the tile
    W = per_row * 2 * D
    page_rows = g // per_row  # rows of the tile that a page has
    tile_pages = ROWS // page_rows
    logical_page_size = page_size // g
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
        stats_gmem,  # [Kr, N, page_rows, W] bf16
        table_gmem,  # [B, M] int32
        length_gmem,  # [B] int32
        scores_gmem,  # [B, Kr, chunks * chunk_pages] float32, output
        page_smem,  # [stages, tile_pages, page_rows, W] bf16, pages as fetched
        tile_smem,  # [64, W] bf16
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
                    stats_gmem.at[k, page], page_smem.at[slot, j], ready.at[slot]
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
        page_of_row = row & (tile_pages - 1)  # a power of two
        logical_of_row = per_row * (row >> (tile_pages.bit_length() - 1))

        def score_tile(step, _):
            slot = lax.rem(step, jnp.int32(stages))
            first_page = first_of_chunk + step * tile_pages

            @pl.when(step * tile_pages < pages)
            def _():
                plgpu.barrier_wait(ready.at[slot])
                for r in range(page_rows):
                    tile_smem[pl.ds(r * tile_pages, tile_pages)] = plgpu.load(
                        page_smem.at[slot, :, r],
                        layout=plgpu.Layout.SMEM_GMEM_COPY((tile_pages, W), q.dtype, 128),
                        optimized=False,  # in whatever pattern suits storing the tile
                    )
                plgpu.commit_smem()

                @pl.when((step + stages) * tile_pages < pages)
                def _():
                    fetch(step + stages, page_ids(step + stages))

            # In a tile without pages this multiplies leftovers, and every score is replaced.
            best = full(shape, -jnp.inf, MATRIX)
            for part in range(per_row):
                statistics = tile_smem.at[:, pl.ds(part * 2 * D, 2 * D)]
                score = matmul(statistics, q_smem.transpose((1, 0)), *shape)
                first_token = (first_page + page_of_row) * page_size + (
                    logical_of_row + part
                ) * logical_page_size
                score = jnp.where((first_token < tokens) & of_group, score, -jnp.inf)
                best = jnp.maximum(best, score)
            best_smem[...] = best.max(axis=1)
            plgpu.commit_smem()
            best, *others = (
                plgpu.load(best_smem.at[pl.ds(r * tile_pages, tile_pages)], layout=PER_COLUMN)
                for r in range(page_rows)
            )
            for other in others:
                best = jnp.maximum(best, other)
            store_anyhow(scores_gmem.at[b, k, pl.ds(first_page, tile_pages)], best)
            return ()

        lax.fori_loop(0, tiles, score_tile, ())

    # Rows of a page are read apart, each a multiple of 512 bytes from the first. The pattern of a
    # swizzle of 128 bytes, which Mosaic would choose, repeats every 1024 only and the odd rows
    # would be read wrongly (JAX 0.11.2 and 0.12.0.1; the interpreter does not show it).
    page_transforms = (plgpu.TilingTransform((32,)), plgpu.SwizzleTransform(64))
    scores = plgpu.kernel(
        score_pages,
        out_type=jax.ShapeDtypeStruct((B, Kr, chunks * chunk_pages), jnp.float32),
        grid=(B, Kr, chunks),
        grid_names=("row", "head", "chunk"),
        scratch_types=[
            plgpu.SMEM((stages, tile_pages, page_rows, W), q.dtype, transforms=page_transforms),
            plgpu.SMEM((ROWS, W), q.dtype, transforms=tile_transforms(W, q.dtype)),
            plgpu.SMEM((columns, 2 * D), q.dtype, transforms=tile_transforms(2 * D, q.dtype)),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=tile_pages, num_barriers=stages),
        ],
    )(queries, key_stats.reshape(Kr, N, page_rows, W), page_table, length)
    return scores[:, :, :M]


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

    float32 scores of at most 32768 pages, at most 512 of them selected. Raises
    ``NotImplementedError`` for anything else.
    """
    B, Kr, M = scores.shape
    _refuse_unsupported_selection(scores, num_pages)
    # What one register of each of 128 threads holds; or a whole number of rounds.
    padding = -M % (128 if M <= MOST_IN_REGISTERS else ROUND)
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, padding)))
    size = M + padding
    part = size if size <= MOST_IN_REGISTERS else ROUND  # scores counted at once
    blocks = pl.cdiv(size, 64 * STRIP)  # of 64 strips
    slot_tiles = pl.cdiv(num_pages, 64)
    copies = pl.cdiv(size, 128 * STRIP)  # a copy moves at most 256 strips
    vector = next(n for n in (4, 2, 1) if part % (128 * n) == 0)
    flat = plgpu.Layout.WG_STRIDED((part,), vec_size=vector)

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
        b, k = (lax.axis_index(name) for name in ("row", "head"))
        for i in range(copies):
            strips = pl.ds(128 * i, min(128, size // STRIP - 128 * i))
            plgpu.copy_gmem_to_smem(scores_gmem.at[b, k, strips], scores_smem.at[strips], ready)
        candidates = jnp.clip(candidates_gmem[b], 0, M)
        sinks = jnp.minimum(sink_pages, candidates)
        total = jnp.minimum(num_pages, candidates)
        wanted = total - sinks  # pages to select by score

        def keys(i):
            """Keys of part ``i``, lowest for sinks and what is no candidate; page numbers."""
            page = plgpu.broadcasted_iota(jnp.int32, (part,), 0, layout=flat) + i * part
            x = plgpu.load(flat_gmem.at[b, k, pl.ds(i * part, part)], layout=flat, optimized=False)
            eligible = (page >= sinks) & (page < candidates)
            return jnp.where(eligible, _order_preserving(x), LOWEST_KEY), page

        held = keys(0) if part == size else None

        def total_of(f):
            """Sum of f(key, page) over all pages."""
            if held is not None:
                return jnp.sum(f(*held))
            return lax.fori_loop(
                0, size // part, lambda i, acc: acc + jnp.sum(f(*keys(i))), jnp.int32(0)
            )

        def largest(f):
            """Maximum of f(key, page) over all pages."""
            if held is not None:
                return jnp.max(f(*held))
            return lax.fori_loop(
                0,
                size // part,
                lambda i, acc: jnp.maximum(acc, jnp.max(f(*keys(i)))),
                jnp.int32(LOWEST_KEY),
            )

        def narrow(bounds):
            """``low`` has at least ``wanted`` keys at or above it, every key above ``high`` fewer.

            Two thresholds near a third and two thirds of the way; done where a count is exact.
            """
            low, high = bounds
            span = high - low  # unsigned
            third = sum(lax.shift_right_logical(span, jnp.int32(n)) for n in (2, 4, 6))
            third = jnp.maximum(third, 1)
            first, second = low + third, low + 2 * third
            both = total_of(
                lambda key, _: jnp.where(key >= second, UPPER + 1, jnp.where(key >= first, 1, 0))
            )
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
        least = ~largest(lambda key, _: jnp.where(key == LOWEST_KEY, key, ~key))
        greatest = largest(lambda key, _: key)
        low = jnp.where(wanted > 0, least, HIGHEST_KEY)
        high = jnp.where(wanted > 0, greatest, HIGHEST_KEY)
        threshold, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], narrow, (low, high))

        both = total_of(
            lambda key, _: jnp.where(key > threshold, UPPER, jnp.where(key == threshold, 1, 0))
        )
        ties = wanted - lax.shift_right_logical(both, jnp.int32(16))

        def halve(bounds):
            low, high = bounds
            middle = lax.div(low + high, jnp.int32(2))
            below = total_of(
                lambda key, page: jnp.where((key == threshold) & (page < middle), 1, 0)
            )
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
            key = plgpu.load(scores_smem.at[at], layout=MATRIX, optimized=False)
            key = _order_preserving(key)
            page = (block * 64 + row) * STRIP + column
            chosen = (key > threshold) | ((key == threshold) & (page < cutoff)) | (page < sinks)
            chosen = _flags(chosen & (page < candidates))
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

        def find(tile, _):
            """Writes the pages of 64 slots."""
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
            page = (strip * STRIP + within).astype(jnp.int32)
            number = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=PER_ROW) + tile * 64
            page = jnp.where(number < total, page, -1)
            store_anyhow(selected_gmem.at[b, k, pl.ds(tile * 64, 64)], page)
            return ()

        lax.fori_loop(0, slot_tiles, find, ())

    strips, slots = 64 * blocks, 64 * slot_tiles
    transforms = tile_transforms(64, jnp.bfloat16)
    square = plgpu.SMEM(SQUARE, jnp.bfloat16, transforms=transforms)
    selected = plgpu.kernel(
        select,
        out_type=jax.ShapeDtypeStruct((B, Kr, slots), jnp.int32),
        grid=(B, Kr),
        grid_names=("row", "head"),
        scratch_types=[
            plgpu.SMEM((strips, STRIP), jnp.float32),
            square,
            square,
            plgpu.SMEM((strips, STRIP), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((strips,), jnp.float32),
            plgpu.SMEM((strips,), jnp.float32),
            plgpu.Barrier(num_arrivals=copies),
        ],
    )(scores, scores.reshape(B, Kr, size // STRIP, STRIP), num_candidates)
    return selected[:, :, :num_pages]


def _refuse_unsupported_selection(scores: Array, num_pages: int) -> None:
    reasons = []
    if scores.dtype != jnp.float32:
        reasons.append(f"scores must be float32, got {scores.dtype}")
    if scores.shape[2] > MOST_PAGES:
        reasons.append(f"at most {MOST_PAGES} pages, got {scores.shape[2]}")
    if not 1 <= num_pages <= MOST_SELECTED:
        reasons.append(f"1 to {MOST_SELECTED} pages can be selected, got {num_pages}")
    refuse("select_pages", reasons)
