"""Page scores for decode: how much each page can matter, Hopper (Mosaic GPU).

For a weight w of the lower bound between 0 and 1

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
    MATRIX,
    MATRIX_TRANSPOSED,
    PER_COLUMN,
    SM_COUNT,
    cdiv,
    matmul,
    refuse,
    spread_columns,
    store_unoptimised,
    tile_transforms,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared, sizes

ROWS = 64  # rows of a tile: wgmma's M
SQUARE = (64, 64)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call; ``choose_config`` gives a good one."""

    tiles: int  # tiles of 64 rows a chunk
    stages: int = 2  # tiles in flight

    def __post_init__(self) -> None:
        for name in ("tiles", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def choose_config(rows: int, kv_heads: int, tiles: int) -> Config:
    """The configuration for ``rows`` x ``kv_heads`` lists of ``tiles`` tiles each."""
    # One wave of two CTAs an SM: if a tile is left over for each, nothing hides its latency.
    # Two tiles in flight: with more, shared memory has room for one CTA only, which is slower.
    # Beyond eight tiles a CTA there is nothing more to gain.
    return Config(tiles=min(max(pl.cdiv(rows * kv_heads * tiles, 2 * SM_COUNT), 1), 8))


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    config: Config
    rows: int  # B
    most_heads: int
    group: int  # G
    head_dim: int  # D
    pages: int  # M
    logical_pages: int  # g
    page_size: int
    selected_page_size: int
    lower_bound_weight: float


_STATIC = ("page_size", "selected_page_size", "lower_bound_weight", "most_heads", "config")


@partial(jax.jit, static_argnames=_STATIC)
def page_scores(
    q: Float[Array, "B Hr D"],
    key_stats: Float[Array, "Kr N g 2 D"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
    *,
    page_size: int,
    selected_page_size: int,
    lower_bound_weight: float = 0.0,
    most_heads: int | None = None,
    config: Config | None = None,
) -> Float[Array, "B Kr M*m"]:
    """``pallas_kernels.api.page_scores`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    Query and statistics bf16; D 64 or 128; 1, 2, 4 or 8 logical pages a page; up to 16 query heads
    a KV head. ``lower_bound_weight * q`` is rounded to bf16, which a power of two makes exact.
    Raises ``NotImplementedError`` for anything else.
    """
    _refuse_unsupported(q, key_stats)
    B, Hr, D = q.shape
    Kr, N, g = key_stats.shape[:3]
    M, G = page_table.shape[1], Hr // Kr
    most_heads = Kr if most_heads is None else most_heads
    if config is None:
        config = choose_config(B, most_heads, pl.cdiv(M, ROWS // g))
    settings = _Settings(
        config, B, most_heads, G, D, M, g, page_size, selected_page_size, lower_bound_weight
    )
    queries, most_queries = q.reshape(B * Hr, D), B * most_heads * G
    columns = _columns(G)
    if B * Hr < columns:  # a tile of query rows must lie inside the array
        queries = jnp.pad(queries, ((0, columns - B * Hr), (0, 0)))
    last_tile = len(queries) - columns
    tile_scores = ROWS * page_size // (g * selected_page_size)
    width = pl.cdiv(M, config.tiles * ROWS // g) * config.tiles * tile_scores
    (scores,) = call_shared(
        _make_kernel,
        settings,
        (
            queries,
            key_stats.reshape(Kr, N, g, 2 * D),
            page_table,
            length,
            sizes(Kr, last_tile),
        ),
        (jax.ShapeDtypeStruct((B * Kr, width), jnp.float32),),
        longest=(max(most_queries, columns), most_heads, None, None, None),
        longest_results=(B * most_heads,),
    )
    return scores.reshape(B, Kr, width)[:, :, : M * page_size // selected_page_size]


def _columns(group: int) -> int:
    """N, columns of the query matrix."""
    return 8 * pl.cdiv(group, 8)


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    G, g, D, M = settings.group, settings.logical_pages, settings.head_dim, settings.pages
    page_size, columns, tiles = settings.page_size, _columns(G), settings.config.tiles
    stages = min(settings.config.stages, tiles)
    tile_pages, logical_page_size = ROWS // g, page_size // g
    together = settings.selected_page_size // logical_page_size  # logical pages that have one score
    tile_scores, chunk_pages = ROWS // together, tiles * tile_pages

    def score_pages(
        q_gmem,  # [rows, D] bf16
        stats_gmem,  # [Kr, N, g, 2 D] bf16
        table_gmem,  # [B, M] int32
        length_gmem,  # [B] int32
        sizes_gmem,  # int32: Kr, first row of the last tile of queries
        scores_gmem,  # [B * Kr, chunks * tiles * tile_scores] float32, output
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
        heads = sizes_gmem[0]
        pair = b * heads + k

        @pl.when(k < heads)
        def _():
            def fetch(step, ids):
                """Starts the copies of one tile."""
                stage = lax.rem(step, jnp.int32(stages))
                for j, page in enumerate(ids):
                    if j:  # the tile's first page stands in for those past ``length``
                        page = jnp.where(step * tile_pages + j < pages, page, ids[0])
                    plgpu.copy_gmem_to_smem(
                        stats_gmem.at[k, page],
                        page_smem.at[stage, pl.ds(j * g, g)],
                        ready.at[stage],
                    )

            for step in range(stages):
                pl.when(step * tile_pages < pages)(
                    lambda step=step: fetch(jnp.int32(step), ids[step])
                )

            # The pair's own query rows start at ``own``. The tile of rows runs on into the next
            # pair's, which are masked; at the end of the array it starts early instead.
            own = pair * G
            first_query = jnp.minimum(own, sizes_gmem[1])
            query = plgpu.load(
                q_gmem.at[pl.ds(first_query, columns)].transpose((1, 0)),
                layout=MATRIX_TRANSPOSED,
                optimized=False,  # D * columns elements once a chunk
            )
            weighted = query * settings.lower_bound_weight
            for half, part in enumerate(
                (jnp.maximum(query, weighted), jnp.minimum(query, weighted))
            ):
                q_smem.at[:, pl.ds(half * D, D)].transpose((1, 0))[...] = part
            plgpu.commit_smem()

            shape = (ROWS, columns)
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX) - (
                own - first_query
            )
            of_group = (column >= 0) & (column < G)

            def score_tile(step, _):
                stage = lax.rem(step, jnp.int32(stages))
                tile = c * tiles + step

                @pl.when(step * tile_pages < pages)
                def _():
                    plgpu.barrier_wait(ready.at[stage])
                    tile_smem[...] = plgpu.load(
                        page_smem.at[stage],
                        layout=plgpu.Layout.SMEM_GMEM_COPY((ROWS, 2 * D), jnp.bfloat16, 128),
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
                scores = scores_gmem.at[pair, pl.ds(tile * tile_scores, tile_scores)]
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

    # A page starts at a multiple of 256 bytes. Copies follow a swizzle by the address itself,
    # so this one fits them; it repeats every 512 bytes and the tile is loaded as a whole.
    page_transforms = (plgpu.TilingTransform((32,)), plgpu.SwizzleTransform(64))
    return plgpu.kernel(
        score_pages,
        out_type=results[0],
        grid=(settings.rows, settings.most_heads, pl.cdiv(M, chunk_pages)),
        grid_names=("row", "head", "chunk"),
        scratch_types=[
            plgpu.SMEM((stages, ROWS, 2 * D), jnp.bfloat16, transforms=page_transforms),
            plgpu.SMEM(
                (ROWS, 2 * D), jnp.bfloat16, transforms=tile_transforms(2 * D, jnp.bfloat16)
            ),
            plgpu.SMEM(
                (columns, 2 * D), jnp.bfloat16, transforms=tile_transforms(2 * D, jnp.bfloat16)
            ),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=tile_pages, num_barriers=stages),
        ],
    )


def _refuse_unsupported(q: Array, key_stats: Array) -> None:
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
