"""New keys and values: ``append_kv`` and ``append_kv_chunk``."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.api import KV_KINDS, KVKind, KVPages
from pallas_kernels.kv_codes import CODE_TYPES, stored_channels
from pallas_kernels.types import KVScale


@dataclass(frozen=True, kw_only=True)
class AppendShape:
    """One call of ``append_kv`` (rows of one token) or ``append_kv_chunk`` (tokens of one row)."""

    name: str
    rows: int = 1
    tokens: int = 1
    start: int = 0  # position of a chunk's first token
    retrieval_heads: int
    dense_heads: int = 0  # the last of the retrieval heads, which have no statistics
    streaming_heads: int = 0
    kept: int = 384  # tokens at the end of a chunk that streaming heads keep
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    logical_page_size: int = 16
    kind: KVKind | None = None

    @property
    def kv_heads(self) -> int:
        return self.retrieval_heads + self.streaming_heads

    @property
    def ranked_heads(self) -> int:
        return self.retrieval_heads - self.dense_heads

    @property
    def bytes_moved(self) -> int:
        """Keys and values read and written once, a row's queries, and statistics."""
        page = jax.tree.leaves(jax.eval_shape(lambda: _empty_pool(1, 1, self)))
        stored = sum(x.size * x.dtype.itemsize for x in page) // self.page_size
        kept = min(self.tokens, self.kept)
        vectors = self.rows * (self.tokens * self.retrieval_heads + kept * self.streaming_heads)
        moved = vectors * (4 * self.head_dim + stored)
        statistics = self.rows * self.ranked_heads * 4 * self.head_dim  # of one logical page
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
        *(AppendShape(name=f"1 row, {kind}", kind=kind, **half) for kind in KV_KINDS),
        *(AppendShape(name=f"8 rows, {kind}", rows=8, kind=kind, **half) for kind in KV_KINDS),
        AppendShape(name="3 and 5 heads, 2 rows", rows=2, retrieval_heads=3, streaming_heads=5),
        AppendShape(name="3 of 4 heads ranked, 2 rows", rows=2, dense_heads=1, **half),
        AppendShape(name="SmolLM2, 2 rows", rows=2, retrieval_heads=2, streaming_heads=1, **small),
    )


def _chunk_shapes() -> tuple[AppendShape, ...]:
    half = {"retrieval_heads": 4, "streaming_heads": 4}
    edges = {"tokens": 1000, "start": 77}
    small = {"group": 3, "head_dim": 64, "page_size": 16, "logical_page_size": 8}
    return (
        AppendShape(name="chunk of 8192", tokens=8192, retrieval_heads=8),
        AppendShape(name="chunk of 8192, half streaming", tokens=8192, start=16384, **half),
        *(
            AppendShape(name=f"chunk of 8192, {kind}", tokens=8192, retrieval_heads=8, kind=kind)
            for kind in KV_KINDS
        ),
        AppendShape(name="chunk of 32768", tokens=32768, retrieval_heads=8),
        AppendShape(
            name="chunk of 1000 at 77, 2 of 4 heads ranked",
            dense_heads=2,
            **edges,
            **half,
        ),
        *(
            AppendShape(name=f"chunk of 1000 at 77, {kind}", kind=kind, **edges, **half)
            for kind in KV_KINDS
        ),
        *(
            AppendShape(
                name=f"chunk of 1000 at 77, {kind}, pages of 16",
                page_size=16,
                kind=kind,
                **edges,
                **half,
            )
            for kind in KV_KINDS
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
    """All NaN (codes: of a NaN scale)."""
    size, kind = (heads, pages, shape.page_size), shape.kind

    def tokens() -> tuple[Array, KVScale | None]:
        if kind is None:
            return jnp.full((*size, shape.head_dim), jnp.nan, jnp.bfloat16), None
        codes = jnp.full((*size, stored_channels(kind, shape.head_dim)), 77, CODE_TYPES[kind])
        if kind == "int4":  # a word of ones is two NaN
            return codes, (jnp.full(size, -1, jnp.int32), jnp.full(size, -1, jnp.int32))
        return codes, jnp.full(size, jnp.nan, jnp.float32)

    (k, k_scale), (v, v_scale) = tokens(), tokens()
    return KVPages(k, v, k_scale, v_scale)


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
    stats = jax.random.normal(keys[4], (shape.ranked_heads, N, g, 2, D), jnp.bfloat16)
    stats = jnp.where(merged[..., None, None], -jnp.sort(-stats, axis=3), jnp.nan)
    pools = (
        _empty_pool(heads, N, shape) for heads in (shape.retrieval_heads, shape.streaming_heads)
    )
    places = [
        tuple(map(jnp.asarray, call)) for call in zip(pages, ring_pages, offsets, strict=True)
    ]
    return (q, k, v, jnp.cos(angle), jnp.sin(angle), *pools, stats), places


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
    size = shape.ranked_heads, N, g, 2, D
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
    places = [
        (jnp.asarray(table), jnp.asarray(pages), start, length)
        for table, pages in zip(tables, ring, strict=True)
    ]
    return (k, v, *pools, stats), places
