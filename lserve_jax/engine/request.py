"""A request on its way through the engine, and what comes out of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lserve_jax.checks import is_integer, is_real
from lserve_jax.engine.costs import BurstRow, CacheUnits, RequestCosts
from lserve_jax.engine.draft_times import TimedBurst
from lserve_jax.engine.inputs import BurstInputs
from lserve_jax.engine.metrics import RelayDecision, RequestMetrics
from lserve_jax.engine.prefix_cache import PromptPages
from lserve_jax.engine.prefix_tree import Node
from lserve_jax.engine.reads import PageReads
from lserve_jax.engine.state import Burst, Sample
from lserve_jax.engine.token_rules import RequestRules
from lserve_jax.sampling_params import SamplingParams


@dataclass(frozen=True, eq=False)
class PromptIds:
    """Token ids of a prompt that were checked: it is made once, where a prompt comes in."""

    ids: np.ndarray  # [n] int32, each in the vocabulary; read-only
    vocab_size: int

    @classmethod
    def check(
        cls,
        token_ids: "PromptIds | Sequence[int] | np.ndarray",
        vocab_size: int,
        *,
        what: str = "prompt",
    ) -> "PromptIds":
        """A copy of ``token_ids``, or what was checked already. ``what`` names them in errors.

        Raises ``ValueError`` for what is no list, an id that is no integer (a bool is none), and
        one outside the vocabulary.
        """
        if isinstance(token_ids, PromptIds):
            if token_ids.vocab_size == vocab_size:
                return token_ids
            token_ids = token_ids.ids
        try:
            ids = np.array(token_ids)
        except ValueError:  # lists of several lengths
            raise ValueError(f"{what} token ids must be a list of integers, got lists") from None
        if ids.ndim == 0:
            raise ValueError(f"{what} token ids must be a list of integers, got {token_ids!r:.200}")
        if ids.ndim != 1:
            raise ValueError(f"{what} token ids must be a list of integers, got shape {ids.shape}")
        # Floats, text, integers that no array type holds; or a bool that became an integer.
        types = set(map(type, token_ids)) if isinstance(token_ids, Sequence) else set()
        if ids.dtype.kind not in "iu" or types & {bool, np.bool_}:
            for token in token_ids:
                if not is_integer(token):
                    raise ValueError(f"{what} token id {token!r} must be an integer")
        outside = (ids < 0) | (ids >= vocab_size)
        if outside.any():
            raise ValueError(
                f"{what} token id {ids[outside.argmax()]} is outside the vocabulary "
                f"[0, {vocab_size})"
            )
        ids = ids.astype(np.int32)
        ids.flags.writeable = False
        return cls(ids, vocab_size)

    def __len__(self) -> int:
        return len(self.ids)


def check_deadline(deadline: float | None) -> None:
    """Raises ``ValueError`` for what is no positive number of seconds; None is no deadline."""
    if deadline is not None and not (is_real(deadline) and deadline > 0):
        raise ValueError(f"{deadline=} must be positive: it is in seconds from now")


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """New tokens of one request. ``finish_reason`` is set with the last of them."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]  # of each token, under the model's own distribution
    top_logprobs: list[dict[int, float]]  # per token, empty unless asked for
    # With the request's first output, if asked for: of each token of the prompt {id: logprob} of
    # the most likely tokens and its own; None for the first token, which has none before it.
    prompt_logprobs: list[dict[int, float] | None] | None = None
    # "stop", "length", "deadline", "cancelled", "error", or None while running
    finish_reason: str | None
    metrics: RequestMetrics
    ends_with_stop_id: bool = False  # the last token is a stop id; else "stop" was a grammar's end
    error: Exception | None = None  # given with "error"
    page_reads: PageReads | None = None  # up to now; None unless asked for


@dataclass(kw_only=True)
class InFlight:
    """A burst on the device whose results are not yet fetched."""

    burst: Burst
    inputs: BurstInputs
    requests: list[tuple[int, "Request"]]  # (slot, request)
    decisions: dict[int, RelayDecision]  # by slot, of those whose request has a prefix
    # By slot, of those whose request records selections: ``runner.selected_pages``.
    chosen: dict[int, list[jax.Array]]
    timed: TimedBurst | None  # in exact mode

    def drafts(self, slot: int) -> int:
        """How many tokens a slot's request was to draft a round."""
        return 0 if self.inputs.drafts is None else int(self.inputs.drafts[slot])

    @property
    def metrics(self) -> dict[str, Any]:
        """The fields of ``StepMetrics`` that tell of it."""
        # Requests of one prefix have one decision in common.
        relay = {id(decision): decision for decision in self.decisions.values()}
        return {
            "decode_requests": len(self.requests),
            "decode_steps": self.inputs.steps,
            "relay": tuple(relay.values()),
        }


@dataclass(kw_only=True, eq=False)
class Request(PromptPages):
    """The engine's own record of a request."""

    request_id: str
    number: int  # in order of arrival
    sampling: SamplingParams
    sampling_row: dict[str, np.ndarray]  # its row of SamplingArrays
    rules: RequestRules | None  # which tokens it may sample next; None: any
    arrival: float
    deadline: float | None  # on the engine's clock
    reads: PageReads | None  # what it has read so far; None: it did not ask

    # Where it is.
    slot: int = -1  # -1: it waits
    found_tokens: int = 0  # of its prompt, those that were there when it was first admitted
    path: list[Node] = field(default_factory=list)  # of its prompt in the tree, while it decodes
    finished: bool = False
    error: Exception | None = None  # why it ends with "error"

    # Of its prompt's chunks, if they are block-sparse:
    attended_blocks: list[jax.Array] = field(default_factory=list)  # not yet fetched
    causal_blocks: int = 0  # over layers and retrieval heads, of all chunks so far

    # What the model thinks of its prompt's tokens, where asked for.
    judged: list[Sample] = field(default_factory=list)  # of each chunk so far, not yet fetched
    keeps_hidden: bool = False  # their hidden states beside it
    prompt_logprobs: list[dict[int, float] | None] | None = None  # not yet returned

    # Its tokens. After a preemption those in ``tokens`` are fed to the model again (replayed).
    tokens: list[int] = field(default_factory=list)  # returned to the caller
    scheduled: int = 0  # tokens that the steps so far can have made, since its last admission
    received: int = 0  # of these, those that the host has seen

    # What it cost.
    prefill_start: float = 0.0
    first_token: float | None = None  # when the first token came
    costs: RequestCosts = field(default_factory=RequestCosts)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def length(self) -> int:
        """Most tokens that its sequence has in the cache once all scheduled steps are done."""
        return len(self.prompt) + max(self.scheduled - 1, 0)

    @property
    def remaining(self) -> int:
        """Tokens that are still to be scheduled."""
        return self.sampling.max_tokens - self.scheduled

    @property
    def is_stepwise(self) -> bool:
        """Whether it takes one step a burst."""
        return self.rules is not None and self.rules.stepwise

    @property
    def records_selections(self) -> bool:
        return self.reads is not None and self.reads.has_ranked

    def steps_of(self, burst: int) -> int:
        """Of the next ``burst`` steps, those in which it still feeds a token."""
        return max(min(1 if self.is_stepwise else burst, self.remaining), 0)

    # What comes back from the device.

    def begin(self, now: float, judged: Sequence[Sample], attended_blocks: int) -> None:
        """The first token is there; what is known of the time before it goes to the metrics.

        ``judged`` was fetched; what the model thinks of the prompt goes out with the next output.
        """
        self.judged, self.attended_blocks = [], []
        if self.first_token is not None:  # it began before it was preempted
            return
        self.first_token = now
        if judged:
            self._take_prompt(judged)
        self.metrics = dataclasses.replace(
            self.metrics,
            prompt_tokens=len(self.prompt),
            prefix_tokens=self.found_tokens,
            queue_seconds=self.prefill_start - self.arrival,
            prefill_seconds=now - self.prefill_start,
            first_token_seconds=now - self.arrival,
            prefill_density=attended_blocks / self.causal_blocks if self.causal_blocks else 1.0,
        )

    def _take_prompt(self, judged: Sequence[Sample]) -> None:
        whole: Sample = jax.tree.map(lambda *parts: np.concatenate(parts), *judged)
        # Only the last chunk is padded, and nothing follows the prompt's last token.
        own: Sample = jax.tree.map(lambda x: x[: len(self.prompt) - 1], whole)
        if not np.isfinite(own.logprob).all():
            self.error = _not_finite(f"in the {len(self.prompt)} tokens of prompt")
            return
        tops = _top(own, self.sampling.prompt_logprobs)
        tokens = zip(tops, own.token.tolist(), own.logprob.tolist(), strict=True)
        self.prompt_logprobs = [None, *({**top, token: value} for top, token, value in tokens)]

    def add_costs(
        self,
        row: BurstRow,
        units: CacheUnits,
        decision: RelayDecision | None,
        now: float,
        *,
        drafts: int,
    ) -> None:
        """Adds what its row of a burst cost, fetched ``now``, before its tokens are taken.

        ``drafts``: what it was to draft a round.
        """
        assert self.first_token is not None  # it came before any burst was fetched
        self.costs.add(row, units, len(self.prompt) + self.received - 1, decision)
        replayed = self.received < len(self.tokens)  # these rounds do not judge their drafts
        self.costs.rounds += row.verified if drafts and not replayed else 0
        self.costs.seconds = now - self.first_token

    def take(self, samples: Sample) -> Sample:
        """Adds sampled tokens (leaves ``[n, ...]``); returns those not known before.

        After a preemption the first ones are tokens that the request has already.
        """
        count = len(samples.token)
        replayed = min(max(len(self.tokens) - self.received, 0), count)
        self.received += count
        new: Sample = samples
        if replayed > 0:
            new = jax.tree.map(lambda x: x[replayed:], samples)
        finite = np.isfinite(new.logprob)
        if not finite.all():
            # Tokens from here on mean nothing.
            new = jax.tree.map(lambda x: x[: int(finite.argmin())], new)
        tokens = new.token.tolist()
        self.tokens += tokens
        if self.rules is not None:
            for token in tokens:
                self.rules.accept(token)
        if not finite.all():
            self.error = _not_finite(
                f"after {len(self.prompt)} tokens of prompt and {len(self.tokens)} of output"
            )
        elif self.rules is not None:
            self.error = self.error or self.rules.error
        return new

    def record(self, burst: InFlight, slot: int) -> None:
        """Notes what was chosen for its tokens of a burst, before it takes them."""
        if self.reads is not None and slot in burst.chosen:
            self.reads = self.reads.add(
                self.received,
                jax.device_get(burst.chosen[slot]),
                burst.inputs.page_table[slot],
                burst.decisions.get(slot),
            )

    @property
    def _ends_with_stop_id(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.sampling_row["stop_token_ids"]

    def finish_reason(self) -> str | None:
        """Why nothing comes after its newest token: "stop", "length" or "error"; or None."""
        if self.error is not None:
            return "error"
        if self._ends_with_stop_id or (self.rules is not None and self.rules.ended):
            return "stop"
        return "length" if len(self.tokens) >= self.sampling.max_tokens else None

    def output(
        self, new: Sample | None, finish_reason: str | None, units: CacheUnits
    ) -> TokenOutput:
        """New tokens as they are returned, with the metrics up to now; None: no new ones."""
        self.metrics = self.costs.metrics(
            self.metrics,
            units,
            generated_tokens=len(self.tokens),
            # The last token is never fed back; a request that never ran holds nothing.
            cached_tokens=0
            if self.first_token is None
            else len(self.prompt) + max(len(self.tokens) - 1, 0),
        )
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        token_ids, logprobs, top_logprobs = [], [], []
        if new is not None:
            token_ids, logprobs = new.token.tolist(), new.logprob.tolist()
            top_logprobs = _top(new, self.sampling.logprobs)
        return TokenOutput(
            request_id=self.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            metrics=self.metrics,
            ends_with_stop_id=finish_reason == "stop" and self._ends_with_stop_id,
            error=self.error,
            page_reads=self.reads,
        )


def _not_finite(where: str) -> FloatingPointError:
    return FloatingPointError(
        f"the model's logits {where} are not finite: its weights or constants hold NaN or "
        "infinity, or its numbers overflow the dtype"
    )


def _top(samples: Sample, wanted: int | None) -> list[dict[int, float]]:
    """Per token, {id: logprob} of the ``wanted`` most likely ones; fewer than were computed."""
    if not wanted:
        return [{} for _ in samples.token]
    ids = samples.top_ids[:, :wanted].tolist()
    values = samples.top_logprobs[:, :wanted].tolist()
    return [dict(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
