"""Every op of this package in plain jnp: the specification, the CPU path and the kernels' oracle.

Arithmetic is float32 whatever the storage type. Loops run over blocks with the online softmax
of FlashAttention, so that no op holds scores for more than one block of keys; how many blocks
run is decided by the data (``lax.fori_loop`` with a traced bound), so cost follows the lengths
and not the padded shapes. Places of a page that hold no valid token are never used, even when they
hold NaN.

Shapes and meaning of arguments are documented once, in ``api.py``. What a model calls in every
layer is jitted, so that many layers trace and lower it once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.block_scores import block_scores as block_scores
from pallas_kernels.chunk_rows import rows_or_one, scan_rows
from pallas_kernels.kv_codes import as_stored
from pallas_kernels.listed_attention import (
    BLOCK_TOKENS,
    attend_blocks,
    attend_page_list,
    gather_pages,
)
from pallas_kernels.online_softmax import (
    Softmax,
    softmax_finish,
    softmax_queries,
    softmax_start,
    softmax_step,
)
from pallas_kernels.types import (
    BlockList,
    KVPages,
    OwnAttention,
    PageList,
    W8A8Weight,
    Weight,
)
from pallas_kernels.unfused import unfused_layer
from pallas_kernels.w8a8 import w8a8_product
from pallas_kernels.weights import product

# Query tokens per tile in prefill: bounds the score block to tile x BLOCK_TOKENS per head.
QUERY_TILE = 256


@jax.jit
def apply_rotary(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T D/2"], sin: Float[Array, "B T D/2"]
) -> Float[Array, "B T H D"]:
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x.dtype)


def fused_linear(
    x: Float[Array, "R K"],
    kernel: Float[Array, "K out"] | Weight | W8A8Weight,
    bias: Float[Array, " out"] | None,
    norm_scale: Float[Array, " K"] | None,
    square_sums: Array | None,
    residual: Float[Array, "R out"] | None,
    *,
    gated: bool,
    epsilon: float,
) -> tuple[Float[Array, "R out"], None]:
    del square_sums  # x says it all

    def multiply(x: Float[Array, "R K"]) -> Float[Array, "R out"]:
        """In the operands' dtype; float32 means float32, never TF32."""
        if isinstance(kernel, W8A8Weight):
            return w8a8_product(x, kernel).astype(x.dtype)
        if isinstance(kernel, Weight):
            return product(x, kernel).astype(x.dtype)
        return jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST)

    around = bias, norm_scale, residual
    return unfused_layer(multiply, x, *around, gated=gated, epsilon=epsilon), None


@partial(jax.jit, static_argnames=("selected_page_size", "most_tokens"))
def paged_attention(
    q: Float[Array, "B H D"],
    retrieval: KVPages,
    streaming: KVPages,
    retrieval_list: PageList,
    streaming_list: PageList,
    *,
    selected_page_size: int | None = None,
    most_tokens: tuple[int, ...] | None = None,
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    del most_tokens  # the lists say it
    B, H, D = q.shape
    split = retrieval.k.shape[0]
    K = split + streaming.k.shape[0]
    grouped = q.reshape(B, K, H // K, D)
    outs, lses = [], []
    for pages, lists, part in (
        (retrieval, retrieval_list, slice(None, split)),
        (streaming, streaming_list, slice(split, None)),
    ):
        heads = pages.k.shape[0]
        if heads > 0:
            every = PageList(*(jnp.broadcast_to(x[:B], (B, heads, *x.shape[2:])) for x in lists))
            page_size = selected_page_size or pages.k.shape[2]
            every = every._replace(start=every.start[..., None], stop=every.stop[..., None])
            out, lse = attend_page_list(grouped[:, part], pages, every, page_size)
            outs.append(out)
            lses.append(lse)
    out, lse = jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)
    return out.reshape(B, H, D).astype(q.dtype), lse.reshape(B, H)


def _prefill_one_class(
    q: Float[Array, "T K G D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    window: tuple[int, int] | None,
) -> tuple[Float[Array, "T K G D"], Float[Array, "T K G"]]:
    """Heads of one class: causal if ``window`` is None, else (sink, local) of the lambda mask."""
    T, K, G, D = q.shape
    page_size, M = pages.k.shape[2], page_table.shape[0]
    tile = min(QUERY_TILE, T)
    per_step = min(max(BLOCK_TOKENS // page_size, 1), M)
    block = per_step * page_size
    table = jnp.pad(page_table, (0, -M % per_step))
    q, k, v = (
        jnp.pad(x, ((0, -T % tile), *[(0, 0)] * (x.ndim - 1)))
        for x in (softmax_queries(q), k.astype(jnp.float32), v.astype(jnp.float32))
    )
    k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)  # [K, T', D]
    tiles = q.reshape(-1, tile, K, G, D).transpose(0, 2, 3, 1, 4).reshape(-1, K, G * tile, D)

    def attend_tile(args: tuple[Array, Array]) -> tuple[Array, Array]:
        index, q_tile = args  # [K, G * tile, D]
        first = start + index * tile  # position of the tile's first query
        positions = jnp.tile(first + jnp.arange(tile), G)[:, None]  # [G * tile, 1]

        def visible(keys: Array) -> Array:
            """Which of the keys at these positions, all before the tile's end, a query sees."""
            seen = keys <= positions
            if window is not None:
                sink, local = window
                seen &= (keys < sink) | (keys > positions - local)
            return seen

        def blocks(origin: Array | int, size: int, end: Array) -> tuple[Array, Array, Array]:
            """Which blocks of ``size`` keys, from position ``origin`` to ``end``, the tile can see.

            Returns (count, sink_blocks, gap): blocks 0..sink_blocks-1 and, ``gap`` blocks
            later, the local ones. Blocks in the gap are never visited.
            """
            total = (end - origin + size - 1) // size
            total = jnp.where(first < start + length, total, 0)  # a tile of padding attends nothing
            if window is None:
                return total, total, jnp.zeros_like(total)
            sink, local = window
            sink_blocks = jnp.clip((sink - origin + size - 1) // size, 0, total)
            first_local = jnp.maximum(first - local + 1 - origin, 0) // size
            gap = jnp.clip(first_local - sink_blocks, 0, total - sink_blocks)
            return total - gap, sink_blocks, gap

        def history_step(i: Array, state: Softmax) -> Softmax:
            b = jnp.where(i < history_sinks, i, i + history_gap)
            ids = lax.dynamic_slice_in_dim(table, b * per_step, per_step)
            k_block, v_block = gather_pages(pages, jnp.broadcast_to(ids, (K, per_step)))
            keys = b * block + jnp.arange(block)[None]
            seen = keys < start
            if window is not None:
                seen &= visible(keys)
            return softmax_step(state, q_tile, k_block, v_block, seen[None])

        def chunk_block(b: Array) -> tuple[Array, Array]:
            k_block = lax.dynamic_slice_in_dim(k, b * tile, tile, axis=1)
            return k_block, lax.dynamic_slice_in_dim(v, b * tile, tile, axis=1)

        def chunk_step(i: Array, state: Softmax) -> Softmax:
            b = jnp.where(i < chunk_sinks, i, i + chunk_gap)
            seen = None
            if window is not None:
                seen = visible(start + b * tile + jnp.arange(tile)[None])[None]
            return softmax_step(state, q_tile, *chunk_block(b), seen)

        history_count, history_sinks, history_gap = blocks(0, block, start)
        chunk_count, chunk_sinks, chunk_gap = blocks(start, tile, first)
        state = lax.fori_loop(0, history_count, history_step, softmax_start(q_tile))
        state = lax.fori_loop(0, chunk_count, chunk_step, state)
        # Only here are there keys behind their queries, and padding.
        own = first + jnp.arange(tile)[None]
        seen = visible(own) & (own < start + length)
        return softmax_finish(softmax_step(state, q_tile, *chunk_block(index), seen[None]))

    out, lse = lax.map(attend_tile, (jnp.arange(tiles.shape[0]), tiles))
    out = out.reshape(-1, K, G, tile, D).transpose(0, 3, 1, 2, 4).reshape(-1, K, G, D)
    lse = lse.reshape(-1, K, G, tile).transpose(0, 3, 1, 2).reshape(-1, K, G)
    return out[:T], lse[:T]


@rows_or_one(
    *("q", "k", "v", "page_table", "streaming_table", "start", "length", "blocks"), results=True
)
@partial(jax.jit, static_argnames=("sink", "local"))
def prefill_attention(
    q: Float[Array, "R T H D"],
    k: Float[Array, "R T Hk D"],
    v: Float[Array, "R T Hk D"],
    retrieval: KVPages,
    streaming: KVPages,
    page_table: Int[Array, "R M"],
    streaming_table: Int[Array, "R M"],
    start: Int[Array, " R"],
    length: Int[Array, " R"],
    *,
    sink: int,
    local: int,
    blocks: BlockList | None = None,
) -> tuple[Float[Array, "R T H D"], Float[Array, "R T H"]]:
    """A chunk knows nothing of the others, so that its numbers are those that it has alone."""
    _, T, H, D = q.shape
    Hk, split = k.shape[2], retrieval.k.shape[0]

    def attend_row(_: None, row: tuple) -> tuple[None, tuple[Array, Array]]:
        q, k, v, page_table, streaming_table, start, length, blocks = row
        grouped = q.reshape(T, Hk, H // Hk, D)
        outs, lses = [], []
        for pages, table, window, part in (
            (retrieval, page_table, None, slice(None, split)),
            (streaming, streaming_table, (sink, local), slice(split, None)),
        ):
            if pages.k.shape[0] > 0:
                args = grouped[:, part], k[:, part], v[:, part], pages, table, start, length
                if window is None and blocks is not None:
                    out, lse = attend_blocks(*args, blocks)
                else:
                    out, lse = _prefill_one_class(*args, window)
                outs.append(out)
                lses.append(lse)
        out, lse = jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)
        return None, (out.reshape(T, H, D).astype(q.dtype), lse.reshape(T, H))

    rows = q, k, v, page_table, streaming_table, start, length, blocks
    _, results = scan_rows(attend_row, None, rows)
    return results


@jax.jit
def prefix_attention(
    q: Float[Array, "B H D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    length: Int[Array, ""],
    own: OwnAttention | None = None,
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    B, H, D = q.shape
    K = pages.k.shape[0]
    # The rows are more query heads of one row, whose list is the prefix.
    grouped = q.reshape(B, K, H // K, D).swapaxes(0, 1).reshape(1, K, -1, D)
    ids = jnp.broadcast_to(page_table, (1, K, page_table.shape[0]))
    stop = jnp.broadcast_to(length, (1, K, 1))
    lists = PageList(ids, jnp.zeros_like(stop), stop)
    out, lse = attend_page_list(grouped, pages, lists, pages.k.shape[2])
    out = out.reshape(K, B, H // K, D).swapaxes(0, 1).reshape(B, H, D).astype(q.dtype)
    lse = lse.reshape(K, B, H // K).swapaxes(0, 1).reshape(B, H)
    if own is None:
        return out, lse
    lse = jnp.where(own.shares[:, None], lse, -jnp.inf)
    return merge_attention(jnp.stack([own.out, out]), jnp.stack([own.lse, lse]))


@jax.jit
def verify_attention(
    q: Float[Array, "B T H D"],
    pages: KVPages,
    page_table: Int[Array, "B M"],
    position: Int[Array, " B"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    B, T, H, D = q.shape
    K = pages.k.shape[0]
    # The tokens are more query heads of one token, each with a stop of its own.
    grouped = q.reshape(B, T, K, H // K, D).swapaxes(1, 2).reshape(B, K, -1, D)
    ids = jnp.broadcast_to(page_table[:, None], (B, K, page_table.shape[1]))
    stop = jnp.maximum(position[:, None] + jnp.arange(1, T + 1)[None], 0)
    stop = jnp.repeat(stop, H // K, axis=1)[:, None]  # [B, 1, T * G]
    lists = PageList(ids, jnp.zeros_like(stop), stop)
    out, lse = attend_page_list(grouped, pages, lists, pages.k.shape[2])
    out = out.reshape(B, K, T, H // K, D).swapaxes(1, 2).reshape(B, T, H, D).astype(q.dtype)
    return out, lse.reshape(B, K, T, H // K).swapaxes(1, 2).reshape(B, T, H)


def merge_attention(
    outs: Float[Array, "n *batch D"], lses: Float[Array, " n *batch"]
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch"]]:
    peak = lses.max(axis=0)
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)  # all parts empty
    weights = jnp.exp(lses - shift[None])
    total = weights.sum(axis=0)
    empty = total == 0.0
    safe = jnp.where(empty, 1.0, total)
    # An empty part may hold anything, NaN included.
    parts = jnp.where(weights[..., None] > 0, outs.astype(jnp.float32), 0.0)
    out = (weights[..., None] * parts).sum(axis=0) / safe[..., None]
    return out.astype(outs.dtype), jnp.where(empty, -jnp.inf, shift + jnp.log(safe))


def _write_tokens(
    pages: KVPages,
    k: Float[Array, "n K D"],
    v: Float[Array, "n K D"],
    page: Int[Array, " n"],
    offset: Int[Array, " n"],
) -> KVPages:
    """Tokens with a negative ``page`` are dropped."""
    page = jnp.where(page < 0, pages.k.shape[1], page)  # out of range on purpose: scatter drops it

    def put(pool: Array, tokens: Array) -> Array:  # tokens [K, n, ...]
        return pool.at[:, page, offset].set(tokens, mode="drop")

    return jax.tree.map(put, pages, as_stored(k.swapaxes(0, 1), v.swapaxes(0, 1), pages))


@jax.jit
def append_kv(
    q: Float[Array, "B H D"],
    k: Float[Array, "B Hk D"],
    v: Float[Array, "B Hk D"],
    cos: Float[Array, "B D/2"],
    sin: Float[Array, "B D/2"],
    retrieval: KVPages,
    streaming: KVPages,
    key_stats: Float[Array, "Kq N g 2 D"] | None,
    page: Int[Array, " B"],
    streaming_page: Int[Array, " B"],
    offset: Int[Array, " B"],
) -> tuple[Float[Array, "B H D"], KVPages, KVPages, Float[Array, "Kq N g 2 D"] | None]:
    split = retrieval.k.shape[0]
    q = apply_rotary(q[:, None], cos[:, None], sin[:, None])[:, 0]
    k = apply_rotary(k[:, None], cos[:, None], sin[:, None])[:, 0]
    retrieval = _write_tokens(retrieval, k[:, :split], v[:, :split], page, offset)
    streaming = _write_tokens(streaming, k[:, split:], v[:, split:], streaming_page, offset)
    if key_stats is not None:
        logical_page_size = retrieval.k.shape[2] // key_stats.shape[2]
        logical = offset // logical_page_size
        key = k[:, : key_stats.shape[0]].swapaxes(0, 1).astype(key_stats.dtype)  # [Kq, B, D]
        safe = jnp.where(page < 0, 0, page)
        old = key_stats[:, safe, logical]  # [Kq, B, 2, D]
        # The first token of a logical page assigns: what the page held belongs to somebody else.
        first = (offset % logical_page_size == 0)[None, :, None]
        high = jnp.where(first, key, jnp.maximum(old[:, :, 0], key))
        low = jnp.where(first, key, jnp.minimum(old[:, :, 1], key))
        target = jnp.where(page < 0, key_stats.shape[1], page)
        new = jnp.stack([high, low], axis=2)
        key_stats = key_stats.at[:, target, logical].set(new, mode="drop")
    return q, retrieval, streaming, key_stats


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
    T, split, P = k.shape[1], retrieval.k.shape[0], retrieval.k.shape[2]

    def append_row(
        pools: tuple[KVPages, KVPages, Array | None], row: tuple[Array, ...]
    ) -> tuple[tuple[KVPages, KVPages, Array | None], None]:
        retrieval, streaming, key_stats = pools
        k, v, page_table, streaming_page, start, length = row
        position = start + jnp.arange(T)
        valid = jnp.arange(T) < length
        page = jnp.where(valid, page_table[jnp.minimum(position // P, page_table.shape[0] - 1)], -1)
        streaming_page = jnp.where(valid, streaming_page, -1)
        offset = position % P
        retrieval = _write_tokens(retrieval, k[:, :split], v[:, :split], page, offset)
        streaming = _write_tokens(streaming, k[:, split:], v[:, split:], streaming_page, offset)
        if key_stats is not None:
            key_stats = _pool_statistics(
                k[:, : key_stats.shape[0]],
                key_stats,
                page_table,
                start,
                length,
                P // key_stats.shape[2],
            )
        return (retrieval, streaming, key_stats), None

    rows = k, v, page_table, streaming_page, start, length
    pools, _ = scan_rows(append_row, (retrieval, streaming, key_stats), rows)
    return pools


def _pool_statistics(
    k: Float[Array, "T Kq D"],
    key_stats: Float[Array, "Kq N g 2 D"],
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    logical_page_size: int,
) -> Float[Array, "Kq N g 2 D"]:
    """Widen kmax/kmin of every logical page that the chunk touches, at any chunk edge."""
    T, Kq, D = k.shape
    g = key_stats.shape[2]
    lead = start % logical_page_size  # tokens of the first logical page that earlier chunks wrote
    count = -(-T // logical_page_size) + 1  # logical pages a chunk of T tokens can touch
    token = jnp.arange(count * logical_page_size) - lead
    valid = ((token >= 0) & (token < length)).reshape(count, logical_page_size, 1, 1)
    keys = k[jnp.clip(token, 0, T - 1)].reshape(count, logical_page_size, Kq, D)
    high = jnp.where(valid, keys, -jnp.inf).max(axis=1)  # [count, Kq, D]
    low = jnp.where(valid, keys, jnp.inf).min(axis=1)
    logical = start // logical_page_size + jnp.arange(count)  # within the sequence
    page = page_table[jnp.minimum(logical // g, page_table.shape[0] - 1)]
    old = key_stats[:, page, logical % g].swapaxes(0, 1).astype(k.dtype)  # [count, Kq, 2, D]
    # Only the first logical page can hold earlier tokens of this sequence.
    merge = ((jnp.arange(count) == 0) & (lead > 0))[:, None, None]
    high = jnp.where(merge, jnp.maximum(old[:, :, 0], high), high)
    low = jnp.where(merge, jnp.minimum(old[:, :, 1], low), low)
    touched = jnp.any(valid, axis=(1, 2, 3)) & (page >= 0)  # as for K and V: negative is dropped
    target = jnp.where(touched, page, key_stats.shape[1])  # out of range on purpose: dropped
    new = jnp.stack([high, low], axis=2).swapaxes(0, 1).astype(key_stats.dtype)
    return key_stats.at[:, target, logical % g].set(new, mode="drop")


@partial(
    jax.jit,
    static_argnames=("page_size", "selected_page_size", "lower_bound_weight", "most_heads"),
)
def page_scores(
    q: Float[Array, "B Hr D"],
    key_stats: Float[Array, "Kq N g 2 D"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
    *,
    page_size: int,
    selected_page_size: int,
    lower_bound_weight: float = 0.0,
    most_heads: int | None = None,
) -> Float[Array, "B Kq M*m"]:
    del most_heads  # the shapes say how many there are
    B, Hr, D = q.shape
    Kq, _, g = key_stats.shape[:3]
    M, logical_page_size = page_table.shape[1], page_size // key_stats.shape[2]
    q = q.reshape(B, Kq, Hr // Kq, D).astype(jnp.float32)
    # kmax >= kmin and 0 <= w <= 1, so max(q * kmax, q * kmin) + w * min(q * kmax, q * kmin) =
    # max(q, w * q) * kmax + min(q, w * q) * kmin: one product.
    weighted = lower_bound_weight * q
    halves = jnp.concatenate([jnp.maximum(q, weighted), jnp.minimum(q, weighted)], axis=-1)
    stats = key_stats[:, page_table].astype(jnp.float32).reshape(Kq, B, M * g, 2 * D)
    scores = jnp.einsum("bkqd,kbld->bkql", halves, stats, precision=lax.Precision.HIGHEST)
    holds_tokens = jnp.arange(M * g)[None] * logical_page_size < length[:, None]
    scores = jnp.where(holds_tokens[:, None, None], scores, -jnp.inf)
    # Over the group's query heads and over the logical pages that are selected together.
    together = selected_page_size // logical_page_size
    return scores.reshape(B, Kq, Hr // Kq, -1, together).max(axis=(2, 4))


@partial(jax.jit, static_argnames=("num_pages", "sink_pages", "most_heads"))
def select_pages(
    scores: Float[Array, "B Kq M"],
    num_candidates: Int[Array, " B"],
    wanted: Int[Array, "B Kq"],
    *,
    num_pages: int,
    sink_pages: int,
    most_heads: int | None = None,
) -> Int[Array, "B Kq R"]:
    del most_heads  # the shapes say how many there are
    number = jnp.arange(scores.shape[-1])[None, None]  # of a selected page in its sequence
    scores = jnp.where(scores == 0.0, 0.0, scores)  # top_k would rank -0.0 below 0.0
    ranked = jnp.where(number < sink_pages, jnp.inf, scores)
    ranked = jnp.where(number < num_candidates[:, None, None], ranked, -jnp.inf)
    # lax.top_k is stable: among equal scores the lower number wins.
    _, selected = lax.top_k(ranked, num_pages)
    count = jnp.minimum(wanted, num_candidates[:, None])
    valid = jnp.arange(num_pages)[None, None] < count[..., None]
    # In ascending order, what is not valid last.
    selected = jnp.sort(jnp.where(valid, selected.astype(jnp.int32), jnp.iinfo(jnp.int32).max))
    return jnp.where(valid, selected, -1)
