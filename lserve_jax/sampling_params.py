"""What one request asks of sampling and of its end. Names and meaning are vLLM's."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lserve_jax.checks import INT32_MAX, check_bool, check_integer, is_listing, is_real

# Below this temperature a row is greedy, as in vLLM: dividing by it would overflow.
_GREEDY_TEMPERATURE = 1e-5
_MOST_COMPLETIONS = 16_384  # each is a request; vLLM's limit
_MOST_FLOAT32 = float(np.finfo(np.float32).max)
MAX_BIASED_TOKENS = 1024  # entries of logit_bias
_MOST_BAD_WORDS = 1024
_MOST_BIAS = 100.0  # OpenAI's bound
_MOST_CHARACTERS = 65_536  # of a schema, expression or grammar: some 0.5 s to compile at worst


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What the text of a completion must be. Exactly one field is given.

    Raises ``ValueError`` for none or several, and for what is no JSON, empty or longer than 65,536
    characters. Whether a schema, an expression or a grammar can be followed shows when a request is
    checked.
    """

    # JSON schema, as mapping or text; True or {}: any JSON object. Kept as text.
    json: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None  # the whole text matches it; Rust's syntax
    choice: Sequence[str] | None = None  # the text is one of these; kept as tuple
    grammar: str | None = None  # in Lark's syntax, as llguidance extends it

    def __post_init__(self):
        names = ("json", "regex", "choice", "grammar")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured outputs need exactly one of json, regex, choice and grammar, got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            choice = _as_tuple("choice", self.choice, "strings")
            if not choice or not all(isinstance(text, str) and text for text in choice):
                raise ValueError(f"choice={self.choice!r:.200} must hold non-empty strings")
            object.__setattr__(self, "choice", choice)
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise ValueError(f"{name}={text!r:.200} must be a non-empty string")
        [name] = given
        value = getattr(self, name)
        size = sum(map(len, value)) if isinstance(value, tuple) else len(value)
        if size > _MOST_CHARACTERS:
            raise ValueError(f"{name} has {size} characters, more than {_MOST_CHARACTERS}")


def _schema_text(schema: Any) -> str:
    """A JSON schema as the text of a JSON object."""
    value = schema
    try:
        if isinstance(schema, str):
            value = json.loads(schema)
        elif isinstance(schema, Mapping):
            value = json.loads(json.dumps(dict(schema), allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json={schema!r:.200} is no JSON schema: {error}") from None
    if value is True or value == {}:
        value = {"type": "object"}
    if not isinstance(value, dict):
        raise ValueError(f"json={schema!r:.200} must be a JSON schema (an object) or True")
    return json.dumps(value, ensure_ascii=False)


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
    # Added to the logits of these token ids; -100 to 100. Left out of the hash: a mapping has none.
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None  # no other tokens; kept as tuple
    # Never generated, with or without a space in front, in the tokens that the tokenizer makes of
    # them; kept as tuple.
    bad_words: Sequence[str] = ()
    structured_outputs: StructuredOutputs | None = None  # what the text must be

    def __post_init__(self):
        for name, kind in (
            ("stop", "strings"),
            ("stop_token_ids", "integers"),
            ("bad_words", "strings"),
        ):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name), kind))

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
        self._check_restrictions()
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n={self.n} needs temperature > 0: greedy completions would all be the same"
            )

    def _check_restrictions(self) -> None:
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            name = "allowed_token_ids"
            ids = _as_tuple(name, self.allowed_token_ids, "integers")
            ids = tuple(check_integer(f"every entry of {name}", i, 0) for i in ids)
            if not ids:
                raise ValueError(f"{name}=() must hold at least one token id; None allows all")
            object.__setattr__(self, name, ids)
        if len(self.bad_words) > _MOST_BAD_WORDS:
            raise ValueError(f"{len(self.bad_words)} bad_words are more than {_MOST_BAD_WORDS}")
        for word in self.bad_words:
            if not isinstance(word, str) or not word:
                raise ValueError(f"bad_words={self.bad_words!r:.200} must hold non-empty strings")
        if (size := sum(map(len, self.bad_words))) > _MOST_CHARACTERS:
            raise ValueError(f"bad_words have {size} characters, more than {_MOST_CHARACTERS}")
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise ValueError(
                f"structured_outputs={self.structured_outputs!r:.200} must be StructuredOutputs"
            )
        if self.structured_outputs is not None and self.ignore_eos:
            raise ValueError(
                "ignore_eos=True contradicts structured_outputs: where the text is complete, only "
                "its end can follow"
            )

    @property
    def needs_constraint(self) -> bool:
        """Whether what may be generated depends on text, so that it takes a tokenizer to tell."""
        return bool(self.bad_words) or self.structured_outputs is not None

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


def _as_tuple(name: str, value: Any, kind: str) -> tuple:
    if name == "stop" and isinstance(value, str):
        return (value,)
    if not is_listing(value):
        kind = f"a string or a sequence of {kind}" if name == "stop" else f"a sequence of {kind}"
        raise ValueError(f"{name}={value!r} must be {kind}")
    return tuple(value)


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias={bias!r:.200} must map token ids to numbers")
    if len(bias) > MAX_BIASED_TOKENS:
        raise ValueError(f"logit_bias has {len(bias)} entries, more than {MAX_BIASED_TOKENS}")
    checked = {}
    for token, value in bias.items():
        token = check_integer("every token id of logit_bias", token, 0)
        # Written so that NaN fails too.
        if not is_real(value) or not -_MOST_BIAS <= value <= _MOST_BIAS:
            raise ValueError(
                f"logit_bias of token {token} must be a number in [{-_MOST_BIAS}, {_MOST_BIAS}], "
                f"got {value!r}"
            )
        checked[token] = float(value)
    return checked
