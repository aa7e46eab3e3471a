"""Training samples for head gates: passkeys hidden in a long text and asked for at its end.

After DuoAttention (arXiv 2410.10819): some passkeys, each a list of random words, stand at random
depths of a text; behind it every one is asked for and answered. Only a head that reads far back
can tell the answers, which is what gates are trained to find out.

    sample = PasskeySamples(tokenizer, builtin_text(), PasskeySettings(max_length=4096))
    tokens, first_label = sample(0)
"""

from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np

from lserve_jax.calibrate.gates import Sample
from lserve_jax.tokenizer import Text, Tokenizer, text_ids

# Of the NATO spelling alphabet: common, distinct, and without a sense together.
_NATO = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november "
    "oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
)
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth"
WORDS, ORDINALS = tuple(_NATO.split()), tuple(_ORDINALS.split())
PREFACE = "Several passkeys are hidden in the following text. Memorize each of them.\n\n"
QUESTIONS = "\n\nThe text ends here. These were the passkeys in it.\n"


@dataclass(frozen=True, kw_only=True)
class PasskeySettings:
    """What samples look like. Raises ``ValueError`` for a number out of its range."""

    max_length: int = 8192
    """Longest sample in tokens, questions and answers included."""
    num_lengths: int = 3
    """So many lengths, evenly spaced up to the longest; each is compiled once."""
    num_passkeys: int = 10
    """Passkeys hidden in each sample, at most 10."""
    passkey_words: int = 32
    """Words of each passkey."""
    min_depth: float = 0.05
    """Passkeys stand between this share of the text"""
    max_depth: float = 0.95
    """and this one."""
    seed: int = 0
    """Same seed, same samples."""

    def __post_init__(self):
        for name in ("max_length", "num_lengths", "num_passkeys", "passkey_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_passkeys > len(ORDINALS):
            raise ValueError(f"num_passkeys={self.num_passkeys} must be at most {len(ORDINALS)}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if not 0.0 <= self.min_depth < self.max_depth <= 1.0:
            raise ValueError(
                f"min_depth={self.min_depth} and max_depth={self.max_depth} must be ascending "
                "and lie in [0, 1]"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the samples, ascending."""
        n = self.num_lengths
        return tuple(self.max_length * (i + 1) // n for i in range(n))


def builtin_text() -> str:
    """The Python language reference as this interpreter carries it for ``help()``: 0.5 MB."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def _statement(ordinal: str, passkey: str) -> str:
    return f"\nMemorize this: the {ordinal} passkey is {passkey}.\n"


def _question(ordinal: str, passkey: str) -> str:
    return f"\nWhich one is the {ordinal} passkey?\nIt is {passkey}.\n"


class PasskeySamples:
    """The sample of every step, each a pure function of the settings' seed and its number.

    Samples have exactly the tokens of their length. Lengths take turns: all of them in a new
    random order, and again. ``text`` is what they are hidden in, or its token ids.

    Raises ``ValueError`` if the text is shorter than the longest sample needs, or the passkeys do
    not fit the shortest.
    """

    def __init__(self, tokenizer: Tokenizer, text: Text, settings: PasskeySettings):
        self.settings = settings
        self._tokenizer = tokenizer
        self._text = text_ids(tokenizer, text)
        self._preface = tokenizer.encode(PREFACE)
        shortest, longest = settings.lengths[0], settings.lengths[-1]
        most = self._most_passkey_tokens()
        least = -(-settings.num_passkeys // (settings.max_depth - settings.min_depth)) + 1
        if shortest < most + least:
            raise ValueError(
                f"{settings.num_passkeys} passkeys of {settings.passkey_words} words take up to "
                f"{most} tokens and need {least:.0f} tokens of text between them, more than the "
                f"shortest sample has: {shortest} tokens; raise max_length={settings.max_length}, "
                f"lower num_lengths={settings.num_lengths}, or hide fewer or shorter passkeys"
            )
        if len(self._text) < longest:
            raise ValueError(
                f"the text has {len(self._text)} tokens, "
                f"samples of max_length={longest} need as many"
            )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _most_passkey_tokens(self) -> int:
        """What all but the text can take at most: no passkey is longer than its longest word."""
        longest = max(WORDS, key=lambda word: len(self._encode(f" {word}")))
        passkey = " ".join([longest] * self.settings.passkey_words)
        asked = ORDINALS[: self.settings.num_passkeys]
        questions = QUESTIONS + "".join(_question(ordinal, passkey) for ordinal in asked)
        stated = sum(len(self._encode(_statement(ordinal, passkey))) for ordinal in asked)
        return len(self._preface) + stated + len(self._encode(questions))

    def __call__(self, step: int) -> Sample:
        settings = self.settings
        rng = np.random.default_rng([settings.seed, step])
        turn, index = divmod(step, settings.num_lengths)
        order = np.random.default_rng([settings.seed, turn, 1]).permutation(settings.num_lengths)
        length = settings.lengths[order[index]]

        ordinals = ORDINALS[: settings.num_passkeys]
        passkeys = [" ".join(rng.choice(WORDS, settings.passkey_words)) for _ in ordinals]
        pairs = list(zip(ordinals, passkeys, strict=True))
        questions = self._encode(QUESTIONS + "".join(_question(*pair) for pair in pairs))
        statements = [self._encode(_statement(*pair)) for pair in pairs]

        room = length - len(self._preface) - len(questions) - sum(map(len, statements))
        start = rng.integers(len(self._text) - room + 1)
        text = self._text[start : start + room]
        first, last = int(settings.min_depth * room), int(settings.max_depth * room)
        places = rng.choice(np.arange(first, last), len(statements), replace=False)
        parts, done = [np.asarray(self._preface, np.int32)], 0
        for i in np.argsort(places):
            parts += [text[done : places[i]], np.asarray(statements[i], np.int32)]
            done = places[i]
        parts += [text[done:], np.asarray(questions, np.int32)]
        return Sample(np.concatenate(parts), length - len(questions))
