"""What a request's decode steps read and hold, in bytes: the one place that counts them."""

import dataclasses
from dataclasses import dataclass
from typing import Self

from lserve_jax.attention.cache import CacheSpec, cache_bytes, token_bytes
from lserve_jax.engine.metrics import RelayDecision, RequestMetrics
from lserve_jax.engine.state import Burst
from lserve_jax.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class CacheUnits:
    """Bytes of what a cache consists of. Frozen; made once for an engine."""

    token: int  # keys and values of a token in one KV head, scales included
    page: int  # a retrieval page in all layers, statistics included
    remembered_page: int  # the same and a page of the prefill window
    statistics: int  # the statistics of a page in all layers
    decode_window: int  # a sequence's window for streaming heads, in all layers
    page_size: int  # tokens
    kv_heads: int  # of all layers
    retrieval_heads: int  # of all layers
    num_layers: int

    @classmethod
    def of(cls, config: ModelConfig, spec: CacheSpec, dtype) -> Self:
        """The units of a cache of ``spec`` whose compute dtype is ``dtype``."""
        sizes = cache_bytes(config, spec, dtype)
        token = token_bytes(spec, config.head_dim, dtype)
        windows = sizes["streaming"] // spec.num_streaming_pages
        page = (sizes["retrieval"] + sizes["key_stats"]) // spec.num_pages
        return cls(
            token=token,
            page=page,
            remembered_page=page + sizes["prefill_window"] // spec.num_window_pages,
            statistics=sizes["key_stats"] // spec.num_pages,
            decode_window=windows * spec.decode_window.num_pages,
            page_size=spec.page_size,
            kv_heads=config.num_hidden_layers * config.num_key_value_heads,
            retrieval_heads=sum(spec.heads.num_retrieval),
            num_layers=config.num_hidden_layers,
        )

    @property
    def heads_a_layer(self) -> float:
        """Retrieval heads, on average over layers."""
        return self.retrieval_heads / self.num_layers


@dataclass(frozen=True, kw_only=True)
class BurstRow:
    """What one row of a ``Burst`` says of its request, on the host."""

    steps: int
    bypassed: int  # steps that attended everything
    selections: int
    scored: int  # pages whose statistics were read, in one layer and KV head
    attended: float  # tokens, summed over steps, layers and KV heads
    verified: int
    judging: int
    drafted: int
    confirmed: int

    @classmethod
    def of(cls, burst: Burst, row: int) -> Self:
        """A row of a burst that was fetched."""
        return cls(
            steps=int(burst.steps[row]),
            bypassed=int(burst.bypassed[row]),
            selections=int(burst.selections[row]),
            scored=int(burst.scored[row]),
            attended=float(burst.attended[row]),
            verified=int(burst.verified[row]),
            judging=int(burst.judging[row]),
            drafted=int(burst.drafted[row]),
            confirmed=int(burst.confirmed[row]),
        )


@dataclass(kw_only=True)
class RequestCosts:
    """Sums over a request's decode steps. A preempted request's steps count again."""

    steps: int = 0
    bypassed: int = 0
    selections: int = 0
    scored: int = 0
    attended: float = 0.0
    read: float = 0.0  # of ``attended``, the request's share of what was read together
    positions: int = 0  # tokens of the sequence, summed: what dense attention would attend
    relay_steps: int = 0
    relay_reason: str = ""
    verified: int = 0
    rounds: int = 0  # of these, those of bursts in which it was to draft
    judging: int = 0
    drafted: int = 0
    confirmed: int = 0
    draft_reason: str = ""
    seconds: float = 0.0  # from the first token to the newest

    def add(
        self, row: BurstRow, units: CacheUnits, position: int, decision: RelayDecision | None
    ) -> None:
        """Adds a burst. ``position`` is that of its first step.

        ``decision`` is None where nobody shares the request's beginning.
        """
        together = decision is not None and decision.used
        self.steps += row.steps
        self.bypassed += row.bypassed
        self.selections += row.selections
        self.scored += row.scored
        self.attended += row.attended
        self.verified += row.verified
        self.judging += row.judging
        self.drafted += row.drafted
        self.confirmed += row.confirmed
        self.read += row.attended
        if decision is not None and decision.used:
            others = 1 - 1 / decision.requests
            self.read -= row.steps * units.retrieval_heads * decision.prefix_tokens * others
        self.positions += sum(range(position + 1, position + row.steps + 1))
        self.relay_steps += row.steps * together
        self.relay_reason = "nobody shares its beginning" if decision is None else decision.reason

    def metrics(
        self,
        metrics: RequestMetrics,
        units: CacheUnits,
        *,
        generated_tokens: int,
        cached_tokens: int,
    ) -> RequestMetrics:
        """``metrics`` with these sums in it; ``cached_tokens`` is the length of the sequence."""
        steps, pages = max(self.steps, 1), -(-cached_tokens // units.page_size)
        read = self.read * units.token + self.scored * units.statistics
        return dataclasses.replace(
            metrics,
            generated_tokens=generated_tokens,
            decode_seconds=self.seconds,
            decode_steps=self.steps,
            relay_steps=self.relay_steps,
            relay_reason=self.relay_reason,
            verifications=self.verified,
            drafted_tokens=self.drafted,
            confirmed_tokens=self.confirmed,
            draft_reason=self.draft_reason,
            selector_runs=self.selections,
            bypassed_steps=self.bypassed,
            pages_attended_per_step=self.attended / steps / units.kv_heads / units.page_size,
            kv_bytes_held=pages * units.page + units.decode_window * (pages > 0),
            kv_bytes_read_per_step=read / steps,
            dense_kv_bytes_read_per_step=self.positions * units.kv_heads * units.token / steps,
        )
