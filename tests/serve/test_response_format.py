"""What an answer must be, from all the fields that can say it."""

import json

import pytest

from lserve_jax.sampling_params import StructuredOutputs
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.response_format import FORMAT_FIELDS, AnswerFormat, answer_format
from lserve_jax.serve.tool_calls import HERMES, LLAMA3_JSON, ToolFormat
from lserve_jax.serve.tool_grammar import call_grammar

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
NOTHING = AnswerFormat(constraint=None, source=None, tools=None, tool_format=None)


def tool(name: str, **function: object) -> dict:
    return {"type": "function", "function": {"name": name, **function}}


TOOLS = [tool("f", parameters=SCHEMA, description="d", strict=True), tool("g")]
SHOWN = [
    tool("f", description="d", parameters=SCHEMA),
    tool("g", parameters={"type": "object", "properties": {}}),
]
FUNCTIONS = {shown["function"]["name"]: shown["function"]["parameters"] for shown in SHOWN}


def asked(form: ToolFormat | None = LLAMA3_JSON, **fields: object) -> AnswerFormat:
    return answer_format(fields, form, {})


def named(name: object) -> dict:
    return {"type": "function", "function": {"name": name}}


# --- without tools ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({}, None),
        ({"response_format": None, "tools": None, "tool_choice": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputs(json={"type": "object"})),
        ({"response_format": JSON_SCHEMA}, StructuredOutputs(json=SCHEMA)),
        ({"guided_json": SCHEMA}, StructuredOutputs(json=SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, StructuredOutputs(json=json.dumps(SCHEMA))),
        ({"guided_regex": "[ab]+"}, StructuredOutputs(regex="[ab]+")),
        ({"guided_choice": ["yes", "no"]}, StructuredOutputs(choice=("yes", "no"))),
        ({"guided_grammar": 'start: "a"'}, StructuredOutputs(grammar='start: "a"')),
        ({"structured_outputs": {"regex": "a", "json": None}}, StructuredOutputs(regex="a")),
        (
            {"structured_outputs": {"choice": ["a"], "json_object": False}},
            StructuredOutputs(choice=("a",)),
        ),
        ({"structured_outputs": {"json_object": True}}, StructuredOutputs(json={"type": "object"})),
        # Nothing is contradictory about tools that cannot be called.
        ({"tools": [], "tool_choice": "auto"}, None),
        ({"tool_choice": "none", "parallel_tool_calls": False}, None),
        (
            {"tools": TOOLS, "tool_choice": "none", "guided_regex": "a"},
            StructuredOutputs(regex="a"),
        ),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, StructuredOutputs(regex="a")),
    ],
)
def test_one_field_says_what_the_answer_must_be(fields, constraint):
    source = None
    if constraint is not None:
        [source] = [n for n in FORMAT_FIELDS if fields.get(n) not in (None, {"type": "text"})]
    expected = AnswerFormat(constraint=constraint, source=source, tools=None, tool_format=None)
    assert asked(**fields) == expected
    assert asked(None, **fields) == expected


# --- tools ------------------------------------------------------------------------------------


def test_a_model_may_call_tools_or_not():
    expected = AnswerFormat(constraint=None, source=None, tools=SHOWN, tool_format=LLAMA3_JSON)
    assert asked(tools=TOOLS) == asked(tools=TOOLS, tool_choice="auto") == expected
    assert asked(tools=TOOLS, parallel_tool_calls=False) == expected


@pytest.mark.parametrize("parallel", [None, True, False])
def test_a_call_is_forced(parallel):
    grammar = call_grammar(
        LLAMA3_JSON, FUNCTIONS, parallel=parallel is not False, control_tokens={}
    )
    expected = AnswerFormat(
        constraint=StructuredOutputs(grammar=grammar),
        source="tools",
        tools=SHOWN,
        tool_format=LLAMA3_JSON,
    )
    given = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel}
    assert asked(**given) == expected
    # The response format is that of an answer that is no call.
    assert asked(**given, response_format=JSON_SCHEMA) == expected


def test_one_function_is_forced_and_called_once():
    grammar = call_grammar(LLAMA3_JSON, {"g": FUNCTIONS["g"]}, parallel=False, control_tokens={})
    got = asked(tools=TOOLS, tool_choice=named("g"), parallel_tool_calls=True)
    assert got == AnswerFormat(
        constraint=StructuredOutputs(grammar=grammar),
        source="tools",
        tools=SHOWN,
        tool_format=LLAMA3_JSON,
    )


@pytest.mark.parametrize("name", ["auto", "none", "required", "function"])
def test_a_function_may_have_the_name_of_a_choice(name):
    got = asked(tools=[tool(name), tool("f")], tool_choice=named(name))
    assert got.constraint is not None and got.constraint.grammar is not None
    assert f'"name\\": \\"{name}\\"' in got.constraint.grammar.replace("\\\\", "\\")
    assert '\\"f\\"' not in got.constraint.grammar


def test_a_model_without_a_format_can_be_forced_only():
    got = asked(None, tools=TOOLS, tool_choice="required")
    assert got.tool_format == HERMES
    grammar = call_grammar(HERMES, FUNCTIONS, parallel=True, control_tokens={})
    assert got.constraint == StructuredOutputs(grammar=grammar)
    with pytest.raises(ApiError, match="need a chat template that shows tool calls") as error:
        asked(None, tools=TOOLS)
    assert error.value.param == "tools"


def test_tools_beside_a_response_format_leave_the_choice():
    answer = call_grammar(LLAMA3_JSON, FUNCTIONS, parallel=False, control_tokens={}, answer=SCHEMA)
    got = asked(tools=TOOLS, parallel_tool_calls=False, response_format=JSON_SCHEMA)
    assert got.constraint == StructuredOutputs(grammar=answer)


def test_markers_are_the_tokens_of_the_tokenizer():
    fields = {"tools": TOOLS, "tool_choice": "required"}
    got = answer_format(fields, HERMES, {"<tool_call>": 7, "<|im_end|>": 8})
    assert got.constraint is not None and got.constraint.grammar is not None
    assert "<[7]>" in got.constraint.grammar and '"</tool_call>"' in got.constraint.grammar


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "rule"),
    [
        ({"response_format": "json"}, "response_format", "must be an object, got 'json'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "got 'xml'"),
        ({"response_format": {}}, "response_format.type", "got None"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "must be an object, got None",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "must be an object, got None",
        ),
        ({"guided_json": 5}, "guided_json", "must be a JSON schema, got 5"),
        ({"guided_regex": ["a"]}, "guided_regex", "must be text"),
        ({"guided_choice": "ab"}, "guided_choice", "must be a list of texts"),
        ({"guided_choice": []}, "guided_choice", "must be a list of texts"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "must be a list of texts"),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, .* got nothing"),
        ({"structured_outputs": 5}, "structured_outputs", "must be an object"),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs",
            "got structural_tag",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs",
            "got choice, regex",
        ),
        (
            {"structured_outputs": {"json": {}, "json_object": True}},
            "structured_outputs",
            "got json, json_object",
        ),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "must be text, got 5"),
        (
            {"guided_regex": "a", "response_format": JSON_SCHEMA},
            "guided_regex",
            "cannot be given together with response_format",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "with guided_regex"),
        (
            {"guided_regex": "a", "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "with guided_regex",
        ),
        ({"guided_regex": "a", "tools": TOOLS}, "guided_regex", "together with tools"),
        (
            {"structured_outputs": {"regex": "a"}, "tools": TOOLS, "tool_choice": "required"},
            "structured_outputs",
            "together with tools",
        ),
        ({"functions": []}, "functions", "old name: use tools"),
        ({"function_call": "auto"}, "function_call", "old name: use tool_choice"),
        ({"tools": tool("f")}, "tools", "must be a list"),
        ({"tools": [5]}, "tools[0]", "must be an object, got 5"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function', got 'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "must be an object"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "letters, digits, _ and -"),
        ({"tools": [tool("f"), tool(5)]}, "tools[1].function.name", "got 5"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name", "is 'f', and so is"),
        (
            {"tools": [tool("f", description=5)]},
            "tools[0].function.description",
            "must be text, got 5",
        ),
        (
            {"tools": [tool("f", parameters="x")]},
            "tools[0].function.parameters",
            "must be an object, got 'x'",
        ),
        (
            {"tools": [tool("f", parameters={"type": "array"})]},
            "tools[0].function.parameters",
            "must be a schema of an object, got 'array'",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [], "tool_choice": named("f")}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "got 'any'"),
        ({"tools": TOOLS, "tool_choice": "function"}, "tool_choice", "got 'function'"),
        ({"tools": TOOLS, "tool_choice": 5}, "tool_choice", "got 5"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "function": {}}},
            "tool_choice",
            "got 'allowed_tools'",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function"}},
            "tool_choice.function",
            "must be an object",
        ),
        ({"tools": TOOLS, "tool_choice": named(None)}, "tool_choice", "that names one"),
        (
            {"tools": TOOLS, "tool_choice": named("h")},
            "tool_choice.function.name",
            "is 'h', but the tools are 'f', 'g'",
        ),
        (
            {"tools": TOOLS, "tool_choice": named(["f"])},
            "tool_choice.function.name",
            "but the tools are",
        ),
        (
            {"tools": TOOLS, "parallel_tool_calls": "no"},
            "parallel_tool_calls",
            "must be true or false, got 'no'",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(fields, param, rule):
    with pytest.raises(ApiError, match=rule) as error:
        asked(**fields)
    assert error.value.param == param and error.value.status == 400
    assert str(error.value).startswith(f"{param} ")
