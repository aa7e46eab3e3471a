"""How much sampled queries attend to each block of keys, Hopper (Mosaic GPU).

What block-sparse prefill chooses blocks by: of each query and block of 128 keys the logarithm of
the sum of exponentials of the scores. No value is read and no score leaves the registers.

Index map. The grid is (KV head k, split s, tile r of 128 queries), one warpgroup of 128 threads,
two CTAs an SM, so that one multiplies while the other sums. Blocks are numbered as for prefill:
those of the history through the page table, then those of the chunk. Split s takes every S-th:

      blocks           | history 0 | 1 | 2 | .. | chunk 0 | 1 | .. |     which a tile sees
      split (S = 3)    |     0     | 1 | 2 | 0  |    1    | 2 | 0  |

      scores [64, 128] = Q [64, D] @ K^T [D, 128]     twice, both from shared memory
      out [k, block, r * 128 + row] = log(sum over the row's keys)

What must move: K of each block once for every tile of queries, from L2 for all but the first: a
KV head of G query heads and a chunk of T tokens has G * T / 64 / 128 tiles. And 4 bytes out for
each query and block.
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

from pallas_kernels.hopper.mosaic import (
    LN_2,
    LOG2_E,
    LOWEST,
    MATRIX,
    PER_ROW,
    SM_COUNT,
    cdiv,
    matmul,
    refuse,
    spread_rows,
    store_unoptimised,
    tile_transforms,
    unsupported,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared
from pallas_kernels.kv_codes import float_pages
from pallas_kernels.types import BLOCK_KEYS, KVPages

ROWS, HALF = 128, 64  # queries of a CTA, and of one product
BLOCK = BLOCK_KEYS
STAGES = 2  # blocks of keys in shared memory
EVERYTHING = 1 << 29  # more keys than a history has, and twice as many still an int32
CTAS = 4 * SM_COUNT  # twice as many as run at once: tiles differ in how much they see


@partial(jax.jit, static_argnames=("most_heads",))
def block_scores(
    queries: Float[Array, "K R D"],
    last: Int[Array, " R"],
    keys: Float[Array, "T K D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    *,
    most_heads: int | None = None,
) -> Float[Array, "K R N"]:
    """``pallas_kernels.block_scores.block_scores`` on a Hopper GPU (or under the interpreter).

    Queries and keys bf16, pages bf16 or codes, of which those that the table names are first
    converted by XLA; D 64 or 128; P 16 to 128. Raises ``NotImplementedError`` for anything else.
    """
    arrays = {"queries": queries, "keys": keys}
    refuse("block_scores", unsupported(queries.shape[2], arrays, {"pages": pages}))
    pages, page_table = float_pages(pages, page_table, jnp.bfloat16)
    (K, R, _), P = queries.shape, pages.k.shape[2]
    tiles = pl.cdiv(R, ROWS)
    queries = jnp.pad(queries, ((0, 0), (0, tiles * ROWS - R), (0, 0)))
    last = jnp.pad(last, (0, tiles * ROWS - R), constant_values=-1)  # such a query sees nothing
    keys = jnp.pad(keys, ((0, -keys.shape[0] % BLOCK), (0, 0), (0, 0))).swapaxes(0, 1)
    chunk_blocks = keys.shape[1] // BLOCK
    most_history = pl.cdiv(page_table.shape[0] * P, BLOCK)
    seen = cdiv(last.reshape(tiles, ROWS).max(axis=1) + 1, BLOCK)  # blocks of the chunk
    numbers = jnp.concatenate([jnp.stack([start, jnp.int32(K)]), seen])
    heads = most_heads or K
    settings = _Settings(
        heads=heads,
        head_dim=queries.shape[2],
        splits=min(max(CTAS // (heads * tiles), 1), most_history + chunk_blocks),
        page_size=P,
        table=page_table.shape[0],
        most_history=most_history,
    )
    [found] = call_shared(
        _make_kernel,
        settings,
        (queries, keys, pages.k, page_table, last, numbers),
        (jax.ShapeDtypeStruct((K, most_history + chunk_blocks, tiles * ROWS), jnp.float32),),
        longest=(heads, heads, heads, None, None, None),
        longest_results=(heads,),
    )
    found = found[..., :R].swapaxes(1, 2)
    # What no CTA has looked at holds anything.
    number = jnp.arange(found.shape[2])
    of_history = number < most_history
    history = number < (start + BLOCK - 1) // BLOCK
    chunk = number[None] - most_history <= last[:R, None] // BLOCK
    looked_at = jnp.where(of_history[None], history[None], chunk & (last[:R, None] >= 0))
    return jnp.where(looked_at[None], found, -jnp.inf)


class _Settings(NamedTuple):
    """What the kernel is lowered for, beside the shapes of its arrays."""

    heads: int  # most KV heads of any layer
    head_dim: int  # D
    splits: int  # S
    page_size: int  # P
    table: int  # M
    most_history: int  # blocks that the table can hold


class _Scratch(NamedTuple):
    """Shared memory and barriers of a CTA."""

    q: Any  # [2, 64, D] bf16
    k: Any  # [stages, 128, D] bf16
    q_ready: Any  # barrier
    k_ready: Any  # [stages] barriers


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    heads, D, S, P, M, most_history = settings
    tiles = results[0].shape[2] // ROWS

    def score_blocks(
        q_gmem,  # [K, R, D] bf16
        keys_gmem,  # [K, T, D] bf16, of the chunk
        pages_gmem,  # [K, N, P, D] bf16
        table_gmem,  # [M] int32
        last_gmem,  # [R] int32
        numbers_gmem,  # int32: start, K, and of each tile how many blocks of the chunk it sees
        found_gmem,  # [K, N, R] float32, output
        scratch,  # see _Scratch
    ):
        s, r, k = (lax.axis_index(name) for name in ("split", "tile", "head"))
        start, num_heads = numbers_gmem[0], numbers_gmem[1]
        history = cdiv(start, BLOCK)
        total = history + numbers_gmem[2 + r]
        steps = lax.div(jnp.maximum(total - s, 0) + S - 1, jnp.int32(S))

        def fetch(step):
            block, stage = s + step * S, lax.rem(step, jnp.int32(STAGES))
            to, ready = scratch.k.at[stage], scratch.k_ready.at[stage]

            @pl.when(block < history)
            def _():
                for j in range(BLOCK // P):
                    entry = jnp.minimum(block * (BLOCK // P) + j, M - 1)
                    page = jnp.clip(table_gmem[entry], 0, pages_gmem.shape[1] - 1)
                    plgpu.copy_gmem_to_smem(pages_gmem.at[k, page], to.at[pl.ds(j * P, P)], ready)

            @pl.when(block >= history)
            def _():
                for j in range(0, BLOCK, P):  # in as many copies as a block of the history
                    tokens = pl.ds((block - history) * BLOCK + j, P)
                    plgpu.copy_gmem_to_smem(keys_gmem.at[k, tokens], to.at[pl.ds(j, P)], ready)

        @pl.when((k < num_heads) & (steps > 0))
        def _():
            for step in range(STAGES):
                pl.when(step < steps)(partial(fetch, jnp.int32(step)))
            for half in range(2):
                rows = pl.ds(r * ROWS + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(q_gmem.at[k, rows], scratch.q.at[half], scratch.q_ready)
            lasts = [
                plgpu.load(
                    last_gmem.at[pl.ds(r * ROWS + half * HALF, HALF)],
                    layout=PER_ROW,
                    optimized=False,
                )
                for half in range(2)
            ]
            plgpu.barrier_wait(scratch.q_ready)

            def score_block(step, _):
                block, stage = s + step * S, lax.rem(step, jnp.int32(STAGES))
                of_history = block < history
                first = BLOCK * (block - jnp.where(of_history, 0, history))
                place = block + jnp.where(of_history, 0, most_history - history)
                plgpu.barrier_wait(scratch.k_ready.at[stage])
                for half, last in enumerate(lasts):
                    keys = scratch.k.at[stage].transpose((1, 0))
                    x = matmul(scratch.q.at[half], keys, HALF, BLOCK)
                    # Keys that a query sees of the block: all but the history's have both ends.
                    of_all = jnp.where(of_history, start - first, BLOCK)
                    of_row = last + (1 - first + jnp.where(of_history, EVERYTHING, 0))

                    def hide(x, of_all=of_all, of_row=of_row):
                        key = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=MATRIX)
                        seen = (key < of_all) & (key < spread_rows(of_row, key))
                        return jnp.where(seen, x, -jnp.inf)

                    whole = of_history & (of_all >= BLOCK)
                    x = lax.cond(whole, lambda x: x, hide, x)
                    found = _log_sum(x, D)
                    to = found_gmem.at[k, place, pl.ds(r * ROWS + half * HALF, HALF)]
                    store_unoptimised(to, found)
                pl.when(step + STAGES < steps)(partial(fetch, step + STAGES))
                return None

            lax.fori_loop(0, steps, score_block, None)

    transforms = tile_transforms(D, jnp.bfloat16)
    scratch = _Scratch(
        q=plgpu.SMEM((2, HALF, D), jnp.bfloat16, transforms=transforms),
        k=plgpu.SMEM((STAGES, BLOCK, D), jnp.bfloat16, transforms=transforms),
        q_ready=plgpu.Barrier(num_arrivals=2),
        k_ready=plgpu.Barrier(num_arrivals=BLOCK // P, num_barriers=STAGES),
    )
    return plgpu.kernel(
        score_blocks,
        out_type=results,
        # Neighbouring CTAs read the same keys.
        grid=(heads, S, tiles),
        grid_names=("head", "split", "tile"),
        scratch_types=[scratch],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _log_sum(x, head_dim: int):
    """Natural logarithm of the sum of a row's exponentials [64], of products x [64, 128]."""
    scale = head_dim**-0.5 * LOG2_E
    peak = jnp.maximum(x.max(axis=1) * scale, LOWEST)
    total = jnp.exp2(x * scale - spread_rows(peak, x)).sum(axis=1)
    return jnp.where(total > 0.0, (peak + jnp.log2(total)) * LN_2, -jnp.inf)
