"""Verification of drafted tokens: ``verify_attention``."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import KV_KINDS, KVKind, KVPages
from shapes.pages import random_pages, token_bytes


@dataclass(frozen=True, kw_only=True)
class VerifyShape:
    """One call of ``verify_attention``; the last query attends ``context`` tokens less 5."""

    name: str
    rows: int = 1
    tokens: int
    context: int
    heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    kind: KVKind | None = None

    @property
    def bytes_moved(self) -> int:
        """Keys, values and scales of every token, once."""
        tokens = self.rows * self.heads * self.context
        return tokens * token_bytes(self.head_dim, self.kind)


def _verify_shapes() -> tuple[VerifyShape, ...]:
    """Llama-3-8B's heads; one token beside a few shows what the others cost."""
    sizes = (("8 rows of 64K", 8, 65536), ("512K", 1, 524288))
    return (
        *(
            VerifyShape(
                name=f"{name}, {count} token{'s' if count > 1 else ''}",
                rows=rows,
                context=context,
                tokens=count,
            )
            for name, rows, context in sizes
            for count in (1, 3, 5, 9)
        ),
        *(
            VerifyShape(
                name=f"8 rows of 64K, 5 tokens, {kind}",
                rows=8,
                context=65536,
                tokens=5,
                kind=kind,
            )
            for kind in KV_KINDS
        ),
        # Two pieces, a short context, and SmolLM2's heads.
        VerifyShape(name="group 8, 9 tokens", rows=2, context=8192, tokens=9, heads=4, group=8),
        VerifyShape(
            name="SmolLM2 8K, 5 tokens, pages of 16",
            rows=3,
            context=8192,
            tokens=5,
            heads=3,
            group=3,
            head_dim=64,
            page_size=16,
        ),
        *(
            VerifyShape(
                name=f"{kind}, 9 tokens, pages of 16",
                context=4096,
                tokens=9,
                page_size=16,
                kind=kind,
            )
            for kind in KV_KINDS
        ),
    )


VERIFY = _verify_shapes()


def verify_inputs(
    shape: VerifyShape, *, calls: int = 1, seed: int = 0
) -> tuple[jax.Array, KVPages, jax.Array, jax.Array]:
    """Query, pages, page tables ``[calls, B, M]`` without a page in common, and positions.

    Tokens past the last query are NaN.
    """
    rng = np.random.default_rng(seed)
    B, P = shape.rows, shape.page_size
    M = shape.context // P
    total = calls * B * M
    tables = rng.permutation(total).astype(np.int32).reshape(calls, B, M)
    position = shape.context - 5 - shape.tokens
    used = np.zeros((total, P), bool)
    used[tables] = np.arange(M * P).reshape(M, P) < position + shape.tokens
    key, q_key = jax.random.split(jax.random.key(seed))
    of_heads = jnp.broadcast_to(jnp.asarray(used), (shape.heads, total, P))
    pages = random_pages(key, of_heads, shape.head_dim, shape.kind)
    size = B, shape.tokens, shape.heads * shape.group, shape.head_dim
    q = jax.random.normal(q_key, size, jnp.bfloat16)
    return q, pages, jnp.asarray(tables), jnp.full(B, position, jnp.int32)
