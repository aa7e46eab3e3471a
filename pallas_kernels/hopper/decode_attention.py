"""Paged attention for one query token a row: both head classes in one launch, Hopper (Mosaic GPU).

Index map. The grid is (row b, split s of KV head k), one warpgroup of 128 threads each;
``decode_splits`` deals the splits out to the heads. The tokens of (b, k), its listed pages end to
end, are cut into tiles of T = 64; of S splits of a head, s takes every S-th tile, so that work is
even whatever the length and a split needs no length to find its first:

      pages listed for (b, k) |  page 7  |  page 2  |  page 9  |  page 4  |     P tokens a page
      tokens of (b, k)        |....start########################stop......|
      tiles of T tokens       |  0  |  1  |  2  |  3  |  4  |  5  |  6  |       T <= P or T > P
      split (S = 3)           |  0  |  1  |  2  |  0  |  1  |  2  |  -  |

      k < Kr: the retrieval pool and its list, else the streaming pool (head k - Kr) and its list

For each tile, with the G query heads of k as the N = 8 or 16 *columns* of every matrix (wgmma's
M is 64, and G rows would waste most of it; N can be as small as 8):

      scores [T, N] = K [T, D] @ Q^T [D, N]        K as TMA left it in shared memory
      online softmax down the columns
      acc [D, N]   += V^T [D, T] @ P^T [T, N]      V as TMA left it, P through shared memory

      parts [B, splits, D, N], lses [B, splits, N]  --combine: grid (b, k, D / 64)-->  out, lse

What must move: K and V of each listed token once, B * K * tokens * 2 * D * (2, 1 or 1/2) bytes,
plus 8 bytes of scales a token for int8 and fp8, 16 for int4. The parts are B * splits * D * N * 4
bytes, written and read in L2.

Pages of codes. K stays codes: the query is split into two int8 vectors, q = scale * (high + low /
254), which keeps 15 bits of it, and the tensor cores multiply int8 by int8; a token's scale
multiplies its row of scores. For fp8 they are two e4m3, which keep of a bf16 q all but what lies
2^-18 below its largest element; sums of e4m3 products have fewer digits than float32. V has to be
transposed, which wgmma can do for 16-bit operands only, so V alone passes through shared memory a
second time, as bf16 codes; its scales multiply P.

int4 pages: x = code * step + lowest, with two numbers for each half h of the channels. Codes of K
become int8 in registers, from where wgmma takes them, with the 4 N columns of

      | high of h = 0 | low of h = 0 | high of h = 1 | low of h = 1 |    zeros in the other half

and the sum of q over each half, times the lowest value, is added. P is two matrices side by side,
one for either half's steps, of which each half of the channels of V^T @ P^T takes its own; what P
times the lowest values sums to is added at the end.

What must not be read: an entry of the list past ``stop`` never has its page fetched, scores of
tokens outside ``[start, stop)`` are replaced and not added to, and their V rows are zeroed, since
a weight of zero does not silence a NaN. Codes of V are never NaN; their scales are replaced, too.

``decode_tiles`` fetches tiles, ``decode_operands`` makes of them what is multiplied, and
``decode_combine`` is the second kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper.decode_combine import combine_parts
from pallas_kernels.hopper.decode_operands import (
    load_query,
    of_halves,
    scales,
    scores,
    step_and_lowest,
    values,
)
from pallas_kernels.hopper.decode_splits import (
    Alike,
    deal_splits,
    most_splits,
    place_alike,
    split_table,
)
from pallas_kernels.hopper.decode_tiles import (
    KEYS,
    VALUES,
    Boxes,
    Buffers,
    Split,
    allocate_buffers,
    plan_split,
    query_tile_start,
    read_place,
)
from pallas_kernels.hopper.mosaic import (
    LOWEST,
    MATRIX,
    MATRIX_TRANSPOSED,
    PER_COLUMN,
    SM_COUNT,
    full,
    matmul,
    refuse,
    spread_columns,
    store_unoptimised,
)
from pallas_kernels.hopper.shared_kernel import FLAT, Shapes, call_shared
from pallas_kernels.kv_codes import kv_kind
from pallas_kernels.listed_attention import cut_pages
from pallas_kernels.types import KVPages, PageList


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call; ``choose_config`` gives a good one."""

    splits: tuple[int, ...]  # parts that each KV head of a row is cut into
    numbers: int = 0  # S, splits of a row that there is room for, if more than ``splits`` are
    stages: int = 2  # tiles of K and V in flight a split
    parts: int = 33  # parts the combining kernel loads at once

    def __post_init__(self) -> None:
        for name, value in (
            ("splits", min(self.splits)),
            ("stages", self.stages),
            ("parts", self.parts),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def choose_config(
    rows: int, most_tokens: tuple[int, ...], dtype: jax.typing.DTypeLike, queries: int = 1
) -> Config:
    """The configuration for ``rows`` rows whose lists attend up to ``most_tokens`` a KV head.

    ``queries`` is how many query vectors a KV head has.
    """
    # Two CTAs an SM read bf16 at full bandwidth; codes take more arithmetic a byte, and four hide
    # it, for which many columns leave no registers. Every further part costs the combining kernel
    # time.
    four = {None: 0, "int8": 16, "fp8": 8, "int4": 8}[kv_kind(dtype)]  # up to so many queries
    ctas = (4 if queries <= four else 2) * SM_COUNT
    # As many parts at once as registers hold, of which 8 columns take four.
    parts = 33 if queries <= 16 else 264 // _columns(queries)
    splits = deal_splits(rows, most_tokens, ctas)
    numbers = most_splits(rows, len(most_tokens), ctas)
    # Where heads differ, the same for all layers: few heads have twice as many as all on average.
    usual = splits[0] if len(set(splits)) == 1 else 2 * numbers // len(splits)
    return Config(splits=splits, numbers=numbers, parts=min(parts, usual))


def _columns(queries: int) -> int:
    """N, columns of the query matrix."""
    return 8 * pl.cdiv(queries, 8)


@partial(jax.jit, static_argnames=("selected_page_size", "most_tokens", "config"))
def paged_attention(
    q: Float[Array, "B H D"],
    retrieval: KVPages,
    streaming: KVPages,
    retrieval_list: PageList,
    streaming_list: PageList,
    *,
    selected_page_size: int | None = None,
    most_tokens: tuple[int, ...] | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """``pallas_kernels.api.paged_attention`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    Query bf16, pages bf16 or codes of any kind; D 64 or 128; listed pages of 16 to 128 tokens; up
    to 16 query heads a KV head. Shapes are those the api has checked. Raises
    ``NotImplementedError`` for anything else.
    """
    if selected_page_size is not None:
        retrieval, streaming = (cut_pages(x, selected_page_size) for x in (retrieval, streaming))
    group = q.shape[1] // (retrieval.k.shape[0] + streaming.k.shape[0])
    reasons = unsupported(q, retrieval, streaming)
    if group > 16:
        reasons.append(f"at most 16 query heads a KV head, got {group}")
    refuse("paged_attention", reasons)
    B, H, D = q.shape
    classes = [
        (pool, page_list)
        for pool, page_list in ((retrieval, retrieval_list), (streaming, streaming_list))
        if pool.k.shape[0] > 0
    ]
    if config is None:
        held = [
            page_list.page_ids.shape[2] * pool.k.shape[2]
            for pool, page_list in classes
            for _ in range(pool.k.shape[0])
        ]
        most = tuple(map(min, held, most_tokens or held))
        config = choose_config(B, most, retrieval.k.dtype, group)

    out, lse = attend_lists(q.reshape(B, -1, group, D), classes, config)
    return out.reshape(B, H, D), lse.reshape(B, H)


def unsupported(q: Float[Array, "... D"], retrieval: KVPages, streaming: KVPages) -> list[str]:
    """Reasons why ``attend_lists`` cannot run."""
    head_dim, page_size = q.shape[-1], retrieval.k.shape[2]
    reasons = []
    if q.dtype != jnp.bfloat16:
        reasons.append(f"queries must be bfloat16, got {q.dtype}")
    for name, pool in (("retrieval", retrieval), ("streaming", streaming)):
        if pool.k.dtype != jnp.bfloat16 and kv_kind(pool.k.dtype) is None:
            reasons.append(f"{name} pages must be bfloat16 or codes, got {pool.k.dtype}")
    if retrieval.k.dtype != streaming.k.dtype:
        reasons.append(
            f"both pools must have one dtype, got {retrieval.k.dtype} and {streaming.k.dtype}"
        )
    if head_dim not in (64, 128):
        reasons.append(f"head_dim must be 64 or 128, got {head_dim}")
    if page_size not in (16, 32, 64, 128):
        reasons.append(f"listed pages must have 16, 32, 64 or 128 tokens, got {page_size}")
    return reasons


def attend_lists(
    q: Float[Array, "B K G D"],
    classes: list[tuple[KVPages, PageList]],  # of the pools that have heads
    config: Config,
    *,
    tokens: int = 1,
) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G"]]:
    """Attention over the lists, out in q's dtype, lse natural and float32.

    With ``tokens`` the G queries of a KV head are those of so many tokens of the sequence, G /
    tokens of each: those of the last token attend all of the list, those of each token before it
    one token less.
    """
    B, K, G, D = q.shape
    N = _columns(G)
    rows = q.reshape(-1, D)
    if len(rows) < N:  # a tile of N query rows must lie inside the array
        rows = jnp.pad(rows, ((0, N - len(rows)), (0, 0)))
    first_row = G * np.arange(B * K)
    shift = first_row - np.minimum(first_row, len(rows) - N)  # see query_tile_start

    pools, lists = zip(*classes, strict=True)
    alike = len(pools) == 1 and len(set(config.splits)) == 1
    numbers, table = sum(config.splits), None
    if not alike:
        numbers = max(config.numbers, numbers)
        of_pools = [(pool.k.shape[0], of_pool) for pool, of_pool in classes]
        table = jnp.asarray(split_table(config.splits, of_pools, numbers))
    settings = _Settings(
        rows=B,
        heads=K,
        group=G,
        head_dim=D,
        numbers=numbers,
        stages=config.stages,
        tokens=tokens,
        page_size=pools[0].k.shape[2],
        dtype=pools[0].k.dtype,
        alike=Alike(config.splits[0], jax.tree.map(_shape, lists[0])) if alike else None,
    )
    parts, lses = call_shared(
        _make_kernel,
        settings,
        (rows, jax.tree.map(jnp.ravel, lists), pools, table),
        (
            jax.ShapeDtypeStruct((B, numbers, D, N), jnp.float32),
            jax.ShapeDtypeStruct((B, numbers, N), jnp.float32),
        ),
        longest=(None, FLAT, K, None),
        longest_results=(None, None),
    )
    splits = config.splits[0] if alike else None
    out, lse = combine_parts(parts, lses, table, K, splits, G, q.dtype, config.parts)
    column = N * np.arange(B * K)[:, None] + shift[:, None] + np.arange(G)
    return out.reshape(q.shape), lse.reshape(-1)[column].reshape(B, K, G)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    rows: int  # B
    heads: int  # K
    group: int  # G
    head_dim: int  # D
    numbers: int  # S
    stages: int
    tokens: int
    page_size: int  # P
    dtype: Any  # of pages
    alike: Alike | None  # None where heads differ: their splits are in a table


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    B, K, G, D, S, stages, tokens, page_size, dtype, alike = settings
    N, boxes = _columns(G), Boxes(page_size)
    query_rows = max(B * K * G, N)

    def attend_split(
        q_gmem,  # [rows, D] bf16
        lists_gmem,  # for each class: page_ids, start and stop, flat int32
        pools_gmem,  # for each class: KVPages
        table_gmem,  # [S, columns] int32, see ``split_table``; None if all are alike
        parts_gmem,  # [B, S, D, N] float32, output
        lses_gmem,  # [B, S, N] float32, output
        buffers,  # see Buffers
    ):
        b, number = lax.axis_index("row"), lax.axis_index("split")
        place = read_place(table_gmem, number) if alike is None else place_alike(number, alike)
        k, split = place.head, plan_split(lists_gmem, pools_gmem, buffers, b, place)

        @pl.when(split.steps == 0)
        def _():
            store_unoptimised(lses_gmem.at[b, number], full((N,), -jnp.inf, PER_COLUMN))

        @pl.when(split.steps > 0)
        def _():
            for step in range(stages):

                @pl.when(step < split.steps)
                def _(step=step):
                    split.fetch(KEYS, step, split.first_page_ids[step])
                    split.fetch(VALUES, step, split.first_page_ids[step])

            first_row = query_tile_start(b * K + k, G, N, query_rows)
            query_scale = load_query(q_gmem.at[pl.ds(first_row, N)], buffers)
            stops = None
            if tokens > 1:
                column = plgpu.broadcasted_iota(jnp.int32, (N,), 0, layout=PER_COLUMN)
                query = column - ((b * K + k) * G - first_row)
                later = tokens - 1 - lax.div(query, jnp.int32(G // tokens))  # tokens after its own
                stops = split.stop - later
            acc, peak, total = _attend_tiles(split, buffers, boxes, query_scale, stops)
            # Every tile of the split may lie before ``start``.
            inverse = jnp.where(total > 0.0, 1.0 / total, 0.0)
            lse = jnp.where(total > 0.0, peak + jnp.log2(total), -jnp.inf)
            store_unoptimised(parts_gmem.at[b, number], acc * spread_columns(inverse, acc))
            store_unoptimised(lses_gmem.at[b, number], lse)

    return plgpu.kernel(
        attend_split,
        out_type=results,
        grid=(B, S),
        grid_names=("row", "split"),
        scratch_types=[allocate_buffers(D, N, boxes, stages, dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _attend_tiles(split: Split, buffers: Buffers, boxes: Boxes, query_scale, stops):
    """Attends all tiles of the split, the first of which are on their way.

    ``stops`` [N] are the columns' own, None if all have that of the split. Returns the weighted sum
    of values [D, N], the largest score [N] (base 2) and the sum of the weights relative to it [N].
    """
    stages, T, _ = buffers.k.shape
    halves = buffers.kind == "int4"  # of the channels, with weights and lowest values of their own
    N, D = buffers.p.shape[0] // (2 if halves else 1), buffers.query[0].shape[1]
    # Weights are summed down the columns only once, at the end: no exchange between warps in the
    # loop. Many columns leave no registers for that.
    summed_last = N <= 16

    def add_up(total, decay, x):
        if summed_last:
            return total * spread_columns(decay, total) + x
        return total * decay + x.sum(axis=0)

    def attend_tile(step, carry):
        # [D, N], [N], [T, N] or [N], as total for either half, ids of step + stages
        acc, peak, total, lowest_totals, next_ids = carry
        stage = lax.rem(step, jnp.int32(stages))
        refill = step + stages < split.steps

        plgpu.barrier_wait(buffers.k_ready.at[stage])
        x = scores(buffers, stage, boxes, query_scale)
        token = split.token_numbers(step, (T, N))
        attended = split.attends(token)
        if stops is not None:
            attended &= token < spread_columns(stops, token)
        x = jnp.where(attended, x, -jnp.inf)
        new_peak = jnp.maximum(peak, x.max(axis=0))
        pl.when(refill)(lambda: split.fetch(KEYS, step + stages, next_ids))

        decay = jnp.exp2(peak - new_peak)
        p = jnp.exp2(x - spread_columns(new_peak, x))
        total = add_up(total, decay, p)

        plgpu.barrier_wait(buffers.v_ready.at[stage])
        weights = p
        if halves:
            words = [
                step_and_lowest(of_half, stage, boxes, p, attended) for of_half in buffers.v_scale
            ]
            weights = jnp.concatenate([p * size for size, _ in words], axis=1)
            lowest_totals = tuple(
                add_up(total, decay, p * lowest)
                for total, (_, lowest) in zip(lowest_totals, words, strict=True)
            )
        elif buffers.v_scale:
            weights = jnp.where(attended, p * scales(buffers.v_scale[0], stage, boxes, p), 0.0)
        buffers.p.transpose((1, 0))[...] = plgpu.layout_cast(
            weights.astype(jnp.bfloat16), MATRIX_TRANSPOSED
        )
        v = values(buffers, stage, split, step)
        plgpu.commit_smem()
        new = matmul(v.transpose((1, 0)), buffers.p.transpose((1, 0)), D, weights.shape[1])
        if halves:
            new = of_halves(new[:, :N], new[:, N:])
        acc = acc * spread_columns(decay, acc) + new
        pl.when(refill)(lambda: split.fetch(VALUES, step + stages, next_ids))
        return acc, new_peak, total, lowest_totals, split.page_ids(step + stages + 1)

    def no_total():
        return full((T, N), 0.0, MATRIX) if summed_last else full((N,), 0.0, PER_COLUMN)

    acc, peak, total, lowest_totals, _ = lax.fori_loop(
        0,
        split.steps,
        attend_tile,
        (
            full((D, N), 0.0, MATRIX),
            full((N,), LOWEST, PER_COLUMN),
            no_total(),
            (no_total(), no_total()) if halves else (),
            split.first_page_ids[stages],
        ),
    )
    if summed_last:
        total, *lowest_totals = (x.sum(axis=0) for x in (total, *lowest_totals))
    if halves:
        acc = acc * 64.0 + of_halves(*(spread_columns(x, acc) for x in lowest_totals))
    return acc, peak, total
