"""Decode attention: ``paged_attention``."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import KVPages, PageList
from shapes.pages import random_pages


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
        """Keys, values and scales of every listed token, once."""
        listed_pages = (
            self.retrieval_heads * self.retrieval_pages
            + self.streaming_heads * self.streaming_pages
        )
        tokens = self.rows * self.page_size * listed_pages
        return tokens * (2 * self.head_dim + 8 if self.int8 else 4 * self.head_dim)


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

    Tokens that no list attends are NaN (int8: of a NaN scale). Every list ends in a partial page,
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
        token = np.arange(count * P).reshape(count, P)
        attended = (token >= first) & (token < count * P - 5)
        used = np.zeros((number, total, P), bool)
        used[np.arange(number)[:, None, None, None], ids] = attended
        return random_pages(key, jnp.asarray(used), shape.head_dim, shape.int8)

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
