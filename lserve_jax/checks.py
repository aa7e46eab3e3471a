"""Checks of arguments; an error names the argument, its value and the rule."""

import numbers
from typing import Any

import numpy as np

INT32_MAX = 2**31 - 1  # what fits the device's integers


def check_integer(name: str, value: Any, least: int | None = None, most: float = INT32_MAX) -> None:
    """Raises ``ValueError`` for what is no integer in [``least``, ``most``]; a bool is none."""
    if not is_integer(value) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be an integer{bound}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raises ``ValueError`` for what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r} must be True or False")


def is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
