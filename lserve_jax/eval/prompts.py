"""Prompts of an exact length: a haystack first, then a question about it.

A task makes a ``Puzzle``: what the haystack will hold and several questions about it.
``make_cases`` turns it into prompts that are all exactly as long as asked and differ only after
the haystack, so that an engine that shares prefixes reads the haystack once. Parts are tokenised
one by one and joined as ids: so lengths and depths are exact, and the haystack's ids do not depend
on a question.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal, get_args

from lserve_jax.eval.stories import write_stories
from lserve_jax.tokenizer import Text, Tokenizer, text_ids

TextName = Literal["documentation", "stories", "neutral"]

_NEUTRAL = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
# Stands for the haystack in the chat template; no template has it.
_MARK = "{haystack goes here}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about a haystack."""

    text: str
    answers: tuple[str, ...]  # the texts that a right answer holds
    depth: float | None = None  # of the needle asked for, as a share of the haystack; None: several


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """A haystack in the making, and its questions."""

    task: str
    introduction: str  # stands before the haystack
    questions: tuple[Question, ...]
    fill: Callable[[int], list[int]]  # token ids of a haystack of at most so many tokens
    max_tokens: int  # room for one answer


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt, and what its answer must hold."""

    source: str  # the text that its haystack is part of
    task: str
    length: int  # tokens of the prompt
    haystack: int  # number of its haystack: cases that share one follow each other
    question: Question
    max_tokens: int
    token_ids: list[int]


def read_text(tokenizer: Tokenizer, source: str, least: int, *, seed: int = 0) -> list[int]:
    """Token ids of a text to take haystacks from: one of ``TextName``, or a file in UTF-8.

    ``documentation`` is the Python language reference that ships with Python for ``help()``,
    ``stories`` are made up (``write_stories``, which ``seed`` is for), ``neutral`` is one paragraph
    repeated.

    Raises ``ValueError`` for a file that is not there or no text, and a text of fewer than
    ``least`` tokens.
    """
    if source == "neutral":
        text = _NEUTRAL * (least // 8)  # a paragraph has far more than 8 tokens
    elif source == "documentation":
        text = "\n\n".join(topics[name] for name in sorted(topics))
    elif source == "stories":
        text = write_stories(seed)
    else:
        text = _read_file(source)
    return encode_text(tokenizer, source, text, least)


def encode_text(tokenizer: Tokenizer, source: str, text: Text, least: int) -> list[int]:
    """Token ids of a text, whose name is ``source``.

    Raises ``ValueError`` for fewer than ``least`` tokens.
    """
    ids = text_ids(tokenizer, text).tolist()
    if len(ids) < least:
        raise ValueError(f"text {source!r} has {len(ids)} tokens, prompts this long need {least}")
    return ids


def _read_file(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = ", ".join(get_args(TextName))
        raise ValueError(f"text {source!r} is no file, and none of {known}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {source!r} is not UTF-8: {error}") from None


def make_cases(
    tokenizer: Tokenizer, puzzle: Puzzle, *, source: str, length: int, haystack: int, chat: bool
) -> list[Case]:
    """A prompt of exactly ``length`` tokens for every question of the puzzle.

    ``source`` and ``haystack`` say in results which text the haystack comes from, and which of
    its haystacks it is.

    What a haystack leaves over, and what one question is shorter than another, is filled with line
    breaks before the question. ``chat`` wraps the prompt in the tokenizer's chat template.

    Raises ``ValueError`` if the length leaves no room, and whatever ``puzzle.fill`` raises.
    """
    frames = [_frame(tokenizer, puzzle.introduction, q.text, chat) for q in puzzle.questions]
    before = frames[0][0]
    room = length - len(before) - max(len(after) for _, after in frames)
    if room < 1:
        raise ValueError(
            f"{length=} leaves no haystack for {puzzle.task}: the rest of the prompt has "
            f"{length - room} tokens"
        )
    hay = puzzle.fill(room)
    assert len(hay) <= room
    line_break = tokenizer.encode("\n", add_special_tokens=False)[-1]
    cases = []
    for question, (_, after) in zip(puzzle.questions, frames, strict=True):
        padding = [line_break] * (length - len(before) - len(hay) - len(after))
        cases.append(
            Case(
                source=source,
                task=puzzle.task,
                length=length,
                haystack=haystack,
                question=question,
                max_tokens=puzzle.max_tokens,
                token_ids=before + hay + padding + after,
            )
        )
    return cases


def _frame(
    tokenizer: Tokenizer, introduction: str, question: str, chat: bool
) -> tuple[list[int], list[int]]:
    """Token ids before and after the haystack."""
    if not chat:
        before = tokenizer.encode(introduction)  # with BOS, where the tokenizer adds it
        return before, tokenizer.encode(f"{question}\nAnswer:", add_special_tokens=False)
    content = introduction + _MARK + question
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}])
    parts = text.split(_MARK)
    if len(parts) != 2:
        raise ValueError("the chat template must contain the user's message exactly once")
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
    return before, after


def bury(
    text_ids: Sequence[int],
    needles: Sequence[tuple[float, list[int]]],
    room: int,
    rng: random.Random,
) -> list[int]:
    """A haystack of ``room`` tokens: a random part of the text with needles at their depths.

    ``needles`` are depth and token ids; a depth is the share of the text part before the needle.
    They must be in ascending order of depth.

    Raises ``ValueError`` if the needles leave no room, or the text is too short.
    """
    taken = room - sum(len(ids) for _, ids in needles)
    if taken < 0:
        raise ValueError(f"the needles take {room - taken} tokens, the haystack has {room}")
    if taken > len(text_ids):
        raise ValueError(f"the text has {len(text_ids)} tokens, the haystack needs {taken}")
    start = rng.randrange(len(text_ids) - taken + 1)
    hay, out, at = text_ids[start : start + taken], [], 0
    for depth, ids in needles:
        until = int(taken * depth)
        out += [*hay[at:until], *ids]
        at = until
    return [*out, *hay[at:]]


def share_found(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that the text holds, whatever their case (RULER's score, in [0, 1])."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)
