"""What is counted: for a request, for a step of the engine, for the engine as a whole."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class RelayDecision:
    """Whether the requests of one beginning read it together in a burst, and why."""

    used: bool
    reason: str
    prefix_tokens: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class DraftDecision:
    """How many tokens a request drafts in a burst, and why."""

    drafts: int
    reason: str
    # What was taken for that; 0 where nothing was weighed.
    tokens: float = 0.0  # that a round is expected to make
    dense_bytes: float = 0.0  # that a pass of dense attention reads
    sparse_bytes: float = 0.0  # that a draft reads

    @property
    def round_bytes(self) -> float:
        """Bytes that a round reads."""
        return self.dense_bytes + self.drafts * self.sparse_bytes

    def because(self, reason: str, **changes: Any) -> Self:
        """The same for another reason."""
        return dataclasses.replace(self, reason=reason, **changes)


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """What one request cost. Times in seconds, sizes in bytes; means are over its decode steps.

    A preempted request runs its steps again: they count again.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_tokens: int = 0  # of the prompt, those whose keys and values were there already
    # Of the blocks of keys that retrieval heads would attend causally while the prompt is read,
    # those that they did; a prefix's left out.
    prefill_density: float = 1.0
    queue_seconds: float = 0.0  # from arrival to the start of its prefill
    prefill_seconds: float = 0.0  # from then to its first token, other requests' steps included
    first_token_seconds: float = 0.0  # from arrival to the first token (TTFT)
    decode_seconds: float = 0.0  # from the first token to the newest
    preemptions: int = 0
    decode_steps: int = 0
    relay_steps: int = 0  # steps that read the prefix together with other requests
    relay_reason: str = ""  # why its last burst did or did not
    # In exact mode:
    verifications: int = 0  # passes of dense attention over drafts and the token before them
    drafted_tokens: int = 0  # those of a replay, which are known, left out
    confirmed_tokens: int = 0  # of these, those that became tokens of the answer
    draft_reason: str = ""  # how many tokens its last burst drafted a round, and why
    selector_runs: int = 0  # steps in which its pages were chosen anew
    # Steps whose history fitted the budget, so that nothing was pruned; in exact mode tokens of
    # rounds that drafted nothing, or nothing from pruned pages.
    bypassed_steps: int = 0
    pages_attended_per_step: float = 0.0  # of page_size tokens; mean over layers and KV heads
    kv_bytes_held: int = 0  # pages with tokens, and decode window, at its end; a prefix's pages too
    # K and V attended, and statistics read by the selector; of a prefix read together its share.
    kv_bytes_read_per_step: float = 0.0
    dense_kv_bytes_read_per_step: float = 0.0  # what attending everything would have read

    @property
    def acceptance(self) -> float:
        """Share of drafts that were confirmed; 0 if nothing was drafted."""
        return self.confirmed_tokens / max(self.drafted_tokens, 1)

    @property
    def tokens_per_verification(self) -> float:
        """Tokens that a dense pass made; 0 outside of exact mode."""
        return self.decode_steps / max(self.verifications, 1) if self.verifications else 0.0

    @property
    def seconds_per_output_token(self) -> float:
        """TPOT: mean time between two tokens, the first one left out; 0 for a single token."""
        return self.decode_seconds / max(self.generated_tokens - 1, 1)


@dataclass(kw_only=True)
class EngineCounts:
    """Counts since the engine was made."""

    finished: int = 0
    cancelled: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # tokens of prompts that were looked for in the prefix tree
    prefix_tokens: int = 0  # of these, those that it had and that were not prefilled
    generated_tokens: int = 0
    selector_runs: int = 0  # selections, summed over requests
    relay_bursts: int = 0  # bursts in which some prefix was read together
    steps: int = 0  # of the engine
    tokens_attended: int = 0  # summed over decode steps, requests, layers and KV heads
    # Of prompts that are read block-sparsely, summed over tiles of queries, layers and KV heads:
    prefill_blocks: int = 0  # that retrieval heads attended
    causal_prefill_blocks: int = 0  # that they would have attended causally


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step of the engine handed to the device."""

    number: int
    prefill_tokens: int  # prompt tokens run
    prefix_tokens: int  # of the prompts that it admitted, tokens that a prefix had
    decode_requests: int = 0  # requests in the burst
    decode_steps: int = 0  # its length; 0: there was no burst
    relay: tuple[RelayDecision, ...] = ()  # for each beginning that requests of the burst share
    # Of the burst before, whose results it fetched:
    selector_runs: int  # selections, summed over requests
    tokens_attended: int  # summed over its steps, requests, layers and KV heads

    @classmethod
    def between(cls, before: EngineCounts, after: EngineCounts, **of_the_burst: Any) -> Self:
        """Of the step that changed ``before`` to ``after``; the fields that no count tells."""
        return cls(
            number=after.steps,
            prefix_tokens=after.prefix_tokens - before.prefix_tokens,
            selector_runs=after.selector_runs - before.selector_runs,
            tokens_attended=after.tokens_attended - before.tokens_attended,
            **of_the_burst,
        )


@dataclass(kw_only=True)
class EngineMetrics(EngineCounts):
    """The engine at one moment: where requests and pages are, and its counts."""

    waiting: int
    running: int  # the one whose prompt is prefilled included
    free_pages: int  # that nobody uses, those of remembered prompts included
    cached_pages: int  # of these, pages that hold remembered prompts
    cached_bytes: int  # of these; their prefill windows are a part of ``memory_plan``
    pinned_pages: int  # held by prefixes until they are released
    host_pages: int  # of remembered prompts, in host memory
    host_bytes: int  # that these take with their windows, as ``host_cache_bytes`` counts
    evicted_pages: int  # of remembered prompts, since the engine began or was reset
    evicted_windows: int  # pages of their windows, given up by themselves
    num_pages: int
    prompt_tokens: int  # prefilled, preempted requests' again
    compilations: int  # different shapes that jitted functions were called with
    last_step: StepMetrics | None
