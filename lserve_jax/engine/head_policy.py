"""Which heads stream, which read everything, and how much each of the others may read.

From ``SparsityConfig`` and the files that it names to what is static about an engine's heads.
``docs/lserve.md`` says what each policy was measured to lose.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from convert.attention_patterns import load_pattern
from convert.head_shares import has_head_shares, load_head_shares
from lserve_jax.attention.budgets import HeadBudgets
from lserve_jax.attention.config import EVEN_BUDGET, SparsityConfig
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.head_shares import SHARES, HeadSensitivity, fit_shares
from lserve_jax.model.heads import HeadPartition, partition_heads, partition_of

DEFAULT_BUDGET_SHARE = 1 / 8
DEFAULT_STREAMING = {"worth": 1 / 3, "gates": 0.5}


@dataclass(frozen=True, kw_only=True)
class HeadPolicy:
    """What is static about a model's heads under one ``SparsityConfig``; hashable."""

    partition: HeadPartition
    budgets: HeadBudgets
    source: str  # in words, for people

    @property
    def counts(self) -> str:
        """How many heads of each kind there are, in words."""
        streaming = sum(map(len, self.partition.streaming))
        ranked, dense = sum(map(len, self.partition.ranked)), sum(self.partition.num_dense)
        return f"{streaming} stream, {dense} read everything, {ranked} select pages"


def head_policy(
    config: ModelConfig, sparsity: SparsityConfig | None, *, exact: bool = False
) -> HeadPolicy:
    """The policy of ``sparsity`` for a model; None is dense attention.

    In exact mode it is the policy of drafting: heads that would stream keep their pages, since
    verification reads all.

    Raises ``ValueError`` for files that do not belong to the model, and for more dense heads than
    there are.
    """
    if sparsity is None:
        everyone = np.ones((config.num_hidden_layers, config.num_key_value_heads), bool)
        return _policy(partition_of(~everyone, dense=everyone), "dense")
    policy = _sparse_policy(config, sparsity)
    if not exact:
        return policy
    partition, budgets = policy.partition, policy.budgets
    heads = dataclasses.replace(
        budgets,
        num_retrieval=(partition.num_kv_heads,) * partition.num_layers,
        num_windowed=tuple(len(layer) for layer in partition.streaming),
    )
    return dataclasses.replace(policy, budgets=heads)


def _sparse_policy(config: ModelConfig, sparsity: SparsityConfig) -> HeadPolicy:
    where = _where(sparsity)
    if where is None:
        return _by_gates(config, sparsity)
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    sensitivity, given = load_head_shares(where)
    if given.shape != shape:
        raise ValueError(
            f"head_shares={where!r} are of {given.shape} (layers, KV heads), the model has {shape}"
        )
    if sensitivity is None:
        return _as_given(sparsity, where, given)
    return _by_worth(sparsity, where, sensitivity)


def _where(sparsity: SparsityConfig) -> str | None:
    """Where head shares are; None: there are none, or they are not wanted."""
    if sparsity.head_shares != "auto":
        return sparsity.head_shares
    pattern = sparsity.pattern
    return pattern if pattern is not None and has_head_shares(pattern) else None


def _by_gates(config: ModelConfig, sparsity: SparsityConfig) -> HeadPolicy:
    """LServe's own: heads stream by their gates, all others have one budget."""
    fraction = sparsity.streaming_fraction
    if fraction is None:
        fraction = 0.0 if sparsity.pattern is None else DEFAULT_STREAMING["gates"]
    partition = partition_heads(
        None if sparsity.pattern is None else load_pattern(sparsity.pattern),
        fraction,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
    )
    if sparsity.dense_heads:
        raise ValueError(
            f"dense_heads={sparsity.dense_heads} needs head shares: pattern={sparsity.pattern!r} "
            "has none beside its gates; name a pattern that has, or head_shares=DIRECTORY"
        )
    if sparsity.budget_share is None:
        budget = EVEN_BUDGET if sparsity.token_budget is None else sparsity.token_budget
        source = f"{budget} tokens a head" + (", streaming by gates" if fraction else "")
        return _policy(partition, source, token_budget=budget)
    share = sparsity.budget_share - sparsity.statistics_share
    if share < SHARES[0]:
        raise ValueError(
            f"budget_share={sparsity.budget_share} cannot be met: the least share and ranking take "
            f"{SHARES[0] + sparsity.statistics_share:.4g} of the context"
        )
    shares = tuple((share,) * len(heads) for heads in partition.ranked)
    source = f"{share:.4g} of the context a head" + (", streaming by gates" if fraction else "")
    return _policy(partition, source, shares=shares)


def _as_given(
    sparsity: SparsityConfig, where: str, shares: Float64[np.ndarray, "L Hk"]
) -> HeadPolicy:
    """Shares written by hand, or by another program: nothing is known but them."""
    for name in ("budget_share", "token_budget", "streaming_fraction", "dense_heads"):
        if getattr(sparsity, name):
            raise ValueError(
                f"{name}={getattr(sparsity, name)} needs head_sensitivity.tsv, which "
                f"head_shares={where!r} has not: its shares are taken as they are"
            )
    return _with_shares(shares, np.zeros(shares.shape, bool), f"shares of {where}")


def _by_worth(sparsity: SparsityConfig, where: str, sensitivity: HeadSensitivity) -> HeadPolicy:
    """Streaming and dense heads by worth; budgets even, or fitted."""
    dense = sensitivity.most_sensitive(sparsity.dense_heads)
    fraction = sparsity.streaming_fraction
    fraction = DEFAULT_STREAMING["worth"] if fraction is None else fraction
    streams = sensitivity.least_sensitive(fraction) & ~dense
    source = f"{sparsity.dense_heads} dense heads, " if sparsity.dense_heads else ""
    if sparsity.token_budget is not None:
        source += f"{sparsity.token_budget} tokens each other head, heads by {where}"
        partition = partition_of(streams, dense=dense)
        return _policy(partition, source, token_budget=sparsity.token_budget)
    budget = sparsity.budget_share
    budget = DEFAULT_BUDGET_SHARE if budget is None else budget
    window = (sparsity.decode_sink + sparsity.decode_local) / sensitivity.context
    shares = fit_shares(
        sensitivity,
        budget,
        streams,
        dense=dense,
        statistics=sparsity.statistics_share,
        window=window,
    )
    ranked = (shares > 0) & (shares < 1)
    least = (shares.sum() + sparsity.statistics_share * ranked.sum() + window * streams.sum()) / (
        shares.size
    )
    if sparsity.budget_share is not None and least > budget * (1 + 1e-9):
        raise ValueError(
            f"budget_share={budget} cannot be met: {source or 'the least shares, '}windows and "
            f"ranking take {least:.4g} of the context"
        )
    return _with_shares(shares, streams, f"{source}{budget:.4g} of the context by {where}")


def _with_shares(
    shares: Float64[np.ndarray, "L Hk"], streams: Bool[np.ndarray, "L Hk"], source: str
) -> HeadPolicy:
    """A share of 1 makes a dense head."""
    partition = partition_of(streams, dense=shares == 1.0)
    ranked = zip(shares, partition.ranked, strict=True)
    by_layer = tuple(tuple(layer[list(heads)].tolist()) for layer, heads in ranked)
    return _policy(partition, source, shares=by_layer)


def _policy(partition: HeadPartition, source: str, **budgets: Any) -> HeadPolicy:
    return HeadPolicy(
        partition=partition,
        budgets=HeadBudgets(
            num_retrieval=partition.num_retrieval, num_dense=partition.num_dense, **budgets
        ),
        source=source,
    )
