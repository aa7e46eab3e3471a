"""RULER's synthetic tasks (arXiv 2404.06654), generated offline in wording of our own.

    niah_single      one needle; its number is asked for
    niah_multikey    needles of four keys; each is asked for by itself, the others distract
    niah_multivalue  four numbers of one key, asked for together
    niah_multiquery  needles of four keys, asked for together
    vt               variable tracking: a number is assigned and copied four times; who holds it?
    cwe              common words: ten words stand 30 times in a list, all others 3 times
    fwe              frequent words: words of a coded text follow a Zeta distribution (alpha 2); the
                     three most frequent are asked for, not counting the dots in between

The score is RULER's: the share of the expected strings that the answer holds (``share_found``).
Unlike there, no solved example comes first and no beginning of the answer is given: the answer's
first tokens would otherwise come from prefill, which hardly prunes.
"""

import random
import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from lserve_jax.eval.prompts import Puzzle, Question, bury
from lserve_jax.tokenizer import Tokenizer

RulerTask = Literal[
    "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"
]
# Tasks whose haystacks are words of their own: no text is in them.
WITHOUT_TEXT = ("cwe", "fwe")

_ADJECTIVES = (
    *("amber", "brave", "calm", "dusty", "eager", "faded", "gentle", "hollow", "icy", "jolly"),
    *("kind", "lazy", "mellow", "narrow", "odd", "patient", "quiet", "rusty", "shiny", "tidy"),
    *("upset", "vivid", "weary", "young", "zesty"),
)
_NOUNS = (
    *("anchor", "basket", "candle", "drawer", "engine", "feather", "garden", "hammer", "island"),
    *("jacket", "kettle", "ladder", "mirror", "needle", "orchard", "pillow", "quarry", "ribbon"),
    *("saddle", "tunnel", "umbrella", "valley", "window", "yard", "zipper"),
)
_COMMON, _COMMON_TIMES, _UNCOMMON_TIMES = 10, 30, 3
_ZETA_2 = 1.6449340668482264
_DOTS = " ..."


def ruler_puzzle(
    task: RulerTask, tokenizer: Tokenizer, text_ids: Sequence[int], *, rng: random.Random
) -> Puzzle:
    """One haystack of a task. ``text_ids`` is the text around needles; cwe and fwe use none."""
    if task == "vt":
        return _variable_tracking(tokenizer, text_ids, rng)
    if task == "cwe":
        return _common_words(tokenizer, rng)
    if task == "fwe":
        return _frequent_words(tokenizer, rng)
    return _needles(task, tokenizer, text_ids, rng)


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return partial(tokenizer.encode, add_special_tokens=False)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _needles(
    task: RulerTask, tokenizer: Tokenizer, text_ids: Sequence[int], rng: random.Random
) -> Puzzle:
    count = 1 if task == "niah_single" else 4
    names = [f"{a} {noun}" for a in _ADJECTIVES for noun in _NOUNS]
    keys = rng.sample(names, 1 if task == "niah_multivalue" else count)
    facts = [(key, _number(rng)) for key in keys * (count // len(keys))]
    depths = sorted(rng.random() for _ in facts)
    encode = _encoder(tokenizer)
    needles = [
        (depth, encode(f"\nThe secret number of the {key} is {number}.\n"))
        for depth, (key, number) in zip(depths, facts, strict=True)
    ]
    numbers = tuple(number for _, number in facts)
    if task in ("niah_single", "niah_multikey"):
        questions = tuple(
            Question(
                text=f"\n\nWhat is the secret number of the {key}?", answers=(number,), depth=depth
            )
            for depth, (key, number) in zip(depths, facts, strict=True)
        )
    elif task == "niah_multivalue":
        text = f"\n\nWhat are all the secret numbers of the {keys[0]}?"
        questions = (Question(text=text, answers=numbers),)
    else:
        several = ", ".join(f"the {key}" for key in keys[:-1])
        text = f"\n\nWhat are the secret numbers of {several} and the {keys[-1]}?"
        questions = (Question(text=text, answers=numbers),)
    return Puzzle(
        task=task,
        introduction="",
        questions=questions,
        fill=lambda room: bury(text_ids, needles, room, rng),
        max_tokens=48 if len(questions[0].answers) == 1 else 128,
    )


def _variable_tracking(tokenizer: Tokenizer, text_ids: Sequence[int], rng: random.Random) -> Puzzle:
    names = _distinct(5, lambda: "".join(rng.choices(string.ascii_uppercase, k=5)))
    number = _number(rng)
    values = [number, *(f"VAR {name}" for name in names[:-1])]
    depths = sorted(rng.random() for _ in names)
    encode = _encoder(tokenizer)
    needles = [
        (depth, encode(f"\nVAR {name} = {value}\n"))
        for depth, name, value in zip(depths, names, values, strict=True)
    ]
    question = (
        f"\n\nVariables are assigned in the text above. Which {len(names)} variables have the "
        f"value {number}, directly or through other variables?"
    )
    return Puzzle(
        task="vt",
        introduction="Keep track of the variables that are assigned in this text.\n\n",
        questions=(Question(text=question, answers=tuple(names)),),
        fill=lambda room: bury(text_ids, needles, room, rng),
        max_tokens=64,
    )


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[draw()] = None
    return list(words)


def _made_up_word(rng: random.Random) -> str:
    """Three syllables: pronounceable, and there are hundreds of thousands."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))


def _common_words(tokenizer: Tokenizer, rng: random.Random) -> Puzzle:
    pairs = [f"{a}{noun}" for a in _ADJECTIVES for noun in _NOUNS]
    common, encode = rng.sample(pairs, _COMMON), _encoder(tokenizer)

    def entry(number: int, word: str) -> list[int]:
        return encode(f" {number}. {word}")

    def fill(room: int) -> list[int]:
        # Words are added until the list is full; then all are shuffled and numbered. A number's
        # tokens depend on its place, so the last words that no longer fit are taken out again.
        words = common * _COMMON_TIMES
        others = {*common}
        size = len([token for i, word in enumerate(words) for token in entry(i + 1, word)])
        if size > room:
            raise ValueError(f"the common words take {size} tokens, the list has {room}")
        while size <= room:
            word = _made_up_word(rng)
            if word in others:
                continue
            others.add(word)
            for _ in range(_UNCOMMON_TIMES):
                words.append(word)
                size += len(entry(len(words), word))
        for _ in range(_UNCOMMON_TIMES):
            words.pop()
        while True:
            shuffled = rng.sample(words, len(words))
            ids = [token for i, word in enumerate(shuffled) for token in entry(i + 1, word)]
            if len(ids) <= room:
                return ids
            for _ in range(_UNCOMMON_TIMES):
                words.pop()

    question = (
        f"\n\nWhich {_COMMON} words appear most often in the list above? Each of them appears "
        f"{_COMMON_TIMES} times, any other {_UNCOMMON_TIMES} times."
    )
    return Puzzle(
        task="cwe",
        introduction="Below is a numbered list of words.\n\n",
        questions=(Question(text=question, answers=tuple(common)),),
        fill=fill,
        max_tokens=120,
    )


def _frequent_words(tokenizer: Tokenizer, rng: random.Random) -> Puzzle:
    words = _distinct(400, lambda: _made_up_word(rng))
    encode = _encoder(tokenizer)
    # Rank 1, the most frequent, are the dots; the three after them are the answer.
    sizes = [len(encode(_DOTS)), *(len(encode(f" {word}")) for word in words)]

    def counts(total: int) -> list[int]:
        return [int(total / _ZETA_2 / rank**2) for rank in range(1, len(sizes) + 1)]

    def tokens(total: int) -> int:
        return sum(count * size for count, size in zip(counts(total), sizes, strict=True))

    def fill(room: int) -> list[int]:
        least, most = 0, room  # every entry has at least one token
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if tokens(middle) <= room else (least, middle - 1)
        times = counts(least)
        if times[3] <= times[4]:
            raise ValueError(f"{room} tokens are too few for three words to stand out")
        entries = [
            text
            for text, count in zip((_DOTS, *(f" {w}" for w in words)), times, strict=True)
            for _ in range(count)
        ]
        ids = [token for text in rng.sample(entries, len(entries)) for token in encode(text)]
        return ids + encode(_DOTS) * ((room - len(ids)) // sizes[0])

    question = (
        "\n\nThe text above is written in a code. Not counting the dots, which three words appear "
        "most often in it?"
    )
    return Puzzle(
        task="fwe",
        introduction="Count how often each word of this coded text appears.\n\n",
        questions=(Question(text=question, answers=tuple(words[:3])),),
        fill=fill,
        max_tokens=50,
    )
