"""Needles in a haystack: one fact at every depth of a long text, each asked for by itself.

All needles of a haystack are of one form and tell of different cities, so a model has to find the
right one. The prompts of a haystack differ only in the city at their end.
"""

import random
from collections.abc import Sequence
from typing import Literal

from lserve_jax.eval.prompts import Puzzle, Question, bury
from lserve_jax.tokenizer import Tokenizer

NeedleKind = Literal["passkey", "sentence"]

_CITIES = (
    *("Quito", "Oslo", "Nairobi", "Lima", "Hanoi", "Porto", "Tunis", "Riga", "Delhi", "Cairo"),
    *("Athens", "Boston", "Dublin", "Geneva", "Havana", "Jakarta", "Kyoto", "London", "Madrid"),
    *("Paris", "Prague", "Rome", "Seoul", "Sydney", "Toronto", "Vienna", "Warsaw", "Zagreb"),
    *("Berlin", "Chicago", "Dallas", "Milan"),
)
_ACTIVITIES = (
    *("feed the swans", "eat a ripe peach", "play a game of chess", "listen to the choir"),
    *("paint a picture", "read an old newspaper", "drink a cup of tea", "watch the boats"),
    *("fly a red kite", "count the pigeons", "write a postcard", "learn to juggle"),
)
_PLACES = (
    *("beside the stone bridge", "under the oldest tree", "on the market square"),
    *("in front of the museum", "at the railway station", "behind the town hall"),
    *("near the lighthouse", "on the castle wall", "in the rose garden", "next to the fountain"),
)
MOST_DEPTHS = len(_CITIES)


def needle_puzzle(
    kind: NeedleKind,
    tokenizer: Tokenizer,
    text_ids: Sequence[int],
    *,
    depths: int,
    rng: random.Random,
) -> Puzzle:
    """A haystack with a needle in the middle of each of ``depths`` equal parts.

    ``passkey``: a number of five digits for a city. ``sentence``: what is best done there, and
    where; a right answer names both.

    Raises ``ValueError`` for fewer than 1 or more than 32 depths.
    """
    if not 1 <= depths <= MOST_DEPTHS:
        raise ValueError(f"{depths=} must lie in [1, {MOST_DEPTHS}]")
    needles, questions = [], []
    doings = rng.sample([(a, place) for a in _ACTIVITIES for place in _PLACES], depths)
    for i, city in enumerate(rng.sample(_CITIES, depths)):
        depth = (i + 0.5) / depths
        if kind == "passkey":
            answers = (str(rng.randrange(10_000, 100_000)),)
            fact = f"The secret pass key for the city of {city} is {answers[0]}."
            question = f"What is the secret pass key for the city of {city}?"
        else:
            answers = doings[i]
            fact = f"The best thing to do in {city} is to {answers[0]} {answers[1]}."
            question = f"What is the best thing to do in {city}?"
        needles.append((depth, tokenizer.encode(f"\n{fact}\n", add_special_tokens=False)))
        questions.append(Question(text=f"\n\n{question}", answers=answers, depth=depth))
    return Puzzle(
        task=kind,
        introduction="",
        questions=tuple(questions),
        fill=lambda room: bury(text_ids, needles, room, rng),
        max_tokens=32,
    )
