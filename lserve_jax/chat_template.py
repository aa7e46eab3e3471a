"""Chat templates: Jinja as the Hugging Face Hub expects it, and within bounds.

A template comes with a model, so it is not trusted. Jinja's sandbox keeps it from Python's
internals; here it is also kept from running or growing without end: see ``template_bounds``.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lserve_jax.template_bounds import (
    CONTAINERS,
    DRAWING,
    LAZY,
    MAX_SHORT,
    SHALLOW,
    Bounds,
    Drawn,
    check_bits,
    check_step,
    listed,
    weight,
)

# The key under which a rendering's bounds travel; no name that a template can write.
_BOUNDS = "bounds of this rendering"


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
        bounds = Bounds()
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
        if node.test is not None:  # also what a loop passes over
            passed = _call(self.environment, "measured", [nodes.Const(True)], node)
            node.test = nodes.And(passed, node.test, lineno=node.lineno)
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

    def count(self, bounds: Bounds, raw: int) -> None:
        """A loop's iteration that writes ``raw`` characters of the template."""
        bounds.grow(raw)

    def concatenate(self, bounds: Bounds, *values: Any) -> str:
        bounds.measure_all(values)
        text = "".join(map(str, values))
        bounds.grow(len(text))
        return text

    def measured(self, bounds: Bounds, value: Any) -> Any:
        bounds.measure(value)
        return value

    def copied(self, bounds: Bounds, value: Any) -> Any:
        bounds.grow(weight(value))
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        bounds = __context.parent[_BOUNDS]
        bounds.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps format
        owner = getattr(method, "__self__", None)
        if owner is __self:
            return __obj(bounds, *args)
        if isinstance(owner, (str, bytes, int, *CONTAINERS)):
            args = tuple(map(listed, args)) if method.__name__ == "join" else args
            check_step(bounds, method.__name__, owner, [*args, *kwargs.values()])
        else:
            bounds.measure_all([*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        bounds.grow(weight(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        bounds = context.parent[_BOUNDS]
        bounds.step()
        if operator == "%" and isinstance(left, str | bytes):
            check_step(bounds, "%", left, [right])
        elif operator == "-":  # also of a dictionary's keys, by their hashes
            bounds.measure_all([left, right])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * abs(right))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    bounds.grow(weight(items) * max(times, 0))
        result = super().call_binop(context, operator, left, right)
        bounds.grow(weight(result))
        return result


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
        value = listed(value) if name in DRAWING else value
        # Of a list that is not looked into, the size does not matter.
        size_of = None if name in SHALLOW and not isinstance(value, str | bytes) else value
        check_step(bounds, name, size_of, [*args, *kwargs.values()])
        if name in LAZY and isinstance(value, (str, bytes, Iterator, *CONTAINERS)):
            value = Drawn(bounds, value)
        result = plain.call_filter(name, value, args, kwargs, context=context)
        bounds.grow(weight(result))
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
        check_step(bounds, "%" if divides else name, value, [*args, *kwargs.values()])
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
    if len(form) > MAX_SHORT:
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
