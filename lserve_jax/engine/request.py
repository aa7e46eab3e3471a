"""A request on its way through the engine, and what comes out of it."""

from dataclasses import dataclass, field

import numpy as np

from lserve_jax.engine.metrics import RequestMetrics
from lserve_jax.engine.prefix import Prefix
from lserve_jax.sampling_params import SamplingParams


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
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def length(self) -> int:
        """Most tokens that its sequence has in the cache once all scheduled steps are done."""
        return len(self.prompt) + max(self.scheduled - 1, 0)

    @property
    def remaining(self) -> int:
        """Tokens that are still to be scheduled."""
        return self.sampling.max_tokens - self.scheduled
