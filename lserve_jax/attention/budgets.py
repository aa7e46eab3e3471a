"""What a retrieval head may read in a decode step: everything, a share, or so many tokens."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class HeadBudgets:
    """Retrieval heads of every layer and their budgets. Hashable: may be a static argument.

    A layer's retrieval pool has its *ranked* heads first, which select pages, then its *dense*
    heads, which read everything, and in exact mode its *windowed* heads: those that would stream,
    whose pages are all kept for verification, while drafting reads sinks and newest ones. Raises
    ``ValueError`` for numbers that contradict each other.
    """

    num_retrieval: tuple[int, ...]  # of each layer
    num_dense: tuple[int, ...]
    num_windowed: tuple[int, ...] = ()  # (): there are none
    # Of each layer's ranked heads, the share of the context that they list, in (0, 1).
    shares: tuple[tuple[float, ...], ...] | None = None
    token_budget: int | None = None  # tokens of every ranked head, where there are no shares

    def __post_init__(self):
        if not self.num_windowed:
            object.__setattr__(self, "num_windowed", (0,) * len(self.num_retrieval))
        for name in ("num_dense", "num_windowed"):
            if len(getattr(self, name)) != len(self.num_retrieval):
                raise ValueError(
                    f"{name} names {len(getattr(self, name))} layers, "
                    f"num_retrieval {len(self.num_retrieval)}"
                )
        for layer, ranked in enumerate(self.num_ranked):
            if ranked < 0 or self.num_dense[layer] < 0 or self.num_windowed[layer] < 0:
                raise ValueError(
                    f"layer {layer} has {self.num_dense[layer]} dense and "
                    f"{self.num_windowed[layer]} windowed of {self.num_retrieval[layer]} "
                    "retrieval heads"
                )
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
        counts = zip(self.num_retrieval, self.num_dense, self.num_windowed, strict=True)
        return tuple(every - dense - windowed for every, dense, windowed in counts)

    def first_like(self, layer: int) -> int:
        """The first layer whose retrieval heads may read what this one's may."""

        def kinds(other: int) -> tuple:
            shares = None if self.shares is None else self.shares[other]
            counts = self.num_retrieval[other], self.num_dense[other], self.num_windowed[other]
            return *counts, shares

        return next(other for other in range(layer + 1) if kinds(other) == kinds(layer))
