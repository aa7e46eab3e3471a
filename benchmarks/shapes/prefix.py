"""Attention over a shared prefix: ``prefix_attention``."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import KV_KINDS, KVKind
from shapes.pages import random_pages, token_bytes


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
    kind: KVKind | None = None  # None: bf16

    @property
    def flops(self) -> int:
        return 4 * self.rows * self.heads * self.group * self.head_dim * self.tokens

    @property
    def bytes_moved(self) -> int:
        """Keys and values of the prefix, once."""
        return token_bytes(self.head_dim, self.kind) * self.tokens * self.heads


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

# bf16 and codes.
PREFIX_KINDS = tuple(
    PrefixShape(
        name=f"prefix {tokens // 1024}K, {rows} rows, {kind or 'bf16'}",
        rows=rows,
        tokens=tokens,
        kind=kind,
    )
    for tokens, rows in ((8192, 8), (8192, 32), (8192, 128), (32768, 8), (32768, 128))
    for kind in (None, *KV_KINDS)
)
# What has edges: a ragged last page, either head size, every page size.
PREFIX_CODES = tuple(
    PrefixShape(
        name=f"prefix of {kind}, D {head_dim}, pages of {page_size}",
        rows=7,
        tokens=5000,
        heads=2,
        group=3,
        head_dim=head_dim,
        page_size=page_size,
        kind=kind,
    )
    for kind in KV_KINDS
    for head_dim, page_size in ((64, 16), (64, 128), (128, 16), (128, 32), (128, 64))
)


def prefix_inputs(shape: PrefixShape, *, seed: int = 0) -> tuple:
    """Arguments of ``prefix_attention``. Pages hold NaN past the prefix."""
    rng = np.random.default_rng(seed)
    P, D = shape.page_size, shape.head_dim
    width = -(-shape.tokens // P)
    table = rng.permutation(width).astype(np.int32)
    used = np.zeros((width, P), bool)
    used[table] = np.arange(width * P).reshape(width, P) < shape.tokens
    key, q_key = jax.random.split(jax.random.key(seed))
    pages = random_pages(
        key, jnp.broadcast_to(jnp.asarray(used), (shape.heads, width, P)), D, shape.kind
    )
    q = jax.random.normal(q_key, (shape.rows, shape.heads * shape.group, D), jnp.bfloat16)
    return q, pages, jnp.asarray(table), jnp.int32(shape.tokens)
