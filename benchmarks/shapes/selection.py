"""Page scores and page selection: ``page_scores`` and ``select_pages``."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class SelectionShape:
    """One call of ``page_scores`` and of ``select_pages`` on its scores."""

    name: str
    rows: int = 1
    retrieval_heads: int = 4
    most_heads: int = 8  # of any layer of the model
    pages: int  # pages a row has
    selected: int = 255  # selected pages
    uneven: int = 1  # every second head wants so many times fewer
    group: int = 4
    head_dim: int = 128
    page_size: int = 64
    logical_page_size: int = 16
    selected_page_size: int = 16

    @property
    def candidates(self) -> int:
        """Selected pages to choose from: pages, or parts of them."""
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
    # Heads with budgets of their own, up to 16K and 64K tokens.
    SelectionShape(name="select, 128K, uneven 1024", pages=2048, selected=1024, uneven=16),
    SelectionShape(name="select, 128K, uneven 4096", pages=2048, selected=4096, uneven=16),
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
        most_heads=3,
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
