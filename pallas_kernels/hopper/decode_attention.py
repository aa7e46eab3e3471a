"""Paged attention for one query token a row: both head classes in one launch, Hopper (Mosaic GPU).

Index map. The grid is (row b, KV head k, split s), one warpgroup of 128 threads each. The token
slots of (b, k), its listed pages end to end, are cut into tiles of T = 64 slots; split s takes
every S-th tile, so that work is even whatever the length and a split needs no length to find its
first:

      pages listed for (b, k) |  page 7  |  page 2  |  page 9  |  page 4  |     P slots a page
      slots of (b, k)         |....start########################stop......|
      tiles of T slots        |  0  |  1  |  2  |  3  |  4  |  5  |  6  |       T <= P or T > P
      split (S = 3)           |  0  |  1  |  2  |  0  |  1  |  2  |  -  |

      k < Kr: the retrieval pool and its list, else the streaming pool (head k - Kr) and its list

For each tile, with the G query heads of k as the N = 8 or 16 *columns* of every matrix (wgmma's
M is 64, and G rows would waste most of it; N can be as small as 8):

      scores [T, N] = K [T, D] @ Q^T [D, N]        K as TMA left it in shared memory
      online softmax down the columns
      acc [D, N]   += V^T [D, T] @ P^T [T, N]      V as TMA left it, P through shared memory

      parts [B, K, S, D, N], lses [B, K, S, N]  --combine: grid (b, k, D / 64)-->  out, lse

What must move: each listed K and V slot once, B * K * slots * 2 * D * (2 or 1) bytes, plus 8 bytes
of scales a slot for int8. The parts are B * K * S * D * N * 4 bytes, written and read in L2.

int8 pages. K is never converted: the query is split into two int8 vectors, q = scale * (high +
low / 254), which keeps 15 bits of it, and the tensor cores multiply int8 by int8; a token's scale
multiplies its row of scores. V has to be transposed, which wgmma can do for 16-bit operands
only, so V alone passes through shared memory a second time, as bf16; its scales multiply P.

What must not be read: an entry of the list past ``stop`` never has its page fetched, scores of
slots outside ``[start, stop)`` are replaced and not added to, and their V rows are zeroed, since
a weight of zero does not silence a NaN.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper.mosaic import (
    LN_2,
    LOG2_E,
    LOWEST,
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
from pallas_kernels.reference import cut_pages
from pallas_kernels.types import KVPages, PageList

# An int8 holds a query to 1/127; the rounding error, at most 1/254 of that step, fills another.
LOW_STEPS = 254.0
# T, token slots of one step: the least that wgmma multiplies. Twice as many took so many registers
# for int8 that one CTA an SM was left, and gained nothing for bf16.
TILE = 64
# Positions of K and V in ``KVPages``; their scales follow two further on.
KEYS, VALUES = 0, 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call; ``choose_config`` gives a good one."""

    splits: int  # S, parts that a (row, KV head) is cut into
    stages: int = 2  # tiles of K and V in flight a split
    parts: int = 33  # parts the combining kernel loads at once

    def __post_init__(self) -> None:
        for name in ("splits", "stages", "parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def choose_config(rows: int, kv_heads: int, slots: int, dtype: jax.typing.DTypeLike) -> Config:
    """The configuration for ``rows`` x ``kv_heads`` lists of up to ``slots`` token slots."""
    # Two CTAs an SM read bf16 at full bandwidth; int8 takes more arithmetic a byte, and four hide
    # it. Every further part costs the combining kernel time.
    splits = (4 if dtype == jnp.int8 else 2) * SM_COUNT // (rows * kv_heads)
    # A split of one tile saves less than combining it costs, and so do parts beyond two loads.
    return Config(splits=max(min(splits, 66, slots // (2 * TILE)), 1))


@partial(jax.jit, static_argnames=("selected_page_size", "config"))
def paged_attention(
    q: Float[Array, "B H D"],
    retrieval: KVPages,
    streaming: KVPages,
    retrieval_list: PageList,
    streaming_list: PageList,
    *,
    selected_page_size: int | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """``pallas_kernels.api.paged_attention`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    Query bf16, pages bf16 or int8; D 64 or 128; listed pages of 16 to 128 tokens; up to 16 query
    heads a KV head.
    Shapes are those the api has checked. Raises ``NotImplementedError`` for anything else.
    """
    if selected_page_size is not None:
        retrieval, streaming = (cut_pages(x, selected_page_size) for x in (retrieval, streaming))
    _refuse_unsupported(q, retrieval, streaming)
    B, H, D = q.shape
    K = retrieval.k.shape[0] + streaming.k.shape[0]
    G = H // K
    N = 8 * pl.cdiv(G, 8)
    classes = [
        (pool, lists)
        for pool, lists in ((retrieval, retrieval_list), (streaming, streaming_list))
        if pool.k.shape[0] > 0
    ]
    if config is None:
        slots = max(lists.page_ids.shape[2] for _, lists in classes) * retrieval.k.shape[2]
        config = choose_config(B, K, slots, retrieval.k.dtype)

    rows = q.reshape(B * H, D)
    if B * H < N:  # a tile of N query rows must lie inside the array
        rows = jnp.pad(rows, ((0, N - B * H), (0, 0)))
    first_row = G * np.arange(B * K)
    shift = first_row - np.minimum(first_row, len(rows) - N)  # see _query_tile

    parts, lses = _attend_splits(rows, B, classes, G, config)
    out, lse = _combine_splits(parts, lses, G, q.dtype, config)
    column = N * np.arange(B * K)[:, None] + shift[:, None] + np.arange(G)
    return out.reshape(B, H, D), lse.reshape(-1)[column].reshape(B, H)


def _refuse_unsupported(q: Array, retrieval: KVPages, streaming: KVPages) -> None:
    head_dim, page_size = q.shape[2], retrieval.k.shape[2]
    group = q.shape[1] // (retrieval.k.shape[0] + streaming.k.shape[0])
    reasons = []
    if q.dtype != jnp.bfloat16:
        reasons.append(f"queries must be bfloat16, got {q.dtype}")
    for name, pool in (("retrieval", retrieval), ("streaming", streaming)):
        if pool.k.dtype not in (jnp.bfloat16, jnp.int8):
            reasons.append(f"{name} pages must be bfloat16 or int8, got {pool.k.dtype}")
    if retrieval.k.dtype != streaming.k.dtype:
        reasons.append(
            f"both pools must have one dtype, got {retrieval.k.dtype} and {streaming.k.dtype}"
        )
    if head_dim not in (64, 128):
        reasons.append(f"head_dim must be 64 or 128, got {head_dim}")
    if page_size not in (16, 32, 64, 128):
        reasons.append(f"listed pages must have 16, 32, 64 or 128 tokens, got {page_size}")
    if group > 16:
        reasons.append(f"at most 16 query heads a KV head, got {group}")
    refuse("paged_attention", reasons)


def _query_tile(pair, group: int, columns: int, query_rows: int):
    """First of the ``columns`` query rows to load for a (row, KV head) pair.

    The pair's own rows start at ``pair * group``. The tile runs on into the next pair's, whose
    results are dropped; at the end of the array it starts early instead.
    """
    return jnp.minimum(pair * group, query_rows - columns)


def _attend_splits(
    q: Float[Array, "rows D"],
    B: int,
    classes: list[tuple[KVPages, PageList]],  # of the pools that have heads
    G: int,
    config: Config,
) -> tuple[Float[Array, "B K S D N"], Float[Array, "B K S N"]]:
    """Attention of every split on its own; lse is base 2, and -inf for a split without tiles."""
    rows, D = q.shape
    pools, lists = zip(*classes, strict=True)
    K = sum(pool.k.shape[0] for pool in pools)
    P = pools[0].k.shape[2]
    T, S, stages = TILE, config.splits, config.stages
    N = 8 * pl.cdiv(G, 8)
    int8 = pools[0].k.dtype == jnp.int8
    box = min(P, T)  # slots one copy moves
    boxes = T // box  # copies a tile of K (or V) needs: pages a tile spans
    tiles_per_page = max(P // T, 1)
    first_heads = pools[0].k.shape[0]
    scale = D**-0.5 * LOG2_E  # scores in base 2: exp2 is one instruction
    # A copy starts at a multiple of 128 bytes in shared memory: scales of a page of 16 leave gaps.
    scale_box = max(box, 128 // 4)

    def attend_split(q_gmem, *refs):  # q [rows, D] bf16
        # For each class: pages [B, Kc or 1, L], start and stop [B, Kc or 1] int32
        lists_gmem = [PageList(*refs[3 * i : 3 * i + 3]) for i in range(len(lists))]
        refs = refs[3 * len(lists) :]
        fields = 4 if int8 else 2
        pools_gmem = [
            KVPages(*refs[i : i + fields])  # k, v [Kc, N, P, D]; scales [Kc, N, P] float32
            for i in range(0, fields * len(pools), fields)
        ]
        (
            parts_gmem,  # [B, K, S, D, N] float32, output
            lses_gmem,  # [B, K, S, N] float32, output
            k_smem,  # [stages, T, D] as stored
            v_smem,  # [stages, T, D] as stored
            p_smem,  # [N, T] bf16
            k_ready,  # [stages] barriers
            v_ready,  # [stages] barriers
            *query_smem,  # bf16: q [N, D] bf16; int8: high [N, D], low [N, D] int8
        ) = refs[fields * len(pools) :]
        if int8:
            *query_smem, v_bf16_smem, k_scale_smem, v_scale_smem = query_smem
            # V [T, D] bf16; scales [stages, boxes * scale_box] float32
        b, k, s = (lax.axis_index(name) for name in ("row", "head", "split"))

        def of_head(field, *index):
            """Entry ``index`` of a field of this head's list: ``page_ids``, ``start`` or ``stop``."""
            values = []
            for first, gmem in zip((0, first_heads), lists_gmem, strict=False):
                x = getattr(gmem, field)
                head = jnp.clip(k - first, 0, x.shape[1] - 1)  # a shared list has one head
                values.append(x[b, head, *(jnp.minimum(i, x.shape[2] - 1) for i in index)])
            return values[0] if len(values) == 1 else jnp.where(k < first_heads, *values)

        def page_ids(step):
            tile = s + step * S
            entry = lax.div(tile, jnp.int32(tiles_per_page)) * boxes
            return [of_head("page_ids", entry + j) for j in range(boxes)]

        # Loaded before anything that depends on ``stop``: one trip to memory instead of two.
        ids = [page_ids(step) for step in range(stages + 1)]
        start, stop = of_head("start"), of_head("stop")
        tiles = jnp.where(stop > start, cdiv(stop, T), 0)
        steps = cdiv(jnp.maximum(tiles - s, 0), S)

        def fetch(part, step, ids):
            """Starts the copies of one tile: ``part`` KEYS or VALUES, and its scales."""
            slot = lax.rem(step, jnp.int32(stages))
            tile = s + step * S
            within = lax.rem(tile, jnp.int32(tiles_per_page)) * T if P > T else 0
            to, ready = ((k_smem, k_ready), (v_smem, v_ready))[part]

            def copy(pool, head):
                for j, page in enumerate(ids):
                    if j:  # the tile's first page stands in for those past ``stop``
                        page = jnp.where(tile * T + j * P < stop, page, ids[0])
                    source = head, page, pl.ds(within, box)
                    target = to.at[slot, pl.ds(j * box, box)]
                    plgpu.copy_gmem_to_smem(pool[part].at[source], target, ready.at[slot])
                    if int8:
                        target = (k_scale_smem, v_scale_smem)[part]
                        target = target.at[slot, pl.ds(j * scale_box, box)]
                        plgpu.copy_gmem_to_smem(pool[2 + part].at[source], target, ready.at[slot])

            if len(pools_gmem) == 1:
                copy(pools_gmem[0], k)
            else:
                pl.when(k < first_heads)(lambda: copy(pools_gmem[0], k))
                pl.when(k >= first_heads)(lambda: copy(pools_gmem[1], k - first_heads))

        def load_query():
            """Puts Q [N, D] where wgmma reads it; returns what undoes its scaling, if any."""
            first = _query_tile(b * K + k, G, N, rows)
            transposed = plgpu.load(
                q_gmem.at[pl.ds(first, N)].transpose((1, 0)),
                layout=MATRIX_TRANSPOSED,
                optimized=False,  # D * N elements once a split
            )
            if not int8:
                query_smem[0].transpose((1, 0))[...] = transposed
                plgpu.commit_smem()
                return None
            query = plgpu.layout_cast(transposed, MATRIX).astype(jnp.float32)  # [D, N]
            largest = jnp.maximum(jnp.abs(query).max(axis=0), 1e-30)
            query = query * spread_columns(127.0 / largest, query)
            high = jnp.round(query)
            low = jnp.round((query - high) * LOW_STEPS)
            for to, value in zip(query_smem, (high, low), strict=True):
                # Small integers are exact in bf16, the width that can be transposed.
                value = plgpu.layout_cast(value.astype(jnp.bfloat16), MATRIX_TRANSPOSED)
                to.transpose((1, 0))[...] = value.astype(jnp.float32).astype(jnp.int8)
            plgpu.commit_smem()
            return largest * (scale / 127.0)

        def scales(smem, slot, like):
            """Of a tile's slots, in every column of ``like``."""

            def shifted(j):
                """Right in the rows of box j: what lies before its scales is left out."""
                gaps = j * (scale_box - box)
                return spread_rows(plgpu.load(smem.at[slot, pl.ds(gaps, T)], layout=PER_ROW), like)

            rows = shifted(0)
            if box < scale_box:
                row = plgpu.broadcasted_iota(jnp.int32, like.shape, 0, layout=MATRIX)
                for j in range(1, boxes):
                    rows = jnp.where(row >= j * box, shifted(j), rows)
            return rows

        def scores(slot, query_scale):
            """[T, N], base 2."""
            keys = k_smem.at[slot]
            if not int8:
                return matmul(keys, query_smem[0].transpose((1, 0)), T, N) * scale
            high, low = (
                matmul(keys, x.transpose((1, 0)), T, N, jnp.int32).astype(jnp.float32)
                for x in query_smem
            )
            x = (high + low * (1.0 / LOW_STEPS)) * spread_columns(query_scale, high)
            return x * scales(k_scale_smem, slot, x)

        def token_slots(step, shape):
            rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
            return rows + (s + step * S) * T

        def seen(slots):
            return (slots >= start) & (slots < stop)

        def values(slot, step):
            """V [T, D] bf16 in shared memory, rows outside the list zero."""
            if int8:
                codes = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                v_bf16_smem[...] = plgpu.layout_cast(codes, MATRIX).astype(jnp.bfloat16)
                return v_bf16_smem  # codes are never NaN and the weights of unseen rows are zero
            tile = v_smem.at[slot]
            first = (s + step * S) * T

            @pl.when((first < start) | (first + T > stop))
            def _():
                v = plgpu.load(tile, layout=MATRIX)
                tile[...] = jnp.where(seen(token_slots(step, (T, D))), v, jnp.zeros_like(v))

            return tile

        @pl.when(steps == 0)
        def _():
            store_unoptimised(lses_gmem.at[b, k, s], full((N,), -jnp.inf, PER_COLUMN))

        @pl.when(steps > 0)
        def _():
            for step in range(stages):

                @pl.when(step < steps)
                def _(step=step):
                    fetch(KEYS, step, ids[step])
                    fetch(VALUES, step, ids[step])

            query_scale = load_query()

            def attend_tile(step, carry):
                acc, peak, total, next_ids = carry  # [D, N], [N], [T, N], ids of step + stages
                slot = lax.rem(step, jnp.int32(stages))
                refill = step + stages < steps

                plgpu.barrier_wait(k_ready.at[slot])
                x = scores(slot, query_scale)
                visible = seen(token_slots(step, (T, N)))
                x = jnp.where(visible, x, -jnp.inf)
                new_peak = jnp.maximum(peak, x.max(axis=0))
                pl.when(refill)(lambda: fetch(KEYS, step + stages, next_ids))

                decay = jnp.exp2(peak - new_peak)
                p = jnp.exp2(x - spread_columns(new_peak, x))
                # Summed down the columns only once, at the end: no exchange between warps here.
                total = total * spread_columns(decay, total) + p

                plgpu.barrier_wait(v_ready.at[slot])
                if int8:
                    p = jnp.where(visible, p * scales(v_scale_smem, slot, p), 0.0)
                v = values(slot, step)
                p_smem.transpose((1, 0))[...] = plgpu.layout_cast(
                    p.astype(jnp.bfloat16), MATRIX_TRANSPOSED
                )
                plgpu.commit_smem()
                new = matmul(v.transpose((1, 0)), p_smem.transpose((1, 0)), D, N)
                acc = acc * spread_columns(decay, acc) + new
                pl.when(refill)(lambda: fetch(VALUES, step + stages, next_ids))
                return acc, new_peak, total, page_ids(step + stages + 1)

            acc, peak, total, _ = lax.fori_loop(
                0,
                steps,
                attend_tile,
                (
                    full((D, N), 0.0, MATRIX),
                    full((N,), LOWEST, PER_COLUMN),
                    full((T, N), 0.0, MATRIX),
                    ids[stages],
                ),
            )
            total = total.sum(axis=0)
            # Every tile of the split may lie before ``start``.
            inverse = jnp.where(total > 0.0, 1.0 / total, 0.0)
            lse = jnp.where(total > 0.0, peak + jnp.log2(total), -jnp.inf)
            store_unoptimised(parts_gmem.at[b, k, s], acc * spread_columns(inverse, acc))
            store_unoptimised(lses_gmem.at[b, k, s], lse)

    dtype = pools[0].k.dtype
    kv_tile = plgpu.SMEM((stages, T, D), dtype, transforms=tile_transforms(D, dtype))
    ready = plgpu.Barrier(num_arrivals=2 * boxes if int8 else boxes, num_barriers=stages)
    query_tile = plgpu.SMEM(
        (N, D), jnp.int8 if int8 else q.dtype, transforms=tile_transforms(D, dtype)
    )
    p_tile = plgpu.SMEM((N, T), jnp.bfloat16, transforms=tile_transforms(T, jnp.bfloat16))
    scratch = [kv_tile, kv_tile, p_tile, ready, ready, query_tile]
    if int8:
        v_tile = plgpu.SMEM((T, D), jnp.bfloat16, transforms=tile_transforms(D, jnp.bfloat16))
        scale_tile = plgpu.SMEM((stages, boxes * scale_box), jnp.float32)
        scratch += [query_tile, v_tile, scale_tile, scale_tile]
    return plgpu.kernel(
        attend_split,
        out_type=(
            jax.ShapeDtypeStruct((B, K, S, D, N), jnp.float32),
            jax.ShapeDtypeStruct((B, K, S, N), jnp.float32),
        ),
        grid=(B, K, S),
        grid_names=("row", "head", "split"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        q,
        *(x for one in lists for x in one),
        *(x for pool in pools for x in pool if x is not None),
    )


def _combine_splits(
    parts: Float[Array, "B K S D N"],
    lses: Float[Array, "B K S N"],
    G: int,
    dtype: jax.typing.DTypeLike,
    config: Config,
) -> tuple[Float[Array, "BH D"], Float[Array, "B K N"]]:
    """Joins the splits as ``merge_attention`` does; lse is natural and keeps the query tile's N.

    Index map: grid (row b, KV head k, half d of the head dimension), 64 channels a CTA.
    """
    B, K, S, D, N = parts.shape
    H = B * K * G
    at_once = min(config.parts, S)

    def combine_splits(
        parts_gmem,  # [B, K, S, D, N] float32
        lses_gmem,  # [B, K, S, N] float32
        out_gmem,  # [B * H, D]
        lse_gmem,  # [B, K, N] float32
        out_smem,  # [N, 64]
    ):
        b, k, d = (lax.axis_index(name) for name in ("row", "head", "half"))
        channels = pl.ds(d * 64, 64)

        def join(step, carry):
            acc, peak, total = carry  # [64, N], [N], [N]
            # No load depends on another or on how many splits had work: all wait together.
            index = [step * at_once + j for j in range(at_once)]
            inside = [jnp.minimum(i, S - 1) for i in index]
            lse = [
                plgpu.load(lses_gmem.at[b, k, i], layout=PER_COLUMN, optimized=False)
                for i in inside
            ]
            part = [
                plgpu.load(parts_gmem.at[b, k, i, channels], layout=MATRIX, optimized=False)
                for i in inside
            ]
            if S % at_once:  # the last step repeats split S - 1
                lse = [x + jnp.where(i < S, 0.0, -jnp.inf) for x, i in zip(lse, index, strict=True)]
            new_peak = peak
            for x in lse:
                new_peak = jnp.maximum(new_peak, x)
            decay = jnp.exp2(peak - new_peak)
            acc, total = acc * spread_columns(decay, acc), total * decay
            for x, values in zip(lse, part, strict=True):
                weight = jnp.exp2(x - new_peak)
                total += weight
                spread = spread_columns(weight, acc)
                # A split without tiles has written no part: what is there may be NaN.
                acc += jnp.where(spread > 0.0, values * spread, 0.0)
            return acc, new_peak, total

        acc, peak, total = lax.fori_loop(
            0,
            pl.cdiv(S, at_once),
            join,
            (
                full((64, N), 0.0, MATRIX),
                full((N,), LOWEST, PER_COLUMN),
                full((N,), 0.0, PER_COLUMN),
            ),
        )
        empty = total == 0.0
        inverse = jnp.where(empty, 0.0, 1.0 / total)
        out = (acc * spread_columns(inverse, acc)).astype(dtype)  # [64, N]
        store_unoptimised(out_smem.transpose((1, 0)), plgpu.layout_cast(out, MATRIX_TRANSPOSED))
        plgpu.commit_smem()

        @pl.when(d == 0)
        def _():
            lse = (peak + jnp.log2(total)) * LN_2
            store_unoptimised(lse_gmem.at[b, k], jnp.where(empty, -jnp.inf, lse))

        own = (b * K + k) * G
        shift = own - _query_tile(b * K + k, G, N, max(H, N))
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(shift, G)], out_gmem.at[pl.ds(own, G), channels])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        combine_splits,
        out_type=(
            jax.ShapeDtypeStruct((H, D), dtype),
            jax.ShapeDtypeStruct((B, K, N), jnp.float32),
        ),
        grid=(B, K, D // 64),
        grid_names=("row", "head", "half"),
        scratch_types=[plgpu.SMEM((N, 64), dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(parts, lses)
