"""JSON files and the values in them: what is of the wrong kind is refused by file and field."""

import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from convert.files import is_file

# Sizes and token ids are int32 on the device.
_LARGEST = 2**31 - 1
# An error that lists problems shows as many of them.
_SHOWN = 20


def read_json(path: Path) -> dict[str, Any]:
    """Raises ``ValueError`` if ``path`` is missing, no file or not a JSON object."""
    if not is_file(path):
        raise ValueError(f"{path} does not exist")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def positive_int(name: str, value: Any, where: str) -> int:
    """``value``, which must be an integer in [1, 2^31)."""
    if not _is_int(value) or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"{where}: {name} must be a positive integer below 2^31, got {reprlib.repr(value)}"
        )
    return value


def number(name: str, value: Any, where: str) -> float:
    """``value``, which must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise ValueError(f"{where}: {name} must be a finite number, got {reprlib.repr(value)}")
    return value


def flag(name: str, value: Any, where: str) -> bool:
    """``value``, which must be true, false or null; null is false."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be true or false, got {reprlib.repr(value)}")
    return bool(value)


def json_object(name: str, value: Any, where: str) -> dict[str, Any]:
    """``value``, which must be an object or null; null is empty."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {name} must be an object, got {reprlib.repr(value)}")
    return dict(value or {})


def token_ids(name: str, value: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    """``value``, a token id or a list of them, as a tuple; null is empty."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if not _is_int(i) or not 0 <= i < vocab_size:
            raise ValueError(
                f"{where}: {name} must be a token id or a list of them, each in "
                f"[0, {vocab_size}), got {reprlib.repr(value)}"
            )
    return tuple(ids)


def shortened(lines: Sequence[str]) -> Iterable[str]:
    """The first of ``lines``, and how many more there are."""
    yield from lines[:_SHOWN]
    if len(lines) > _SHOWN:
        yield f"and {len(lines) - _SHOWN} more"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
