"""What an answer must be: ``response_format``, tools and vLLM's fields, as one constraint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lserve_jax.sampling_params import StructuredOutputs
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.tool_calls import HERMES, ToolFormat, is_function_name
from lserve_jax.serve.tool_grammar import call_grammar

_CONSTRAINTS = ("json", "regex", "choice", "grammar")
# Fields of a chat's body that are read here; a completion has the last ones only.
FORMAT_FIELDS = (
    *("response_format", "structured_outputs"),
    *(f"guided_{name}" for name in _CONSTRAINTS),
)
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call")
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """What a request asks of the form of its answer."""

    constraint: StructuredOutputs | None
    source: str | None  # the field that asks for the constraint
    tools: list[dict[str, Any]] | None  # for the chat template; None: it shows none
    tool_format: ToolFormat | None  # in which calls are read; None: there are none


def answer_format(
    fields: Mapping[str, Any], form: ToolFormat | None, control_tokens: Mapping[str, int]
) -> AnswerFormat:
    """What ``fields`` of a body ask for: those of ``FORMAT_FIELDS`` and ``TOOL_FIELDS``.

    ``form`` is that of the chat template, if it is known; ``control_tokens`` are the tokenizer's.
    A field that is null is absent.

    Raises ``ApiError`` that names the field that is wrong or contradicts another one.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    constraints = _constraints(fields)
    if len(constraints) > 1:
        first, second = [*constraints][:2]
        _refuse(second, f"cannot be given together with {first}: both say what the answer must be")
    source, constraint = next(iter(constraints.items()), (None, None))
    functions, tools = _functions(fields)
    choice, name = _tool_choice(fields, functions)
    if choice == "none" or not functions:
        return AnswerFormat(constraint=constraint, source=source, tools=None, tool_format=None)
    if source not in (None, "response_format"):
        _refuse(source, "cannot be given together with tools: it leaves no room for a call")
    parallel = fields.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        _refuse("parallel_tool_calls", f"must be true or false, got {parallel!r:.100}")
    # A response format is that of an answer without calls; who forces a call gets no such answer.
    answer = None
    if choice == "auto":
        if form is None:
            _refuse(
                "tools",
                "with tool_choice 'auto' need a chat template that shows tool calls in a known "
                "way, and this model's does not; 'required' or a function's name forces a call",
            )
        if constraint is None:
            return AnswerFormat(constraint=None, source=None, tools=tools, tool_format=form)
        assert constraint.json is not None  # of all sources only a response format comes here
        answer = json.loads(str(constraint.json))
    grammar = call_grammar(
        form or HERMES,  # a model without a format of its own takes what it is forced to
        functions if name is None else {name: functions[name]},
        parallel=parallel and name is None,
        control_tokens=control_tokens,
        answer=answer,
    )
    return AnswerFormat(
        constraint=_constraint("grammar", grammar, "tools"),
        source="tools",
        tools=tools,
        tool_format=form or HERMES,
    )


def _constraints(fields: Mapping[str, Any]) -> dict[str, StructuredOutputs]:
    """What each field asks of the text, apart from tools; fields that ask nothing are left out."""
    found = {}
    if (schema := _response_schema(fields.get("response_format"))) is not None:
        found["response_format"] = _constraint("json", schema, "response_format")
    for name in _CONSTRAINTS:
        field = f"guided_{name}"
        if field in fields:
            found[field] = _constraint(name, fields[field], field)
    if "structured_outputs" in fields:
        where = "structured_outputs"
        given = _object(fields[where], where)
        given = {k: v for k, v in given.items() if v is not None and v is not False}
        if given.get("json_object") is True and "json" not in given:
            given = {"json": _ANY_OBJECT, **given}
            del given["json_object"]
        if len(given) != 1 or not set(given) <= set(_CONSTRAINTS):
            shown = ", ".join(sorted(map(str, given))) or "nothing"
            _refuse(
                where,
                f"must hold one of json, json_object, regex, choice and grammar, got {shown:.100}",
            )
        [(name, value)] = given.items()
        found[where] = _constraint(name, value, f"{where}.{name}")
    return found


def _response_schema(given: Any) -> Mapping[str, Any] | None:
    """The JSON schema of a response format; None for plain text."""
    if given is None:
        return None
    where = "response_format"
    kind = _object(given, where).get("type")
    if kind in ("text", "json_object"):
        for name in given:
            if name != "type":
                _refuse(f"{where}.{name:.100}", f"has no meaning where the type is {kind!r}")
        return _ANY_OBJECT if kind == "json_object" else None
    if kind != "json_schema":
        _refuse(
            f"{where}.type", f"must be 'text', 'json_object' or 'json_schema', got {kind!r:.100}"
        )
    described = _object(given.get("json_schema"), f"{where}.json_schema")
    return _object(described.get("schema"), f"{where}.json_schema.schema")


def _constraint(name: str, value: Any, where: str) -> StructuredOutputs:
    if name == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
            _refuse(where, f"must be a list of texts, got {value!r:.100}")
        value = tuple(value)
    elif not isinstance(value, str) and (name != "json" or not isinstance(value, Mapping)):
        kind = "a JSON schema" if name == "json" else "text"
        _refuse(where, f"must be {kind}, got {value!r:.100}")
    given: dict[str, Any] = {name: value}
    try:
        return StructuredOutputs(**given)
    except ValueError as error:
        _refuse(where, f"cannot be followed: {error}")


def _functions(
    fields: Mapping[str, Any],
) -> tuple[dict[str, Mapping[str, Any]], list[dict[str, Any]]]:
    """JSON schemas of arguments by the function's name, and the tools as templates show them."""
    for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
        if old in fields:
            _refuse(old, f"is OpenAI's old name: use {new}")
    given = fields.get("tools", [])
    if not isinstance(given, list):
        _refuse("tools", f"must be a list, got {given!r:.100}")
    functions: dict[str, Mapping[str, Any]] = {}
    tools = []
    for i, tool in enumerate(given):
        where = f"tools[{i}]"
        kind = _object(tool, where).get("type")
        if kind != "function":
            _refuse(f"{where}.type", f"must be 'function', got {kind!r:.100}")
        where = f"{where}.function"
        function = _object(tool.get("function"), where)
        name = function.get("name")
        if not is_function_name(name):
            _refuse(f"{where}.name", f"must be 1 to 64 letters, digits, _ and -, got {name!r:.100}")
        if name in functions:
            _refuse(f"{where}.name", f"is {name!r}, and so is that of a tool before it")
        schema = function.get("parameters")
        schema = {"properties": {}} if schema is None else _object(schema, f"{where}.parameters")
        if schema.get("type", "object") != "object":
            _refuse(
                f"{where}.parameters", f"must be a schema of an object, got {schema['type']!r:.100}"
            )
        functions[name] = {"type": "object", **schema}
        described = {"name": name}
        if (description := function.get("description")) is not None:
            described["description"] = _description(description, f"{where}.description")
        shown = {**described, "parameters": functions[name]}
        tools.append({"type": "function", "function": shown})
    return functions, tools


def _tool_choice(fields: Mapping[str, Any], functions: Mapping[str, Any]) -> tuple[str, str | None]:
    """``none``, ``auto``, ``required`` or ``function``, and with the last one its name."""
    where, name = "tool_choice", None
    choice = fields.get(where, "auto")
    if isinstance(choice, Mapping):
        name = _object(choice.get("function"), f"{where}.function").get("name")
        choice = choice.get("type")
    kinds = ("none", "auto", "required") if name is None else ("function",)
    if choice not in kinds:
        _refuse(
            where,
            "must be 'none', 'auto', 'required' or an object of the type 'function' that names "
            f"one, got {choice!r:.100}",
        )
    if choice in ("required", "function") and not functions:
        _refuse(where, "needs tools, and there are none")
    if name is not None and (not isinstance(name, str) or name not in functions):
        known = ", ".join(map(repr, functions))
        _refuse(f"{where}.function.name", f"is {name!r:.100}, but the tools are {known:.500}")
    return choice, name


def _description(value: Any, where: str) -> str:
    if not isinstance(value, str):
        _refuse(where, f"must be text, got {value!r:.100}")
    return value


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        _refuse(where, f"must be an object, got {value!r:.100}")
    return value


def _refuse(where: str, rule: str) -> NoReturn:
    raise ApiError(f"{where} {rule}", param=where)
