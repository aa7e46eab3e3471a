"""Which blocks of keys a tile of queries attends in block-sparse prefill.

The last of every ``STRIDE`` queries attends everything before it, as far as to its weights: what
they sum up to over a block of keys is the block's estimated share of the tile's attention, the mean
over the tile's sampled queries and over the query heads of a KV head. That costs 1 / STRIDE of the
first product of causal attention, and reads each key once.

    keys      block 0   block 1   block 2   ...
    query 63     0.4       0.1       0.0          one tile of 128 queries, two of them sampled
    query 127    0.2       0.1       0.3          shares: 0.3, 0.1, 0.15, ...
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import (
    check_range,
    check_table,
    expect_groups,
    expect_int32,
    expect_most_heads,
    expect_pages,
    expect_shape,
    expect_table,
)
from pallas_kernels.device import MOST_SELECTED_PAGES, Backend, implementation
from pallas_kernels.types import BLOCK_KEYS, TILE_QUERIES, BlockList, KVPages

STRIDE = 64  # divides a tile


def choose_blocks(
    q: Float[Array, "T Hr D"],
    k: Float[Array, "T Kr D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    threshold: float | None = None,
    density: float | None = None,
    whole_from: Int[Array, ""] | None = None,
    dense_heads: int = 0,
    most_heads: int | None = None,
    backend: Backend = "auto",
) -> BlockList:
    """The blocks of keys that retrieval heads attend, for ``prefill_attention`` of the same chunk.

    Each tile of 128 queries lists the fewest blocks, the best first, whose estimated share of its
    attention reaches ``threshold``; 1 lists all that it sees. Or, of all that it sees, the share
    ``density``, rounded up. The first block, the tile's own and the one before it (of a history
    that ends within a block the two before it) are always among them. Tiles with a query at
    position ``whole_from`` or behind it list all that they see (None: there are none), and so does
    every tile of the pool's last ``dense_heads`` heads. q and k are rotated; ``q`` has G query
    heads for each of the pool's KV heads, which share a list. ``most_heads``, None: Kr, is the most
    retrieval heads of any layer: layers with the same share a kernel.

    No kernel finds lists of more than 4096 blocks (524,288 tokens, where all may be listed): those
    XLA does.

    Raises ``ValueError`` for pages whose tokens do not divide 128, and unless one of ``threshold``
    and ``density`` is given, in (0, 1]; and for more dense heads than there are.

    >>> import jax.numpy as jnp
    >>> pool = KVPages(jnp.ones((1, 4, 64, 8)), jnp.ones((1, 4, 64, 8)))
    >>> x, table = jnp.ones((512, 1, 8)), jnp.arange(4)
    >>> blocks = choose_blocks(
    ...     x, x, pool, table, jnp.int32(256), jnp.int32(512), density=0.75
    ... )
    >>> blocks.counts.tolist(), blocks.ids[0, 3, :5].tolist()  # of at most six
    ([[3, 3, 4, 5]], [0, 1, 2, 4, 5])
    """
    expect_shape("q", q, (None, None, None))
    T, H, D = q.shape
    expect_pages("pages", pages, D)
    K, page_size = pages.k.shape[0], pages.k.shape[2]
    expect_shape("k", k, (T, K, D))
    expect_groups(H, K)
    expect_table("page_table", page_table)
    expect_int32((), start=start, length=length)
    if whole_from is not None:
        expect_int32((), whole_from=whole_from)
    if not 0 <= dense_heads <= K:
        raise ValueError(f"{dense_heads=} must lie in [0, {K}], the heads of pages")
    if BLOCK_KEYS % page_size:
        raise ValueError(f"pages of {page_size} tokens must divide blocks of {BLOCK_KEYS}")
    if (threshold is None) == (density is None):
        raise ValueError(f"give one of {threshold=} and {density=}")
    for name, value in (("threshold", threshold), ("density", density)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}={value} must lie in (0, 1]")
    check_range("length", length, T)
    check_table("page_table", page_table, pages, start)
    expect_most_heads(most_heads, K)
    args = q, k, pages, page_table, start, length
    shares = attention_shares(*args, most_heads=most_heads, backend=backend)
    how = {"threshold": threshold, "density": density, "dense_heads": dense_heads}
    return _choose(shares, start, length, whole_from, **how, most_heads=most_heads, backend=backend)


@partial(jax.jit, static_argnames=("most_heads", "backend"))
def attention_shares(
    q: Float[Array, "T Hr D"],
    k: Float[Array, "T Kr D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    most_heads: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "Kr tiles N"]:
    """Each block's estimated share of a tile's attention, float32; a tile of padding has none.

    The history's blocks come first, as many as ``page_table`` can hold, then those of the chunk.
    """
    (T, H, D), K = q.shape, pages.k.shape[0]
    tiles = -(-T // TILE_QUERIES)
    first = jnp.arange(0, tiles * TILE_QUERIES, STRIDE)  # of each group of queries
    last = jnp.minimum(first + STRIDE - 1, jnp.maximum(length - 1, 0))
    queries = q[last].reshape(-1, K, H // K, D).transpose(1, 2, 0, 3).reshape(K, -1, D)
    scores = implementation("block_scores", backend)(
        queries,
        jnp.tile(jnp.where(first < length, last, -1), H // K),
        k,
        pages,
        page_table,
        start,
        most_heads=most_heads,
    )
    shares = jax.nn.softmax(scores, axis=-1)
    shares = shares.reshape(K, H // K, tiles, -1, shares.shape[-1])
    exists = (first < length).reshape(1, 1, tiles, -1, 1)
    shares = jnp.where(exists, shares, 0.0).sum(axis=(1, 3))
    return shares / jnp.maximum(shares.sum(axis=-1, keepdims=True), 1.0)  # a query's sum is 1


@partial(jax.jit, static_argnames=("threshold", "density", "dense_heads", "most_heads", "backend"))
def _choose(
    shares: Float[Array, "K tiles N"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    whole_from: Int[Array, ""] | None,
    *,
    threshold: float | None,
    density: float | None,
    dense_heads: int,
    most_heads: int | None,
    backend: Backend,
) -> BlockList:
    """From the shares of ``attention_shares`` to lists."""
    K, tiles, N = shares.shape
    history = (start + BLOCK_KEYS - 1) // BLOCK_KEYS
    # The chunk's blocks right behind those that the history has, so that places are numbers.
    shares = lax.dynamic_update_slice(shares, shares[..., N - tiles :], (0, 0, history))
    tile, number = jnp.arange(tiles)[None, :, None], jnp.arange(N)[None, None]
    own = history + tile
    visible = (number <= own) & (tile * TILE_QUERIES < length)
    cut_short = (tile == 0) & (start % BLOCK_KEYS > 0)  # the history's last block
    oldest = own - jnp.where(cut_short, 2, 1)
    always = (number == 0) | (number >= oldest)
    if whole_from is not None:
        always |= start + jnp.minimum((tile + 1) * TILE_QUERIES, length) > whole_from
    if dense_heads:
        always |= jnp.arange(K)[:, None, None] >= K - dense_heads
    always = jnp.broadcast_to(always & visible, shares.shape)
    there, least = visible.sum(axis=-1), always.sum(axis=-1)  # [1, tiles], [K, tiles]
    if density is not None:
        wanted = jnp.ceil(density * there.astype(jnp.float32) - 1e-4).astype(jnp.int32)
    elif threshold is not None and threshold < 1:
        others = jnp.sort(jnp.where(visible & ~always, shares, 0.0), descending=True)
        before = jnp.where(always, shares, 0.0).sum(axis=-1, keepdims=True)
        before += jnp.cumsum(others, axis=-1) - others
        wanted = least + (before < threshold).sum(axis=-1)
    else:
        wanted = there
    counts = jnp.clip(wanted, least, there).astype(jnp.int32)
    # A tile with a query of NaN lists the blocks that are always listed: NaN would rank above them.
    ranked = jnp.where(jnp.isnan(shares), 0.0, shares)
    ids = implementation("select_pages", "reference" if N > MOST_SELECTED_PAGES else backend)(
        jnp.where(always, jnp.inf, ranked).swapaxes(0, 1),
        jnp.broadcast_to(there[0], (tiles,)).astype(jnp.int32),
        counts.T,
        num_pages=N,
        sink_pages=0,
        most_heads=most_heads,
    )
    return BlockList(ids=ids.swapaxes(0, 1), counts=counts)
