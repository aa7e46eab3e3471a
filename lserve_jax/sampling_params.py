"""What one request asks of sampling and of its end. Names and meaning are vLLM's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lserve_jax.checks import INT32_MAX, check_bool, check_integer, is_listing, is_real

# Below this temperature a row is greedy, as in vLLM: dividing by it would overflow.
_GREEDY_TEMPERATURE = 1e-5
_MOST_COMPLETIONS = 16_384  # each is a request; vLLM's limit
_MOST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks of sampling and of its end. Raises ``ValueError`` where it is wrong."""

    n: int = 1  # completions of the prompt
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 or -1 keep all
    top_p: float = 1.0  # keep the fewest likeliest tokens with this much probability
    min_p: float = 0.0  # keep tokens at least this likely relative to the likeliest
    seed: int | None = None  # same seed, same tokens, whatever else is in the batch
    max_tokens: int = 16
    min_tokens: int = 0  # no stop id before this many tokens
    # A completion ends where one of these appears: in the text, or, if it is a special or added
    # token of the tokenizer by itself, as that token. Kept as tuple.
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()  # ids that end a completion; kept as tuple
    ignore_eos: bool = False
    repetition_penalty: float = 1.0  # over 1: tokens of prompt and output become less likely
    presence_penalty: float = 0.0  # subtracted once from every token in the output
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output
    logprobs: int | None = None  # log probabilities of this many top tokens and the chosen one
    # The same for every token of the prompt but the first. Only with it may ``max_tokens`` be 0:
    # the request ends with its prompt.
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True  # leave special tokens out of the text
    include_stop_str_in_output: bool = False

    def __post_init__(self):
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))

        for name, least, most in (
            ("n", 1, _MOST_COMPLETIONS),
            ("top_k", -1, INT32_MAX),
            ("max_tokens", 1 if self.prompt_logprobs is None else 0, INT32_MAX),
            ("min_tokens", 0, INT32_MAX),
            ("seed", 0, math.inf),
            ("logprobs", 0, INT32_MAX),
            ("prompt_logprobs", 0, INT32_MAX),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs", "prompt_logprobs"):
                object.__setattr__(self, name, check_integer(name, value, least, most))
        stops = (check_integer("every entry of stop_token_ids", i, 0) for i in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", tuple(stops))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            check_bool(name, getattr(self, name))
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            # Written so that NaN fails too.
            if not is_real(value) or not low <= value <= high or value > _MOST_FLOAT32:
                bounds = f"at least {low}" if math.isinf(high) else f"in [{low}, {high}]"
                raise ValueError(f"{name}={value!r} must be a finite number {bounds}")
        if self.top_p == 0:
            raise ValueError("top_p=0 must be greater than 0")
        if np.float32(self.repetition_penalty) == 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty!r} is too close to 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}"
            )
        if self.n > 1 and self.max_tokens == 0:
            raise ValueError(f"n={self.n} needs max_tokens > 0: there is one prompt to judge")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={self.stop!r} must hold non-empty strings only")
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n={self.n} needs temperature > 0: greedy completions would all be the same"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _GREEDY_TEMPERATURE

    @property
    def uses_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def uses_filters(self) -> bool:
        """Whether the vocabulary must be ranked; ``min_p`` needs only the likeliest token."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1)


def _as_tuple(name: str, value: Any) -> tuple:
    if name == "stop" and isinstance(value, str):
        return (value,)
    if not is_listing(value):
        kind = "a string or a sequence of strings" if name == "stop" else "a sequence of integers"
        raise ValueError(f"{name}={value!r} must be {kind}; () is none")
    return tuple(value)
