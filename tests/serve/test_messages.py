"""OpenAI's messages as templates take them, and what is refused by name."""

import json

import pytest

from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.messages import template_messages
from lserve_jax.serve.tool_calls import HERMES, MISTRAL

USER = {"role": "user", "content": "Hi"}


def call(call_id: str = "call_1", name: str = "f", arguments: object = '{"x": [1]}') -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def converted(*messages: dict) -> list[dict]:
    return template_messages(messages, HERMES)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (USER, USER),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({**USER, "content": ""}, {**USER, "content": ""}),
        ({**USER, "content": []}, {**USER, "content": ""}),
        ({**USER, "content": [{"type": "text", "text": "Hi"}]}, USER),
        (
            {
                "role": "system",
                "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": " b"}],
            },
            {"role": "system", "content": "a\n b"},
        ),
        ({**USER, "name": "ann", "id": 5, "cache_control": {}}, {**USER, "name": "ann"}),
        # An answer of the openai package, sent back as it came.
        (
            {
                "role": "assistant",
                "content": "Yes.",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            },
            {"role": "assistant", "content": "Yes."},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b", "tool_calls": []},
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
        ),
    ],
)
def test_messages_become_those_of_templates(message, expected):
    assert converted(message) == [expected]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_and_their_results(content):
    given = [
        USER,
        {"role": "assistant", **content, "tool_calls": [call(), call("call_2", "g", "")]},
        {"role": "tool", "tool_call_id": "call_2", "content": "42"},
        {"role": "tool", "tool_call_id": "call_1", "name": "own", "content": "43"},
        {"role": "tool", "tool_call_id": "call_3", "content": "44"},
    ]
    before = json.dumps(given)
    assert converted(*given) == [
        USER,
        {
            "role": "assistant",
            "tool_calls": [call(arguments={"x": [1]}), call("call_2", "g", {})],
            "content": "",
        },
        {"role": "tool", "content": "42", "tool_call_id": "call_2", "name": "g"},
        {"role": "tool", "name": "own", "content": "43", "tool_call_id": "call_1"},
        {"role": "tool", "content": "44", "tool_call_id": "call_3"},
    ]
    assert json.dumps(given) == before


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_arguments_may_be_an_object_already(arguments):
    [message] = converted({"role": "assistant", "tool_calls": [call(arguments=arguments)]})
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_mistral_templates_get_ids_of_nine_letters_and_digits():
    ids = ["abcDEF123", "call_123456", "call_1234567", "abcdef-12", ""]
    given = [
        {"role": "assistant", "tool_calls": [call(i) for i in ids]},
        *({"role": "tool", "tool_call_id": i, "content": ""} for i in ids),
    ]
    assistant, *results = template_messages(given, MISTRAL)
    called = [c["id"] for c in assistant["tool_calls"]]
    assert called == [result["tool_call_id"] for result in results]
    assert called[0] == "abcDEF123" and len(set(called)) == len(ids)
    assert all(len(i) == 9 and i.isascii() and i.isalnum() for i in called)
    assert [r["name"] for r in results] == ["f"] * len(ids)
    same, *_ = template_messages(given[:1], None)
    assert [c["id"] for c in same["tool_calls"]] == ids


@pytest.mark.parametrize(
    ("message", "field", "rule"),
    [
        ({}, "role", "must be 'system', .* or 'tool', got None"),
        ({"role": "ipython", "content": ""}, "role", "got 'ipython'"),
        ({"role": ["user"], "content": ""}, "role", "got"),
        ({"role": "function", "name": "f", "content": ""}, "role", "the role 'tool'"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "function_call", "tool_calls"),
        ({"role": "user"}, "content", "must be text or a list of parts, got None"),
        ({"role": "assistant", "content": None}, "content", "must be text"),
        ({"role": "user", "content": 5}, "content", "must be text or a list of parts, got 5"),
        ({"role": "user", "content": ["a"]}, "content[0]", "of the type 'text', got None"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "content[1]",
            "must be a part of the type 'text', got 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text", "must be text"),
        ({"role": "user", "content": "", "name": 5}, "name", "must be text, got 5"),
        ({"role": "user", "content": "", "tool_calls": [call()]}, "tool_calls", "calls nothing"),
        ({"role": "tool", "content": "4"}, "tool_call_id", "must be text, got None"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "tool_calls", "must be a list"),
        (
            {"role": "assistant", "tool_calls": [5]},
            "tool_calls[0]",
            "of the type 'function', got 5",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "x", "type": "custom"}]},
            "tool_calls[0]",
            "of the type 'function'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "x"}]},
            "tool_calls[0].function",
            "must be an object, got None",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            "tool_calls[0].id",
            "must be text",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "x", "function": {}}]},
            "tool_calls[0].function.name",
            "must be text",
        ),
        *(
            (
                {"role": "assistant", "tool_calls": [call(), call(arguments=wrong)]},
                "tool_calls[1].function.arguments",
                rule,
            )
            for wrong, rule in (
                ("{", "must be JSON"),
                ("[1]", "must be a JSON object"),
                ("5", "must be a JSON object"),
                ([1], "must be a JSON object"),
                ("[" * 100_000, "must be JSON"),
            )
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(message, field, rule):
    with pytest.raises(ApiError, match=rule) as error:
        converted(USER, message)
    assert error.value.param == f"messages[1].{field}"
    assert str(error.value).startswith(f"messages[1].{field} ")
    assert error.value.status == 400 and len(str(error.value)) < 300
