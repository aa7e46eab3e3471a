"""Bounds of a chat template: its time, its text, and what one of its steps may work on.

Every loop iteration, call, filter, test and comparison is a step, and a step that comes after 3
seconds of CPU time ends the template. All texts that it makes, also those that it drops again, may
have 100 million characters together. What a step works on may have a million items, counted with
the lists in the lists: a list that holds another twice, and so on, is short to write and endless
to compare. A text that is taken letter by letter is such a list.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2

_MAX_SECONDS = 3.0  # of this thread's CPU time, for one conversation
_MAX_TEXT = 100_000_000  # characters
_MAX_ITEMS = 1_000_000  # of a list, counted with the lists in it
_MAX_DEPTH = 1_000  # of lists in lists: Python's own hash of deeper ones ends the process
_MAX_SPLIT = 10_000_000  # characters of a text that is taken apart word by word
_MAX_SOUGHT = 1_000_000_000  # characters times those sought from the end: that takes the product
_MAX_SEARCHED = 10_000  # characters of a text for what takes the square of its length
MAX_SHORT = 1_000  # characters of a time's format, and of those that are taken off a text's ends
_MAX_MEASURED = 100_000  # lists whose sizes are remembered
_MAX_BITS = 20_000  # of a whole number

# Methods of texts and numbers, and filters, whose result can be longer than what they are given.
_GROWING = (
    *("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "indent", "wordwrap"),
    *("batch", "slice", "string", "round", "to_bytes"),
)
_SEARCHING = ("wordwrap", "striptags", "urlize")  # they take the square of a text's length
_SPLITTING = ("title", "pprint")
_FROM_THE_END = ("rfind", "rindex", "rsplit", "rpartition")
_SLOW_CODECS = ("punycode", "idna", "namereplace")
_STRIPPING = ("strip", "lstrip", "rstrip", "trim")
# Filters that yield items one after another; those that look at a list's own items, but not into
# them; and those that draw all of what is given to them.
LAZY = ("map", "select", "selectattr", "reject", "rejectattr", "batch", "slice")
SHALLOW = (
    *("d", "default", "count", "length", "first", "last", "list", "items", "reverse", "random"),
    *LAZY,
)
DRAWING = ("join", "sort", "unique", "groupby", "min", "max", "sum")


class _Size(NamedTuple):
    """Of a value that is written out: a list counts as often as it is held."""

    characters: int  # as text, about
    items: int = 1
    depth: int = 0


class Bounds:
    """What is left to one rendering."""

    def __init__(self):
        self._end = time.thread_time() + _MAX_SECONDS
        self._text = _MAX_TEXT
        # By id, with the list itself, so that no other takes its place. A template cannot change
        # one: it is walked once, however often it is compared.
        self._sizes: dict[int, tuple[Any, _Size]] = {}

    def step(self) -> None:
        if time.thread_time() > self._end:
            raise jinja2.TemplateError(
                f"it needs more than {_MAX_SECONDS:.0f} seconds of computing; the bound is there "
                "for templates that never end"
            )
        if len(self._sizes) > _MAX_MEASURED:
            self._sizes.clear()

    def grow(self, characters: int) -> None:
        self._text -= characters
        if self._text < 0:
            _refuse_text()

    def measure(self, value: Any) -> _Size:
        """The size of ``value``, which is refused if it is beyond the bounds."""
        if not isinstance(value, CONTAINERS):
            return _Size(_characters(value))
        pending: list[tuple[Any, list | None]] = [(value, None)]
        while pending:
            item, parts = pending.pop()
            if parts is not None:  # those that are lists are measured by now
                self._sizes[id(item)] = (item, self._sum(parts))
            elif id(item) not in self._sizes:
                if len(item) > _MAX_ITEMS:
                    _refuse_items()
                is_mapping = isinstance(item, Mapping)
                parts = [*item.keys(), *item.values()] if is_mapping else list(item)
                self._sizes[id(item)] = (item, _ENDLESS)  # for one that holds itself
                pending.append((item, parts))
                lists = {id(part): part for part in parts if isinstance(part, CONTAINERS)}
                pending += [(part, None) for part in lists.values()]
        size = self._sizes[id(value)][1]
        if size.characters > _MAX_TEXT:
            _refuse_text()
        return size

    def measure_all(self, values: Sequence[Any]) -> _Size:
        """As of a list of ``values``, which is not kept."""
        if len(values) > _MAX_ITEMS:
            _refuse_items()
        for value in values:
            self.measure(value)
        return self._sum(values)

    def _sum(self, parts: Sequence[Any]) -> _Size:
        characters, items, depth = 2, 1, 0
        for part in parts:
            size = self._sizes[id(part)][1] if isinstance(part, CONTAINERS) else None
            characters += 1 + (_characters(part) if size is None else size.characters)
            items += 1 if size is None else size.items
            depth = depth if size is None else max(depth, size.depth)
        if items > _MAX_ITEMS:
            _refuse_items()
        if depth >= _MAX_DEPTH:
            raise jinja2.TemplateError(f"it works on lists that are more than {_MAX_DEPTH} deep")
        return _Size(characters, items, depth + 1)


class Drawn:
    """What yields ``items`` one after another, each as a step within ``bounds``.

    Generators that draw from each other without end would end the process where they are freed;
    with one of these between any two they do not.
    """

    def __init__(self, bounds: Bounds, items: Iterable[Any]):
        self._bounds, self._items = bounds, iter(items)

    def __iter__(self) -> "Drawn":
        return self

    def __next__(self) -> Any:
        self._bounds.step()
        return next(self._items)


_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
CONTAINERS = (list, tuple, dict, set, frozenset, Mapping, *_VIEWS)
_ENDLESS = _Size(_MAX_TEXT + 1, _MAX_ITEMS + 1)


def _characters(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return 1 + value.bit_length() // 3 if isinstance(value, int) else 1


def _refuse_text() -> NoReturn:
    raise jinja2.TemplateError(
        f"it makes more text than {_MAX_TEXT} characters; the bound is there for templates that "
        "never end"
    )


def _refuse_items() -> NoReturn:
    raise jinja2.TemplateError(
        f"it works on a list of more than {_MAX_ITEMS} items, counted with those of the lists in "
        "it; the bound is there for templates that never end"
    )


def weight(value: Any) -> int:
    """What a new ``value`` takes of the bounds: the characters of a text, 8 an item of a list."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        check_bits(value.bit_length())
    return 8 * len(value) if isinstance(value, list | tuple | dict) else 0


def check_step(bounds: Bounds, name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Refuses a filter or a method that would take, or make, too much, before it is called."""
    size, given = bounds.measure(value), bounds.measure_all(arguments)
    if name in (*LAZY, *DRAWING) and isinstance(value, str | bytes) and len(value) > _MAX_ITEMS:
        _refuse_items()
    for names, most in ((_SEARCHING, _MAX_SEARCHED), (_SPLITTING, _MAX_SPLIT)):
        if name in names and size.characters > most:
            raise jinja2.TemplateError(
                f"{name} is for texts of at most {most} characters, got {size.characters}"
            )
    if name in _FROM_THE_END and size.characters * given.characters > _MAX_SOUGHT:
        raise jinja2.TemplateError(
            f"{name} is for at most {_MAX_SOUGHT} comparisons of characters, got "
            f"{size.characters} characters and {given.characters} that are sought"
        )
    if name in _STRIPPING and given.characters > MAX_SHORT:
        raise jinja2.TemplateError(
            f"{name} is for at most {MAX_SHORT} characters to take away, got {given.characters}"
        )
    if name in ("encode", "decode"):
        for codec in arguments:  # Python finds it by its letters, too
            if re.sub("[^a-z]", "", str(codec).lower()) in _SLOW_CODECS:
                raise jinja2.TemplateError(f"{name} has no {codec!r} here")
    if name == "round":  # it raises 10 to that power
        check_bits(max((4 * abs(p) for p in arguments if isinstance(p, int)), default=0))
    if _longest(bounds, name, value, arguments) > _MAX_TEXT:
        _refuse_text()


def _longest(bounds: Bounds, name: str, value: Any, arguments: Sequence[Any]) -> int:
    """What the result of a filter or a method may take; 0 for those that make nothing longer."""
    size, given = bounds.measure(value), bounds.measure_all(arguments)
    # A width, or another text, for each character.
    width = sum(abs(p) if isinstance(p, int) else bounds.measure(p).characters for p in arguments)
    if name == "replace" and len(arguments) >= 2:
        text, old, new = str(value), str(arguments[0]), str(arguments[1])
        return len(text) + text.count(old) * len(new)
    if name == "join":
        both = [value, *arguments]
        items = max((len(part) for part in both if isinstance(part, list)), default=0)
        separator = max((len(part) for part in both if isinstance(part, str)), default=0)
        return size.characters + given.characters + items * separator
    if name in ("format", "format_map", "%"):
        # A number in a format may be a width; one among the arguments, where it has a *, and
        # digits among them, where it has a brace within braces.
        text = str(value)
        widths = [int(number) for number in re.findall(r"\d{1,4000}", text)]
        if "*" in text:
            flat = [p for a in arguments for p in (a if isinstance(a, tuple) else (a,))]
            widths += [abs(part) for part in flat if isinstance(part, int)]
        if re.search(r"\{[^}]*\{", text):
            digits = sum(character.isdecimal() for character in f"{text}{arguments}")
            widths.append(10 ** min(digits, 20))
        places = 1 + text.count("{") + text.count("%")
        return len(text) + places * (given.characters + max(widths, default=0))
    if name in ("split", "rsplit", "splitlines"):
        between = [part for part in arguments if part and isinstance(part, str | bytes)]
        return 8 * (value.count(between[0]) if between else len(value) // 2)
    if name == "list":
        return 8 * len(value) if isinstance(value, str | bytes) else 0
    if name == "tojson":
        return size.characters + size.items * size.depth * width
    if name == "pprint":  # it writes what a list holds once for the list, and again by itself
        return size.characters * (1 + size.depth)
    if name == "sum" and any(isinstance(start, list | tuple) for start in arguments):
        return size.items * len(value)  # each sum of lists is a copy
    return max(1, size.characters) * max(1, width) if name in _GROWING else 0


def listed(value: Any) -> Any:
    """``value``, or a list of what it would yield, so that its length is known."""
    return list(value) if isinstance(value, Iterator | tuple) else value


def check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise jinja2.TemplateError(f"it makes a number of more than {_MAX_BITS} bits")
