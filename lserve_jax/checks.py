"""Checks of arguments; an error names the argument, its value and the rule."""

import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

INT32_MAX = 2**31 - 1  # what fits the device's integers


def check_integer(name: str, value: Any, least: int | None = None, most: float = INT32_MAX) -> int:
    """``value`` as Python's own integer, whoever made it.

    Raises ``ValueError`` for what is no integer in [``least``, ``most``]; a bool is none.
    """
    if not is_integer(value) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be an integer{bound}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
    return operator.index(value)


def check_bool(name: str, value: object) -> None:
    """Raises ``ValueError`` for what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r} must be True or False")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` for what is none of the texts ``choices``."""
    # An array is asked for its type first: compared with a text it is neither true nor false.
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={value!r} must be {', '.join(others)} or {last}")


def check_path(name: str, value: object) -> None:
    """Raises ``TypeError`` for what is no path, ``ValueError`` for an empty one."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}={value!r} must be a path (str or os.PathLike)")
    if not os.fspath(value):  # pathlib would take it for the working directory
        raise ValueError(f"{name}={value!r} must not be empty")


def is_integer(value: object) -> bool:
    """Whether ``value`` stands for an integer: Python's, NumPy's or an array of one, no bool."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def is_listing(value: object) -> bool:
    """Whether ``value`` gives entries one after another: a list, an array, a generator.

    Text and bytes would give their letters, a mapping its keys; an array may have no dimension.
    """
    scalar = isinstance(value, str | bytes | bytearray | Mapping)
    return not scalar and isinstance(value, Iterable) and getattr(value, "shape", None) != ()


def is_real(value: object) -> bool:
    """Whether ``value`` is a number that is no bool; for NumPy a time span is an integer."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.timedelta64)
