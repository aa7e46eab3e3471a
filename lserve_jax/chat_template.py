"""Chat templates: Jinja as the Hugging Face Hub expects it, and within bounds.

A template comes with a model, so it is not trusted. Jinja's sandbox keeps it from Python's
internals; here it is also kept from running or growing without end. Every loop iteration, call,
filter, test and comparison is a step, and a step that comes after 3 seconds of CPU time ends the
template. All texts that it makes, also those that it drops again, may have 100 million characters
together. What a step works on may have a million items, counted with the lists in the lists: a
list that holds another twice, and so on, is short to write and endless to compare.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_SECONDS = 3.0  # of this thread's CPU time, for one conversation
_MAX_TEXT = 100_000_000  # characters
_MAX_ITEMS = 1_000_000  # of a list, counted with the lists in it
_MAX_SEARCHED = 10_000  # characters of a text for what takes the square of its length
_MAX_SHORT = 1_000  # characters of a time's format, and of those that are taken off a text's ends
_MAX_MEASURED = 100_000  # lists whose sizes are remembered
_MAX_BITS = 20_000  # of a whole number

# The key under which a rendering's bounds travel; no name that a template can write.
_BOUNDS = "bounds of this rendering"

# Methods of texts and numbers, and filters, whose result can be longer than what they are given.
_GROWING = (
    *("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "indent", "wordwrap"),
    *("batch", "slice", "string", "round", "to_bytes"),
)
_SEARCHING = ("wordwrap", "striptags", "urlize")  # they take the square of a text's length
_STRIPPING = ("strip", "lstrip", "rstrip", "trim")
# Filters that look at a list's own items, but not into them; and those that draw all of what is
# given to them.
_SHALLOW = (
    *("d", "default", "count", "length", "first", "last", "list", "items", "reverse", "random"),
    *("map", "select", "selectattr", "reject", "rejectattr", "batch", "slice"),
)
_DRAWING = ("join", "sort", "unique", "groupby", "min", "max", "sum")


class ChatTemplate:
    """A compiled template. Raises ``ValueError``, naming the line, if ``source`` is not Jinja."""

    def __init__(self, source: str):
        try:
            self._template = _make_environment().from_string(source, globals=_GLOBALS)
        except Exception as error:  # also Python's, of which a deep expression has several
            raise _explain(error) from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The text that the template makes of the variables ``values``.

        Raises ``ValueError``, naming the template's line, for whatever ends the template: it
        refuses the values, uses them wrongly, or is stopped by the bounds.
        """
        bounds = _Bounds()
        parts = []
        try:
            for part in self._template.generate({**values, _BOUNDS: bounds}):
                bounds.grow(len(part))
                parts.append(part)
        except Exception as error:  # a template's mistakes raise what Python's do
            raise _explain(error) from error
        return "".join(parts)


def _explain(error: Exception) -> ValueError:
    lines = [
        step.tb_lineno
        for step in _frames(error)
        if "__jinja_exception__" in step.tb_frame.f_globals
    ]
    if isinstance(error, jinja2.TemplateSyntaxError):
        lines.append(error.lineno)
    where = f" in line {lines[-1]} of the template" if lines else ""
    reason = error.msg if isinstance(error, SyntaxError) else str(error)  # without Python's line
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return ValueError(f"the chat template failed on these messages{where}: {kind}{reason}")


def _frames(error: Exception) -> Iterator[Any]:
    step = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


# --- bounds -----------------------------------------------------------------------------------


class _Size(NamedTuple):
    """Of a value that is written out: a list counts as often as it is held."""

    characters: int  # as text, about
    items: int = 1
    depth: int = 0


class _Bounds:
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
        if not isinstance(value, _CONTAINERS):
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
                lists = {id(part): part for part in parts if isinstance(part, _CONTAINERS)}
                pending += [(part, None) for part in lists.values()]
        size = self._sizes[id(value)][1]
        if size.characters > _MAX_TEXT:
            _refuse_text()
        return size

    def measure_all(self, values: Sequence[Any]) -> _Size:
        """As of a list of ``values``, which is not kept."""
        for value in values:
            self.measure(value)
        return self._sum(values)

    def _sum(self, parts: Sequence[Any]) -> _Size:
        characters, items, depth = 2, 1, 0
        for part in parts:
            size = self._sizes[id(part)][1] if isinstance(part, _CONTAINERS) else None
            characters += 1 + (_characters(part) if size is None else size.characters)
            items += 1 if size is None else size.items
            depth = depth if size is None else max(depth, size.depth)
        if items > _MAX_ITEMS:
            _refuse_items()
        return _Size(characters, items, depth + 1)


_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS = (list, tuple, dict, set, frozenset, Mapping, *_VIEWS)
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


def _weight(value: Any) -> int:
    """What a new ``value`` takes of the bounds: the characters of a text, 8 an item of a list."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        _check_bits(value.bit_length())
    return 8 * len(value) if isinstance(value, list | tuple | dict) else 0


def _check_step(bounds: _Bounds, name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Refuses a filter or a method that would take, or make, too much, before it is called."""
    size, given = bounds.measure(value), bounds.measure_all(arguments)
    if name in _SEARCHING and size.characters > _MAX_SEARCHED:
        raise jinja2.TemplateError(
            f"{name} is for texts of at most {_MAX_SEARCHED} characters, got {size.characters}"
        )
    if name in _STRIPPING and given.characters > _MAX_SHORT:
        raise jinja2.TemplateError(
            f"{name} is for at most {_MAX_SHORT} characters to take away, got {given.characters}"
        )
    if name in ("encode", "decode"):
        for codec in arguments:  # Python finds it by its letters, too
            if re.sub("[^a-z]", "", str(codec).lower()) in ("punycode", "idna"):
                raise jinja2.TemplateError(f"{name} has no codec {codec!r} here")
    if _longest(bounds, name, value, arguments) > _MAX_TEXT:
        _refuse_text()


def _longest(bounds: _Bounds, name: str, value: Any, arguments: Sequence[Any]) -> int:
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


def _listed(value: Any) -> Any:
    """``value``, or a list of what it would yield, so that its length is known."""
    return list(value) if isinstance(value, Iterator | tuple) else value


class _Namespace(Namespace):
    def __repr__(self) -> str:  # it can hold itself, and change after it was measured
        raise jinja2.TemplateError("a namespace cannot become text")


# --- the environment --------------------------------------------------------------------------


class _Generator(CodeGenerator):
    """Makes loops and operators go through the environment, as calls and filters do."""

    _loops = 0  # around what is generated now

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        raw = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        step = _call(self.environment, "count", [nodes.Const(raw)], node)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        self._loops += 1
        super().visit_For(node, frame)
        self._loops -= 1

    def visit_Break(self, node: nodes.Break, frame: Any) -> None:
        if not self._loops:
            self.fail("break outside of a loop", node.lineno)
        super().visit_Break(node, frame)

    def visit_Continue(self, node: nodes.Continue, frame: Any) -> None:
        if not self._loops:
            self.fail("continue outside of a loop", node.lineno)
        super().visit_Continue(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.visit(_call(self.environment, "concatenate", node.nodes, node), frame)

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        node.expr = self._measured(node.expr)
        for operand in node.ops:
            operand.expr = self._measured(operand.expr)
        super().visit_Compare(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        for pair in node.items:
            pair.key = self._measured(pair.key)
        super().visit_Dict(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self.write("environment.call(context, environment.copied, ")
            super().visit_Getitem(node, frame)
            self.write(")")
        else:
            node.arg = self._measured(node.arg)
            super().visit_Getitem(node, frame)

    def _measured(self, node: nodes.Expr) -> nodes.Expr:
        """For what is compared or looked up: equality and hashes go into the depth."""
        if isinstance(node, nodes.Const):
            return node
        return _call(self.environment, "measured", [node], node)


def _call(environment: Any, name: str, arguments: list[nodes.Expr], near: nodes.Node) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(near.lineno).set_environment(environment)
    return call


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "-", "*", "**", "%"))

    # What the generator above writes calls of; a template has no name for them.

    def count(self, bounds: _Bounds, raw: int) -> None:
        """A loop's iteration that writes ``raw`` characters of the template."""
        bounds.grow(raw)

    def concatenate(self, bounds: _Bounds, *values: Any) -> str:
        bounds.measure_all(values)
        text = "".join(map(str, values))
        bounds.grow(len(text))
        return text

    def measured(self, bounds: _Bounds, value: Any) -> Any:
        bounds.measure(value)
        return value

    def copied(self, bounds: _Bounds, value: Any) -> Any:
        bounds.grow(_weight(value))
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        bounds = __context.parent[_BOUNDS]
        bounds.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps format
        owner = getattr(method, "__self__", None)
        if owner is __self:
            return __obj(bounds, *args)
        if isinstance(owner, (str, bytes, int, *_CONTAINERS)):
            args = tuple(map(_listed, args)) if method.__name__ == "join" else args
            _check_step(bounds, method.__name__, owner, [*args, *kwargs.values()])
        else:
            bounds.measure_all([*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        bounds.grow(_weight(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        bounds = context.parent[_BOUNDS]
        bounds.step()
        if operator == "%" and isinstance(left, str | bytes):
            _check_step(bounds, "%", left, [right])
        elif operator == "-":  # also of a dictionary's keys, by their hashes
            bounds.measure_all([left, right])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    bounds.grow(_weight(items) * max(times, 0))
        result = super().call_binop(context, operator, left, right)
        bounds.grow(_weight(result))
        return result


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise jinja2.TemplateError(f"it makes a number of more than {_MAX_BITS} bits")


@jinja2.pass_context
def _written(context: Context, value: Any) -> str:
    """``value`` of ``{{ value }}`` as text."""
    bounds = context.parent[_BOUNDS]
    bounds.measure(value)
    text = str(value)
    bounds.grow(len(text))
    return text


def _bounded_filter(name: str, plain: jinja2.Environment) -> Any:
    """The filter ``name`` of the environment ``plain``, as a step within the bounds."""

    @jinja2.pass_context
    def filtered(context: Context, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        bounds = context.parent[_BOUNDS]
        bounds.step()
        value = _listed(value) if name in _DRAWING else value
        # Of a list that is not looked into, the size does not matter.
        size_of = None if name in _SHALLOW and not isinstance(value, str | bytes) else value
        _check_step(bounds, name, size_of, [*args, *kwargs.values()])
        result = plain.call_filter(name, value, args, kwargs, context=context)
        bounds.grow(_weight(result))
        return result

    return filtered


def _bounded_test(name: str, plain: jinja2.Environment) -> Any:
    """The test ``name`` of the environment ``plain``, as a step within the bounds."""

    @jinja2.pass_context
    def tested(context: Context, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        bounds = context.parent[_BOUNDS]
        bounds.step()
        # Of a text, a remainder is a format.
        divides = name in ("odd", "even", "divisibleby") and isinstance(value, str | bytes)
        _check_step(bounds, "%" if divides else name, value, [*args, *kwargs.values()])
        return plain.call_test(name, value, args, kwargs, context=context)

    return tested


class _GenerationTag(Extension):
    """``{% generation %}`` marks the model's own words for training; here it is a scope only."""

    tags = {"generation"}  # noqa: RUF012 - Jinja types it as an instance attribute

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


@jinja2.pass_context
def _raise_exception(context: Context, message: Any) -> None:
    raise jinja2.TemplateError(_written(context, message))


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_SHORT:
        raise jinja2.TemplateError(f"the format of a time has {len(form)} characters")
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


_GLOBALS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


def _make_environment() -> jinja2.Environment:
    plain = ImmutableSandboxedEnvironment()
    plain.filters["tojson"] = _tojson
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, loopcontrols],
        finalize=_written,
    )
    environment.filters = {name: _bounded_filter(name, plain) for name in plain.filters}
    environment.tests = {name: _bounded_test(name, plain) for name in plain.tests}
    environment.globals["namespace"] = _Namespace
    del environment.globals["lipsum"]  # filler text of any length
    return environment
