"""A request on its way through the engine, and what it cost."""

from dataclasses import dataclass, field

import numpy as np

from lserve_jax.prefix import Prefix
from lserve_jax.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """What one request cost. Times in seconds, sizes in bytes; means are over its decode steps.

    A preempted request runs its steps again: they count again.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_tokens: int = 0  # of the prompt, those whose keys and values were there already
    queue_seconds: float = 0.0  # from arrival to the start of its prefill
    prefill_seconds: float = 0.0  # from then to its first token, other requests' steps included
    first_token_seconds: float = 0.0  # from arrival to the first token (TTFT)
    decode_seconds: float = 0.0  # from the first token to the newest
    preemptions: int = 0
    decode_steps: int = 0
    relay_steps: int = 0  # steps that read the prefix together with other requests
    relay_reason: str = ""  # why its last burst did or did not
    selector_runs: int = 0  # steps in which its pages were chosen anew
    bypassed_steps: int = 0  # steps whose history fitted the budget, so that nothing was pruned
    pages_attended_per_step: float = 0.0  # mean over layers and KV heads
    kv_bytes_held: int = 0  # pages with tokens, and ring, at its end; a prefix's pages too
    # K and V attended, and statistics read by the selector; of a prefix read together its share.
    kv_bytes_read_per_step: float = 0.0
    dense_kv_bytes_read_per_step: float = 0.0  # what attending everything would have read

    @property
    def seconds_per_output_token(self) -> float:
        """TPOT: mean time between two tokens, the first one left out; 0 for a single token."""
        return self.decode_seconds / max(self.generated_tokens - 1, 1)


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """New tokens of one request. ``finish_reason`` is set with the last of them."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]  # of each token, under the model's own distribution
    top_logprobs: list[dict[int, float]]  # per token, empty unless asked for
    finish_reason: str | None  # "stop", "length", "deadline" or None while running
    metrics: RequestMetrics


@dataclass(kw_only=True, eq=False)
class Request:
    """The engine's own record of a request."""

    request_id: str
    number: int  # in order of arrival
    prompt: np.ndarray  # [prompt length] int32
    sampling: SamplingParams
    sampling_row: dict[str, np.ndarray]  # its row of SamplingArrays
    arrival: float
    deadline: float | None  # on the engine's clock

    # Where it is.
    slot: int = -1  # -1: it waits
    pages: list[int] = field(default_factory=list)  # its prefix's first
    prefix: Prefix | None = None
    shared_tokens: int = 0  # of the prompt, on pages of the prefix
    prefilled: int = 0  # prompt tokens that are in the cache
    finished: bool = False

    # Its tokens. After a preemption those in ``tokens`` are fed to the model again (replayed).
    tokens: list[int] = field(default_factory=list)  # handed out
    scheduled: int = 0  # tokens that the steps so far can have made, since its last admission
    received: int = 0  # of these, those that the host has seen

    # Sums behind its metrics.
    prefill_start: float = 0.0
    first_token: float | None = None  # when the first token came
    position_sum: int = 0  # sum over decode steps of tokens in the sequence: the dense cost
    attended: float = 0.0  # token slots, summed over steps, layers and KV heads
    read: float = 0.0  # of these, its share of those that were read
    statistics_pages: int = 0  # pages scored, summed over selections
    metrics: RequestMetrics = RequestMetrics()

    @property
    def length(self) -> int:
        """Most tokens that its sequence has in the cache once all scheduled steps are done."""
        return len(self.prompt) + max(self.scheduled - 1, 0)

    @property
    def remaining(self) -> int:
        """Tokens that are still to be scheduled."""
        return self.sampling.max_tokens - self.scheduled
