"""Attention over a shared prefix: ``prefix_attention``."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from shapes.pages import random_pages


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
    """Arguments of ``prefix_attention``. Pages hold NaN past the prefix."""
    rng = np.random.default_rng(seed)
    P, D = shape.page_size, shape.head_dim
    width = -(-shape.tokens // P)
    table = rng.permutation(width).astype(np.int32)
    used = np.zeros((width, P), bool)
    used[table] = np.arange(width * P).reshape(width, P) < shape.tokens
    key, q_key = jax.random.split(jax.random.key(seed))
    pages = random_pages(key, jnp.broadcast_to(jnp.asarray(used), (shape.heads, width, P)), D, None)
    q = jax.random.normal(q_key, (shape.rows, shape.heads * shape.group, D), jnp.bfloat16)
    return q, pages, jnp.asarray(table), jnp.int32(shape.tokens)
