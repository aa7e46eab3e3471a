"""Prefill attention over paged history and the chunk itself: both head classes in one launch.

Index map (Hopper, Mosaic GPU). A CTA holds a tile of 128 queries of one query head (see
``query_tiles``) and visits the blocks of 128 keys they can see: first those of the history, read
from pages through the table, then those of the chunk, read from ``k`` and ``v``.

      keys             0 . . . . . . . . . . . . . start . . . . . . . . . start + length
      blocks           |  0  |  1  |  2  |  3  |  4 ] |  5  |  6  |  7  |  8 ]  each part has a
                       `------- history ----------' `------- chunk -------'    ragged last block
      retrieval tile   x     x     x     x     x      x     x     \\             causal
      with a list      x           x                  x           \\             what it lists
      streaming tile   x     (gap: never visited)  \\    x     x     \\             sink, local
                       sink                           local

      program          (tiles - 1 - tile) * G + query head in the group, of each KV head in turn,
                       of each chunk in turn

Chunks of several sequences are one launch: short prompts would else wait for launches.

Tiles of a head are launched from the last, which sees most, to the first; the tiles that run
together read the same KV head at about the same place, so that K and V come from L2. Streaming
heads come last and fill the SMs that long tiles leave.

Masks cost only where they matter: a block is masked if some of its keys are hidden from some of
its queries (the diagonal, ragged ends, the edges of the window), else not even compared.

What must be computed: 4 * D operations for each visible pair of query and key; a block of the
diagonal does twice its share. What must move: per tile, K and V of its blocks, 4 * 128 * D bytes a
block from L2; q and out once.

What must not be read: V rows of keys that no query of the chunk sees are zeroed in shared memory
(ragged ends; edges of the window in the history), their scores are replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.chunk_rows import rows_or_one, scan_rows
from pallas_kernels.hopper.mosaic import MATRIX, cdiv, refuse, unsupported
from pallas_kernels.hopper.query_tiles import (
    BLOCK,
    HALF,
    ROWS,
    WARPGROUPS,
    Work,
    attend,
    copy_pages,
    tile_scratch,
    zero_rows,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared
from pallas_kernels.kv_codes import float_pages, kv_kind
from pallas_kernels.types import BlockList, KVPages

# The window of a retrieval head: longer than any sequence.
EVERYTHING = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call; ``choose_config`` gives a good one."""

    stages: int  # blocks of K and V in shared memory

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1, got {self.stages}")


def choose_config(head_dim: int) -> Config:
    """The configuration for heads of ``head_dim`` channels."""
    # Two blocks of 128 channels fill 128 KB of the SM's 227; one block is in use while the other
    # arrives.
    return Config(stages=256 // head_dim)


@rows_or_one(
    *("q", "k", "v", "page_table", "streaming_table", "start", "length", "blocks"), results=True
)
@partial(jax.jit, static_argnames=("sink", "local", "config"))
def prefill_attention(
    q: Float[Array, "R T H D"],
    k: Float[Array, "R T Hk D"],
    v: Float[Array, "R T Hk D"],
    retrieval: KVPages,
    streaming: KVPages,
    page_table: Int[Array, "R M"],
    streaming_table: Int[Array, "R M"],
    start: Int[Array, " R"],
    length: Int[Array, " R"],
    *,
    sink: int,
    local: int,
    blocks: BlockList | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "R T H D"], Float[Array, "R T H"]]:
    """``pallas_kernels.api.prefill_attention`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    q, k and v bf16; D 64 or 128; P 16 to 128; any T and group. Pages bf16, or codes: then the pages
    that the table names are first converted to bf16, all of them, by XLA. Shapes are those the api
    has checked. Raises ``NotImplementedError`` for anything else.
    """
    pools = {"retrieval pages": retrieval, "streaming pages": streaming}
    refuse("prefill_attention", unsupported(q.shape[3], {"q": q, "k": k, "v": v}, pools))
    R, T, _, D = q.shape
    if R > 1 and any(kv_kind(pool.k.dtype) is not None for pool in pools.values()):
        # One after the other: room for the pages of one is needed, as numbers.
        how = {"sink": sink, "local": local, "config": config}

        def attend_row(_: None, row: tuple) -> tuple[None, tuple[Array, Array]]:
            (q, k, v), bounds, blocks = row
            return None, prefill_attention(
                q, k, v, retrieval, streaming, *bounds, blocks=blocks, **how
            )

        bounds = page_table, streaming_table, start, length
        return scan_rows(attend_row, None, ((q, k, v), bounds, blocks))[1]
    classes = [
        _float_pages(pool, table)
        for pool, table in ((retrieval, page_table), (streaming, streaming_table))
        if pool.k.shape[0] > 0
    ]
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, -T % ROWS), (0, 0), (0, 0))).reshape(-1, *x.shape[2:])
        for x in (q, k, v)
    )
    if blocks is not None:
        blocks = jax.tree.map(lambda x: x.swapaxes(0, 1), blocks)
    out, lse = _attend_chunks(
        q,
        k,
        v,
        [pool for pool, _ in classes],
        jnp.stack([table for _, table in classes]),
        jnp.stack([start, length, jnp.full((R,), retrieval.k.shape[0], jnp.int32)], axis=1),
        blocks if retrieval.k.shape[0] > 0 else None,
        (sink, min(local, EVERYTHING)),
        choose_config(D) if config is None else config,
    )
    out, lse = (x.reshape(R, -1, *x.shape[1:])[:, :T] for x in (out, lse.T))
    return out, lse


def _float_pages(pool: KVPages, table: Int[Array, "R M"]) -> tuple[KVPages, Int[Array, "R M"]]:
    """``float_pages``; R is 1 where there are codes."""
    pool, flat = float_pages(pool, table.reshape(-1), jnp.bfloat16)
    return pool, flat.reshape(table.shape)


def _attend_chunks(
    q: Float[Array, "R*T H D"],
    k: Float[Array, "R*T Hk D"],
    v: Float[Array, "R*T Hk D"],
    pools: list[KVPages],  # bf16, of the classes that have heads
    tables: Int[Array, "classes R M"],
    bounds: Int[Array, "R 3"],  # start, length, split
    blocks: BlockList | None,  # heads first: [Kr, R, tiles, L]
    window: tuple[int, int],  # sink, local
    config: Config,
) -> tuple[Float[Array, "R*T H D"], Float[Array, "H R*T"]]:
    """T is a multiple of 128."""
    (tokens, H, D), P, Hk, R = q.shape, pools[0].k.shape[2], k.shape[1], bounds.shape[0]
    settings = _Settings(R, tokens // R, H, Hk, D, P, window, config.stages)
    out, lse = call_shared(
        _make_kernel,
        settings,
        (q, k, v, tables, bounds, pools, blocks),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((H, tokens), jnp.float32)),
        longest=(*[None] * 5, Hk, Hk),
        longest_results=(None, None),
    )
    return out, lse


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    rows: int  # R
    tokens: int  # T
    heads: int  # H
    kv_heads: int  # Hk
    head_dim: int  # D
    page_size: int  # P
    window: tuple[int, int]  # sink, local
    stages: int


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    R, T, H, kv_heads, D, P, window, stages = settings

    def attend_chunk(
        q_gmem,  # q, k, v, tables, bounds as above
        k_gmem,
        v_gmem,
        tables_gmem,
        bounds_gmem,
        pools_gmem,  # k, v [Kp, N, P, D]
        lists_gmem,  # ids [Kr, R, tiles, L], counts [Kr, R, tiles]; None: everything is attended
        out_gmem,  # [R * T, H, D]
        lse_gmem,  # [H, R * T] float32
        tile,  # a Tile
    ):
        plan = partial(
            _plan,
            (q_gmem, out_gmem, lse_gmem),
            (k_gmem, v_gmem),
            pools_gmem,
            tables_gmem,
            bounds_gmem,
            lists_gmem,
            T,
            window,
        )
        attend(tile, plan)

    return plgpu.kernel(
        attend_chunk,
        out_type=results,
        grid=(R, kv_heads, T // ROWS * (H // kv_heads)),
        grid_names=("row", "kv_head", "program"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[tile_scratch(D, jnp.bfloat16, stages, P)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _plan(
    rows_gmem: tuple,  # q [R * T, H, D], out [R * T, H, D], lse [H, R * T]
    chunk_gmem: tuple,  # k, v [R * T, Hk, D]
    pools_gmem: list[KVPages],  # k, v [Kp, N, P, D]
    tables_gmem,  # [classes, R, M]
    bounds_gmem,  # [R, 3]
    lists_gmem,  # ids [Kr, R, tiles, L], counts [Kr, R, tiles]; or None
    T: int,
    window: tuple[int, int],
) -> Work:
    """Which blocks the tile of this program attends, and how."""
    q_gmem, out_gmem, lse_gmem = rows_gmem
    H = q_gmem.shape[1]
    M, P = tables_gmem.shape[2], pools_gmem[0].k.shape[2]
    G, tiles, pages_per_block = H // chunk_gmem[0].shape[1], T // ROWS, BLOCK // P
    sink, local = window

    row, kv_head, program = (lax.axis_index(name) for name in ("row", "kv_head", "program"))
    tile = tiles - 1 - lax.div(program, jnp.int32(G))
    first = tile * ROWS  # of the tile's queries
    head = kv_head * G + lax.rem(program, jnp.int32(G))
    start, length, split = (bounds_gmem[row, i] for i in range(3))
    retrieval = kv_head < split
    near = jnp.where(retrieval, EVERYTHING, local)

    history_blocks = cdiv(start, BLOCK)
    exists = first < length  # a tile of padding attends nothing

    def block_at(position):
        """Number of the block that holds a position."""
        of_history = position < start
        number = lax.div(position - jnp.where(of_history, 0, start), jnp.int32(BLOCK))
        return number + jnp.where(of_history, 0, history_blocks)

    # Of the blocks up to the diagonal those of the sink, 0..sink_blocks-1, and, ``gap`` blocks
    # later, the local ones.
    end = jnp.minimum(first + ROWS, length)
    total = jnp.where(exists, history_blocks + cdiv(end, BLOCK), 0)
    sink_blocks = jnp.minimum(block_at(jnp.int32(sink - 1)) + 1 if sink > 0 else 0, total)
    oldest_seen = jnp.maximum(start + first - near + 1, 0)  # by the tile's first query, sink aside
    gap = jnp.minimum(jnp.maximum(block_at(oldest_seen) - sink_blocks, 0), total - sink_blocks)

    def visited(step):
        return step + jnp.where(step < sink_blocks, 0, gap)

    def listed(step):
        # Of a step after the last one, too: that is not used, but read.
        entry = jnp.minimum(step, lists_gmem.ids.shape[3] - 1)
        block = lists_gmem.ids[kv_head, row, tile, entry]
        return jnp.maximum(block, 0)

    def listed_count():
        count = jnp.minimum(lists_gmem.counts[kv_head, row, tile], lists_gmem.ids.shape[3])
        return jnp.where(exists, count, 0)

    def of_class(retrieval_heads, streaming_heads, *args):
        if lists_gmem is None:
            return streaming_heads(*args)
        if len(pools_gmem) == 1:
            return retrieval_heads(*args)
        return lax.cond(retrieval, retrieval_heads, streaming_heads, *args)

    def place(block):
        """(whether of the history, number there, position of the first key, end of keys)."""
        of_history = block < history_blocks
        number = block - jnp.where(of_history, 0, history_blocks)
        begin = number * BLOCK + jnp.where(of_history, 0, start)
        return of_history, number, begin, jnp.where(of_history, start, start + length)

    def rows_of(half):
        rows = pl.ds(row * T + first + half * HALF, HALF)
        return q_gmem.at[rows, head], out_gmem.at[rows, head], lse_gmem.at[head, rows]

    def fetch(block, part, to, ready):
        of_history, number, _, _ = place(block)

        def from_pool(index, head):
            def page_id(j):
                return tables_gmem[index, row, jnp.minimum(number * pages_per_block + j, M - 1)]

            copy_pages(pools_gmem[index][part], head, page_id, to, ready)

        @pl.when(of_history)
        def _():
            if len(pools_gmem) == 1:
                from_pool(0, kv_head)
            else:
                pl.when(retrieval)(lambda: from_pool(0, kv_head))
                pl.when(kv_head >= split)(lambda: from_pool(1, kv_head - split))

        @pl.when(jnp.logical_not(of_history))
        def _():
            for j in range(0, BLOCK, P):  # in as many copies as blocks of the history
                tokens = pl.ds(row * T + number * BLOCK + j, P)
                plgpu.copy_gmem_to_smem(
                    chunk_gmem[part].at[tokens, kv_head], to.at[pl.ds(j, P)], ready
                )

    def mask(block, half, scores):
        _, _, begin, end = place(block)
        query = start + first + half * HALF  # the oldest of the warpgroup's queries
        newest = query + HALF - 1
        in_window = (begin + BLOCK <= sink) | (begin > newest - near)
        whole = (begin + BLOCK <= end) & (begin + BLOCK - 1 <= query) & in_window

        def hide(scores):
            i, j = (
                plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=MATRIX)
                for axis in (0, 1)
            )
            i, j = i + query, j + begin
            seen = (j <= i) & (j < end) & ((j < sink) | (j > i - near))
            return jnp.where(seen, scores, -jnp.inf)

        return lax.cond(whole, lambda scores: scores, hide, scores)

    def clean(block, values):
        of_history, _, begin, end = place(block)
        # What the chunk's first query does not see of the history, none does.
        gap_end = jnp.where(of_history, start - near, -1)
        in_gap = (begin + BLOCK > sink) & (begin <= gap_end)

        @pl.when((begin + BLOCK > end) | in_gap)
        def _():
            def seen_by_some(row):
                j = row + begin
                return (j < end) & ((j < sink) | (j > gap_end))

            zero_rows(values, seen_by_some)

    return Work(
        steps=of_class(listed_count, lambda: total - gap),
        rows_of=rows_of,
        block=partial(of_class, listed, visited),
        fetch=fetch,
        mask=mask,
        clean=clean,
    )
