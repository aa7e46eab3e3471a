"""RelayAttention's system part: every row's query attends one prefix that all rows share.

Index map (Hopper, Mosaic GPU). No query is masked, so the rows are as good as one long query: the
B * G queries of a KV head form tiles of 128 (see ``query_tiles``), and the blocks of 128 keys of
the prefix are dealt to S splits, so that there are CTAs for all SMs.

      page_table       |  page 7  |  page 2  |  page 9  |  page 4  |    P tokens a page
      prefix           |############################length..........|
      blocks of 128    |  0  |  1  |  2  |  3  |  4  ]  the last block is masked past ``length``
      split (S = 3)    |  0  |  1  |  2  |  0  |  1  |

      q [B, K * G, D]  --XLA-->  rows [K, R, D], R = B * G (D = 64: and one) to a multiple of 128
      grid (split s, KV head k, tile)   parts [S, K, R, D] bf16, lses [S, K, R]
      grid (row b, KV head k, g)        parts and the row's own attention --> out [B, K * G, D]

What must be computed: 4 * B * K * G * D * length operations. What must move: K and V of the prefix
once a tile, 4 * length * K * D bytes; beyond about 200 rows a KV head the arithmetic takes longer.
Of codes half or a quarter of that moves, and with a scale or two a token; each tile makes bf16 of
them anew, beside its products (see ``query_tiles``).
The second kernel joins the splits, and with them the attention that a row has of its own tokens:
XLA would take four launches for it, in every layer of a decode step.
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

from pallas_kernels.hopper.mosaic import (
    LN_2,
    LOG2_E,
    LOWEST,
    MATRIX,
    SM_COUNT,
    STRIDED,
    cdiv,
    refuse,
    store_unoptimised,
    unsupported,
)
from pallas_kernels.hopper.query_tiles import (
    BLOCK,
    HALF,
    ROWS,
    WARPGROUPS,
    Work,
    attend,
    copy_code_pages,
    copy_pages,
    tile_scratch,
    zero_rows,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared
from pallas_kernels.kv_codes import KVKind, kv_kind
from pallas_kernels.types import KVPages, OwnAttention

# Elements a warpgroup of the merging kernel holds: one a thread.
LANES = 128
# Tuning limits of ``choose_config``.
MOST_SPLITS = 32
# What starting a CTA and merging its part cost, in blocks of keys.
SPLIT_COST = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call; ``choose_config`` gives a good one."""

    splits: int  # S, parts that the prefix is cut into
    stages: int  # blocks of K and V in shared memory

    def __post_init__(self) -> None:
        for name in ("splits", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def choose_config(tiles: int, tokens: int, head_dim: int) -> Config:
    """The configuration for ``tiles`` tiles of all KV heads and a prefix of ``tokens``."""
    blocks = pl.cdiv(tokens, BLOCK)

    def cost(splits: int) -> int:
        """Blocks that the busiest SM attends one after another."""
        return pl.cdiv(tiles * splits, SM_COUNT) * (pl.cdiv(blocks, splits) + SPLIT_COST)

    splits = min(range(1, min(blocks, MOST_SPLITS) + 1), key=cost)
    # As for prefill: one block of 128 channels is in use while the other arrives.
    return Config(splits=splits, stages=256 // head_dim)


@partial(jax.jit, static_argnames=("config",))
def prefix_attention(
    q: Float[Array, "B H D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    length: Int[Array, ""],
    own: OwnAttention | None = None,
    *,
    config: Config | None = None,
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """``pallas_kernels.api.prefix_attention`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    Query bf16; D 64 or 128; P 16 to 128; any B and group. Pages bf16, or codes of any kind, which
    give what pages of these numbers rounded to bf16 would, bit for bit. Shapes are those the api
    has checked. Raises ``NotImplementedError`` for anything else.
    """
    refuse("prefix_attention", unsupported(q.shape[2], {"q": q}, {"pages": pages}))
    B, H, D = q.shape
    K, _, P, _ = pages.k.shape
    rows = B * (H // K)
    tiles = K * pl.cdiv(rows, ROWS)
    if config is None:
        config = choose_config(tiles, page_table.shape[0] * P, D)
    by_head = q.reshape(B, K, H // K, D).swapaxes(0, 1).reshape(K, rows, D)
    # Merging reads LANES elements where a query's D begin: the last query needs some behind it.
    spare = pl.cdiv(LANES - D, D)
    by_head = jnp.pad(by_head, ((0, 0), (0, -(rows + spare) % ROWS + spare), (0, 0)))
    parts, lses = _attend_prefix(by_head, pages, page_table, length[None], config)
    return merge_parts(parts, lses, own, B, H)


def _attend_prefix(
    q: Float[Array, "K R D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    length: Int[Array, " 1"],
    config: Config,
) -> tuple[Float[Array, "S K R D"], Float[Array, "S K R"]]:
    """Attention of every split on its own. R is a multiple of 128."""
    K, R, D = q.shape
    kind = kv_kind(pages.k.dtype)
    settings = _PrefixSettings(config, page_table.shape[0], pages.k.shape[2], kind)
    shapes = ((config.splits, K, R, D), q.dtype), ((config.splits, K, R), jnp.float32)
    parts, lses = call_shared(
        _make_prefix_kernel,
        settings,
        (q, pages, page_table, length),
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        longest=(None,) * 4,
        longest_results=(None,) * 2,
    )
    return parts, lses


class _PrefixSettings(NamedTuple):
    """What the first kernel is lowered for, beside the shapes of its arrays."""

    config: Config
    table: int  # M
    page_size: int  # P
    kind: KVKind | None  # of the pages


def _make_prefix_kernel(settings: _PrefixSettings, results: Shapes) -> Callable[..., Any]:
    config, M, P, kind = settings
    (S, K, R, D), dtype = results[0].shape, results[0].dtype

    def attend_prefix(
        q_gmem,  # [K, R, D]
        pages_gmem,  # KVPages: k, v [K, N, P, D or D / 2]; of codes their scales [K, N, P]
        table_gmem,  # [M]
        length_gmem,  # [1]
        parts_gmem,  # [S, K, R, D], output
        lses_gmem,  # [S, K, R] float32, output
        tile,
    ):
        def plan() -> Work:
            s, k, first = (lax.axis_index(name) for name in ("split", "head", "tile"))
            length = length_gmem[0]
            steps = cdiv(jnp.maximum(cdiv(length, BLOCK) - s, 0), S)

            def rows_of(half):
                rows = pl.ds(first * ROWS + half * HALF, HALF)
                return q_gmem.at[k, rows], parts_gmem.at[s, k, rows], lses_gmem.at[s, k, rows]

            def page_id(block, j):
                return table_gmem[jnp.minimum(block * (BLOCK // P) + j, M - 1)]

            def fetch(block, part, to, ready):
                copy_pages(pages_gmem[part], k, partial(page_id, block), to, ready)

            def fetch_codes(block, page, part, targets, ready):
                arrays = [pages_gmem[part], *jax.tree.leaves(pages_gmem[2 + part])]
                copy_code_pages(arrays, k, page, partial(page_id, block), targets, ready)

            def rest(block):
                """Keys of the prefix from the block's first one on; 128 and more fill the block."""
                return length - block * BLOCK

            def mask(block, half, scores):
                def hide(scores):
                    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
                    return jnp.where(key < rest(block), scores, -jnp.inf)

                return lax.cond(rest(block) >= BLOCK, lambda scores: scores, hide, scores)

            def clean(block, values):
                @pl.when(rest(block) < BLOCK)
                def _():
                    zero_rows(values, lambda row: row < rest(block))

            return Work(
                steps=steps,
                rows_of=rows_of,
                block=lambda step: s + step * S,
                fetch=fetch,
                mask=mask,
                clean=clean,
                page_id=page_id,
                fetch_codes=fetch_codes,
            )

        attend(tile, plan)

    return plgpu.kernel(
        attend_prefix,
        out_type=results,
        grid=(S, K, R // ROWS),
        grid_names=("split", "head", "tile"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[tile_scratch(D, dtype, config.stages, P, kind)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def merge_parts(
    parts: Float[Array, "S K R D"],
    lses: Float[Array, "S K R"],
    own: OwnAttention | None,
    B: int,
    H: int,
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """Joins all splits, and ``own`` where it shares the prefix, as ``merge_attention`` does.

    Parts are bf16, their query ``b * H // K + g`` is that of row b; lses are natural logarithms,
    float32. R has a query more than there are if D = 64.

    Index map: grid (row b, KV head k, query head g of it), one query a CTA.
    """
    S, K, R, D = parts.shape
    if own is not None:
        own_out = jnp.pad(own.out.reshape(-1), (0, LANES - D))
        own = OwnAttention(own_out, own.lse, own.shares.astype(jnp.int32))
    shapes = ((B * H * D,), parts.dtype), ((B, H, LANES), jnp.float32)
    out, lse = call_shared(
        _make_merge_kernel,
        _MergeSettings(B, H, S, K, D),
        (parts.reshape(S, K, R * D), lses, own),
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        longest=(None,) * 3,
        longest_results=(None,) * 2,
    )
    return out.reshape(B, H, D), lse[:, :, 0]


class _MergeSettings(NamedTuple):
    """What the second kernel is lowered for, beside the shapes of its arrays."""

    rows: int  # B
    query_heads: int  # H
    splits: int  # S
    heads: int  # K
    head_dim: int  # D


def _make_merge_kernel(settings: _MergeSettings, results: Shapes) -> Callable[..., Any]:
    B, H, S, K, D = settings
    G, dtype = H // K, results[0].dtype

    def merge(
        parts_gmem,  # [S, K, R * D]
        lses_gmem,  # [S, K, R] float32
        own_gmem,  # out [B * H * D and more], lse [B, H] float32, shares [B] int32; or None
        out_gmem,  # [B * H * D], output
        lse_gmem,  # [B, H, LANES] float32, output
        out_smem,  # [LANES]
    ):
        b, k, g = (lax.axis_index(name) for name in ("row", "head", "query"))
        r, h = b * G + g, k * G + g

        def load(ref, *index):
            """The query's D elements, and LANES - D of what lies behind them."""
            *head, row = index
            return plgpu.load(ref.at[*head, pl.ds(row * D, LANES)], layout=STRIDED, optimized=False)

        # No load depends on another: all wait together.
        peaks = [lses_gmem[s, k, r] for s in range(S)]
        values = [load(parts_gmem, s, k, r) for s in range(S)]
        if own_gmem is not None:
            hidden = jnp.where(own_gmem.shares[b] > 0, 0.0, -jnp.inf)
            peaks = [x + hidden for x in peaks] + [own_gmem.lse[b, h]]
            values.append(load(own_gmem.out, b * H + h))
        peak = jnp.float32(LOWEST)
        for x in peaks:
            peak = jnp.maximum(peak, x)
        acc = total = jnp.zeros((LANES,), jnp.float32)
        for x, part in zip(peaks, values, strict=True):
            weight = jnp.exp2(jnp.full((LANES,), (x - peak) * LOG2_E, jnp.float32))
            # An empty part may hold anything, NaN included.
            acc += jnp.where(weight > 0.0, weight * part.astype(jnp.float32), 0.0)
            total += weight
        empty = total == 0.0
        out_smem[...] = (acc * jnp.where(empty, 0.0, 1.0 / total)).astype(dtype)
        lse = jnp.where(empty, -jnp.inf, peak + jnp.log2(total) * LN_2)
        store_unoptimised(lse_gmem.at[b, h], plgpu.layout_cast(lse, STRIDED))
        plgpu.commit_smem()
        to = out_gmem.at[pl.ds((b * H + h) * D, D)]
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, D)], to)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        merge,
        out_type=results,
        grid=(B, K, G),
        grid_names=("row", "head", "query"),
        scratch_types=[plgpu.SMEM((LANES,), dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
