"""Prompts files made, output files read."""

import json
from pathlib import Path

import numpy as np


def read_output(path: Path) -> tuple[dict, list[dict]]:
    header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    return header, records


def by_index(path: Path) -> dict[int, dict]:
    """What the model said to each line, times left out; fails if a line is there twice."""
    _, records = read_output(path)
    answers = {record.pop("index"): record for record in records}
    assert len(answers) == len(records)
    for record in records:
        record.pop("timings", None)
    return answers


def write_lines(path: Path, lines) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def some_prompts(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, count)
    return [{"prompt_token_ids": rng.integers(0, 95, n).tolist()} for n in lengths]


def error_of(result: tuple[int, str]) -> str:
    """The one sentence with which a command line was refused."""
    code, err = result
    assert code == 2
    lines = err.replace("\r", "\n").splitlines()
    (sentence,) = [line for line in lines if line and "tensor/s]" not in line]
    return sentence.removeprefix("error: ")
