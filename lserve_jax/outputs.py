"""What generation returns (field names are vLLM's), and how a completion's text comes together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lserve_jax.engine.metrics import RequestMetrics
from lserve_jax.engine.reads import PageReads
from lserve_jax.engine.request import TokenOutput
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int  # which of the request's n completions
    text: str  # empty when there is no tokenizer
    token_ids: list[int]
    cumulative_logprob: float  # sum of the tokens' logprobs under the model's own distribution
    # Per token, {id: logprob} of the most likely tokens and the chosen one; None unless asked for.
    logprobs: list[dict[int, float]] | None
    # The same as arrays, int32 and float32: of each of the n tokens its log probability, and the
    # ``logprobs`` likeliest tokens (none where they were not asked for).
    token_logprobs: np.ndarray = field(compare=False)  # [n]
    top_token_ids: np.ndarray = field(compare=False)  # [n, logprobs]
    top_logprobs: np.ndarray = field(compare=False)  # [n, logprobs]
    finish_reason: str  # "stop", "length", "deadline", "cancelled" or "error"
    stop_reason: int | str | None  # the stop token id or string that ended it; None otherwise
    metrics: RequestMetrics
    # With "error" what went wrong: FloatingPointError for logits that are not finite, ValueError
    # for a grammar that became too complex in the course of the text.
    error: Exception | None = None
    page_reads: PageReads | None = None  # what each token read of the context, where asked for


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One prompt and its completions."""

    request_id: str
    prompt: str | None  # None when the prompt was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    # Of each token of the prompt, {id: logprob} of the most likely tokens and its own; None for
    # the first token. None unless asked for, and where an error or a deadline came before it.
    prompt_logprobs: list[dict[int, float] | None] | None = None

    @property
    def metrics(self) -> RequestMetrics:
        """Of the first completion; the others carry their own."""
        return self.outputs[0].metrics

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed, since they had been before."""
        return self.metrics.prefix_tokens

    @property
    def error(self) -> str | None:
        """What went wrong with the first completion whose ``finish_reason`` is "error", if any."""
        for completion in self.outputs:
            if completion.error is not None:
                return str(completion.error)
        return None


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """What is new of one completion of a request."""

    request_id: str
    index: int  # which of the request's n completions
    text: str  # that can be shown now: never what a stop string could still take back
    token_ids: list[int]
    # Per token, as in ``CompletionOutput``; None unless asked for.
    logprobs: list[dict[int, float]] | None
    # With the completion's last delta "stop", "length", "deadline", "cancelled" or "error".
    finish_reason: str | None
    stop_reason: int | str | None
    output: RequestOutput | None  # with the last delta of the request
    # With the first delta of completion 0, as in ``RequestOutput``.
    prompt_logprobs: list[dict[int, float] | None] | None = None
    num_cached_tokens: int | None = None  # with completion 0's, as in ``RequestOutput``
    error: Exception | None = None  # with "error", as in ``CompletionOutput``


class Completion:
    """A completion in the making: tokens in, readable text out, stop strings found.

    Text that could be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, index: int, sampling: SamplingParams, tokenizer: Tokenizer | None):
        self.index = index
        self.sampling = sampling
        self.finished = False
        self._stream, self._vocab_size = None, 0
        self._stop_of_id: dict[int, str] = {}  # of stop strings that are a token by themselves
        if tokenizer is not None:
            self._vocab_size = tokenizer.vocab_size
            self._stop_of_id = _single_tokens(tokenizer, sampling.stop)
            self._stream = tokenizer.stream(skip_special_tokens=sampling.skip_special_tokens)
        self._text = ""
        self._shown = 0  # characters of text that append() has returned
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[dict[int, float]] = []  # the likeliest and the chosen token
        self._top_ids: list[list[int]] = []  # without the chosen token
        self._top_logprobs: list[list[float]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._metrics = RequestMetrics()
        self.error: Exception | None = None
        self._page_reads: PageReads | None = None

    def append(self, new: TokenOutput) -> tuple[str, list[int]]:
        """Takes new tokens; returns the text that can be shown now, and the tokens taken.

        After a stop string ``finished`` is set although the engine still generates, and the tokens
        behind it are left out.
        """
        self._metrics, self._page_reads = new.metrics, new.page_reads
        before = len(self._token_ids)
        stopped_by_token = new.ends_with_stop_id
        for i, token in enumerate(new.token_ids):
            self._token_ids.append(token)
            self._logprobs.append(new.logprobs[i])
            if self.sampling.logprobs is not None:
                self._top.append({**new.top_logprobs[i], token: new.logprobs[i]})
                self._top_ids.append([*new.top_logprobs[i]])
                self._top_logprobs.append([*new.top_logprobs[i].values()])
            ends_here = stopped_by_token and i == len(new.token_ids) - 1
            if token in self._stop_of_id and len(self._token_ids) > self.sampling.min_tokens:
                self._end_at_token(self._stop_of_id[token])
            elif not ends_here or self.sampling.include_stop_str_in_output:
                self._add_text(self._readable(token))
            if self.finished:  # a stop string
                break
        if not self.finished and new.finish_reason is not None:
            self.finished, self.finish_reason = True, new.finish_reason
            self.error = new.error
            if stopped_by_token and self._token_ids[-1] in self.sampling.stop_token_ids:
                self.stop_reason = self._token_ids[-1]
            if self._stream is not None:
                self._add_text(self._stream.flush())
        # What could be the beginning of a stop string is shown once it is not.
        held_back = 0 if self.finished else max(map(len, self.sampling.stop), default=1) - 1
        end = max(len(self._text) - held_back, self._shown)
        text = self._text[self._shown : end]
        self._shown = end
        return text, self._token_ids[before:]

    def logprobs_of_last(self, count: int) -> list[dict[int, float]] | None:
        """Of the newest ``count`` tokens, as in ``CompletionOutput``."""
        if self.sampling.logprobs is None:
            return None
        return self._top[len(self._top) - count :]

    def _readable(self, token: int) -> str:
        # Embeddings are often padded beyond the tokenizer's vocabulary: such ids have no text.
        if self._stream is None or token >= self._vocab_size:
            return ""
        return self._stream.step(token)

    def _add_text(self, text: str) -> None:
        before = len(self._text)
        self._text += text
        if len(self._token_ids) <= self.sampling.min_tokens:
            return
        # A stop string may begin before the new text, but must end in it: one that was complete
        # before ``min_tokens`` is text like any other.
        found = [
            (self._text.find(stop, max(before - len(stop) + 1, 0)), stop)
            for stop in self.sampling.stop
        ]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, stop = min(found)
            self._end(self._text[:at], stop)

    def _end_at_token(self, stop: str) -> None:
        """The newest token is one of the stop strings; skipped specials have no text."""
        assert self._stream is not None
        self._add_text(self._stream.flush())
        if not self.finished:  # what was flushed may have completed another stop string
            self._end(self._text, stop)

    def _end(self, text: str, stop: str) -> None:
        """A stop string stands behind ``text``."""
        self._text = text + stop if self.sampling.include_stop_str_in_output else text
        self.finished, self.finish_reason, self.stop_reason = True, "stop", stop
        # The engine may have generated on to the end of its burst.
        self._metrics = dataclasses.replace(self._metrics, generated_tokens=len(self._token_ids))

    def output(self) -> CompletionOutput:
        """The finished completion."""
        assert self.finish_reason is not None
        shape = len(self._token_ids), len(self._top_ids[0]) if self._top_ids else 0
        return CompletionOutput(
            index=self.index,
            text=self._text,
            token_ids=self._token_ids,
            cumulative_logprob=sum(self._logprobs),
            logprobs=None if self.sampling.logprobs is None else self._top,
            token_logprobs=np.asarray(self._logprobs, np.float32),
            top_token_ids=np.asarray(self._top_ids, np.int32).reshape(shape),
            top_logprobs=np.asarray(self._top_logprobs, np.float32).reshape(shape),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            metrics=self._metrics,
            error=self.error,
            page_reads=self._page_reads,
        )


def _single_tokens(tokenizer: Tokenizer, stops: Sequence[str]) -> dict[int, str]:
    """The stop strings that are an added token of the tokenizer, special or not, by their id."""
    if not stops:
        return {}
    added = tokenizer.backend.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.content in stops}
