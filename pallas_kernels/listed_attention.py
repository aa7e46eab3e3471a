"""Attention over lists of pages or of blocks of keys, in plain jnp: the loops of ``reference``."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.kv_codes import values
from pallas_kernels.online_softmax import (
    Softmax,
    softmax_finish,
    softmax_queries,
    softmax_start,
    softmax_step,
)
from pallas_kernels.types import BLOCK_KEYS, TILE_QUERIES, BlockList, KVPages, PageList

# Keys per step of the online softmax. Large enough to amortise a loop step, small enough that
# scores of one block stay in cache on a CPU.
BLOCK_TOKENS = 512


def _read(pages: KVPages, places: tuple[Array, ...]) -> tuple[Array, Array]:
    """K and V at ``places``, an index into the pool, in float32."""

    taken = jax.tree.map(lambda x: x[places], pages)
    return values(taken.k, taken.k_scale), values(taken.v, taken.v_scale)


def gather_pages(pages: KVPages, ids: Int[Array, "*batch K n"]) -> tuple[Array, Array]:
    """K and V of the listed pages, float32 ``[..., K, n * P, D]``."""
    heads = jnp.arange(pages.k.shape[0])[:, None]
    k, v = _read(pages, (heads, ids))
    shape = (*ids.shape[:-1], -1, k.shape[-1])
    return k.reshape(shape), v.reshape(shape)


def cut_pages(pages: KVPages, page_size: int) -> KVPages:
    """The pool with smaller pages, of ``page_size`` tokens; a view, nothing moves."""

    def cut(pool: Array) -> Array:
        heads, count, P, *channels = pool.shape
        return pool.reshape(heads, count * (P // page_size), page_size, *channels)

    return jax.tree.map(cut, pages)


def attend_page_list(
    q: Float[Array, "B K G D"], pages: KVPages, lists: PageList, page_size: int
) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G"]]:
    """Unlike the api's, the lists' ``start`` and ``stop`` are [B, K, G], or 1 for an axis."""
    per_step = min(max(BLOCK_TOKENS // page_size, 1), lists.page_ids.shape[-1])
    padding = -lists.page_ids.shape[-1] % per_step
    ids = jnp.pad(lists.page_ids, ((0, 0), (0, 0), (0, padding)))
    q = softmax_queries(q)
    block = per_step * page_size

    def step(i: Array, state: Softmax) -> Softmax:
        # Cut inside of the loop: XLA copies a pool for a loop that reads a view of it.
        of_step = lax.dynamic_slice_in_dim(ids, i * per_step, per_step, axis=2)
        k, v = gather_pages(cut_pages(pages, page_size), of_step)
        token = (i * block + jnp.arange(block))[None, None, None]
        visible = (token >= lists.start[..., None]) & (token < lists.stop[..., None])
        return softmax_step(state, q, k, v, visible)

    steps = (jnp.max(lists.stop) + block - 1) // block
    return softmax_finish(lax.fori_loop(0, steps, step, softmax_start(q)))


def attend_blocks(
    q: Float[Array, "T K G D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    blocks: BlockList,
) -> tuple[Float[Array, "T K G D"], Float[Array, "T K G"]]:
    """Heads of which each tile of queries attends the blocks that it lists, causally."""
    (T, K, G, D), P = q.shape, pages.k.shape[2]
    per_step = min(BLOCK_TOKENS // BLOCK_KEYS, blocks.ids.shape[2])
    ids = jnp.pad(blocks.ids, ((0, 0), (0, 0), (0, -blocks.ids.shape[2] % per_step)))
    chunk = KVPages(k.swapaxes(0, 1), v.swapaxes(0, 1))  # [K, T, D]
    heads = jnp.arange(K)[:, None]
    history_blocks = (start + BLOCK_KEYS - 1) // BLOCK_KEYS
    q = jnp.pad(softmax_queries(q), ((0, -T % TILE_QUERIES), (0, 0), (0, 0), (0, 0)))
    tiles = q.reshape(-1, TILE_QUERIES, K, G, D).transpose(0, 2, 3, 1, 4)
    tiles = tiles.reshape(-1, K, G * TILE_QUERIES, D)

    def attend_tile(args: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        index, q_tile, listed, count = args  # [], [K, G * 128, D], [K, L], [K]
        first = index * TILE_QUERIES  # the tile's first query in the chunk
        queries = jnp.tile(start + first + jnp.arange(TILE_QUERIES), G)[:, None]
        count = jnp.where(first < length, count, 0)  # a tile of padding attends nothing

        def step(i: Array, state: Softmax) -> Softmax:
            block = lax.dynamic_slice_in_dim(listed, i * per_step, per_step, axis=1)
            is_listed = i * per_step + jnp.arange(per_step)[None] < count[:, None]
            block, is_listed = (jnp.repeat(x, BLOCK_KEYS, axis=1) for x in (block, is_listed))
            of_history = block < history_blocks  # [K, keys], as all below
            number = jnp.where(of_history, block, block - history_blocks)
            token = number * BLOCK_KEYS + jnp.tile(jnp.arange(BLOCK_KEYS), per_step)[None]
            exists = is_listed & (token < jnp.where(of_history, start, length))
            position = jnp.where(of_history, token, start + token)
            seen = exists[:, None] & (position[:, None] <= queries[None])
            page = page_table[jnp.minimum(token // P, page_table.shape[0] - 1)]
            cached = _read(pages, (heads, page, token % P))
            new = _read(chunk, (heads, jnp.minimum(token, T - 1)))
            k_block, v_block = (
                jnp.where(of_history[..., None], *parts) for parts in zip(cached, new, strict=True)
            )
            return softmax_step(state, q_tile, k_block, v_block, seen)

        steps = (count.max() + per_step - 1) // per_step
        return softmax_finish(lax.fori_loop(0, steps, step, softmax_start(q_tile)))

    of_tiles = ids.swapaxes(0, 1), blocks.counts.swapaxes(0, 1)
    out, lse = lax.map(attend_tile, (jnp.arange(tiles.shape[0]), tiles, *of_tiles))
    out = out.reshape(-1, K, G, TILE_QUERIES, D).transpose(0, 3, 1, 2, 4).reshape(-1, K, G, D)
    lse = lse.reshape(-1, K, G, TILE_QUERIES).transpose(0, 3, 1, 2).reshape(-1, K, G)
    return out[:T], lse[:T]
