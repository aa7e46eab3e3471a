"""Decode attention: ``paged_attention``."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import KV_KINDS, KVKind, KVPages, PageList
from shapes.pages import random_pages, token_bytes


@dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """One call of ``paged_attention``; page counts are those each list holds.

    The last ``dense_heads`` of the retrieval heads list ``dense_pages``.
    """

    name: str
    rows: int = 1
    retrieval_heads: int
    retrieval_pages: int
    dense_heads: int = 0
    dense_pages: int = 0
    streaming_heads: int = 0
    streaming_pages: int = 0
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    kind: KVKind | None = None

    @property
    def kv_heads(self) -> int:
        return self.retrieval_heads + self.streaming_heads

    @property
    def list_pages(self) -> tuple[int, ...]:
        """Pages that the list of each KV head holds."""
        ranked = (self.retrieval_pages,) * (self.retrieval_heads - self.dense_heads)
        dense = (self.dense_pages,) * self.dense_heads
        return ranked + dense + (self.streaming_pages,) * self.streaming_heads

    @property
    def most_tokens(self) -> tuple[int, ...]:
        return tuple(count * self.page_size for count in self.list_pages)

    @property
    def bytes_moved(self) -> int:
        """Keys, values and scales of every listed token, once."""
        tokens = self.rows * sum(self.most_tokens)
        return tokens * token_bytes(self.head_dim, self.kind)


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
        DecodeShape(name="dense 64K, 8 rows", rows=8, retrieval_heads=8, retrieval_pages=1024),
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
    codes = tuple(
        dataclasses.replace(shape, name=f"{shape.name}, {kind}", kind=kind)
        for kind in KV_KINDS
        for shape in bf16[:3]
    )
    codes += (
        DecodeShape(
            name="dense 128K, int8, pages of 128",
            retrieval_heads=8,
            retrieval_pages=1024,
            page_size=128,
            kind="int8",
        ),
    )
    # Seven heads with a budget of 4096 beside one that reads everything.
    mixed = tuple(
        DecodeShape(
            name=f"one of 8 heads dense, 128K{', 8 rows' if rows > 1 else ''}",
            rows=rows,
            retrieval_heads=8,
            retrieval_pages=64,
            dense_heads=1,
            dense_pages=2048,
        )
        for rows in (1, 8)
    )
    # SmolLM2-135M: 9 query heads on 3 KV heads of 64 channels; small pages; the widest group.
    smollm2 = DecodeShape(
        name="SmolLM2 8K",
        retrieval_heads=2,
        streaming_heads=1,
        retrieval_pages=512,
        streaming_pages=24,
        group=3,
        head_dim=64,
        page_size=16,
    )
    others = (
        smollm2,
        dataclasses.replace(smollm2, name="SmolLM2 8K, int4", kind="int4"),
        *(
            DecodeShape(
                name=f"group 16, pages of 32, {kind}",
                rows=2,
                retrieval_heads=2,
                retrieval_pages=100,
                group=16,
                page_size=32,
                kind=kind,
            )
            for kind in KV_KINDS
        ),
    )
    return bf16 + whole + codes + mixed + others


DECODE = _decode_shapes()


def decode_inputs(
    shape: DecodeShape, *, lists: int = 1, seed: int = 0
) -> tuple[jax.Array, KVPages, KVPages, list[tuple[PageList, PageList]]]:
    """Query, both pools and ``lists`` pairs of page lists without a page in common.

    Tokens that no list attends are NaN. Every list ends in a partial page,
    and a streaming head's starts in one.
    """
    rng = np.random.default_rng(seed)
    B, K, P = shape.rows, shape.kv_heads, shape.page_size
    split, counts = shape.retrieval_heads, np.array(shape.list_pages)
    pages = np.zeros((lists, B, K, counts.max()), np.int32)
    start, stop = np.zeros((B, K), np.int32), np.zeros((B, K), np.int32)

    def pool(heads: range, first: int, key: jax.Array) -> KVPages:
        total = lists * B * max((counts[head] for head in heads), default=0)
        used = np.zeros((len(heads), total, P), bool)
        for head, of_head in zip(heads, used, strict=True):
            count = counts[head]
            ids = rng.permutation(total).astype(np.int32)[: lists * B * count]
            ids = ids.reshape(lists, B, count)
            pages[:, :, head, :count] = ids
            start[:, head], stop[:, head] = first, count * P - 5
            token = np.arange(count * P).reshape(count, P)
            of_head[ids] = (token >= first) & (token < count * P - 5)
        return random_pages(key, jnp.asarray(used), shape.head_dim, shape.kind)

    keys = jax.random.split(jax.random.key(seed), 3)
    retrieval = pool(range(split), 0, keys[0])
    streaming = pool(range(split, K), 3, keys[1])
    q = jax.random.normal(keys[2], (B, K * shape.group, shape.head_dim), jnp.bfloat16)

    def page_list(one: np.ndarray, heads: slice, width: int) -> PageList:
        fields = one[:, heads, :width], start[:, heads], stop[:, heads]
        return PageList(*map(jnp.asarray, fields))

    pairs = [
        (
            page_list(one, slice(0, split), max(counts[:split], default=1)),
            page_list(one, slice(split, K), max(counts[split:], default=1)),
        )
        for one in pages
    ]
    return q, retrieval, streaming, pairs
