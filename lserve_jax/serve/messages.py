"""OpenAI's messages as chat templates take them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.tool_calls import ToolFormat

# Of each role, that which templates know.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text")  # the last two are those of /v1/responses


def template_messages(
    messages: Sequence[Mapping[str, Any]], form: ToolFormat | None
) -> list[dict[str, Any]]:
    """``messages`` with contents that are text, arguments that are objects, and roles that
    templates know.

    ``form`` is that of the template's tool calls: Mistral's take ids of one length only. A field
    that is null is absent; one that is not known is left out.

    Raises ``ApiError`` that names the field, as ``messages[2].content``.
    """
    names: dict[str, str] = {}  # of the functions called so far, by the call's id
    return [_message(message, f"messages[{i}]", form, names) for i, message in enumerate(messages)]


def _message(
    given: Mapping[str, Any], where: str, form: ToolFormat | None, names: dict[str, str]
) -> dict[str, Any]:
    given = {name: value for name, value in given.items() if value is not None}
    role = given.get("role")
    if role == "function" or "function_call" in given:
        field = "role" if role == "function" else "function_call"
        _refuse(f"{where}.{field}", "is OpenAI's old way: use tool_calls, and the role 'tool'")
    if not isinstance(role, str) or role not in _ROLES:
        *others, last = map(repr, _ROLES)
        _refuse(f"{where}.role", f"must be {', '.join(others)} or {last}, got {role!r:.100}")
    out: dict[str, Any] = {"role": _ROLES[role]}
    for name in ("name", "reasoning_content"):
        if name in given:
            out[name] = _text(given[name], f"{where}.{name}")
    calls = given.get("tool_calls", [])
    if calls:
        if role != "assistant":
            _refuse(f"{where}.tool_calls", f"must be absent: the role {role!r} calls nothing")
        out["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls", form, names)
    # Templates append contents to texts, so a call without content has an empty one.
    content = given.get("content", "" if calls else None)
    out["content"] = _content(content, f"{where}.content")
    if role == "tool":
        call_id = _text(given.get("tool_call_id"), f"{where}.tool_call_id")
        out["tool_call_id"] = form.own_id(call_id) if form else call_id
        if call_id in names:  # some templates show it, and clients do not send it
            out.setdefault("name", names[call_id])
    return out


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(where, f"must be text or a list of parts, got {content!r:.100}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS:
            _refuse(f"{where}[{i}]", f"must be a part of the type 'text', got {kind!r:.100}")
        texts.append(_text(part.get("text"), f"{where}[{i}].text"))
    return "\n".join(texts)  # as vLLM joins them


def _tool_calls(
    calls: Any, where: str, form: ToolFormat | None, names: dict[str, str]
) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        _refuse(where, f"must be a list, got {calls!r:.100}")
    return [_tool_call(call, f"{where}[{i}]", form, names) for i, call in enumerate(calls)]


def _tool_call(
    call: Any, where: str, form: ToolFormat | None, names: dict[str, str]
) -> dict[str, Any]:
    if not isinstance(call, Mapping) or call.get("type", "function") != "function":
        _refuse(where, f"must be a call of the type 'function', got {call!r:.100}")
    call_id = _text(call.get("id"), f"{where}.id")
    function = call.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{where}.function", f"must be an object, got {function!r:.100}")
    name = _text(function.get("name"), f"{where}.function.name")
    names[call_id] = name
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    return {
        "id": form.own_id(call_id) if form else call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    """Arguments come as JSON text; no text is that of a function without any."""
    value = arguments or {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            _refuse(where, f"must be JSON, got {arguments!r:.100}")
    if not isinstance(value, Mapping):
        _refuse(where, f"must be a JSON object, got {arguments!r:.100}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        _refuse(where, f"must be text, got {value!r:.100}")
    return value


def _refuse(where: str, rule: str) -> NoReturn:
    raise ApiError(f"{where} {rule}", param=where)
