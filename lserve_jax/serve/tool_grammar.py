"""Grammars, in llguidance's Lark, of answers that must be tool calls."""

import json
from collections.abc import Mapping
from typing import Any

from lserve_jax.serve.tool_calls import LLAMA3_JSON, ToolFormat

# Templates show calls as Python's json writes them. Without this a model may go on with white
# space for ever.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords by which an object may have properties that "properties" does not name.
_OPEN = frozenset(
    {
        *("additionalProperties", "unevaluatedProperties", "patternProperties", "minProperties"),
        *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "dependentSchemas", "dependentRequired"),
    }
)


def call_grammar(
    form: ToolFormat,
    functions: Mapping[str, Mapping[str, Any]],
    *,
    parallel: bool,
    control_tokens: Mapping[str, int],
    answer: Mapping[str, Any] | None = None,
) -> str:
    """The grammar of one or more calls of ``functions``, JSON schemas of their arguments by name.

    A call has no arguments but those that the function's schema names, unless it speaks of others.
    ``parallel`` allows several calls. ``control_tokens`` are the tokenizer's: where a marker of the
    format is one, it must be that token. With ``answer``, a JSON schema, the whole text may be
    JSON of it instead.
    """
    names = [*functions]
    schemas = [
        f"args_{i}: %json {_schema(_arguments(functions[name]))}" for i, name in enumerate(names)
    ]
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(names)))}"]
    tokens = {text: _marker(text, control_tokens) for text in form.markers}
    if form.arguments_marker:
        # The model chooses the id; the server gives the call one of its own.
        call_id = f"{tokens[form.id_marker]} /[a-zA-Z0-9]{{9}}/ " if form.id_marker else ""
        behind = f"{call_id}{tokens[form.arguments_marker]}"
        rules += [
            f"call_{i}: {tokens[form.marker]} {_text(name)} {behind} args_{i}"
            for i, name in enumerate(names)
        ]
        calls = "call+" if parallel else "call"
    else:
        key = "parameters" if form is LLAMA3_JSON else "arguments"
        before, after, between = _frame(form, tokens)
        rules += [
            f'call_{i}: {_text(f'{{"name": {json.dumps(name)}, "{key}": ')} args_{i} "}}"'
            for i, name in enumerate(names)
        ]
        calls = f"{before} call {f'({between} call)* ' if parallel else ''}{after}"
    start = [f"start: {calls}"]
    if answer is not None:
        start = [f"start: {calls} | answer", f"answer: %json {_schema(answer)}"]
    return "\n".join([*start, *rules, *schemas]) + "\n"


def _frame(form: ToolFormat, tokens: Mapping[str, str]) -> tuple[str, str, str]:
    """What stands before the first call, behind the last one, and between two."""
    if form.bare:
        return "", "", '"; "'
    marker = tokens[form.marker]
    if form.closer:
        before, after = f'{marker} "\\n"', f'"\\n" {tokens[form.closer]}'
        return before, after, f'{after} "\\n" {before}'
    return f'{marker} " "? "["', '"]"', '", "'


def _marker(text: str, control_tokens: Mapping[str, int]) -> str:
    return f"<[{control_tokens[text]}]>" if text in control_tokens else _text(text)


def _text(text: str) -> str:
    return json.dumps(text)


def _arguments(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Clients leave ``additionalProperties`` out, and a weak model adds arguments without end."""
    named, required = schema.get("properties"), schema.get("required", [])
    if _OPEN & schema.keys() or not isinstance(named, Mapping) or not isinstance(required, list):
        return schema
    if any(not isinstance(name, str) or name not in named for name in required):
        return schema
    return {**schema, "additionalProperties": False}


def _schema(schema: Mapping[str, Any]) -> str:
    return json.dumps({"x-guidance": _WRITTEN, **schema})
