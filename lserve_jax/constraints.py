"""What ``bad_words`` and ``structured_outputs`` allow as the next token, for the engine.

llguidance (optional: ``pip install lserve-jax[serve]``) turns a JSON schema, a regular expression
or a grammar into masks over a tokenizer's vocabulary. All of its work has bounds, so a schema from
anywhere can be given: one that exceeds them is refused, or ends its request.
"""

import functools
import json
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from lserve_jax.engine.token_rules import Constraint, all_tokens
from lserve_jax.sampling_params import SamplingParams, StructuredOutputs
from lserve_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# States of the lexer that a grammar may make: 1 to 2 kB each. The other bounds are llguidance's
# defaults, some 20 ms of work a token.
_MOST_LEXER_STATES = 20_000
_MOST_GRAMMARS = 16  # compiled ones that are kept for the next request
# Between the parts of JSON. Without a bound a model can go on with spaces until max_tokens.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_NO_END = "<|there is no end of text|>"


class Constraints:
    """Makes constraints for the requests of one model.

    tokenizer: None for a model without text, which has none.
    vocab_size: V of the model, which may be padded beyond the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled = functools.lru_cache(_MOST_GRAMMARS)(self._compile)
        self._words = functools.lru_cache(_MOST_GRAMMARS)(self._word_tokens)

    def make(self, sampling: SamplingParams) -> Constraint | None:
        """A new constraint for one completion; None where its text may be anything.

        The first of a schema, expression, grammar or list of words compiles it. Any thread may
        call it.

        Raises ``ValueError`` without a tokenizer or llguidance, and for structured outputs that
        cannot be followed.
        """
        if not sampling.needs_constraint:
            return None
        if self._tokenizer is None:
            name = "bad_words" if sampling.bad_words else "structured_outputs"
            raise ValueError(f"{name}={getattr(sampling, name)!r:.200} needs a tokenizer")
        parts: list[Constraint] = []
        if sampling.bad_words:
            parts.append(BadWords(self._words(sampling.bad_words), self._vocab_size))
        if sampling.structured_outputs is not None:
            matcher = self._compiled(sampling.structured_outputs).deep_copy()
            parts.append(Grammar(matcher, self._vocab_size))
        return parts[0] if len(parts) == 1 else AllOf(parts)

    def _compile(self, wanted: StructuredOutputs) -> "llguidance.LLMatcher":
        """A matcher at its beginning, of which each completion gets a copy."""
        guidance = _llguidance()
        assert self._tokenizer is not None
        name, grammar = _grammar_text(guidance, wanted)
        matcher = guidance.LLMatcher(
            _vocabulary(self._tokenizer, self._vocab_size),
            grammar,
            log_level=0,
            limits=guidance.LLParserLimits(
                max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False
            ),
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # much of a grammar is worked out only here
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise ValueError(f"{name}={getattr(wanted, name)!r:.200} cannot be used: {reason:.300}")
        return matcher

    def _word_tokens(self, words: tuple[str, ...]) -> list[tuple[int, ...]]:
        """The tokens of each word, with and without a space in front: it is written either way."""
        assert self._tokenizer is not None
        found = {}
        for word in words:
            bare = word.lstrip(" ")
            for text in {word, bare, f" {bare}"} - {""}:
                tokens = tuple(self._tokenizer.encode(text, add_special_tokens=False))
                if not tokens:
                    raise ValueError(f"bad_words entry {word!r} has no tokens")
                found[tokens] = None
        # What ends with the tokens of another word never comes anyway.
        return [word for word in found if not any(word[i:] in found for i in range(1, len(word)))]


class Grammar:
    """A grammar, expression or schema that the text must follow."""

    is_static = False

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    @property
    def error(self) -> ValueError | None:
        if not self._matcher.is_error():
            return None
        reason = " ".join(self._matcher.get_error().split())
        return ValueError(f"the text's grammar became too complex: {reason:.300}")

    def mask(self) -> np.ndarray:
        # Its own vocabulary can be longer by the token that stands for the end.
        everything = all_tokens(self._vocab_size)
        return np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: len(everything)] & everything

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


class BadWords:
    """Sequences of tokens that never come: the last of each is forbidden behind the others."""

    finished, error = False, None

    def __init__(self, words: Sequence[tuple[int, ...]], vocab_size: int):
        self._words = [word for word in words if len(word) > 1]
        self._longest = max(map(len, words))
        self._allowed = all_tokens(vocab_size).copy()
        self._newest: list[int] = []
        for word in words:
            if len(word) == 1:
                _forbid(self._allowed, word[0])

    @property
    def is_static(self) -> bool:
        return not self._words

    def mask(self) -> np.ndarray:
        allowed = self._allowed.copy()
        for *before, last in self._words:
            if self._newest[-len(before) :] == before:
                _forbid(allowed, last)
        return allowed

    def accept(self, token: int) -> None:
        self._newest = [*self._newest, token][-self._longest :]


class AllOf:
    """What all of several constraints allow."""

    def __init__(self, parts: Sequence[Constraint]):
        self._parts = parts

    @property
    def is_static(self) -> bool:
        return all(part.is_static for part in self._parts)

    @property
    def finished(self) -> bool:
        return any(part.finished for part in self._parts)

    @property
    def error(self) -> Exception | None:
        return next((part.error for part in self._parts if part.error is not None), None)

    def mask(self) -> np.ndarray:
        return functools.reduce(np.bitwise_and, (part.mask() for part in self._parts))

    def accept(self, token: int) -> None:
        for part in self._parts:
            part.accept(token)


def _forbid(mask: np.ndarray, token: int) -> None:
    mask[token // 32] &= ~np.uint32(1 << token % 32)


def _grammar_text(guidance: Any, wanted: StructuredOutputs) -> tuple[str, str]:
    """The name of the field that is given, and its grammar as llguidance takes it."""
    if wanted.json is not None:
        defaults = {"whitespace_pattern": _WHITESPACE}
        return "json", guidance.LLMatcher.grammar_from_json_schema(wanted.json, defaults=defaults)
    if wanted.regex is not None:
        return "regex", guidance.LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        # A string of Lark's is one of JSON.
        choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        return "choice", guidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    return "grammar", guidance.LLMatcher.grammar_from_lark(wanted.grammar)


# By the tokenizer, and the vocabulary's size.
_vocabularies: weakref.WeakKeyDictionary[Tokenizer, dict[int, Any]] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> "llguidance.LLTokenizer":
    """The tokenizer as llguidance sees it; takes some 0.2 s once a tokenizer."""
    known = _vocabularies.setdefault(tokenizer, {})
    if vocab_size not in known:
        # A text that must hold the spelling of a control token gets it in plain tokens.
        backend, ends = tokenizer.plain_backend, [*tokenizer.eos_token_ids]
        if not ends:  # llguidance needs one, and would take token 0
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            backend.add_special_tokens([_NO_END])
            ends = [backend.token_to_id(_NO_END)]
        size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        known[vocab_size] = _llguidance().LLTokenizer(
            backend.to_str(), n_vocab=max(vocab_size, size), eos_token=ends
        )
    return known[vocab_size]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "structured output needs the llguidance package: pip install lserve-jax[serve]"
        ) from None
    return llguidance
