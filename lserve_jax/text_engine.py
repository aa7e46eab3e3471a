"""Text in, text out, while requests come and go: what ``LLM.stream`` and a server stand on.

    text = TextEngine(engine, tokenizer)
    text.submit("The sea is", SamplingParams(max_tokens=16))
    while text.has_unfinished_requests:  # more may be submitted in between
        for delta in text.step():
            print(delta.text, end="")

It joins an ``Engine``, which knows token ids only, with a tokenizer: prompts become ids, a
request's ``n`` completions become requests of the engine, and tokens become text as they come.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lserve_jax.checks import check_integer
from lserve_jax.constraints import Constraints
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.request import PromptIds, TokenOutput, check_deadline
from lserve_jax.outputs import Completion, RequestOutput, TextDelta
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.tokenizer import Tokenizer

# A text of up to so many characters a token is tokenised whole at once: most texts have 3 to 5.
_CHARACTERS_A_TOKEN = 8
# A piece that is cut off a text can have other tokens at its end than the text has there: some
# more where it cuts a special token or a word. That is a few; this is safe.
_CUT_TOKENS = 128

# Text, or {"prompt_token_ids": [...]}, where "prompt" may be the text that they come from, or
# {"prompt": text}. "cache_salt" beside them: only prompts of one salt share what was computed.
Prompt = str | Mapping[str, Any]
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True, kw_only=True)
class CheckedPrompt:
    """A prompt as the model sees it, checked once."""

    text: str | None  # None when it was given as token ids
    ids: PromptIds
    cache_salt: str | None = None


@dataclass(kw_only=True)
class _Running:
    """A request whose completions are in the engine."""

    request_id: str
    prompt: CheckedPrompt
    completions: list[Completion]
    prompt_logprobs: list[dict[int, float] | None] | None = None  # that came with completion 0

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self.completions)

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.ids.ids.tolist(),
            outputs=[completion.output() for completion in self.completions],
            finished=True,
            prompt_logprobs=self.prompt_logprobs,
        )


class TextEngine:
    """Requests of text over ``engine``, which nobody else may step.

    tokenizer: None for a model that takes and returns token ids only.
    seed: from which requests without a seed of their own derive theirs.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, *, seed: int = 0):
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be what build_engine returns, got {engine!r}")
        check_tokenizer(tokenizer)
        self.engine, self.tokenizer = engine, tokenizer
        # What ``bad_words`` and ``structured_outputs`` allow. ``make`` may be called by any thread,
        # for instance to compile a schema before its request is submitted.
        self.constraints = Constraints(tokenizer, engine.config.vocab_size)
        self._seed = check_integer("seed", seed, 0, most=math.inf)
        self._numbers = itertools.count()
        self._resets = engine.resets
        self._running: dict[str, _Running] = {}  # by request id
        # The request and completion of each request of the engine, by its id there.
        self._parts: dict[str, tuple[_Running, Completion]] = {}

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    def check(self, prompt: Prompt | CheckedPrompt, sampling: SamplingParams) -> CheckedPrompt:
        """The prompt as token ids; what is checked already is not converted again.

        Raises ``ValueError`` for a request that could never run, for structured outputs that cannot
        be followed, and for what needs a tokenizer without one; ``TypeError`` for other sampling
        than ``SamplingParams``.
        """
        if not isinstance(sampling, SamplingParams):
            raise TypeError(f"sampling must be SamplingParams, got {sampling!r}")
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"stop={sampling.stop} needs a tokenizer; use stop_token_ids")
        constraint = self.constraints.make(sampling)
        if isinstance(prompt, CheckedPrompt):
            self.engine.check_request(prompt.ids, sampling, constraint, prompt.cache_salt)
            return prompt
        self._check_keys(prompt)
        salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
        text = _text_alone(prompt)
        if text is not None and self.tokenizer is not None:
            self.check_length(text)
        ids = self.engine.check_request(self.token_ids(prompt), sampling, constraint, salt)
        return CheckedPrompt(text=prompt_text(prompt), ids=ids, cache_salt=salt)

    def _check_keys(self, prompt: Prompt) -> None:
        keys = prompt if isinstance(prompt, Mapping) else ()
        if unknown := [key for key in keys if key not in _PROMPT_KEYS]:
            raise ValueError(f"a prompt has {', '.join(_PROMPT_KEYS)}, and no {unknown[0]!r}")

    def check_length(self, text: str) -> None:
        """Raises ``ValueError`` for a text that cannot fit, without tokenising all of it.

        Its beginning is tokenised, a piece four times as long each time, until it has too many
        tokens. A cut changes tokens only near it, fewer than ``_CUT_TOKENS``.
        """
        assert self.tokenizer is not None
        limit = self.engine.max_model_len
        size = _CHARACTERS_A_TOKEN * (limit + _CUT_TOKENS)
        while size < len(text):
            count = len(self.tokenizer.encode(text[:size], add_special_tokens=False))
            if count - _CUT_TOKENS >= limit:
                raise ValueError(
                    f"the prompt has {len(text)} characters: already its first {size} make about "
                    f"{count} tokens, more than max_model_len={limit}"
                )
            size *= 4

    def prefix_ids(self, prompt: Prompt) -> PromptIds:
        """What prompts that go on from this one begin with.

        Of a text the last token is left out: it could be another one where the text goes on.

        Raises ``ValueError`` where ``check`` does, and for a ``cache_salt``: prompts that have one
        share with their own kind only.
        """
        if isinstance(prompt, Mapping) and prompt.get("cache_salt") is not None:
            raise ValueError("a prefix is for prompts without a cache_salt: it has none either")
        self._check_keys(prompt)
        text = _text_alone(prompt)
        if text is not None and self.tokenizer is not None:
            self.check_length(text)
        ids = self.token_ids(prompt)
        return ids if text is None else replace(ids, ids=ids.ids[:-1])

    def token_ids(self, prompt: Prompt) -> PromptIds:
        """The prompt as the model sees it.

        Raises ``ValueError`` for text without a tokenizer, and ids that are not integers of the
        vocabulary.
        """
        text = _text_alone(prompt)
        if text is not None:
            if self.tokenizer is None:
                raise ValueError(
                    "the model has no tokenizer: give prompts as {'prompt_token_ids': [...]}"
                )
            ids = self.tokenizer.encode(text)
        elif isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            ids = prompt["prompt_token_ids"]
        else:
            raise ValueError(f"a prompt must be text or hold 'prompt_token_ids', got {prompt!r}")
        if not isinstance(prompt_text(prompt), str | None):
            raise ValueError(
                f"the 'prompt' beside 'prompt_token_ids' must be their text or None, got "
                f"{prompt_text(prompt)!r:.200}"
            )
        return PromptIds.check(ids, self.engine.config.vocab_size)

    def numbers(self, count: int) -> list[int]:
        """Numbers for ``count`` requests: a request without a seed derives its own from its number.

        So that what it draws does not depend on when it is submitted.
        """
        return list(itertools.islice(self._numbers, count))

    def submit(
        self,
        prompt: Prompt | CheckedPrompt,
        sampling: SamplingParams,
        *,
        number: int | None = None,
        deadline: float | None = None,
        record_reads: bool = False,
    ) -> str:
        """Queues a request and returns its id; others may be running.

        ``number`` is one of ``numbers``; None takes the next. ``deadline`` seconds from now it ends
        with what it has (``finish_reason`` "deadline").
        ``record_reads`` as in ``Engine.add_request``.

        Raises ``ValueError`` for a request that could never run; nothing is queued then.
        """
        checked = self.check(prompt, sampling)
        check_deadline(deadline)  # here, where nothing is queued that would have to be ended
        if number is None:
            number = next(self._numbers)
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        request = _Running(
            request_id=str(number),
            prompt=checked,
            completions=[Completion(i, sampling, self.tokenizer) for i in range(sampling.n)],
        )
        self._running[request.request_id] = request
        try:
            for completion in request.completions:
                part = _part_id(request.request_id, completion.index)
                self.engine.add_request(
                    part,
                    checked.ids,
                    # The prompt is judged once.
                    sampling if completion.index == 0 else replace(sampling, prompt_logprobs=None),
                    seed=seed,
                    completion=completion.index,
                    deadline=deadline,
                    constraint=self.constraints.make(sampling),
                    record_reads=record_reads,
                    cache_salt=checked.cache_salt,
                )
                self._parts[part] = (request, completion)
        except BaseException:  # Ctrl-C, too: no completion runs without the others
            try:
                self.engine.abandon(self._parts_of(request.request_id))
            finally:
                self._forget([request.request_id])
            raise
        return request.request_id

    def step(self) -> list[TextDelta]:
        """Runs one step of the engine; returns what is new, in the order in which it came.

        The last delta of a completion has a ``finish_reason``, the last of a request its
        ``output``.

        Raises ``ValueError`` if the engine was reset while requests ran: they are gone then.
        """
        if self.engine.resets != self._resets:
            self._resets = self.engine.resets
            parts = self._parts.items()
            lost = {r.request_id for part, (r, _) in parts if not self.engine.owes(part)}
            self._forget(lost)
            if lost:
                raise ValueError(f"the engine was reset while requests {sorted(lost)} ran")
        return [delta for new in self.engine.step() for delta in self._take(new)]

    def _take(self, new: TokenOutput) -> list[TextDelta]:
        if new.request_id not in self._parts:
            raise ValueError(
                f"the engine runs a request {new.request_id!r} that was not submitted here"
            )
        request, completion = self._parts[new.request_id]
        text, tokens = completion.append(new)
        if new.prompt_logprobs is not None:
            request.prompt_logprobs = new.prompt_logprobs
        output = None
        if completion.finished:
            del self._parts[new.request_id]
            if new.finish_reason is None:
                self.engine.finish(new.request_id)  # a stop string: only we can see it
            if request.finished:
                del self._running[request.request_id]
                output = request.output()
        if not text and not tokens and not completion.finished:
            return []
        delta = TextDelta(
            request_id=request.request_id,
            index=completion.index,
            text=text,
            token_ids=tokens,
            logprobs=completion.logprobs_of_last(len(tokens)),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            output=output,
            prompt_logprobs=new.prompt_logprobs,
            num_cached_tokens=new.metrics.prefix_tokens if completion.index == 0 else None,
            error=completion.error,
        )
        return [delta]

    def cancel(self, request_id: str) -> None:
        """Ends a request and all its completions now, with what they have.

        Nothing more comes of it but the last delta of each completion, with ``finish_reason``
        "cancelled" and no token, which the next step returns.

        Raises ``ValueError`` if no such request waits or runs, and if the engine was reset: then
        it is gone already, which ``step`` will say too.
        """
        if not isinstance(request_id, str) or request_id not in self._running:
            raise ValueError(f"no request with id {request_id!r} is waiting or running")
        parts = self._parts_of(request_id)
        if self.engine.resets != self._resets and not self.engine.unfinished.keys() >= set(parts):
            raise ValueError(f"the engine was reset while request {request_id!r} ran: it is gone")
        parts = [part for part in parts if part in self.engine.unfinished]
        if not parts:  # it is cancelled already
            raise ValueError(f"no request with id {request_id!r} is waiting or running")
        for part in parts:
            self.engine.cancel(part)

    def abandon(self, request_ids: Sequence[str] | None = None) -> None:
        """After an error in the middle of a call: ends its requests, None: all.

        Nothing more comes of them. Resets the engine if the error came from the device, whose state
        is lost then.
        """
        if request_ids is None:
            request_ids = list(self._running)
        try:
            self.engine.abandon([p for name in request_ids for p in self._parts_of(name)])
        finally:  # also after Ctrl-C in between
            self._forget(request_ids)

    def _parts_of(self, request_id: str) -> list[str]:
        completions = self._running[request_id].completions
        return [_part_id(request_id, c.index) for c in completions if not c.finished]

    def _forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            for part in self._parts_of(request_id):
                self._parts.pop(part, None)  # in the middle of ``submit`` some are not there yet
            del self._running[request_id]


def check_tokenizer(tokenizer: object) -> None:
    """Raises ``TypeError`` for what is neither a tokenizer nor None."""
    if not isinstance(tokenizer, Tokenizer | None):
        raise TypeError(f"tokenizer must be what convert.load_tokenizer returns, got {tokenizer!r}")


def _part_id(request_id: str, index: int) -> str:
    return f"{request_id}-{index}"


def _text_alone(prompt: Prompt) -> str | None:
    """The text of a prompt that is to be tokenised; None for one of token ids."""
    if isinstance(prompt, Mapping) and "prompt_token_ids" not in prompt:
        prompt = prompt.get("prompt", "") or prompt
    return prompt if isinstance(prompt, str) else None


def prompt_text(prompt: Prompt) -> str | None:
    """The text of a prompt; None if it is token ids alone."""
    return prompt if isinstance(prompt, str) else prompt.get("prompt")
