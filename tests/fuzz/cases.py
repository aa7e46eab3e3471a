"""What a fuzz case is, and values and edits that every kind of file gets."""

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# What must come of a case. "refuse": the damage shows in the file, so reading it must fail.
# "same": nothing that counts has changed. "any": a value that no reader can know to be wrong.
Expect = Literal["refuse", "same", "any"]


@dataclass(frozen=True)
class Case:
    """One mutated input."""

    name: str
    expect: Expect
    build: Callable[[Path], Path]  # writes it into an empty directory, returns what to load


# Values put in the place of any other.
HOSTILE: dict[str, Any] = {
    **{"null": None, "true": True, "false": False},
    **{"negative": -1, "zero": 0, "one": 1, "10^6": 10**6, "2^31": 2**31, "2^64": 2**64},
    **{"2.5": 2.5, "10^-300": 1e-300, "nan": math.nan, "inf": math.inf, "-inf": -math.inf},
    **{"text": "abc", "digits": "64", "empty text": ""},
    **{"list": [1, 2], "empty list": [], "texts": ["a"], "nested": [[["x"]]]},
    **{"object": {"a": 1}, "empty object": {}},
}

# Contents that are no JSON object.
NO_OBJECTS = {
    **{"empty": b"", "list": b"[]", "null": b"null", "text": b'"a"', "open": b"{"},
    **{"deep list": b"[" * 20_000, "deep object": b'{"a":' * 20_000},
    **{"no UTF-8": b"\xff\xfe\x00\x00", "zeros": bytes(50), "long number": b'{"a":' + b"9" * 5000},
}


def flip(raw: bytes, draw: random.Random, start: int = 0, stop: int | None = None) -> bytes:
    """``raw`` with one bit of bytes [start, stop) changed."""
    place = draw.randrange(start, len(raw) if stop is None else stop)
    return raw[:place] + bytes([raw[place] ^ (1 << draw.randrange(8))]) + raw[place + 1 :]


def cut(raw: bytes, draw: random.Random) -> bytes:
    """The first bytes of ``raw``, at least one fewer than it has."""
    return raw[: draw.randrange(len(raw))]


def in_copy(source: Path, change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A ``build``: a copy of the directory ``source`` to which ``change`` was done."""

    def build(directory: Path) -> Path:
        target = directory / "m"
        shutil.copytree(source, target)
        change(target)
        return target

    return build


def with_file(source: Path, name: str, content: Any) -> Callable[[Path], Path]:
    """A ``build``: a copy of ``source`` whose file ``name`` holds bytes, or a value as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return in_copy(source, lambda target: (target / name).write_bytes(raw))


def paths(value: Any, longest: int = 4) -> Iterator[tuple]:
    """Keys to every part of a JSON value; of a list or object only its first parts."""
    for key in list(value)[:longest] if isinstance(value, dict) else range(min(len(value), 3)):
        yield (key,)
        if isinstance(value[key], dict | list):
            yield from ((key, *rest) for rest in paths(value[key], longest))


def replaced(value: Any, path: tuple, new: Any) -> Any:
    """A copy of ``value`` whose part at ``path`` is ``new``."""
    value = copy.deepcopy(value)
    part = value
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = new
    return value


def without(value: Any, path: tuple) -> Any:
    """A copy of ``value`` that lacks its part at ``path``."""
    value = copy.deepcopy(value)
    part = value
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return value
