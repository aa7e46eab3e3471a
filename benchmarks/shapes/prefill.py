"""Prefill attention: ``prefill_attention``, and lists of blocks for it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import BLOCK_KEYS, TILE_QUERIES, BlockList
from shapes.pages import random_pages


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

    @property
    def causal_blocks(self) -> np.ndarray:
        """[tiles] blocks of keys that each tile of queries sees without lists."""
        tiles = -(-self.tokens // TILE_QUERIES)
        return -(-self.start // BLOCK_KEYS) + np.arange(tiles) + 1


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

    Tokens of the history that no query sees are NaN (int8: of a NaN scale), as is the last token.
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
        return random_pages(key, every, D, "int8" if int8 else None), jnp.asarray(table)

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


def random_blocks(shape: PrefillShape, density: float, *, seed: int = 0) -> BlockList:
    """Each tile lists its first and its last block and random ones between: ``density`` of all.

    Lists have room for all blocks; behind them stands anything.
    """
    rng = np.random.default_rng(seed)
    causal = shape.causal_blocks
    size = shape.retrieval_heads, len(causal), causal[-1]
    ids = rng.integers(-9, 1 << 20, size).astype(np.int32)
    counts = np.maximum(np.rint(density * causal), np.minimum(causal, 2)).astype(np.int32)
    for head in range(shape.retrieval_heads):
        for tile, (blocks, count) in enumerate(zip(causal, counts, strict=True)):
            between = 1 + rng.choice(max(blocks - 2, 0), max(count - 2, 0), replace=False)
            listed = {0, *between.tolist(), blocks - 1}
            ids[head, tile, : len(listed)] = sorted(listed)
    counts = np.broadcast_to(counts, size[:2])
    return BlockList(jnp.asarray(ids), jnp.asarray(counts))
