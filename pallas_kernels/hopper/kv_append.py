"""New keys and values into their pages, in place, Hopper (Mosaic GPU).

The pools and the statistics go into a kernel as references and come out as the same buffers: when
the caller donates them, or carries them through a loop, XLA copies none of them.

Decode, ``append_kv``. The grid is (row b, part), one warpgroup a CTA. A part is a few heads of one
kind; a warp holds a head, a lane two (D = 64: one) channels of its lower half and as many of its
upper, so that rotation and the largest |x| of a head need no other warp:

      part      |  retrieval KV heads  |  streaming KV heads  |      query heads      |
                | rotate k, write k, v |  rotate k, write k,  |        rotate         |
                | widen kmax and kmin  |          v           |                       |

      pool.k[h, page[b], offset[b]] = k        key_stats[h, page[b], offset[b] // L]  (L = P / g)

What must move: a few KB. It is bound by latency: the launch, the page id, the old statistics that
it points to, the stores.

Prefill, ``append_kv_chunk``. The grid is (page i of the chunk, keys or values, KV head h). The
chunk's tokens stand at positions start, start + 1, ...; its pages hold P of them, the first and the
last fewer:

      positions     |  page s  | page s+1 | page s+2 |           s = start // P
      tokens              |###################|                  start + [0, length)
      page i        |    0     |    1     |    2     |
      its slots           [begin, P)      [0, end)               bf16 tile [P, D] of any of them

      tile --TMA--> shared memory --TMA--> a whole page of a pool
                      |  |  \\--8 rows or 1 at a time--> slots of a page written in part
                      |  \\--registers--> int8 codes and scales, shared memory, then as above
                      \\--registers--> kmax, kmin of each logical page

A page is also written in part if the streaming heads keep only some of its tokens (a ring does not
keep what has left the window). A page of which they keep nothing is not read.

What must move: k and v once from where the model left them, and each slot written once: T * Hk *
2 * D * (2 + 2 or 1) bytes, less for streaming heads, 8 more for each pair of int8 scales, and 4 * D
bytes of statistics a logical page and head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper.mosaic import (
    cdiv,
    refuse,
    spread_columns,
    spread_rows,
    store_unoptimised,
)
from pallas_kernels.types import KVPages

# Rows of a tile that are in registers at once: 16 x 128 float32 are 16 registers a thread.
ROWS_AT_ONCE = 16
# Stand for a page id where a page of the chunk has none: no token is written, or each has its own.
NO_PAGE, MANY_PAGES = -1, -2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call of ``append_kv``: heads a CTA. ``choose_config`` gives a good one."""

    query_heads: int  # divides H
    kv_heads: int  # divides Kr and Ks

    def __post_init__(self) -> None:
        for name in ("query_heads", "kv_heads"):
            if getattr(self, name) not in (1, 2, 4):
                raise ValueError(f"{name} must be 1, 2 or 4, got {getattr(self, name)}")


def choose_config(query_heads: int, retrieval_heads: int, streaming_heads: int) -> Config:
    """The configuration for one row's heads."""

    def most(*counts: int) -> int:
        # A head a warp. Fewer leave warps that repeat another's work, which costs no time.
        return next(n for n in (4, 2, 1) if all(count % n == 0 for count in counts))

    return Config(query_heads=most(query_heads), kv_heads=most(retrieval_heads, streaming_heads))


@partial(jax.jit, static_argnames=("config",))
def append_kv(
    q: Float[Array, "B H D"],
    k: Float[Array, "B Hk D"],
    v: Float[Array, "B Hk D"],
    cos: Float[Array, "B D/2"],
    sin: Float[Array, "B D/2"],
    retrieval: KVPages,
    streaming: KVPages,
    key_stats: Float[Array, "Kr N g 2 D"] | None,
    page: Int[Array, " B"],
    streaming_page: Int[Array, " B"],
    offset: Int[Array, " B"],
    *,
    config: Config | None = None,
) -> tuple[Float[Array, "B H D"], KVPages, KVPages, Float[Array, "Kr N g 2 D"] | None]:
    """``pallas_kernels.api.append_kv`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    q, k, v bf16, pages bf16 or int8, statistics bf16 or float32; D 64 or 128. Shapes are those the
    api has checked. Raises ``NotImplementedError`` for anything else.
    """
    refuse("append_kv", _unsupported((q, k, v), retrieval, streaming, key_stats))
    where = page, streaming_page, offset
    return _append_token(q, k, v, cos, sin, retrieval, streaming, key_stats, where, config)


@jax.jit
def append_kv_chunk(
    k: Float[Array, "T Hk D"],
    v: Float[Array, "T Hk D"],
    retrieval: KVPages,
    streaming: KVPages,
    key_stats: Float[Array, "Kr N g 2 D"] | None,
    page_table: Int[Array, " M"],
    streaming_page: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> tuple[KVPages, KVPages, Float[Array, "Kr N g 2 D"] | None]:
    """``pallas_kernels.api.append_kv_chunk`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    k and v bf16, pages bf16 or int8, statistics bf16 or float32; D 64 or 128; P 16 to 128. Shapes
    are those the api has checked. Raises ``NotImplementedError`` for anything else.
    """
    P = retrieval.k.shape[2]
    reasons = _unsupported((k, v), retrieval, streaming, key_stats)
    if P not in (16, 32, 64, 128):
        reasons.append(f"page size must be 16, 32, 64 or 128, got {P}")
    if key_stats is not None and P // key_stats.shape[2] < 4:
        reasons.append(f"logical pages must hold 4 tokens or more, got {P // key_stats.shape[2]}")
    refuse("append_kv_chunk", reasons)
    if k.shape[0] < P:  # a tile of P tokens must lie inside the arrays
        missing = P - k.shape[0]
        k, v = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))) for x in (k, v))
        streaming_page = jnp.pad(streaming_page, (0, missing), constant_values=NO_PAGE)
    return _append_pages(
        k, v, retrieval, streaming, key_stats, page_table, streaming_page, start, length
    )


def _unsupported(
    tokens: tuple[Array, ...], retrieval: KVPages, streaming: KVPages, key_stats: Array | None
) -> list[str]:
    """Reasons why neither kernel can run."""
    head_dim, dtypes = tokens[0].shape[-1], {str(x.dtype) for x in tokens}
    reasons = []
    if dtypes != {"bfloat16"}:
        reasons.append(f"queries, keys and values must be bfloat16, got {sorted(dtypes)}")
    for name, pool in (("retrieval", retrieval), ("streaming", streaming)):
        if pool.k.dtype not in (jnp.bfloat16, jnp.int8):
            reasons.append(f"{name} pages must be bfloat16 or int8, got {pool.k.dtype}")
    if key_stats is not None and key_stats.dtype not in (jnp.bfloat16, jnp.float32):
        reasons.append(f"key statistics must be bfloat16 or float32, got {key_stats.dtype}")
    if head_dim not in (64, 128):
        reasons.append(f"head_dim must be 64 or 128, got {head_dim}")
    return reasons


def _a_row_a_warp(rows: int, columns: int):
    """Registers of a matrix whose row i is in warp i % 4, neighbouring channels in one lane.

    A matrix of one or two rows is held by four or two warps each.
    """
    across = (-3,) if rows > 1 else ()
    repeated = (plgpu.Replicated(4 // rows),) if rows < 4 else ()
    tiling = plgpu.Tiling(((min(rows, 4), columns), (columns // 32,)))
    return plgpu.Layout.TILED(tiling, across + repeated, (-2,), -1)


def _load(ref, layout) -> Array:
    """Each warp reads its rows from end to end, which needs no proof of an optimal pattern."""
    return plgpu.load(ref, layout=layout, optimized=False)


def _quantize(largest, x):
    """int8 codes of ``x`` given the largest |x| of each row, and the scale of each row."""
    largest = jnp.maximum(largest, 1e-6)
    return jnp.round(x * spread_rows(127.0 / largest, x)).astype(jnp.int8), largest / 127.0


def _in_place(
    kernel: Callable, inputs: tuple[Array, ...], retrieval: KVPages, streaming: KVPages, stats
) -> tuple[Array, KVPages, KVPages, Array | None]:
    """Calls ``kernel`` with ``inputs`` and with references to both pools and to the statistics.

    Returns what it gives out, and what the references hold then. There are no references to arrays
    without elements: None stands for an empty pool and its statistics.
    """

    def refer(cache, pool: KVPages):
        return None if pool.k.shape[0] == 0 else jax.tree.map(jax.new_ref, cache)

    def content(cache, ref):
        return cache if ref is None else jax.tree.map(jax.freeze, ref)

    refs = refer(retrieval, retrieval), refer(streaming, streaming), refer(stats, retrieval)
    out = kernel(*inputs, *refs)
    return out, content(retrieval, refs[0]), content(streaming, refs[1]), content(stats, refs[2])


def _append_token(
    q: Float[Array, "B H D"],
    k: Float[Array, "B Hk D"],
    v: Float[Array, "B Hk D"],
    cos: Float[Array, "B D/2"],
    sin: Float[Array, "B D/2"],
    retrieval: KVPages,
    streaming: KVPages,
    key_stats: Float[Array, "Kr N g 2 D"] | None,
    where: tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]],
    config: Config | None,
) -> tuple[Float[Array, "B H D"], KVPages, KVPages, Float[Array, "Kr N g 2 D"] | None]:
    B, H, D = q.shape
    Kr, Ks, P = retrieval.k.shape[0], streaming.k.shape[0], retrieval.k.shape[2]
    Hk = Kr + Ks
    if config is None:
        config = choose_config(H, Kr, Ks)
    # Slices of one projection, as a model has them, XLA joins for nothing. Each as an input of its
    # own would be a launch that copies it, where there is more than one row.
    tokens = jnp.concatenate([x[:, None] for x in (q, k, v)], axis=2)[:, 0]
    half = D // 2
    per_query_part, per_kv_part = config.query_heads, config.kv_heads
    retrieval_parts, kv_parts = Kr // per_kv_part, (Kr + Ks) // per_kv_part

    def append_token(
        tokens_gmem,  # [B, H + 2 * Hk, D] bf16: q, k, v
        cos_gmem,  # [B, D / 2] float32
        sin_gmem,  # [B, D / 2] float32
        page_gmem,  # [B] int32
        streaming_page_gmem,  # [B] int32
        offset_gmem,  # [B] int32
        retrieval_gmem,  # k, v [Kr, N, P, D], scales [Kr, N, P] float32; updated
        streaming_gmem,  # k, v [Ks, N, P, D], scales [Ks, N, P] float32; updated
        stats_gmem,  # [Kr, N, g, 2, D], updated
        rotated_gmem,  # [B, H, D] bf16, output
    ):
        b, part = lax.axis_index("row"), lax.axis_index("part")
        lower, upper = pl.ds(0, half), pl.ds(half, half)

        def halves(head, heads):
            """Two matrices [heads, D / 2], float32, of heads ``head`` on of the token."""
            layout = _a_row_a_warp(heads, half)
            return [
                _load(tokens_gmem.at[b, pl.ds(head, heads), x], layout).astype(jnp.float32)
                for x in (lower, upper)
            ]

        def angles(heads):
            """cos and sin [D / 2] of the row."""
            layout = _a_row_a_warp(heads, half).reduce(0)
            return [_load(x.at[b], layout) for x in (cos_gmem, sin_gmem)]

        def rotate(vector, angles):
            """Two matrices [heads, D / 2], bf16."""
            (low, high), (cos, sin) = vector, (spread_columns(x, vector[0]) for x in angles)
            turned = low * cos - high * sin, high * cos + low * sin
            return [x.astype(jnp.bfloat16) for x in turned]

        def append(pool, ids_gmem, stats, head, source):
            """Writes heads ``head`` on of a pool, KV heads ``source`` on of the token."""
            heads = pl.ds(head, per_kv_part)
            page, offset = ids_gmem[b], offset_gmem[b]
            keys = rotate(halves(H + source, per_kv_part), angles(per_kv_part))
            values = halves(H + Hk + source, per_kv_part)

            def put(to, scale_to, vector):
                if scale_to is not None:
                    vector = [x.astype(jnp.float32) for x in vector]
                    low, high = (jnp.abs(x).max(axis=1) for x in vector)
                    quantized = [_quantize(jnp.maximum(low, high), x) for x in vector]
                    store_unoptimised(scale_to.at[heads, page, offset], quantized[0][1])
                    vector = [codes for codes, _ in quantized]
                for x, channels in zip(vector, (lower, upper), strict=True):
                    store_unoptimised(to.at[heads, page, offset, channels], x.astype(to.dtype))

            def widen():
                size = jnp.int32(P // stats.shape[2])
                at = heads, page, lax.div(offset, size)
                first = lax.rem(offset, size) == 0
                extremes = [  # of which channels, how, and with what
                    (stats.at[*at, i, channels], extreme, x.astype(stats.dtype))
                    for i, extreme in enumerate((jnp.maximum, jnp.minimum))
                    for x, channels in zip(keys, (lower, upper), strict=True)
                ]

                @pl.when(first)  # what the logical page held belongs to somebody else
                def _():
                    for to, _, x in extremes:
                        store_unoptimised(to, x)

                @pl.when(~first)
                def _():
                    layout = _a_row_a_warp(per_kv_part, half)
                    old = [_load(to, layout) for to, _, _ in extremes]  # they wait together
                    for (to, extreme, x), was in zip(extremes, old, strict=True):
                        store_unoptimised(to, extreme(was, x))

            # A page outside the pool is written nowhere, as in the reference.
            @pl.when((page >= 0) & (page < pool.k.shape[1]))
            def _():
                if stats is not None:
                    widen()
                put(pool.k, pool.k_scale, keys)
                put(pool.v, pool.v_scale, values)

        @pl.when(part < retrieval_parts)
        def _():
            if retrieval_gmem is not None:
                head = part * per_kv_part
                append(retrieval_gmem, page_gmem, stats_gmem, head, head)

        @pl.when((part >= retrieval_parts) & (part < kv_parts))
        def _():
            if streaming_gmem is not None:
                source = part * per_kv_part
                append(streaming_gmem, streaming_page_gmem, None, source - Kr, source)

        @pl.when(part >= kv_parts)
        def _():
            head = (part - kv_parts) * per_query_part
            turned = rotate(halves(head, per_query_part), angles(per_query_part))
            for x, channels in zip(turned, (lower, upper), strict=True):
                store_unoptimised(rotated_gmem.at[b, pl.ds(head, per_query_part), channels], x)

    kernel = plgpu.kernel(
        append_token,
        out_type=jax.ShapeDtypeStruct((B, H, D), q.dtype),
        grid=(B, kv_parts + H // per_query_part),
        grid_names=("row", "part"),
        # No warp reads what another writes, or if it does (fewer heads than warps), both write the
        # same, whether the other has written before or not.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return _in_place(kernel, (tokens, cos, sin, *where), retrieval, streaming, key_stats)


def _inside(page, pool: KVPages):
    """The page id, or NO_PAGE for one outside the pool: written nowhere, as in the reference."""
    return jnp.where((page >= 0) & (page < pool.k.shape[1]), page, NO_PAGE)


def _page_of_ring(
    streaming_page: Int[Array, " T"], start: Int[Array, ""], length: Int[Array, ""], P: int
) -> Int[Array, " pages"]:
    """The one page that all tokens of a page of the chunk go to, or NO_PAGE, or MANY_PAGES.

    The same for every layer, so in a model XLA computes it once.
    """
    T = streaming_page.shape[0]
    token = jnp.arange(pl.cdiv(T + P - 1, P) * P) - lax.rem(start, jnp.int32(P))
    exists = (token >= 0) & (token < length)
    ids = streaming_page[jnp.clip(token, 0, T - 1)]
    largest = jnp.where(exists, ids, NO_PAGE).reshape(-1, P).max(axis=1)
    smallest = jnp.where(exists, ids, jnp.iinfo(jnp.int32).max).reshape(-1, P).min(axis=1)
    return jnp.where((largest == NO_PAGE) | (largest == smallest), largest, MANY_PAGES)


def _append_pages(
    k: Float[Array, "T Hk D"],
    v: Float[Array, "T Hk D"],
    retrieval: KVPages,
    streaming: KVPages,
    key_stats: Float[Array, "Kr N g 2 D"] | None,
    page_table: Int[Array, " M"],
    streaming_page: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> tuple[KVPages, KVPages, Float[Array, "Kr N g 2 D"] | None]:
    T, Hk, D = k.shape
    Kr, P, M = retrieval.k.shape[0], retrieval.k.shape[2], page_table.shape[0]
    streaming_page = _inside(streaming_page, streaming)
    ring_page = _page_of_ring(streaming_page, start, length, P)
    pages = ring_page.shape[0]
    matrix = _a_row_a_warp(4, D)  # of any multiple of 4 rows
    per_row, per_channel = matrix.reduce(1), matrix.reduce(0)

    def append_page(
        k_gmem,  # [T, Hk, D] bf16
        v_gmem,  # [T, Hk, D] bf16
        table_gmem,  # [M] int32
        token_page_gmem,  # [T] int32
        ring_page_gmem,  # [pages] int32
        start_gmem,  # [1] int32
        length_gmem,  # [1] int32
        retrieval_gmem,  # k, v [Kr, N, P, D], scales [Kr, N, P] float32; updated
        streaming_gmem,  # k, v [Ks, N, P, D], scales [Ks, N, P] float32; updated
        stats_gmem,  # [Kr, N, g, 2, D], updated
        tile_smem,  # [P, D] bf16
        ready,  # barrier
        *int8_smem,  # codes [P, D] int8, scales [P] float32
    ):
        # The last page first: it may be written in part, which takes longer.
        i = pages - 1 - lax.axis_index("page")
        part, h = lax.axis_index("part"), lax.axis_index("head")
        start, length = start_gmem[0], length_gmem[0]
        number = lax.div(start, jnp.int32(P)) + i  # of the page in its sequence
        first = number * P - start  # the chunk's token in slot 0; may be negative
        begin, end = jnp.maximum(-first, 0), jnp.minimum(length - first, P)
        top = jnp.clip(first, 0, T - P)  # the tile's first token
        shift = first - top  # slot s is row s + shift of the tile

        def quantize():
            rows = min(P, ROWS_AT_ONCE)
            codes_smem, scales_smem = int8_smem

            def quantize_rows(j, _):
                block = pl.ds(j * rows, rows)
                x = _load(tile_smem.at[block], matrix).astype(jnp.float32)
                codes, scale = _quantize(jnp.abs(x).max(axis=1), x)
                store_unoptimised(codes_smem.at[block], codes)
                store_unoptimised(scales_smem.at[block], scale)

            lax.fori_loop(0, P // rows, quantize_rows, None)
            plgpu.commit_smem()

        def extremes(first_row, count, only=None):
            """kmax and kmin [D] of ``count`` rows of the tile, or of the slots ``only`` in them."""
            rows = min(count, ROWS_AT_ONCE)

            def widen(j, carry):
                above = below = _load(tile_smem.at[pl.ds(first_row + j * rows, rows)], matrix)
                if only is not None:
                    row = plgpu.broadcasted_iota(jnp.int32, above.shape, 0, layout=matrix)
                    slot = row + (first_row + j * rows - shift)
                    inside = (slot >= only[0]) & (slot < only[1])
                    above = jnp.where(inside, above, -jnp.inf)
                    below = jnp.where(inside, below, jnp.inf)
                return jnp.maximum(carry[0], above), jnp.minimum(carry[1], below)

            nothing = jnp.full((rows, D), -jnp.inf, jnp.bfloat16)
            nothing = [plgpu.layout_cast(x, matrix) for x in (nothing, -nothing)]
            high, low = lax.fori_loop(0, count // rows, widen, tuple(nothing))
            return high.max(axis=0), low.min(axis=0)

        def assign_statistics(to):
            """Of a page that the chunk writes whole; ``to`` [g, 2, D]."""
            g = to.shape[0]
            for j in range(g):
                for which, x in enumerate(extremes(j * (P // g), P // g)):
                    store_unoptimised(to.at[j, which], x.astype(to.dtype))

        def widen_statistics(to):
            """Of a page that the chunk writes in part; ``to`` [g, 2, D]."""
            size = P // to.shape[0]

            def logical_page(j, _):
                only = jnp.maximum(begin, j * size), jnp.minimum(end, (j + 1) * size)
                holds_earlier_tokens = begin > j * size

                @pl.when(only[0] < only[1])
                def _():
                    for which, x in enumerate(extremes(0, P, only)):
                        x, here = x.astype(to.dtype), to.at[j, which]
                        wider = (jnp.maximum, jnp.minimum)[which]

                        @pl.when(~holds_earlier_tokens)
                        def _(here=here, x=x):
                            store_unoptimised(here, x)

                        @pl.when(holds_earlier_tokens)
                        def _(here=here, x=x, wider=wider):
                            store_unoptimised(here, wider(_load(here, per_channel), x))

            lax.fori_loop(0, to.shape[0], logical_page, None)

        def append(x_gmem, pool, scale_pool, stats, head, page, page_of_token):
            """Writes head ``head`` of a pool; ``page`` is an id, NO_PAGE or MANY_PAGES."""
            whole = (begin == 0) & (end == P) & (page >= 0)
            tile = tile_smem if scale_pool is None else int8_smem[0]

            def write_row(slot, _):
                row, page = slot + shift, page_of_token(slot + first)

                @pl.when(page >= 0)
                def _():
                    store_unoptimised(pool.at[head, page, slot], _load(tile.at[row], per_channel))
                    if scale_pool is not None:
                        scale_pool[head, page, slot] = int8_smem[1][row]

            def write_rows(j, _):
                """Slots 8 * j to 8 * j + 7: at once if all are written, to one page."""
                slots = pl.ds(j * 8, 8)
                at_once = (begin <= j * 8) & (j * 8 + 8 <= end) & (page >= 0)

                @pl.when(at_once)
                def _():
                    rows = pl.ds(j * 8 + shift, 8)
                    store_unoptimised(pool.at[head, page, slots], _load(tile.at[rows], matrix))
                    if scale_pool is not None:
                        scale = _load(int8_smem[1].at[rows], per_row)
                        store_unoptimised(scale_pool.at[head, page, slots], scale)

                @pl.when(~at_once)
                def _():
                    these = jnp.maximum(begin, j * 8), jnp.minimum(end, j * 8 + 8)
                    lax.fori_loop(*these, write_row, None)

            @pl.when((begin < end) & (page != NO_PAGE))
            def _():
                plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(top, P), h], tile_smem, ready)
                plgpu.barrier_wait(ready)
                if scale_pool is not None:
                    quantize()

                @pl.when(whole)
                def _():
                    plgpu.copy_smem_to_gmem(tile, pool.at[head, page])
                    if scale_pool is not None:
                        plgpu.copy_smem_to_gmem(int8_smem[1], scale_pool.at[head, page])
                    if stats is not None:
                        assign_statistics(stats.at[head, page])
                    plgpu.wait_smem_to_gmem(0)

                @pl.when(~whole)
                def _():
                    lax.fori_loop(lax.div(begin, jnp.int32(8)), cdiv(end, 8), write_rows, None)
                    if stats is not None:
                        widen_statistics(stats.at[head, page])

        def append_part(pool, stats, head, page, page_of_token):
            where = head, page, page_of_token
            pl.when(part == 0)(lambda: append(k_gmem, pool.k, pool.k_scale, stats, *where))
            pl.when(part == 1)(lambda: append(v_gmem, pool.v, pool.v_scale, None, *where))

        @pl.when(h < Kr)
        def _():
            if retrieval_gmem is not None:
                page = _inside(table_gmem[jnp.minimum(number, M - 1)], retrieval)
                append_part(retrieval_gmem, stats_gmem, h, page, lambda token: page)

        @pl.when(h >= Kr)
        def _():
            if streaming_gmem is not None:
                page = ring_page_gmem[i]
                append_part(
                    streaming_gmem, None, h - Kr, page, lambda token: token_page_gmem[token]
                )

    scratch = [plgpu.SMEM((P, D), jnp.bfloat16), plgpu.Barrier()]
    if jnp.int8 in (retrieval.k.dtype, streaming.k.dtype):
        scratch += [plgpu.SMEM((P, D), jnp.int8), plgpu.SMEM((P,), jnp.float32)]
    kernel = plgpu.kernel(
        append_page,
        out_type=(),
        # Neighbouring CTAs read the heads of the same tokens, which lie side by side.
        grid=(pages, 2, Hk),
        grid_names=("page", "part", "head"),
        scratch_types=scratch,
    )
    inputs = k, v, page_table, streaming_page, ring_page, start.reshape(1), length.reshape(1)
    return _in_place(kernel, inputs, retrieval, streaming, key_stats)[1:]
