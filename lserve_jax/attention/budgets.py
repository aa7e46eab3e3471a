"""What a retrieval head may read in a decode step: everything, a share, or so many tokens."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class HeadBudgets:
    """Retrieval heads of every layer and their budgets. Hashable: may be a static argument.

    A layer's retrieval pool has its *ranked* heads first, which select pages, and then its *dense*
    heads, which read everything. Raises ``ValueError`` for numbers that contradict each other.
    """

    num_retrieval: tuple[int, ...]  # of each layer
    num_dense: tuple[int, ...]  # of these, the last so many read everything
    # Of each layer's ranked heads, the share of the context that they list, in (0, 1).
    shares: tuple[tuple[float, ...], ...] | None = None
    token_budget: int | None = None  # tokens of every ranked head, where there are no shares

    def __post_init__(self):
        if len(self.num_dense) != len(self.num_retrieval):
            raise ValueError(
                f"num_dense names {len(self.num_dense)} layers, "
                f"num_retrieval {len(self.num_retrieval)}"
            )
        for layer, (all_heads, dense) in enumerate(
            zip(self.num_retrieval, self.num_dense, strict=True)
        ):
            if not 0 <= dense <= all_heads:
                raise ValueError(f"layer {layer} has {dense} dense of {all_heads} retrieval heads")
        if self.shares is not None:
            if self.token_budget is not None:
                raise ValueError(f"token_budget={self.token_budget} and shares are two budgets")
            counts = tuple(len(layer) for layer in self.shares)
            if counts != self.num_ranked:
                raise ValueError(f"shares are for {counts} heads, ranked are {self.num_ranked}")
        elif self.token_budget is None and any(self.num_ranked):
            raise ValueError(f"{sum(self.num_ranked)} ranked heads have neither share nor budget")

    @classmethod
    def dense(cls, num_retrieval: tuple[int, ...]) -> Self:
        """Every retrieval head reads everything."""
        return cls(num_retrieval=num_retrieval, num_dense=num_retrieval)

    @classmethod
    def even(cls, num_retrieval: tuple[int, ...], token_budget: int) -> Self:
        """Every retrieval head ranks its pages and has the same budget."""
        nobody = (0,) * len(num_retrieval)
        return cls(num_retrieval=num_retrieval, num_dense=nobody, token_budget=token_budget)

    @property
    def num_ranked(self) -> tuple[int, ...]:
        """Ranked heads of each layer."""
        return tuple(n - d for n, d in zip(self.num_retrieval, self.num_dense, strict=True))
