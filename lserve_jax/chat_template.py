"""Chat templates: Jinja as the Hugging Face Hub expects it, and within bounds.

A template comes with a model, so it is not trusted. Jinja's sandbox keeps it from Python's
internals; here it is also kept from running or growing without end. Every loop iteration, call
and filter is a step, and a step that comes after 3 seconds of CPU time ends the template. All
texts that it makes, also those that it drops again, may have 100 million characters together.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_SECONDS = 3.0  # of this thread's CPU time, for one conversation
_MAX_TEXT = 100_000_000  # characters
_MAX_ITEMS = 1_000_000  # of a list, counted with the lists in it, that becomes text
_MAX_BITS = 20_000  # of a whole number

# The key under which a rendering's bounds travel; no name that a template can write.
_BOUNDS = "bounds of this rendering"

# Methods of texts and numbers, and filters, whose result can be longer than what they are given.
_GROWING = (
    *("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "indent", "wordwrap"),
    *("batch", "slice", "tojson", "string", "pprint", "round", "to_bytes"),
)


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


class _Bounds:
    """What is left to one rendering."""

    def __init__(self):
        self._end = time.thread_time() + _MAX_SECONDS
        self._text = _MAX_TEXT

    def step(self) -> None:
        if time.thread_time() > self._end:
            raise jinja2.TemplateError(
                f"it needs more than {_MAX_SECONDS:.0f} seconds of computing; the bound is there "
                "for templates that never end"
            )

    def grow(self, characters: int) -> None:
        self._text -= characters
        if self._text < 0:
            _refuse_text()


def _refuse_text() -> None:
    raise jinja2.TemplateError(
        f"it makes more text than {_MAX_TEXT} characters; the bound is there for templates that "
        "never end"
    )


def _size(value: Any) -> int:
    """How long ``value`` is as text, about."""
    total, items, pending = 0, 0, [value]
    while pending:
        item = pending.pop()
        items += 1
        if items > _MAX_ITEMS or total > _MAX_TEXT:
            _refuse_text()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 3
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset) or type(item) in _VIEWS:
            total += len(item)
            pending += item
        elif isinstance(item, Namespace):
            raise jinja2.TemplateError("a namespace cannot become text")
        else:
            total += 1
    return total


_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


def _weight(value: Any) -> int:
    """What a new ``value`` takes of the bounds: the characters of a text, 8 an item of a list."""
    if isinstance(value, str | bytes):
        return len(value)
    return 8 * len(value) if isinstance(value, list | tuple) else 0


def _check_growth(name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Refuses a filter or a method whose result would be too long, before it is called."""
    if name == "replace" and len(arguments) >= 2:
        text, old, new = str(value), str(arguments[0]), str(arguments[1])
        longest = len(text) + text.count(old) * len(new)
    elif name == "join":
        given = [value, *arguments]
        items = max((len(part) for part in given if isinstance(part, list)), default=0)
        separator = max((len(part) for part in given if isinstance(part, str)), default=0)
        longest = sum(map(_size, given)) + items * separator
    elif name in ("format", "format_map", "%"):
        # A number in a format may be a width; one among the arguments, where it has a *, or a
        # brace within braces.
        text = str(value)
        widths = [int(number) for number in re.findall(r"\d{4,4000}", text)]
        if "*" in text or re.search(r"\{[^}]*\{", text):
            widths += [abs(part) for part in _flat(arguments) if isinstance(part, int)]
        places = 1 + text.count("{") + text.count("%")
        longest = len(text) + places * (sum(map(_size, arguments)) + max(widths, default=0))
    elif name == "list":
        longest = 8 * len(value) if isinstance(value, str | bytes) else 0
    elif name in _GROWING:
        # A width, or another text, for each character.
        widths = [abs(part) if isinstance(part, int) else _size(part) for part in arguments]
        longest = max(1, _size(value)) * max(1, sum(widths))
    else:
        return
    if longest > _MAX_TEXT:
        _refuse_text()


def _listed(value: Any) -> Any:
    """``value``, or a list of what it would yield, so that its length is known."""
    return list(value) if isinstance(value, Iterator | tuple) else value


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    for argument in arguments:
        yield from argument if isinstance(argument, list | tuple) else (argument,)


# --- the environment --------------------------------------------------------------------------


class _Generator(CodeGenerator):
    """Makes loops and ``~`` go through the environment, as calls and filters do."""

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


def _call(environment: Any, name: str, arguments: list[nodes.Expr], near: nodes.Node) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(near.lineno).set_environment(environment)
    return call


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def count(self, raw: int) -> None:
        """A loop's iteration that writes ``raw`` characters of the template; see ``call``."""

    def concatenate(self, *values: Any) -> str:
        _size([value for value in values if not isinstance(value, str)])
        return "".join(map(str, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        bounds = __context.parent[_BOUNDS]
        bounds.step()
        if getattr(__obj, "__func__", None) is _Environment.count:
            bounds.grow(args[0])
            return None
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = tuple(map(_listed, args)) if method.__name__ == "join" else args
            _check_growth(method.__name__, owner, [*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        bounds.grow(_weight(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        bounds = context.parent[_BOUNDS]
        bounds.step()
        if operator == "%" and isinstance(left, str):
            _check_growth("%", left, [right])
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
    if not isinstance(value, str):
        _size(value)
    text = str(value)
    context.parent[_BOUNDS].grow(len(text))
    return text


def _bounded_filter(name: str, plain: jinja2.Environment) -> Any:
    """The filter ``name`` of the environment ``plain``, as a step within the bounds."""

    @jinja2.pass_context
    def filtered(context: Context, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        bounds = context.parent[_BOUNDS]
        bounds.step()
        value = _listed(value) if name == "join" else value
        _check_growth(name, value, [*args, *kwargs.values()])
        result = plain.call_filter(name, value, args, kwargs, context=context)
        bounds.grow(_weight(result))
        return result

    return filtered


class _GenerationTag(Extension):
    """``{% generation %}`` marks the model's own words for training; here it is a scope only."""

    tags = {"generation"}  # noqa: RUF012 - Jinja types it as an instance attribute

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
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
    del environment.globals["lipsum"]  # filler text of any length
    return environment
