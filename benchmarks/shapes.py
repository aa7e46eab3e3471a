"""The shapes that kernels are tested, tuned and timed at, and inputs for them."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import KVPages, PageList, quantize_kv


@dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """One call of ``paged_attention``; page counts are those each list holds."""

    name: str
    rows: int = 1
    retrieval_heads: int
    retrieval_pages: int
    streaming_heads: int = 0
    streaming_pages: int = 0
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    int8: bool = False

    @property
    def kv_heads(self) -> int:
        return self.retrieval_heads + self.streaming_heads

    @property
    def bytes_moved(self) -> int:
        """Keys, values and scales of every listed slot, once."""
        slots = (
            self.rows
            * self.page_size
            * (
                self.retrieval_heads * self.retrieval_pages
                + self.streaming_heads * self.streaming_pages
            )
        )
        return slots * (2 * self.head_dim + 8 if self.int8 else 4 * self.head_dim)


def _decode_shapes() -> tuple[DecodeShape, ...]:
    """Llama-3-8B's heads, half of them streaming (sink 128, local 256) with a budget of 4096.

    Sparse attention lists pages of 16 tokens, or whole ones of 64, as published.
    """
    half = {
        "retrieval_heads": 4,
        "streaming_heads": 4,
        "retrieval_pages": 256,
        "streaming_pages": 24,
        "page_size": 16,
    }
    bf16 = (
        DecodeShape(name="sparse, 1 row", **half),
        DecodeShape(name="sparse, 8 rows", rows=8, **half),
        DecodeShape(name="dense 128K", retrieval_heads=8, retrieval_pages=2048),
        DecodeShape(name="dense 512K", retrieval_heads=8, retrieval_pages=8192),
    )
    whole = tuple(
        dataclasses.replace(
            shape,
            name=f"{shape.name}, whole pages",
            retrieval_pages=64,
            streaming_pages=6,
            page_size=64,
        )
        for shape in bf16[:2]
    )
    int8 = (
        DecodeShape(name="sparse, 1 row, int8", int8=True, **half),
        DecodeShape(name="sparse, 8 rows, int8", rows=8, int8=True, **half),
        DecodeShape(name="dense 128K, int8", retrieval_heads=8, retrieval_pages=2048, int8=True),
        DecodeShape(
            name="dense 128K, int8, pages of 128",
            retrieval_heads=8,
            retrieval_pages=1024,
            page_size=128,
            int8=True,
        ),
    )
    # SmolLM2-135M: 9 query heads on 3 KV heads of 64 channels; small pages; the widest group.
    others = (
        DecodeShape(
            name="SmolLM2 8K",
            retrieval_heads=2,
            streaming_heads=1,
            retrieval_pages=512,
            streaming_pages=24,
            group=3,
            head_dim=64,
            page_size=16,
        ),
        DecodeShape(
            name="group 16, pages of 32, int8",
            rows=2,
            retrieval_heads=2,
            retrieval_pages=100,
            group=16,
            page_size=32,
            int8=True,
        ),
    )
    return bf16 + whole + int8 + others


DECODE = _decode_shapes()


def decode_inputs(
    shape: DecodeShape, *, lists: int = 1, seed: int = 0
) -> tuple[jax.Array, KVPages, KVPages, list[tuple[PageList, PageList]]]:
    """Query, both pools and ``lists`` pairs of page lists without a page in common.

    Slots that no list attends hold NaN (int8: a NaN scale). Every list ends in a partial page,
    and a streaming head's starts in one.
    """
    rng = np.random.default_rng(seed)
    B, K, P = shape.rows, shape.kv_heads, shape.page_size
    split, width = shape.retrieval_heads, max(shape.retrieval_pages, shape.streaming_pages)
    pages = np.zeros((lists, B, K, width), np.int32)
    start, stop = np.zeros((B, K), np.int32), np.zeros((B, K), np.int32)

    def pool(heads: slice, count: int, first: int, key: jax.Array) -> KVPages:
        number = heads.stop - heads.start
        total = lists * B * count
        order = np.array([rng.permutation(total) for _ in range(number)], np.int32)
        ids = order.reshape(number, lists, B, count)
        pages[:, :, heads, :count] = ids.transpose(1, 2, 0, 3)
        start[:, heads], stop[:, heads] = first, count * P - 5
        slots = np.arange(count * P).reshape(count, P)
        attended = (slots >= first) & (slots < count * P - 5)
        used = np.zeros((number, total, P), bool)
        used[np.arange(number)[:, None, None, None], ids] = attended
        return _random_pages(key, jnp.asarray(used), shape.head_dim, shape.int8)

    keys = jax.random.split(jax.random.key(seed), 3)
    retrieval = pool(slice(0, split), shape.retrieval_pages, 0, keys[0])
    streaming = pool(slice(split, K), shape.streaming_pages, 3, keys[1])
    q = jax.random.normal(keys[2], (B, K * shape.group, shape.head_dim), jnp.bfloat16)

    def page_list(one: np.ndarray, heads: slice, width: int) -> PageList:
        fields = one[:, heads, :width], start[:, heads], stop[:, heads]
        return PageList(*map(jnp.asarray, fields))

    pairs = [
        (
            page_list(one, slice(0, split), max(shape.retrieval_pages, 1)),
            page_list(one, slice(split, K), max(shape.streaming_pages, 1)),
        )
        for one in pages
    ]
    return q, retrieval, streaming, pairs


def _random_pages(key: jax.Array, used: jax.Array, head_dim: int, int8: bool) -> KVPages:
    def tokens(key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        x = jax.random.normal(key, (*used.shape, head_dim), jnp.bfloat16)
        if not int8:
            return jnp.where(used[..., None], x, jnp.nan), None
        codes, scale = quantize_kv(x)
        return codes, jnp.where(used, scale, jnp.nan)

    k_key, v_key = jax.random.split(key)
    (k, k_scale), (v, v_scale) = jax.jit(tokens)(k_key), jax.jit(tokens)(v_key)
    return KVPages(k, v, k_scale, v_scale)


@dataclass(frozen=True, kw_only=True)
class AppendShape:
    """One call of ``append_kv`` (rows of one token) or ``append_kv_chunk`` (tokens of one row)."""

    name: str
    rows: int = 1
    tokens: int = 1
    start: int = 0  # position of a chunk's first token
    retrieval_heads: int
    streaming_heads: int = 0
    kept: int = 384  # tokens at the end of a chunk that streaming heads keep
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    logical_page_size: int = 16
    int8: bool = False

    @property
    def kv_heads(self) -> int:
        return self.retrieval_heads + self.streaming_heads

    @property
    def bytes_moved(self) -> int:
        """Keys and values read and written once, a row's queries, and statistics."""
        stored = self.head_dim + 4 if self.int8 else 2 * self.head_dim
        kept = min(self.tokens, self.kept)
        vectors = self.rows * (self.tokens * self.retrieval_heads + kept * self.streaming_heads)
        moved = vectors * 2 * (2 * self.head_dim + stored)
        statistics = self.rows * self.retrieval_heads * 4 * self.head_dim  # of one logical page
        if self.tokens > 1:
            return moved + statistics * (self.tokens // self.logical_page_size)
        queries = self.rows * self.kv_heads * self.group * 2 * self.head_dim
        angles = self.rows * 4 * self.head_dim
        return moved + 2 * statistics + 2 * queries + angles


def _append_shapes() -> tuple[AppendShape, ...]:
    """Llama-3-8B's heads, half of them streaming, and SmolLM2-135M's."""
    half = {"retrieval_heads": 4, "streaming_heads": 4}
    small = {"group": 3, "head_dim": 64, "page_size": 16, "logical_page_size": 8}
    return (
        AppendShape(name="1 row", **half),
        AppendShape(name="8 rows", rows=8, **half),
        AppendShape(name="64 rows", rows=64, **half),
        AppendShape(name="1 row, int8", int8=True, **half),
        AppendShape(name="8 rows, int8", rows=8, int8=True, **half),
        AppendShape(name="3 and 5 heads, 2 rows", rows=2, retrieval_heads=3, streaming_heads=5),
        AppendShape(name="SmolLM2, 2 rows", rows=2, retrieval_heads=2, streaming_heads=1, **small),
    )


def _chunk_shapes() -> tuple[AppendShape, ...]:
    half = {"retrieval_heads": 4, "streaming_heads": 4}
    small = {"group": 3, "head_dim": 64, "page_size": 16, "logical_page_size": 8}
    return (
        AppendShape(name="chunk of 8192", tokens=8192, retrieval_heads=8),
        AppendShape(name="chunk of 8192, half streaming", tokens=8192, start=16384, **half),
        AppendShape(name="chunk of 8192, int8", tokens=8192, retrieval_heads=8, int8=True),
        AppendShape(name="chunk of 32768", tokens=32768, retrieval_heads=8),
        AppendShape(name="chunk of 1000 at 77, int8", tokens=1000, start=77, int8=True, **half),
        AppendShape(
            name="chunk of 1000 at 77, int8, pages of 16",
            tokens=1000,
            start=77,
            page_size=16,
            int8=True,
            **half,
        ),
        AppendShape(
            name="SmolLM2, chunk of 2048 at 5",
            tokens=2048,
            start=5,
            retrieval_heads=2,
            streaming_heads=1,
            **small,
        ),
    )


APPEND = _append_shapes()
APPEND_CHUNK = _chunk_shapes()


def _empty_pool(heads: int, pages: int, shape: AppendShape) -> KVPages:
    """Slots hold NaN (int8: a NaN scale)."""
    size = heads, pages, shape.page_size
    if not shape.int8:
        return KVPages(*(jnp.full((*size, shape.head_dim), jnp.nan, jnp.bfloat16) for _ in "kv"))
    codes = (jnp.full((*size, shape.head_dim), 77, jnp.int8) for _ in "kv")
    return KVPages(*codes, *(jnp.full(size, jnp.nan, jnp.float32) for _ in "kv"))


def append_inputs(
    shape: AppendShape, *, calls: int = 1, seed: int = 0
) -> tuple[tuple, list[tuple]]:
    """Arguments of ``append_kv`` up to ``key_stats``, and those after it for ``calls`` calls that
    share no page. One row in eight is inactive; statistics that are not to be merged hold NaN."""
    rng = np.random.default_rng(seed)
    B, D, N = shape.rows, shape.head_dim, calls * shape.rows + 1
    keys = jax.random.split(jax.random.key(seed), 5)
    H, K = shape.group * shape.kv_heads, shape.kv_heads
    q, k, v = (
        jax.random.normal(key, (B, heads, D), jnp.bfloat16)
        for key, heads in zip(keys[:3], (H, K, K), strict=True)
    )
    angle = jax.random.uniform(keys[3], (B, D // 2), maxval=7.0)
    size, g = shape.logical_page_size, shape.page_size // shape.logical_page_size
    offsets = rng.integers(0, shape.page_size, (calls, B)).astype(np.int32)
    pages, ring_pages = (rng.permutation(N)[: calls * B].reshape(calls, B) for _ in range(2))
    inactive = np.arange(B) % 8 == 5
    pages, ring_pages = (np.where(inactive, -1, x).astype(np.int32) for x in (pages, ring_pages))
    merged = np.zeros((N, g), bool)
    merged[pages, offsets // size] = offsets % size != 0
    stats = jax.random.normal(keys[4], (shape.retrieval_heads, N, g, 2, D), jnp.bfloat16)
    stats = jnp.where(merged[..., None, None], -jnp.sort(-stats, axis=3), jnp.nan)
    pools = (
        _empty_pool(heads, N, shape) for heads in (shape.retrieval_heads, shape.streaming_heads)
    )
    where = [tuple(map(jnp.asarray, call)) for call in zip(pages, ring_pages, offsets, strict=True)]
    return (q, k, v, jnp.cos(angle), jnp.sin(angle), *pools, stats), where


def append_chunk_inputs(
    shape: AppendShape, *, calls: int = 1, seed: int = 0
) -> tuple[tuple, list[tuple]]:
    """Arguments of ``append_kv_chunk`` up to ``key_stats``, and those after it for ``calls`` calls
    that share no page. The last token of a chunk does not exist and holds NaN."""
    rng = np.random.default_rng(seed)
    T, P, D = shape.tokens, shape.page_size, shape.head_dim
    k_key, v_key, stats_key = jax.random.split(jax.random.key(seed), 3)
    exists = (jnp.arange(T) < T - 1)[:, None, None]
    k, v = (
        jnp.where(exists, jax.random.normal(key, (T, shape.kv_heads, D), jnp.bfloat16), jnp.nan)
        for key in (k_key, v_key)
    )
    first, last = shape.start // P, (shape.start + T) // P  # pages of the sequence
    touched = last + 1 - first
    N = calls * touched + 1
    order = rng.permutation(N)[: calls * touched].astype(np.int32).reshape(calls, touched)
    position = shape.start + np.arange(T)
    kept = position >= shape.start + T - shape.kept
    ring = np.where(kept, order[:, position // P - first], -1).astype(np.int32)
    g = P // shape.logical_page_size
    size = shape.retrieval_heads, N, g, 2, D
    merged = np.zeros((N, g), bool)
    merged[order[:, 0], shape.start % P // shape.logical_page_size] = (
        shape.start % shape.logical_page_size != 0
    )
    stats = -jnp.sort(-jax.random.normal(stats_key, size, jnp.bfloat16), axis=3)
    stats = jnp.where(merged[..., None, None], stats, jnp.nan)
    pools = (
        _empty_pool(heads, N, shape) for heads in (shape.retrieval_heads, shape.streaming_heads)
    )
    start, length = jnp.int32(shape.start), jnp.int32(T - 1)
    before = np.zeros((calls, first), np.int32)  # pages of earlier chunks
    tables = np.concatenate([before, order], axis=1)
    where = [
        (jnp.asarray(table), jnp.asarray(pages), start, length)
        for table, pages in zip(tables, ring, strict=True)
    ]
    return (k, v, *pools, stats), where


@dataclass(frozen=True, kw_only=True)
class SelectionShape:
    """One call of ``page_scores`` and of ``select_pages`` on its scores."""

    name: str
    rows: int = 1
    retrieval_heads: int = 4
    pages: int  # pages a row has
    selected: int = 255
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    logical_page_size: int = 16
    selected_page_size: int = 16

    @property
    def candidates(self) -> int:
        """Pages to select from: whole ones, or parts of pages."""
        return self.pages * (self.page_size // self.selected_page_size)

    @property
    def bytes_moved(self) -> int:
        """Statistics of every page, once."""
        logical_pages = self.page_size // self.logical_page_size
        return self.rows * self.retrieval_heads * self.pages * logical_pages * 4 * self.head_dim

    @property
    def flops(self) -> int:
        """Of the product of both halves of each query with the statistics."""
        return self.bytes_moved * self.group

    @property
    def score_bytes(self) -> int:
        return 4 * self.rows * self.retrieval_heads * self.candidates


SELECTION = (
    SelectionShape(name="select, 16K", pages=256),
    SelectionShape(name="select, 128K", pages=2048),
    SelectionShape(name="select, 512K", pages=8192),
    SelectionShape(name="select, 128K, 8 rows", rows=8, pages=2048),
    # As published: pages of 64 tokens, each by its best logical page.
    SelectionShape(name="whole pages, 128K", pages=2048, selected=63, selected_page_size=64),
    SelectionShape(name="whole pages, 512K", pages=8192, selected=63, selected_page_size=64),
    SelectionShape(
        name="whole pages, 128K, 8 rows",
        rows=8,
        pages=2048,
        selected=63,
        selected_page_size=64,
    ),
    SelectionShape(
        name="select, SmolLM2 32K",
        retrieval_heads=2,
        pages=2048,
        selected=127,
        group=3,
        head_dim=64,
        page_size=16,
    ),
)


def selection_inputs(
    shape: SelectionShape, *, calls: int = 1, seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Query, statistics, page tables ``[calls, B, M]`` without a page in common, and lengths.

    The newest page of a row is not full; logical pages without tokens hold NaN.
    """
    rng = np.random.default_rng(seed)
    B, M, P = shape.rows, shape.pages, shape.page_size
    g, total = P // shape.logical_page_size, calls * shape.rows * shape.pages
    tables = rng.permutation(total).astype(np.int32).reshape(calls, B, M)
    used = np.ones((total, g), bool)
    used[tables[:, :, -1], -1] = g == 1
    q_key, stats_key = jax.random.split(jax.random.key(seed))
    q = jax.random.normal(
        q_key, (B, shape.retrieval_heads * shape.group, shape.head_dim), jnp.bfloat16
    )
    stats = jax.random.normal(
        stats_key, (shape.retrieval_heads, total, g, 2, shape.head_dim), jnp.bfloat16
    )
    stats = jnp.stack([stats.max(axis=3), stats.min(axis=3)], axis=3)
    stats = jnp.where(jnp.asarray(used)[:, :, None, None], stats, jnp.nan)
    length = jnp.full(B, (M - 1) * P + max(P - shape.logical_page_size, 1), jnp.int32)
    return q, stats, jnp.asarray(tables), length


@dataclass(frozen=True, kw_only=True)
class PrefillShape:
    """One call of ``prefill_attention``; all tokens of the chunk exist but the last."""

    name: str
    tokens: int
    start: int = 0
    retrieval_heads: int
    streaming_heads: int = 0
    sink: int = 128
    local: int = 256
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    int8: bool = False  # the retrieval pool

    @property
    def flops(self) -> int:
        """Four for each channel of each visible pair of a query and a key."""
        position = np.arange(self.start, self.start + self.tokens - 1)
        causal = int((position + 1).sum())
        seen = np.minimum(position + 1, self.local)
        seen += np.minimum(self.sink, np.maximum(position + 1 - self.local, 0))
        pairs = self.retrieval_heads * causal + self.streaming_heads * int(seen.sum())
        return 4 * self.head_dim * self.group * pairs

    @property
    def bytes_moved(self) -> int:
        """Queries and outputs, and keys and values that some query sees, once."""
        everything = self.start + self.tokens
        window = min(everything, self.tokens + self.sink + self.local)
        keys = self.retrieval_heads * everything + self.streaming_heads * window
        queries = (self.retrieval_heads + self.streaming_heads) * self.group * self.tokens
        return 4 * self.head_dim * (keys + queries)


def _prefill_shapes() -> tuple[PrefillShape, ...]:
    """Llama-3-8B's heads, dense and half of them streaming; SmolLM2-135M's; a short chunk."""
    half = {"retrieval_heads": 4, "streaming_heads": 4}
    return (
        PrefillShape(name="8K", tokens=8192, retrieval_heads=8),
        PrefillShape(name="8K at 24K", tokens=8192, start=24576, retrieval_heads=8),
        PrefillShape(name="8K at 24000, half, int8", tokens=8192, start=24000, int8=True, **half),
        PrefillShape(name="64 at 8K, half streaming", tokens=64, start=8192, **half),
        PrefillShape(
            name="SmolLM2, 1000 at 777",
            tokens=1000,
            start=777,
            retrieval_heads=2,
            streaming_heads=1,
            group=3,
            head_dim=64,
            page_size=16,
        ),
    )


def _long_prefill_shapes() -> tuple[PrefillShape, ...]:
    """Timed only: their truth in float32 takes too long. The last is one chunk of many."""
    half = {"retrieval_heads": 4, "streaming_heads": 4}
    return (
        PrefillShape(name="32K", tokens=32768, retrieval_heads=8),
        PrefillShape(name="32K, half streaming", tokens=32768, **half),
        PrefillShape(name="128K", tokens=131072, retrieval_heads=8),
        PrefillShape(name="128K, half streaming", tokens=131072, **half),
        PrefillShape(name="128K, half, local 8192", tokens=131072, local=8192, **half),
        PrefillShape(name="8K at 120K", tokens=8192, start=122880, retrieval_heads=8),
    )


PREFILL = _prefill_shapes()
LONG_PREFILL = _long_prefill_shapes()


def prefill_inputs(shape: PrefillShape, *, seed: int = 0) -> tuple[tuple, dict[str, int]]:
    """Positional and keyword arguments of ``prefill_attention``.

    History slots that no query sees hold NaN (int8: a NaN scale), as does the last token.
    """
    rng = np.random.default_rng(seed)
    T, P, D = shape.tokens, shape.page_size, shape.head_dim
    width = max(-(-shape.start // P), 1)
    position = np.arange(width * P).reshape(width, P)
    keys = jax.random.split(jax.random.key(seed), 5)

    def pool(key, heads, seen, int8):
        table = rng.permutation(width).astype(np.int32)
        used = np.zeros((width, P), bool)
        used[table] = seen & (position < shape.start)
        every = jnp.broadcast_to(jnp.asarray(used), (heads, width, P))
        return _random_pages(key, every, D, int8), jnp.asarray(table)

    in_window = (position < shape.sink) | (position > shape.start - shape.local)
    retrieval, table = pool(keys[0], shape.retrieval_heads, position >= 0, shape.int8)
    streaming, ring = pool(keys[1], shape.streaming_heads, in_window, False)
    kv_heads = shape.retrieval_heads + shape.streaming_heads
    exists = (jnp.arange(T) < T - 1)[:, None, None]
    q, k, v = (
        jnp.where(exists, jax.random.normal(key, (T, heads, D), jnp.bfloat16), jnp.nan)
        for key, heads in zip(keys[2:], (kv_heads * shape.group, kv_heads, kv_heads), strict=True)
    )
    bounds = jnp.int32(shape.start), jnp.int32(T - 1)
    args = q, k, v, retrieval, streaming, table, ring, *bounds
    return args, {"sink": shape.sink, "local": shape.local}


@dataclass(frozen=True, kw_only=True)
class PrefixShape:
    """One call of ``prefix_attention``."""

    name: str
    rows: int
    tokens: int
    heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 64

    @property
    def flops(self) -> int:
        return 4 * self.rows * self.heads * self.group * self.head_dim * self.tokens

    @property
    def bytes_moved(self) -> int:
        """Keys and values of the prefix, once."""
        return 4 * self.tokens * self.heads * self.head_dim


PREFIX = (
    PrefixShape(name="prefix 2K, 8 rows", rows=8, tokens=2048),
    PrefixShape(name="prefix 8K, 64 rows", rows=64, tokens=8192),
    PrefixShape(name="prefix 32K, 32 rows", rows=32, tokens=32768),
    PrefixShape(name="prefix 32K, 128 rows", rows=128, tokens=32768),
    PrefixShape(
        name="prefix, SmolLM2, 7 rows of 5000",
        rows=7,
        tokens=5000,
        heads=2,
        group=3,
        head_dim=64,
        page_size=16,
    ),
)


def prefix_inputs(shape: PrefixShape, *, seed: int = 0) -> tuple:
    """Arguments of ``prefix_attention``. Slots past the prefix hold NaN."""
    rng = np.random.default_rng(seed)
    P, D = shape.page_size, shape.head_dim
    width = -(-shape.tokens // P)
    table = rng.permutation(width).astype(np.int32)
    used = np.zeros((width, P), bool)
    used[table] = np.arange(width * P).reshape(width, P) < shape.tokens
    key, q_key = jax.random.split(jax.random.key(seed))
    pages = _random_pages(
        key, jnp.broadcast_to(jnp.asarray(used), (shape.heads, width, P)), D, False
    )
    q = jax.random.normal(q_key, (shape.rows, shape.heads * shape.group, D), jnp.bfloat16)
    return q, pages, jnp.asarray(table), jnp.int32(shape.tokens)
