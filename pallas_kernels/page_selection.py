"""draft"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
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
LOWEST_KEY = -(2**31)


@dataclass(frozen=True, kw_only=True)
class Config:
    tiles: int = 2
    stages: int = 2


def page_scores(q, key_stats, page_table, length, *, page_size, config=Config()):
    B, Hr, D = q.shape
    Kr, N, g = key_stats.shape[:3]
    M = page_table.shape[1]
    G = Hr // Kr
    columns = 8 * pl.cdiv(G, 8)
    per_row = min(g, 128 // D)  # logical pages a row
    width = per_row * 2 * D
    page_rows = g // per_row
    tile_pages = ROWS // page_rows
    tiles, stages = config.tiles, min(config.stages, config.tiles)
    cta_pages = tiles * tile_pages
    logical = page_size // g
    chunks = pl.cdiv(M, cta_pages)

    rows = q.reshape(B * Hr, D)
    if B * Hr < columns:
        rows = jnp.pad(rows, ((0, columns - B * Hr), (0, 0)))
    query_rows = rows.shape[0]
    stats = key_stats.reshape(Kr, N, page_rows, width)

    def score_pages(q_gmem, stats_gmem, table_gmem, length_gmem, scores_gmem, raw_smem, a_smem, q_smem, best_smem, ready):
        b, k, c = (lax.axis_index(name) for name in ("row", "head", "chunk"))

        def page_ids(step):
            first = c * cta_pages + step * tile_pages
            return [table_gmem[b, jnp.minimum(first + j, M - 1)] for j in range(tile_pages)]

        ids = [page_ids(step) for step in range(stages)]
        n = length_gmem[b]
        pages = jnp.clip(cdiv(n, page_size) - c * cta_pages, 0, cta_pages)

        def fetch(step, ids):
            slot = lax.rem(step, jnp.int32(stages))
            for j, page in enumerate(ids):
                if j:
                    page = jnp.where(step * tile_pages + j < pages, page, ids[0])
                plgpu.copy_gmem_to_smem(
                    stats_gmem.at[k, page], raw_smem.at[slot, j], ready.at[slot]
                )

        for step in range(stages):
            pl.when(step * tile_pages < pages)(lambda step=step: fetch(jnp.int32(step), ids[step]))

        own = (b * Kr + k) * G
        first = jnp.minimum(own, query_rows - columns)
        query = plgpu.load(
            q_gmem.at[pl.ds(first, columns)].transpose((1, 0)),
            layout=plgpu.Layout.WGMMA_TRANSPOSED,
            optimized=False,
        )
        zero = jnp.zeros_like(query)
        for half, part in enumerate((jnp.maximum(query, zero), jnp.minimum(query, zero))):
            q_smem.at[:, pl.ds(half * D, D)].transpose((1, 0))[...] = part
        plgpu.commit_smem()

        def score_tile(step, _):
            slot = lax.rem(step, jnp.int32(stages))
            first_page = c * cta_pages + step * tile_pages
            seen_pages = pages - step * tile_pages

            @pl.when(seen_pages > 0)
            def _():
                plgpu.barrier_wait(ready.at[slot])
                for r in range(page_rows):
                    a_smem[pl.ds(r * tile_pages, tile_pages)] = plgpu.load(
                        raw_smem.at[slot, :, r],
                        layout=plgpu.Layout.SMEM_GMEM_COPY((tile_pages, width), jnp.bfloat16, 128),
                        optimized=False,
                    )
                plgpu.commit_smem()

                @pl.when(seen_pages > stages * tile_pages)
                def _():
                    fetch(step + stages, page_ids(step + stages))

            shape = (ROWS, columns)
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX) - (own - first)
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
            page = first_page + (row & (tile_pages - 1))
            number = lax.shift_right_logical(row, jnp.int32(tile_pages.bit_length() - 1)) * per_row
            best = full(shape, -jnp.inf, MATRIX)
            for part in range(per_row):
                score = matmul(
                    a_smem.at[:, pl.ds(part * 2 * D, 2 * D)], q_smem.transpose((1, 0)), *shape
                )
                token = page * page_size + (number + part) * logical
                seen = (token < n) & (column >= 0) & (column < G)
                best = jnp.maximum(best, jnp.where(seen, score, -jnp.inf))
            best_smem[...] = best.max(axis=1)
            plgpu.commit_smem()
            parts = [
                plgpu.load(best_smem.at[pl.ds(r * tile_pages, tile_pages)], layout=PER_COLUMN)
                for r in range(page_rows)
            ]
            best = parts[0]
            for x in parts[1:]:
                best = jnp.maximum(best, x)
            store_anyhow(scores_gmem.at[b, k, pl.ds(first_page, tile_pages)], best)
            return ()

        lax.fori_loop(0, tiles, score_tile, ())

    scores = plgpu.kernel(
        score_pages,
        out_type=jax.ShapeDtypeStruct((B, Kr, chunks * cta_pages), jnp.float32),
        grid=(B, Kr, chunks),
        grid_names=("row", "head", "chunk"),
        scratch_types=[
            plgpu.SMEM((stages, tile_pages, page_rows, width), jnp.bfloat16, transforms=(plgpu.TilingTransform((32,)), plgpu.SwizzleTransform(64))),
            plgpu.SMEM((ROWS, width), jnp.bfloat16, transforms=tile_transforms(width, jnp.bfloat16)),
            plgpu.SMEM((columns, 2 * D), jnp.bfloat16, transforms=tile_transforms(2 * D, jnp.bfloat16)),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=tile_pages, num_barriers=stages),
        ],
    )(rows, stats, page_table, length)
    return scores[:, :, :M]


STRIP = 64
MOST_IN_REGISTERS = 8192


def _order_preserving(scores):
    """int32 keys in the order of the float32 scores; both zeros give one key."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0.0, 0.0, scores), jnp.int32)
    return bits ^ (lax.shift_right_arithmetic(bits, jnp.full_like(bits, 31)) & 0x7FFFFFFF)


def select_pages(scores, num_candidates, *, num_pages, sink_pages, ordered=True, phases=9):
    B, Kr, M = scores.shape
    R = num_pages
    padding = -M % (128 if M <= MOST_IN_REGISTERS else MOST_IN_REGISTERS)
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, padding)))
    size = M + padding
    part = min(size, MOST_IN_REGISTERS)  # scores counted at once
    parts = size // part
    blocks = pl.cdiv(size, 64 * STRIP)
    slots = 64 * pl.cdiv(R, 64)
    copies = pl.cdiv(size, 128 * STRIP)
    flat = plgpu.Layout.WG_STRIDED((part,), vec_size=next(v for v in (4, 2, 1) if part % (128 * v) == 0))
    square = (64, 64)

    def select(flat_gmem, scores_gmem, candidates_gmem, out_gmem, scores_smem, mask_smem, prefix_smem, triangle_smem, begin_smem, count_smem, page_smem, key_smem, rank_smem, ready):
        b, k = (lax.axis_index(name) for name in ("row", "head"))
        for i in range(copies):
            strips = pl.ds(128 * i, min(128, size // STRIP - 128 * i))
            plgpu.copy_gmem_to_smem(scores_gmem.at[b, k, strips], scores_smem.at[strips], ready)
        candidates = jnp.clip(candidates_gmem[b], 0, M)
        sinks = jnp.minimum(sink_pages, candidates)
        total = jnp.minimum(R, candidates)
        wanted = total - sinks

        def keys(i):
            """Scores as keys, those of sinks and of what is no candidate lowest; page numbers."""
            page = plgpu.broadcasted_iota(jnp.int32, (part,), 0, layout=flat) + i * part
            x = plgpu.load(flat_gmem.at[b, k, pl.ds(i * part, part)], layout=flat, optimized=False)
            return jnp.where((page >= sinks) & (page < candidates), _order_preserving(x), LOWEST_KEY), page

        held = keys(0) if parts == 1 else None

        def total_of(f):
            if held is not None:
                return jnp.sum(f(*held))
            return lax.fori_loop(0, parts, lambda i, acc: acc + jnp.sum(f(*keys(i))), jnp.int32(0))

        def narrow(state):
            low, high = state
            span = high - low
            third = sum(lax.shift_right_logical(span, jnp.int32(s)) for s in (2, 4, 6))
            third = jnp.maximum(third, 1)
            first, second = low + third, low + 2 * third
            both = total_of(lambda x, _: jnp.where(x >= second, 65537, jnp.where(x >= first, 1, 0)))
            upper = lax.shift_right_logical(both, jnp.int32(16))
            lower = both & 0xFFFF
            new_low = jnp.where(upper >= wanted, second, jnp.where(lower >= wanted, first, low))
            new_high = jnp.where(lower < wanted, first - 1, jnp.where(upper < wanted, second - 1, high))
            done_at = jnp.where(lower == wanted, first, second)
            done = (lower == wanted) | (upper == wanted)
            return jnp.where(done, done_at, new_low), jnp.where(done, done_at, new_high)

        bottom = jnp.where(wanted > 0, LOWEST_KEY + 1, 0x7FFFFFFF)
        top = jnp.where(wanted > 0, 0x7F800000, 0x7FFFFFFF)
        threshold, _ = lax.while_loop(lambda s: s[0] < s[1], narrow, (bottom, top))

        both = total_of(lambda x, _: jnp.where(x > threshold, 65537, jnp.where(x == threshold, 1, 0)))
        greater = lax.shift_right_logical(both, jnp.int32(16))
        equal = (both & 0xFFFF) - greater
        ties = wanted - greater

        def halve(state):
            low, high = state
            middle = lax.div(low + high, jnp.int32(2))
            below = total_of(lambda x, page: jnp.where((x == threshold) & (page < middle), 1, 0))
            enough = below >= ties
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        cutoff, _ = lax.while_loop(
            lambda s: s[0] < s[1], halve, (jnp.where(equal > ties, 0, candidates), candidates)
        )
        if phases == 1:
            out_gmem[b, k, 0] = cutoff
            return

        row = plgpu.broadcasted_iota(jnp.int32, square, 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=MATRIX)

        def flags(x):
            return plgpu.layout_cast(jnp.where(x, 1.0, 0.0), MATRIX)

        triangle_smem[...] = flags(row <= column).astype(jnp.bfloat16)
        plgpu.barrier_wait(ready)

        def mark(block, before):
            x = plgpu.load(scores_smem.at[pl.ds(block * 64, 64)], layout=MATRIX, optimized=False)
            x = _order_preserving(x)
            page = (block * 64 + row) * STRIP + column
            chosen = (x > threshold) | ((x == threshold) & (page < cutoff)) | (page < sinks)
            chosen = flags(chosen & (page < candidates))
            mask_smem[...] = chosen.astype(jnp.bfloat16)
            count_smem[pl.ds(block * 64, 64)] = chosen.sum(axis=1)
            plgpu.commit_smem()
            prefix = matmul(mask_smem, triangle_smem, 64, 64)
            prefix_smem[pl.ds(block * 64, 64)] = prefix.astype(jnp.bfloat16)
            count = spread_columns(
                plgpu.load(count_smem.at[pl.ds(block * 64, 64)], layout=PER_COLUMN), prefix
            )
            begin = jnp.where(column < row, count, 0.0).sum(axis=1) + before
            begin_smem[pl.ds(block * 64, 64)] = begin
            plgpu.commit_smem()
            return before + jnp.sum(plgpu.load(count_smem.at[pl.ds(block * 64, 64)], layout=PER_COLUMN))

        if blocks == 1:
            mark(0, 0.0)
        else:
            lax.fori_loop(0, blocks, mark, jnp.float32(0))

        def find(tile, _):
            slot = (row + tile * 64).astype(jnp.float32)

            def gather(block, state):
                found, strip, place = state
                at = pl.ds(block * 64, 64)
                begin = spread_columns(plgpu.load(begin_smem.at[at], layout=PER_COLUMN), slot)
                count = spread_columns(plgpu.load(count_smem.at[at], layout=PER_COLUMN), slot)
                here = flags((begin <= slot) & (slot < begin + count))
                mask_smem[...] = here.astype(jnp.bfloat16)
                plgpu.commit_smem()
                found += matmul(mask_smem, prefix_smem.at[at], 64, 64)
                strip += (here * (column + block * 64).astype(jnp.float32)).sum(axis=1)
                place += (here * (slot - begin)).sum(axis=1)
                return found, strip, place

            found, strip, place = lax.fori_loop(
                0, blocks, gather, (full(square, 0.0, MATRIX), full((64,), 0.0, PER_ROW), full((64,), 0.0, PER_ROW))
            )
            within = flags(found <= spread_rows(place, found)).sum(axis=1)
            page = (strip * STRIP + within).astype(jnp.int32)
            slot = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=PER_ROW) + tile * 64
            page = jnp.where(slot < total, page, -1)
            if not ordered:
                store_anyhow(out_gmem.at[b, k, pl.ds(tile * 64, 64)], page)
            else:
                store_anyhow(page_smem.at[pl.ds(tile * 64, 64)], plgpu.layout_cast(page, PER_ROW))
                plgpu.commit_smem()
            return ()

        lax.fori_loop(0, slots // 64, find, ())
        if not ordered:
            return

        def fetch_keys(i, _):
            pages = [page_smem[i * 8 + j] for j in range(8)]
            at = [jnp.maximum(page, 0) for page in pages]
            found = [scores_smem[lax.div(x, jnp.int32(STRIP)), lax.rem(x, jnp.int32(STRIP))] for x in at]
            for j in range(8):
                x = found[j]
                x = jnp.where(pages[j] < sinks, jnp.inf, jnp.where(x == 0.0, 0.0, x))
                key_smem[i * 8 + j] = jnp.where(pages[j] < 0, -jnp.inf, x)
            return ()

        lax.fori_loop(0, slots // 8, fetch_keys, ())
        plgpu.commit_smem()

        def tile_at(tile):
            return pl.ds(tile * 64, 64)

        def rank(tile, _):
            mine = spread_rows(plgpu.load(key_smem.at[tile_at(tile)], layout=PER_ROW), row)

            def ahead(other, acc):
                x = spread_columns(plgpu.load(key_smem.at[tile_at(other)], layout=PER_COLUMN), row)
                first = (x > mine) | ((x == mine) & (column + other * 64 < row + tile * 64))
                return acc + plgpu.layout_cast(flags(first).sum(axis=1), PER_ROW)

            store_anyhow(rank_smem.at[tile_at(tile)], lax.fori_loop(0, slots // 64, ahead, full((64,), 0.0, PER_ROW)))
            return ()

        lax.fori_loop(0, slots // 64, rank, ())
        plgpu.commit_smem()

        def emit(tile, _):
            place = (row + tile * 64).astype(jnp.float32)

            def pick(other, acc):
                at = tile_at(other)
                x = spread_columns(plgpu.load(rank_smem.at[at], layout=PER_COLUMN), row)
                page = spread_columns(plgpu.load(page_smem.at[at], layout=PER_COLUMN), row)
                hit = plgpu.layout_cast(jnp.where(x == place, page, 0), MATRIX)
                return acc + plgpu.layout_cast(hit.sum(axis=1), PER_ROW)

            zero = plgpu.layout_cast(jnp.zeros((64,), jnp.int32), PER_ROW)
            store_anyhow(
                out_gmem.at[b, k, tile_at(tile)], lax.fori_loop(0, slots // 64, pick, zero)
            )
            return ()

        lax.fori_loop(0, slots // 64, emit, ())

    tile = plgpu.SMEM(square, jnp.bfloat16, transforms=tile_transforms(64, jnp.bfloat16))
    out = plgpu.kernel(
        select,
        out_type=jax.ShapeDtypeStruct((B, Kr, slots), jnp.int32),
        grid=(B, Kr),
        grid_names=("row", "head"),
        scratch_types=[
            plgpu.SMEM((blocks * 64, STRIP), jnp.float32),
            tile,
            plgpu.SMEM((blocks * 64, STRIP), jnp.bfloat16, transforms=tile_transforms(64, jnp.bfloat16)),
            tile,
            plgpu.SMEM((blocks * 64,), jnp.float32),
            plgpu.SMEM((blocks * 64,), jnp.float32),
            plgpu.SMEM((slots,), jnp.int32),
            plgpu.SMEM((slots,), jnp.float32),
            plgpu.SMEM((slots,), jnp.float32),
            plgpu.Barrier(num_arrivals=copies),
        ],
    )(scores, scores.reshape(B, Kr, size // STRIP, STRIP), num_candidates)
    return out[:, :, :R]
