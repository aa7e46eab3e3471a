"""Budgets for specs that tests make by hand."""

from lserve_jax import SparsityConfig
from lserve_jax.attention.budgets import HeadBudgets
from lserve_jax.attention.config import EVEN_BUDGET


def budgets_of(num_retrieval: tuple[int, ...], sparsity: SparsityConfig | None) -> HeadBudgets:
    """Dense without a sparsity, else the same token budget for every head."""
    if sparsity is None:
        return HeadBudgets.dense(num_retrieval)
    return HeadBudgets.even(num_retrieval, sparsity.token_budget or EVEN_BUDGET)
