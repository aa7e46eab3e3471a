"""Tool calls in what a model writes: which format its chat template has, and how it is read.

hermes        ``<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>``; Hermes, Qwen
llama3_json   ``{"name": "f", "parameters": {}}`` at the beginning, or behind ``<|python_tag|>``;
              more behind ``;`` or a new line
mistral       ``[TOOL_CALLS] [{"name": "f", "arguments": {}}]``
mistral_args  ``[TOOL_CALLS]f[ARGS]{}``
mistral_call_id  ``[TOOL_CALLS]f[CALL_ID]id[ARGS]{}``

Of Mistral's, each is read whatever the template says: ``[TOOL_CALLS]f{}`` too.

All that is no call is content, and so is a call that is broken or not complete: no text is lost.
What stands between calls (white space, ``;``) is neither.
"""

import hashlib
import json
import re
import secrets
import string
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TypeGuard

_SPACE = frozenset(" \t\r\n")  # JSON's
_SCALAR = frozenset("-+.0123456789eEtrufalsn")  # what numbers, true, false and null consist of
_MAX_DEPTH = 100  # of lists in the arguments of a call
_ALPHANUMERIC = string.ascii_letters + string.digits
_MAX_NAME = 64
_ARGUMENTS = ("arguments", "parameters")  # keys of a call's object
_NAME_LETTERS = frozenset(_ALPHANUMERIC + "_-")


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family of models writes tool calls."""

    name: str
    marker: str  # begins calls
    closer: str = ""  # ends one, if anything does
    separators: frozenset[str] = frozenset()  # beside white space, between calls
    bare: bool = False  # a JSON object at the beginning of the answer is a call without a marker
    named: bool = False  # a function's name may stand behind the marker
    arguments_marker: str = ""  # between a function's name and its arguments
    id_marker: str = ""  # between a function's name and the call's id
    id_prefix: str = "call_"
    id_length: int = 24  # letters and digits behind the prefix

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens.

        Where one is, the text must be made with ``skip_special_tokens=False``: it would be lost.
        """
        texts = (self.marker, self.closer, self.arguments_marker, self.id_marker)
        return tuple(text for text in texts if text)

    def new_id(self) -> str:
        """A random id for a call."""
        letters = (secrets.choice(_ALPHANUMERIC) for _ in range(self.id_length))
        return self.id_prefix + "".join(letters)

    def own_id(self, call_id: str) -> str:
        """``call_id`` of a client as templates take it: always the same for the same."""
        fits = len(call_id) == self.id_length and set(call_id) <= set(_ALPHANUMERIC)
        if self.id_prefix or fits:
            return call_id
        digest = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest()
        return "".join(_ALPHANUMERIC[byte % 62] for byte in digest[: self.id_length])


HERMES = ToolFormat(name="hermes", marker="<tool_call>", closer="</tool_call>")
LLAMA3_JSON = ToolFormat(
    name="llama3_json", marker="<|python_tag|>", bare=True, separators=frozenset(";")
)
# Their templates refuse ids of any other length.
MISTRAL = ToolFormat(name="mistral", marker="[TOOL_CALLS]", named=True, id_prefix="", id_length=9)
MISTRAL_ARGS = replace(MISTRAL, name="mistral_args", arguments_marker="[ARGS]")
MISTRAL_CALL_ID = replace(MISTRAL_ARGS, name="mistral_call_id", id_marker="[CALL_ID]")


def detect_tool_format(chat_template: str) -> ToolFormat | None:
    """The format that ``chat_template``, Jinja source, writes tool calls in; None if unknown."""
    if MISTRAL.marker in chat_template:
        if MISTRAL_ARGS.arguments_marker not in chat_template:
            return MISTRAL
        has_id = MISTRAL_CALL_ID.id_marker in chat_template
        return MISTRAL_CALL_ID if has_id else MISTRAL_ARGS
    # Others put XML between the same tags.
    if HERMES.marker in chat_template and re.search(r'arguments\\?":', chat_template):
        return HERMES
    if "<|start_header_id|>" in chat_template and re.search(r'"parameters\\?":', chat_template):
        return LLAMA3_JSON
    return None


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # a JSON object, as the model wrote it


@dataclass(frozen=True)
class Delta:
    """What an answer goes on with: a piece of content, or a call.

    A call comes as a whole, when its last character has come: until then it could turn out to be
    broken, and then it is content.
    """

    content: str = ""
    call: ToolCall | None = None
    index: int = 0  # of the call, from 0


def parse_tool_calls(form: ToolFormat, text: str) -> tuple[str | None, list[ToolCall]]:
    """Content and calls of a whole answer; no content is None where there are calls."""
    parser = ToolCallParser(form)
    deltas = [*parser.feed(text), *parser.finish()]
    calls = [delta.call for delta in deltas if delta.call is not None]
    content = "".join(delta.content for delta in deltas)
    return (content if content or not calls else None), calls


class _Place(Enum):
    """Where in an answer the next character stands."""

    START = auto()
    TEXT = auto()  # behind content
    LIST = auto()  # behind a call in a list of them
    CALL = auto()  # behind a call that may still be closed
    CLOSED = auto()  # behind a call


class ToolCallParser:
    """Reads one answer, piece by piece.

    However the answer is cut, the deltas together are what ``parse_tool_calls`` finds in it. The
    time is linear in its length: characters are read a second time only behind a marker that did
    not begin a call.
    """

    def __init__(self, form: ToolFormat):
        self._form = form
        self._place = _Place.START
        self._waiting: deque[str] = deque()  # characters to be read
        self._reading: _Reading | None = None  # of what could be a call
        self._held: list[str] = []  # what it has read
        self._gap: list[str] = []  # white space and separators that nothing has followed yet
        self._content: list[str] = []
        self._calls = 0
        self._deltas: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        """What ``text`` adds and nothing that follows can take back."""
        self._waiting.extend(text)
        while self._waiting:
            self._take(self._waiting.popleft())
        return self._flush()

    def finish(self) -> list[Delta]:
        """At the end of the answer: what was held back."""
        while self._reading is not None:
            self._give_up()
            while self._waiting:
                self._take(self._waiting.popleft())
        if self._place in (_Place.START, _Place.TEXT):
            self._content += self._gap
        self._gap = []
        return self._flush()

    def _take(self, char: str) -> None:
        if self._reading is not None:
            self._held.append(char)
            self._advance(char)
        elif char in _SPACE or (self._place is _Place.CLOSED and char in self._form.separators):
            self._gap.append(char)
        elif self._place is _Place.TEXT and char != self._form.marker[0]:
            self._add_content(char)
        else:
            self._held = [char]
            self._reading = _read(self._form, self._place, char)
            self._advance(None)

    def _advance(self, char: str | None) -> None:
        assert self._reading is not None
        try:
            if char is None:
                next(self._reading)
            else:
                self._reading.send(char)
        except StopIteration as done:
            self._reading = None
            self._accept(*done.value)
        except _Broken:
            self._give_up()

    def _accept(self, called: tuple[str, str] | None, place: _Place) -> None:
        self._place, self._gap = place, []
        if called is not None:
            self._deltas += self._flushed_content()
            call = ToolCall(self._form.new_id(), *called)
            self._deltas.append(Delta(call=call, index=self._calls))
            self._calls += 1

    def _give_up(self) -> None:
        """What is held is no call. Its first character is content; the others are read again."""
        self._reading = None
        self._add_content(self._held[0])
        self._waiting.extendleft(reversed(self._held[1:]))

    def _add_content(self, char: str) -> None:
        self._content += [*self._gap, char]
        self._place, self._gap = _Place.TEXT, []

    def _flushed_content(self) -> list[Delta]:
        content, self._content = "".join(self._content), []
        return [Delta(content)] if content else []

    def _flush(self) -> list[Delta]:
        deltas, self._deltas = self._deltas + self._flushed_content(), []
        return deltas


# --- reading one call -------------------------------------------------------------------------

# A reading takes characters one by one, and returns what they are once they are complete. It
# never goes back.


class _Broken(Exception):
    """What was read can be no call."""


type _Steps[T] = Generator[None, str, T]
# Name and arguments of a call, None for what only frames calls; and the place behind it.
type _Reading = _Steps[tuple[tuple[str, str] | None, _Place]]


def _read(form: ToolFormat, place: _Place, char: str) -> _Reading:
    """Reads a call, or what frames calls, from its first character ``char``."""
    behind = _Place.CALL if form.closer else _Place.CLOSED
    if place is _Place.LIST and char == "]":
        return None, behind
    if place is _Place.LIST and char == ",":
        char = yield from _behind_space((yield))
        return _called((yield from _object(char))[1]), _Place.LIST
    if form.bare and char == "{" and place in (_Place.START, _Place.CLOSED):
        members = (yield from _object(char))[1]
        if members.keys().isdisjoint(_ARGUMENTS):  # an answer in JSON may have a name in it
            raise _Broken
        return _called(members), behind
    if place is _Place.CALL:
        literal = yield from _one_of(char, form.marker, form.closer)
        if literal == form.closer:
            return None, _Place.CLOSED
    else:
        yield from _one_of(char, form.marker)
    char = yield from _behind_space((yield))
    if form.named and char in _NAME_LETTERS:
        return (yield from _named(char)), behind
    if char == "[":
        char = yield from _behind_space((yield))
        behind = _Place.LIST
    return _called((yield from _object(char))[1]), behind


def _one_of(char: str, *literals: str) -> _Steps[str]:
    text = char
    while text not in literals:
        if not any(literal.startswith(text) for literal in literals):
            raise _Broken
        text += yield
    return text


def _behind_space(char: str) -> _Steps[str]:
    while char in _SPACE:
        char = yield
    return char


def _named(char: str) -> _Steps[tuple[str, str]]:
    """``name{}``, ``name[ARGS]{}`` or ``name[CALL_ID]id[ARGS]{}``."""
    name, char = yield from _word(char)
    if char == "[":
        marker = yield from _one_of(
            char, MISTRAL_CALL_ID.arguments_marker, MISTRAL_CALL_ID.id_marker
        )
        if marker == MISTRAL_CALL_ID.id_marker:
            _, char = yield from _word((yield))
            yield from _one_of(char, MISTRAL_CALL_ID.arguments_marker)
        char = yield
    arguments, _ = yield from _object((yield from _behind_space(char)))
    return name, arguments


def _word(char: str) -> _Steps[tuple[str, str]]:
    """A name, and the character behind it."""
    word = ""
    while char in _NAME_LETTERS and len(word) <= _MAX_NAME:
        word += char
        char = yield
    if not is_function_name(word):
        raise _Broken
    return word, char


def is_function_name(name: object) -> TypeGuard[str]:
    """Whether ``name`` is a text of 1 to 64 letters, digits, ``_`` and ``-``, as OpenAI asks."""
    return isinstance(name, str) and 0 < len(name) <= _MAX_NAME and _NAME_LETTERS.issuperset(name)


def _called(members: dict[str, str]) -> tuple[str, str]:
    """Name and arguments of a call, from the members of its object."""
    name = json.loads(members.get("name", "null"))
    arguments = next((members[key] for key in _ARGUMENTS if key in members), "null")
    if arguments == "null":  # of a function that takes none
        arguments = "{}"
    if not is_function_name(name) or arguments[0] != "{":
        raise _Broken
    return name, arguments


def _object(char: str) -> _Steps[tuple[str, dict[str, str]]]:
    """Reads a JSON object from its first character: its text, and by key the texts of its values.

    What no JSON object can begin with is broken at once; the rest is checked at the end.
    """
    if char != "{":
        raise _Broken
    text, closers = [char], ["}"]  # what ends the lists and objects that are open
    members: dict[str, str] = {}
    key, begin = "", 1  # of the member that is read; where its key or value begins
    state, behind_string = "first key", ""
    while closers:
        char = yield
        text.append(char)
        depth = len(closers)
        if state == "string":
            if char == '"':
                state = behind_string
            elif char == "\\":
                state = "escape"
            elif char < " ":
                raise _Broken
        elif state == "escape":
            state = "string"
        elif char in _SPACE:
            state = "end" if state == "scalar" else state
        elif state in ("first key", "key") and char == '"':
            state, behind_string = "string", "colon"
        elif state == "colon" and char == ":":
            state = "value"
            if depth == 1:
                key, begin = "".join(text[begin:-1]), len(text)
        elif state in ("first value", "value") and char in '"{[':
            state, behind_string = _OPENED[char], "end"
            if char != '"':
                closers.append("}" if char == "{" else "]")
        elif state in ("first value", "value", "scalar") and char in _SCALAR:
            state = "scalar"
        elif state in ("end", "scalar") and char == ",":
            state = "key" if closers[-1] == "}" else "value"
        elif state not in ("key", "value", "colon") and char == closers[-1]:
            state = "end"
            closers.pop()
        else:
            raise _Broken
        if depth == 1 and key and ((char == "," and state == "key") or not closers):
            members[key], key, begin = "".join(text[begin:-1]).strip(), "", len(text)
        if len(closers) > _MAX_DEPTH:
            raise _Broken
    whole = "".join(text)
    try:
        json.loads(whole)
        return whole, {json.loads(key): value for key, value in members.items()}
    except ValueError:
        raise _Broken from None


_OPENED = {'"': "string", "{": "first key", "[": "first value"}
