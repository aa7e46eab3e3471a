"""Prompts: exact lengths, needles where they should be, answers that the text alone gives."""

import random
import re
from collections import Counter
from typing import get_args

import pytest

import convert
from convert.tokenizers import load_tokenizer
from lserve_jax.eval.needle import needle_puzzle
from lserve_jax.eval.prompts import Puzzle, Question, bury, make_cases, read_text, share_found
from lserve_jax.eval.ruler import RulerTask, ruler_puzzle
from lserve_jax.tokenizer import Tokenizer

LENGTH = 4096


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Tokenizer:
    found = load_tokenizer(convert.resolve(smollm2).path)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def text_ids(tokenizer) -> list[int]:
    return read_text(tokenizer, "documentation", LENGTH)


def puzzle_of(task: str, tokenizer: Tokenizer, text_ids: list[int], seed: int = 0) -> Puzzle:
    rng = random.Random(seed)
    if task in ("passkey", "sentence"):
        return needle_puzzle(task, tokenizer, text_ids, depths=5, rng=rng)
    return ruler_puzzle(task, tokenizer, text_ids, rng=rng)


TASKS = ("passkey", "sentence", *get_args(RulerTask))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_exactly_as_long_as_asked_and_share_their_haystack(
    tokenizer, text_ids, task, chat
):
    puzzle = puzzle_of(task, tokenizer, text_ids)
    cases = make_cases(tokenizer, puzzle, source="t", length=LENGTH, haystack=3, chat=chat)
    assert [len(case.token_ids) for case in cases] == [LENGTH] * len(puzzle.questions)
    longest = max(len(tokenizer.encode(case.question.text)) for case in cases)
    first = cases[0].token_ids[: LENGTH - longest - 8]  # 8: the template's end, or "Answer:"
    assert all(case.token_ids[: len(first)] == first for case in cases)
    for case in cases:
        text = tokenizer.decode(case.token_ids, skip_special_tokens=False)
        assert case.question.text.strip() in text
        assert text.startswith("<|im_start|>") == chat


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_everything(tokenizer, text_ids, task):
    def prompts(seed: int) -> list[list[int]]:
        puzzle = puzzle_of(task, tokenizer, text_ids, seed)
        cases = make_cases(tokenizer, puzzle, source="t", length=LENGTH, haystack=0, chat=False)
        return [case.token_ids for case in cases]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def solve_passkey(text: str, question: str) -> list[str]:
    city = re.search(r"city of (\w+)\?", question)[1]
    return re.findall(rf"pass key for the city of {city} is (\d{{5}})\.", text)


def solve_sentence(text: str, question: str) -> list[str]:
    city = re.search(r"do in (\w+)\?", question)[1]
    return re.findall(rf"best thing to do in {city} is to (.*)\.\n", text)


def solve_numbers(text: str, question: str) -> list[str]:
    keys = re.findall(r"the (\w+ \w+)(?=[,?]| and the)", question)
    return [n for key in keys for n in re.findall(rf"secret number of the {key} is (\d+)\.", text)]


def solve_variables(text: str, question: str) -> list[str]:
    number = re.search(r"value (\d+)", question)[1]
    assigned = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text))
    holds = {name for name, value in assigned.items() if value == number}
    while more := {name for name, value in assigned.items() if value in holds} - holds:
        holds |= more
    return sorted(holds)


def solve_common_words(text: str, question: str) -> list[str]:
    entries = re.findall(r" (\d+)\. ([a-z]+)", text)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert set(counts.values()) == {30, 3}
    return [word for word, count in counts.items() if count == 30]


def solve_frequent_words(text: str, question: str) -> list[str]:
    coded = text.split("appears.\n\n")[1].split("\n\nThe text above")[0]
    counts = Counter(coded.replace("...", " ").split())
    (first, second, third, fourth) = counts.most_common(4)
    assert first[1] > second[1] > third[1] > fourth[1]
    return [first[0], second[0], third[0]]


SOLVERS = {
    "passkey": solve_passkey,
    "sentence": solve_sentence,
    **{task: solve_numbers for task in get_args(RulerTask) if task.startswith("niah")},
    "vt": solve_variables,
    "cwe": solve_common_words,
    "fwe": solve_frequent_words,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", TASKS)
def test_the_text_alone_gives_the_answers(tokenizer, text_ids, task, seed):
    puzzle = puzzle_of(task, tokenizer, text_ids, seed)
    for case in make_cases(tokenizer, puzzle, source="t", length=LENGTH, haystack=0, chat=False):
        text = tokenizer.decode(case.token_ids)
        body = text.removesuffix(case.question.text + "\nAnswer:")
        answers = case.question.answers
        found = SOLVERS[task](text if task == "fwe" else body, case.question.text)
        if task == "sentence":
            answers = (" ".join(answers),)
        assert sorted(found) == sorted(answers)


@pytest.mark.parametrize(
    ("task", "questions", "answers"),
    [
        *(("passkey", 5, 1), ("niah_single", 1, 1), ("niah_multikey", 4, 1)),
        *(("niah_multivalue", 1, 4), ("niah_multiquery", 1, 4)),
        *(("vt", 1, 5), ("cwe", 1, 10), ("fwe", 1, 3)),
    ],
)
def test_tasks_ask_what_they_should(tokenizer, text_ids, task, questions, answers):
    puzzle = puzzle_of(task, tokenizer, text_ids)
    assert len(puzzle.questions) == questions
    assert all(len(set(question.answers)) == answers for question in puzzle.questions)


@pytest.mark.parametrize("task", ["passkey", "niah_multikey"])
def test_needles_lie_at_their_depths(tokenizer, text_ids, task):
    puzzle = puzzle_of(task, tokenizer, text_ids)
    hay = puzzle.fill(3000)
    assert len(hay) == 3000
    buried = 0
    for question in sorted(puzzle.questions, key=lambda q: q.depth):
        (answer,) = question.answers
        digits = tokenizer.encode(answer, add_special_tokens=False)
        (at,) = (i for i in range(3000) if hay[i : i + len(digits)] == digits)
        before = tokenizer.decode(hay[:at]).rsplit("\n", 1)[1]  # the needle up to its number
        needle = len(tokenizer.encode(f"\n{before}{answer}.\n", add_special_tokens=False))
        start = at - len(tokenizer.encode(f"\n{before}", add_special_tokens=False)) + 1
        text_before = start - buried
        buried += needle
        # Depth is a share of the text; half a dozen tokens of a needle may be counted either way.
        assert text_before / (3000 - 5 * needle) == pytest.approx(question.depth, abs=0.03)
    if task == "passkey":
        assert [q.depth for q in puzzle.questions] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


def test_a_haystack_is_one_part_of_the_text_around_its_needles():
    text = list(range(1000, 1100))
    hay = bury(text, [(0.0, [1, 2]), (0.5, [3]), (1.0, [4])], 24, random.Random(0))
    start = hay[2]
    expected = list(range(start, start + 20))
    assert hay == [1, 2, *expected[:10], 3, *expected[10:], 4]


def test_texts_are_read(tokenizer, tmp_path):
    assert len(read_text(tokenizer, "neutral", 5000)) >= 5000
    (tmp_path / "text.txt").write_text("café " * 50, encoding="utf-8-sig")  # with a mark
    assert tokenizer.decode(read_text(tokenizer, str(tmp_path / "text.txt"), 50)) == "café " * 50


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("It is 12345.", ("12345",), 1.0),
        ("It is 1234.", ("12345",), 0.0),
        ("ALPHA, then gamma", ("alpha", "Beta", "gamma", "delta"), 0.5),
        ("", ("a",), 0.0),
    ],
)
def test_the_score_is_the_share_of_answers_found(text, answers, score):
    assert share_found(text, answers) == score


def test_what_does_not_fit_is_refused(tokenizer, text_ids, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"short.txt' has \d tokens, prompts this long need 100"):
        read_text(tokenizer, str(tmp_path / "short.txt"), 100)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_text(tokenizer, str(tmp_path / "binary"), 1)
    for task, length, message in (
        ("passkey", 15, "length=15 leaves no haystack for passkey"),
        ("passkey", 60, r"the needles take \d+ tokens, the haystack has \d+"),
        ("cwe", 512, r"the common words take \d+ tokens, the list has \d+"),
        ("fwe", 64, "too few for three words to stand out"),
    ):
        with pytest.raises(ValueError, match=message):
            puzzle = puzzle_of(task, tokenizer, text_ids)
            make_cases(tokenizer, puzzle, source="t", length=length, haystack=0, chat=False)
    with pytest.raises(ValueError, match="the text has 100 tokens, the haystack needs"):
        puzzle_of("vt", tokenizer, text_ids[:100]).fill(1000)
    with pytest.raises(ValueError, match=r"depths=33 must lie in \[1, 32\]"):
        needle_puzzle("passkey", tokenizer, text_ids, depths=33, rng=random.Random(0))


def test_a_template_that_drops_the_message_is_refused(tokenizer):
    lost = Tokenizer(
        backend=tokenizer.backend, markers={}, eos_token_ids=(), chat_template="Hello."
    )
    puzzle = Puzzle(
        task="t",
        introduction="",
        questions=(Question(text="?", answers=("a",)),),
        fill=lambda room: [],
        max_tokens=1,
    )
    with pytest.raises(ValueError, match="user's message exactly once"):
        make_cases(lost, puzzle, source="t", length=50, haystack=0, chat=True)
