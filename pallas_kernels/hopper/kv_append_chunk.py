"""The new keys and values of a prefill chunk into their pages, in place, Hopper (Mosaic GPU).

Prefill, ``append_kv_chunk``. The grid is (chunk r, page i of it, keys or values, KV head h). A
chunk's tokens stand at positions start, start + 1, ...; its pages hold P of them, the first and the
last fewer:

      positions     |  page s  | page s+1 | page s+2 |           s = start // P
      tokens              |###################|                  start + [0, length)
      page i        |    0     |    1     |    2     |
      its places          [begin, P)      [0, end)               bf16 tile [P, D] of any of them

      tile --TMA--> shared memory --TMA--> a whole page of a pool
                      |  |  \\--8 rows or 1 at a time--> places of a page written in part
                      |  \\--registers--> codes and scales, shared memory, then as above
                      \\--registers--> kmax, kmin of each logical page

A page is also written in part if the streaming heads keep only some of its tokens (a ring does not
keep what has left the window). A page of which they keep nothing is not read.

What must move: k and v once from where the model left them, and each token written once: T * Hk *
2 * D * (2 + 2, 1 or 1/2) bytes, less for streaming heads, for each key and its value 8 more with
codes of 8 bits, 16 with codes of 4, and 4 * D bytes of statistics a logical page and head.
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

from pallas_kernels.chunk_rows import rows_or_one
from pallas_kernels.hopper.kv_append import (
    append_in_place,
    load_unoptimised,
    quantize,
    row_per_warp,
    unsupported,
)
from pallas_kernels.hopper.mosaic import cdiv, refuse, store_unoptimised
from pallas_kernels.hopper.shared_kernel import Shapes, sizes
from pallas_kernels.kv_codes import CODE_TYPES, KV_KINDS, KVKind, kv_kind, stored_channels
from pallas_kernels.types import KVPages

# Rows of a tile that are in registers at once: 16 x 128 float32 are 16 registers a thread.
ROWS_AT_ONCE = 16
# Rows of a tile that are written to a page at once.
ROWS_OF_STORE = 8
# Stand for a page id where a page of the chunk has none: no token is written, or each has its own.
NO_PAGE, MANY_PAGES = -1, -2


@rows_or_one("k", "v", "page_table", "streaming_page", "start", "length", results=False)
@jax.jit
def append_kv_chunk(
    k: Float[Array, "R T Hk D"],
    v: Float[Array, "R T Hk D"],
    retrieval: KVPages,
    streaming: KVPages,
    key_stats: Float[Array, "Kq N g 2 D"] | None,
    page_table: Int[Array, "R M"],
    streaming_page: Int[Array, "R T"],
    start: Int[Array, " R"],
    length: Int[Array, " R"],
) -> tuple[KVPages, KVPages, Float[Array, "Kq N g 2 D"] | None]:
    """``pallas_kernels.api.append_kv_chunk`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    k and v bf16, pages bf16 or codes, statistics bf16 or float32; D 64 or 128; P 16 to 128. Shapes
    are those the api has checked. Raises ``NotImplementedError`` for anything else.
    """
    P = retrieval.k.shape[2]
    reasons = unsupported((k, v), retrieval, streaming, key_stats)
    if P not in (16, 32, 64, 128):
        reasons.append(f"page size must be 16, 32, 64 or 128, got {P}")
    if key_stats is not None and P // key_stats.shape[2] < 4:
        reasons.append(f"logical pages must hold 4 tokens or more, got {P // key_stats.shape[2]}")
    refuse("append_kv_chunk", reasons)
    missing = max(P - k.shape[1], 0)  # a tile of P tokens must lie inside the chunk
    k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (k, v))
    streaming_page = jnp.pad(streaming_page, ((0, 0), (0, missing)), constant_values=NO_PAGE)
    token_page = _inside(streaming_page, streaming)
    chunk = _Chunk(
        k=k.reshape(-1, *k.shape[2:]),
        v=v.reshape(-1, *v.shape[2:]),
        page_table=page_table,
        token_page=token_page,
        ring_page=jax.vmap(partial(_page_of_ring, P=P))(token_page, start, length),
        start=start,
        length=length,
    )
    return _append_pages(chunk, retrieval, streaming, key_stats)


class _Chunk(NamedTuple):
    """What the kernel reads, in device memory."""

    k: Any  # [R * T, Hk, D] bf16
    v: Any  # [R * T, Hk, D] bf16
    page_table: Any  # [R, M] int32, of the retrieval pool
    token_page: Any  # [R, T] int32: page of the streaming pool that a token goes to, or NO_PAGE
    ring_page: Any  # [R, pages] int32: the same for a page of the chunk, or MANY_PAGES
    start: Any  # [R] int32
    length: Any  # [R] int32


class _Tile(NamedTuple):
    """Shared memory and barrier of a CTA."""

    tokens: Any  # [P, D] bf16
    ready: Any  # barrier
    codes: Any  # a _Stored for each kind of codes that a pool has


class _Stored(NamedTuple):
    """The tile in the form that a pool has, in shared memory."""

    vectors: Any  # [P, D], of codes of 4 bits [P, D / 2]
    scales: Any = None  # one [P] or two, for codes


class _Span(NamedTuple):
    """The chunk's tokens of one page: which places of it they take, and which rows of the tile."""

    first: Any  # the token at place 0; may be negative
    begin: Any  # places [begin, end) are written
    end: Any
    shift: Any  # place p is row p + shift of the tile


class _Target(NamedTuple):
    """Keys or values of one page of the chunk, and where they are written."""

    source: Any  # [P, D] bf16, in device memory
    pages: Any  # [K, N, P, D or D / 2]
    scales: Any  # one [K, N, P] or two, or None
    stats: Any  # [Kq, N, g, 2, D], or None; of the first heads
    ranked: Any  # Kq
    head: Any
    page: Any  # physical id for all tokens, NO_PAGE or MANY_PAGES
    page_of_token: Callable[[Any], Any]  # the page of each token, for MANY_PAGES and edges


def _inside(page, pool: KVPages):
    """The page id, or NO_PAGE for one outside the pool: written nowhere, as in the reference."""
    return jnp.where((page >= 0) & (page < pool.k.shape[1]), page, NO_PAGE)


def _page_of_ring(
    token_page: Int[Array, " T"], start: Int[Array, ""], length: Int[Array, ""], P: int
) -> Int[Array, " pages"]:
    """The one page that all tokens of a page of the chunk go to, or NO_PAGE, or MANY_PAGES.

    The same for every layer, so in a model XLA computes it once.
    """
    T = token_page.shape[0]
    token = jnp.arange(pl.cdiv(T + P - 1, P) * P) - lax.rem(start, jnp.int32(P))
    exists = (token >= 0) & (token < length)
    ids = token_page[jnp.clip(token, 0, T - 1)]
    largest = jnp.where(exists, ids, NO_PAGE).reshape(-1, P).max(axis=1)
    smallest = jnp.where(exists, ids, jnp.iinfo(jnp.int32).max).reshape(-1, P).min(axis=1)
    return jnp.where((largest == NO_PAGE) | (largest == smallest), largest, MANY_PAGES)


def _append_pages(
    chunk: _Chunk, retrieval: KVPages, streaming: KVPages, key_stats: Array | None
) -> tuple[KVPages, KVPages, Array | None]:
    (R, T), (_, Hk, D) = chunk.token_page.shape, chunk.k.shape
    P, M, pages = retrieval.k.shape[2], chunk.page_table.shape[1], chunk.ring_page.shape[1]
    kinds = {kv_kind(pool.k.dtype) for pool in (retrieval, streaming)}
    heads = retrieval.k.shape[0], 0 if key_stats is None else key_stats.shape[0]
    return append_in_place(
        _make_kernel,
        _Settings(R, T, Hk, D, P, M, pages, tuple(kind for kind in KV_KINDS if kind in kinds)),
        (chunk, sizes(*heads)),
        (retrieval, streaming, key_stats),
        most_heads=Hk,
    )


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    rows: int  # R
    tokens: int  # T
    heads: int  # Hk
    head_dim: int  # D
    page_size: int  # P
    table: int  # M
    pages: int  # that the chunk can touch
    kinds: tuple[KVKind, ...]  # of codes that pools have


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    R, T, Hk, D, P, M, pages, kinds = settings

    def append_page(
        chunk_gmem,  # see _Chunk
        sizes_gmem,  # int32: Kr, Kq
        retrieval_gmem,  # KVPages of Kr heads, updated
        streaming_gmem,  # KVPages of Ks heads, updated
        stats_gmem,  # [Kq, N, g, 2, D], updated
        tile,  # see _Tile
    ):
        # The last page first: it may be written in part, which takes longer.
        i = pages - 1 - lax.axis_index("page")
        r, part, h = (lax.axis_index(name) for name in ("row", "part", "head"))
        start, length = chunk_gmem.start[r], chunk_gmem.length[r]
        first_streaming, ranked = sizes_gmem[0], sizes_gmem[1]
        number = lax.div(start, jnp.int32(P)) + i  # of the page in its sequence
        first = number * P - start
        begin, end = jnp.maximum(-first, 0), jnp.minimum(length - first, P)
        top = jnp.clip(first, 0, T - P)  # the tile's first token: a tile lies inside the chunk
        span = _Span(first, begin, end, first - top)

        def append(pool, stats, head, page, page_of_token):
            """Writes head h of the chunk as head ``head`` of a pool: its keys or its values."""
            source, to = pl.ds(r * T + top, P), (ranked, head, page, page_of_token)

            @pl.when(part == 0)
            def _():
                keys = chunk_gmem.k.at[source, h]
                _write_page(_Target(keys, pool.k, pool.k_scale, stats, *to), span, tile)

            @pl.when(part == 1)
            def _():
                values = chunk_gmem.v.at[source, h]
                _write_page(_Target(values, pool.v, pool.v_scale, None, *to), span, tile)

        @pl.when(h < first_streaming)
        def _():
            if retrieval_gmem is not None:
                page = chunk_gmem.page_table[r, jnp.minimum(number, M - 1)]
                page = _inside(page, retrieval_gmem)
                append(retrieval_gmem, stats_gmem, h, page, lambda token: page)

        @pl.when(h >= first_streaming)
        def _():
            if streaming_gmem is not None:
                head, page = h - first_streaming, chunk_gmem.ring_page[r, i]
                append(
                    streaming_gmem, None, head, page, lambda token: chunk_gmem.token_page[r, token]
                )

    # Row after row, as it says: left open, it could be swizzled, and halves or a few rows of it,
    # which do not begin where the swizzle does, would be read wrong.
    as_it_is = (plgpu.TilingTransform((D // 2,)),)
    tile = _Tile(
        plgpu.SMEM((P, D), jnp.bfloat16, transforms=as_it_is),
        plgpu.Barrier(),
        {kind: _stored_codes(kind, P, D) for kind in kinds},
    )
    return plgpu.kernel(
        append_page,
        out_type=(),
        # Neighbouring CTAs read the heads of the same tokens, which lie side by side.
        grid=(R, pages, 2, Hk),
        grid_names=("row", "page", "part", "head"),
        scratch_types=[tile],
    )


def _stored_codes(kind: KVKind, P: int, D: int) -> _Stored:
    row = stored_channels(kind, D)
    as_it_is = (plgpu.TilingTransform((row // 2,)),)  # as for tokens
    codes = plgpu.SMEM((P, row), CODE_TYPES[kind], transforms=as_it_is)
    if kind == "int4":
        return _Stored(codes, (plgpu.SMEM((P,), jnp.int32), plgpu.SMEM((P,), jnp.int32)))
    return _Stored(codes, plgpu.SMEM((P,), jnp.float32))


def _write_page(target: _Target, span: _Span, tile: _Tile) -> None:
    """The whole of a CTA: reads the tokens of one page and writes those that are kept."""
    P = tile.tokens.shape[0]
    whole = (span.begin == 0) & (span.end == P) & (target.page >= 0)
    kind = kv_kind(target.pages.dtype)
    stored = _Stored(tile.tokens) if kind is None else tile.codes[kind]

    @pl.when((span.begin < span.end) & (target.page != NO_PAGE))
    def _():
        plgpu.copy_gmem_to_smem(target.source, tile.tokens, tile.ready)
        plgpu.barrier_wait(tile.ready)
        if kind is not None:
            _quantize_tile(tile.tokens, stored, kind)
        pl.when(whole)(lambda: _write_whole(target, stored, tile))
        pl.when(~whole)(lambda: _write_in_part(target, stored, span, tile))


def _write_whole(target: _Target, stored: _Stored, tile: _Tile) -> None:
    """By TMA, with statistics of the page alone."""
    at = target.head, target.page
    plgpu.copy_smem_to_gmem(stored.vectors, target.pages.at[at])
    for scale, to in _scales(stored, target):
        plgpu.copy_smem_to_gmem(scale, to.at[at])
    if target.stats is not None:
        # Heads beyond those of the statistics are not ranked.
        pl.when(target.head < target.ranked)(lambda: _assign_statistics(target.stats.at[at], tile))
    plgpu.wait_smem_to_gmem(0)


def _write_in_part(target: _Target, stored: _Stored, span: _Span, tile: _Tile) -> None:
    """Rows that all go to one page are written a few at once, others one by one."""
    matrix = row_per_warp(4, stored.vectors.shape[1])  # of any multiple of 4 rows
    size = ROWS_OF_STORE

    def write_row(place, _):
        row, page = place + span.shift, target.page_of_token(place + span.first)

        @pl.when(page >= 0)
        def _():
            vector = load_unoptimised(stored.vectors.at[row], matrix.reduce(0))
            store_unoptimised(target.pages.at[target.head, page, place], vector)
            for scale, to in _scales(stored, target):
                to[target.head, page, place] = scale[row]

    def write_rows(j, _):
        """Places j * size to (j + 1) * size - 1."""
        places = pl.ds(j * size, size)
        at_once = (span.begin <= j * size) & (j * size + size <= span.end) & (target.page >= 0)

        @pl.when(at_once)
        def _():
            rows = pl.ds(j * size + span.shift, size)
            at = target.head, target.page, places
            vectors = load_unoptimised(stored.vectors.at[rows], matrix)
            store_unoptimised(target.pages.at[at], vectors)
            for scale, to in _scales(stored, target):
                store_unoptimised(to.at[at], load_unoptimised(scale.at[rows], matrix.reduce(1)))

        @pl.when(~at_once)
        def _():
            begin = jnp.maximum(span.begin, j * size)
            end = jnp.minimum(span.end, j * size + size)
            lax.fori_loop(begin, end, write_row, None)

    lax.fori_loop(lax.div(span.begin, jnp.int32(size)), cdiv(span.end, size), write_rows, None)
    if target.stats is not None:
        pl.when(target.head < target.ranked)(
            lambda: _widen_statistics(target.stats.at[target.head, target.page], span, tile)
        )


def _scales(stored: _Stored, target: _Target) -> list[tuple[Any, Any]]:
    """Each scale of the tile, and the scales of the pool that it goes to."""
    return list(zip(jax.tree.leaves(stored.scales), jax.tree.leaves(target.scales), strict=True))


def _quantize_tile(tokens, stored: _Stored, kind: KVKind) -> None:
    """Fills ``stored`` with the codes of ``tokens`` [P, D] and their scales."""
    P, D = tokens.shape
    rows, parts = min(P, ROWS_AT_ONCE), 2 if kind == "int4" else 1
    matrix = row_per_warp(4, D // parts)

    def quantize_rows(j, _):
        block = pl.ds(j * rows, rows)
        x = [
            load_unoptimised(tokens.at[block, pl.ds(i * D // parts, D // parts)], matrix)
            for i in range(parts)
        ]
        [codes], scales = quantize(x, kind)
        store_unoptimised(stored.vectors.at[block], codes.astype(stored.vectors.dtype))
        jax.tree.map(lambda to, x: store_unoptimised(to.at[block], x), stored.scales, scales)

    lax.fori_loop(0, P // rows, quantize_rows, None)
    plgpu.commit_smem()


def _extremes(tokens, first_row: int, count: int, span: _Span | None = None) -> tuple:
    """kmax and kmin [D] of ``count`` rows of ``tokens`` [P, D], from ``first_row`` on.

    With a span, only of the rows of its places [begin, end).
    """
    rows, D = min(count, ROWS_AT_ONCE), tokens.shape[1]
    matrix = row_per_warp(4, D)

    def widen(j, carry):
        above = below = load_unoptimised(tokens.at[pl.ds(first_row + j * rows, rows)], matrix)
        if span is not None:
            row = plgpu.broadcasted_iota(jnp.int32, above.shape, 0, layout=matrix)
            place = row + (first_row + j * rows - span.shift)
            inside = (place >= span.begin) & (place < span.end)
            above = jnp.where(inside, above, -jnp.inf)
            below = jnp.where(inside, below, jnp.inf)
        return jnp.maximum(carry[0], above), jnp.minimum(carry[1], below)

    lowest = jnp.full((rows, D), -jnp.inf, jnp.bfloat16)
    carry = tuple(plgpu.layout_cast(x, matrix) for x in (lowest, -lowest))
    kmax, kmin = lax.fori_loop(0, count // rows, widen, carry)
    return kmax.max(axis=0), kmin.min(axis=0)


def _assign_statistics(stats, tile: _Tile) -> None:
    """Of a page that the chunk writes whole; ``stats`` [g, 2, D]."""
    g, size = stats.shape[0], tile.tokens.shape[0] // stats.shape[0]
    for j in range(g):
        for i, x in enumerate(_extremes(tile.tokens, j * size, size)):
            store_unoptimised(stats.at[j, i], x.astype(stats.dtype))


def _widen_statistics(stats, span: _Span, tile: _Tile) -> None:
    """Of a page that the chunk writes in part; ``stats`` [g, 2, D]."""
    P, D = tile.tokens.shape
    g, size = stats.shape[0], P // stats.shape[0]
    per_channel = row_per_warp(4, D).reduce(0)

    def widen_logical_page(j, _):
        begin, end = jnp.maximum(span.begin, j * size), jnp.minimum(span.end, (j + 1) * size)
        holds_earlier_tokens = span.begin > j * size

        @pl.when(begin < end)
        def _():
            extremes = _extremes(tile.tokens, 0, P, span._replace(begin=begin, end=end))
            for i, (x, wider) in enumerate(zip(extremes, (jnp.maximum, jnp.minimum), strict=True)):
                x, to = x.astype(stats.dtype), stats.at[j, i]

                @pl.when(~holds_earlier_tokens)
                def _(to=to, x=x):
                    store_unoptimised(to, x)

                @pl.when(holds_earlier_tokens)
                def _(to=to, x=x, wider=wider):
                    store_unoptimised(to, wider(load_unoptimised(to, per_channel), x))

    lax.fori_loop(0, g, widen_logical_page, None)
