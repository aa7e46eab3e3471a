"""Typed access to a GGUF file's metadata, so that a value of a wrong type ends in a clear error."""

import reprlib
from collections.abc import Mapping
from typing import Any, overload

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class GGUFMetadata:
    """The keys and values of one file; ``where`` names it in messages."""

    def __init__(self, values: Mapping[str, Any], *, where: str):
        self.values, self.where = values, where

    @overload
    def get[T](self, key: str, kind: type[T]) -> T | None: ...

    @overload
    def get[T](self, key: str, kind: type[T], default: T) -> T: ...

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of ``key``, or ``default`` where the file has no such key.

        ``kind`` is str, int, float (whole numbers pass too) or bool. Raises ``ValueError`` for a
        value of another type.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not _is(value, kind):
            raise self.wrong(key, f"must be {_NAMES[kind]}")
        return value

    def get_list[T](self, key: str, kind: type[T]) -> list[T] | None:
        """The array of ``key``, all of ``kind``, or None. Raises ``ValueError`` for others."""
        values = self.values.get(key)
        if values is None:
            return None
        if not isinstance(values, list) or not all(_is(value, kind) for value in values):
            raise self.wrong(key, f"must be an array, each of its values {_NAMES[kind]}")
        return values

    def wrong(self, key: str, rule: str) -> ValueError:
        """The error that ``key`` breaks ``rule``."""
        return ValueError(f"{self.where}: {key}={reprlib.repr(self.values.get(key))} {rule}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind  # a bool is no whole number
