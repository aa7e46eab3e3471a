"""Which blocks of keys a tile of queries attends in block-sparse prefill (XAttention, 2503.16428).

Every ``STRIDE`` tokens are a group. The score of a group of queries with a group of keys is the
mean of its antidiagonal, query S - 1 - s with key s: each query and each key counts once, and
vertical and slanting lines of the attention map cross it wherever they run. With the tokens of a
group laid end to end that is one product of vectors of S * D numbers, so that all scores cost 1 / S
of those of attention, and each key is read once.

    keys      . . . x        one group of 4 queries (down) by 4 keys (right): the four pairs x
              . . x .        make its score
              . x . .
              x . . .

A softmax over groups of keys makes shares of attention of the scores; a block's share is the sum
over its groups, the mean over the queries of the tile and over the query heads of a KV head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.checks import (
    check_range,
    check_table,
    expect_groups,
    expect_int32,
    expect_pages,
    expect_shape,
    expect_table,
)
from pallas_kernels.types import BLOCK_KEYS, TILE_QUERIES, BlockList, KVPages

STRIDE = 16  # S, tokens of a group: at most the smallest page
# Queries that are scored at a time, and keys: bounds memory to 1 MiB of scores a query head.
_SPAN = 8192


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
) -> BlockList:
    """The blocks of keys that retrieval heads attend, for ``prefill_attention`` of the same chunk.

    Each tile of 128 queries lists the fewest blocks, the best first, whose estimated share of its
    attention reaches ``threshold``; 1 lists all that it sees. Or, of all that it sees, the share
    ``density``, rounded up. The first block, the tile's own and the one before it (of a history
    that ends within a block the two before it) are always among them. q and k are rotated; ``q``
    has G query heads for each of the pool's KV heads, which share a list.

    Raises ``ValueError`` for pages that are no multiple of 16 tokens, and unless one of
    ``threshold`` and ``density`` is given, in (0, 1].

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
    if page_size % STRIDE:
        raise ValueError(f"pages of {page_size} tokens must be a multiple of {STRIDE}")
    if (threshold is None) == (density is None):
        raise ValueError(f"give one of {threshold=} and {density=}")
    for name, value in (("threshold", threshold), ("density", density)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}={value} must lie in (0, 1]")
    check_range("length", length, T)
    check_table("page_table", page_table, pages, start)
    shares = attention_shares(q, k, pages, page_table, start, length)
    return _choose(shares, start, length, threshold=threshold, density=density)


@jax.jit
def attention_shares(
    q: Float[Array, "T Hr D"],
    k: Float[Array, "T Kr D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> Float[Array, "Kr tiles N"]:
    """Each block's estimated share of a tile's attention, float32; a tile of padding has none.

    The history's blocks come first, as many as ``page_table`` can hold, then those of the chunk.
    """
    (T, H, D), K = q.shape, pages.k.shape[0]
    tiles = -(-T // TILE_QUERIES)
    span = min(_SPAN, tiles * TILE_QUERIES)
    spans = -(-tiles * TILE_QUERIES // span)
    exists = (jnp.arange(T) < length)[:, None, None]
    q, k = (
        jnp.pad(jnp.where(exists, x, 0), ((0, spans * span - T), (0, 0), (0, 0))) for x in (q, k)
    )
    # [spans, K, G * groups, S * D], the queries of a group in reverse.
    queries = q.reshape(spans, span // STRIDE, STRIDE, K, H // K, D)[:, :, ::-1]
    queries = queries.transpose(0, 3, 4, 1, 2, 5).reshape(spans, K, -1, STRIDE * D)
    keys = k.reshape(spans, span // STRIDE, STRIDE, K, D).transpose(0, 3, 1, 2, 4)
    keys = keys.reshape(spans, K, -1, STRIDE * D)

    def of_span(args: tuple[Array, Array]) -> Array:
        index, rows = args
        history = _history_scores(rows, pages, page_table, start)
        group = index * (span // STRIDE) + jnp.arange(span // STRIDE)  # of queries, in the chunk

        def of_keys(args: tuple[Array, Array]) -> Array:
            index, columns = args
            column = index * (span // STRIDE) + jnp.arange(span // STRIDE)
            seen = jnp.tile(column[None] <= group[:, None], (H // K, 1))
            return _block_scores(rows, columns, seen[None])

        chunk = lax.map(of_keys, (jnp.arange(spans), keys))  # [spans, K, G * groups, blocks]
        chunk = jnp.moveaxis(chunk, 0, 2).reshape(*rows.shape[:2], -1)[..., :tiles]
        scores = jnp.concatenate([history, chunk], axis=-1)
        shares = jax.nn.softmax(scores, axis=-1).reshape(K, H // K, span // STRIDE, -1)
        shares = jnp.where((group * STRIDE < length)[None, None, :, None], shares, 0.0)
        of_tiles = shares.reshape(K, H // K, span // TILE_QUERIES, -1, shares.shape[-1])
        return of_tiles.sum(axis=(1, 3))

    shares = lax.map(of_span, (jnp.arange(spans), queries))  # [spans, K, tiles of a span, N]
    shares = jnp.moveaxis(shares, 0, 1).reshape(K, -1, shares.shape[-1])[:, :tiles]
    return shares / jnp.maximum(shares.sum(axis=-1, keepdims=True), 1.0)  # a group's sum is 1


def _block_scores(
    queries: Float[Array, "K R SD"], keys: Float[Array, "K n SD"], seen: Bool[Array, "1 #R n"]
) -> Float[Array, "K R n/8"]:
    """Logarithm of the sum of exponentials of the scores with each block's groups, float32."""
    scores = jnp.einsum("krd,knd->krn", queries, keys, preferred_element_type=jnp.float32)
    D = queries.shape[-1] // STRIDE
    scores = jnp.where(seen, scores / (STRIDE * D**0.5), -jnp.inf)
    of_blocks = scores.reshape(*scores.shape[:2], -1, BLOCK_KEYS // STRIDE)
    return jax.nn.logsumexp(of_blocks, axis=-1)


def _history_scores(
    queries: Float[Array, "K R SD"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
) -> Float[Array, "K R N"]:
    """``_block_scores`` with all blocks that the table can hold; -inf for those behind ``start``.

    Keys that are not there are read as zeros.
    """
    (K, R, _), (_, _, P, D) = queries.shape, pages.k.shape
    blocks = -(-page_table.shape[0] * P // BLOCK_KEYS)
    span = min(_SPAN, blocks * BLOCK_KEYS)
    spans, per_span = -(-blocks * BLOCK_KEYS // span), span // BLOCK_KEYS
    table = jnp.pad(page_table, (0, spans * span // P - page_table.shape[0]))

    def step(i: Array, found: Array) -> Array:
        ids = lax.dynamic_slice_in_dim(table, i * (span // P), span // P)
        keys = pages.k[:, ids]
        if pages.k_scale is not None:
            keys = keys.astype(jnp.float32) * pages.k_scale[:, ids][..., None]
        token = i * span + jnp.arange(span)
        keys = jnp.where((token < start)[None, :, None], keys.reshape(K, span, D), 0)
        keys = keys.astype(queries.dtype).reshape(K, -1, STRIDE * D)
        scores = _block_scores(queries, keys, (token[::STRIDE] < start)[None, None])
        return lax.dynamic_update_slice_in_dim(found, scores, i * per_span, axis=2)

    # Made from the queries: under shard_map it varies over the mesh axes that they vary over.
    nothing = jnp.full_like(queries[..., :1], -jnp.inf, jnp.float32)
    nothing = jnp.broadcast_to(nothing, (K, R, spans * per_span))
    found = lax.fori_loop(0, (start + span - 1) // span, step, nothing)
    return found[..., :blocks]


@partial(jax.jit, static_argnames=("threshold", "density"))
def _choose(
    shares: Float[Array, "K tiles N"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    *,
    threshold: float | None,
    density: float | None,
) -> BlockList:
    """From the shares of ``attention_shares`` to lists."""
    _, tiles, N = shares.shape
    most = N - tiles  # blocks that the history can have
    history = (start + BLOCK_KEYS - 1) // BLOCK_KEYS
    tile, place = jnp.arange(tiles)[None, :, None], jnp.arange(N)[None, None]
    number = jnp.where(place < most, place, place - most + history)
    own = history + tile
    visible = ((place >= most) | (place < history)) & (number <= own)
    visible &= tile * TILE_QUERIES < length
    cut_short = (tile == 0) & (start % BLOCK_KEYS > 0)  # the history's last block
    oldest = own - jnp.where(cut_short, 2, 1)
    always = visible & ((number == 0) | (number >= oldest))
    # The best first: those that are always attended, then by share; those that are not there last.
    rank = jnp.where(always, -jnp.inf, jnp.where(visible, -shares, jnp.inf))
    _, order, share = lax.sort((rank, jnp.broadcast_to(place, rank.shape), shares), num_keys=1)
    there = visible.sum(axis=-1)
    if density is not None:
        wanted = jnp.ceil(density * there.astype(jnp.float32) - 1e-4).astype(jnp.int32)
    elif threshold is not None and threshold < 1:
        wanted = (jnp.cumsum(share, axis=-1) - share < threshold).sum(axis=-1)
    else:
        wanted = there
    counts = jnp.clip(wanted, always.sum(axis=-1), there)
    counts = jnp.broadcast_to(counts, shares.shape[:2]).astype(jnp.int32)
    listed = lax.sort(jnp.where(place < counts[..., None], order, N))
    ids = jnp.where(listed < most, listed, listed - most + history)
    return BlockList(ids=ids.astype(jnp.int32), counts=counts)
