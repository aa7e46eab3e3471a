"""Answers of a given form, and tool calls, through a real client; the model's weights are random.

So nothing that is asked for here would come by itself.
"""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Literal

import httpx
import openai
import pydantic
import pytest
from served import MODEL, TEMPLATE, Served, byte_tokenizer, serve, tiny_llm

CHAT = [{"role": "user", "content": "Hello, sea."}]
ASKED = {"model": MODEL, "messages": CHAT, "max_tokens": 200, "seed": 3}


class Point(pydantic.BaseModel):
    name: Literal["left", "right"]
    x: Literal[1, 2, 30]
    seen: bool


POINT = Point.model_json_schema()
LETTERS = {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"]}


def tool(name: str, parameters: dict) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("move", {**LETTERS, "additionalProperties": False}), tool("stop", {"type": "object",
         "properties": {}, "additionalProperties": False})]  # fmt: skip
HERMES_TEMPLATE = (
    '{% if tools %}Call <tool_call>{"name": "f", "arguments": {}}</tool_call>: '
    "{{ tools | tojson }}\n{% endif %}" + TEMPLATE
)


@pytest.fixture(scope="module")
def calling() -> Iterator[openai.OpenAI]:
    """A client of a model whose template shows tools."""
    with (
        serve(tiny_llm(byte_tokenizer(HERMES_TEMPLATE))) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_chat_is_parsed(client):
    answer = client.chat.completions.parse(**ASKED, response_format=Point)
    (choice,) = answer.choices
    assert isinstance(choice.message.parsed, Point) and choice.finish_reason == "stop"


def test_a_response_is_parsed(client):
    asked = {"model": MODEL, "input": "Hello.", "max_output_tokens": 200, "text_format": Point}
    answer = client.responses.parse(**asked)
    assert isinstance(answer.output_parsed, Point) and answer.status == "completed"
    assert answer.text.format.type == "json_schema"
    with client.responses.stream(**asked) as events:
        assert isinstance(events.get_final_response().output_parsed, Point)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "matches"),
    [
        ({"guided_regex": "(ab|ba){3}!"}, "(ab|ba){3}!"),
        ({"guided_choice": ["calm sea", "high sea"]}, "(calm|high) sea"),
        ({"guided_grammar": 'start: "(" /[0-9]/ ")"'}, r"\([0-9]\)"),
        ({"guided_json": LETTERS | {"additionalProperties": False}}, r'\{\s*"x"\s*:\s*"[ab]"\s*\}'),
        ({"structured_outputs": {"regex": "[xy]{4}"}}, "[xy]{4}"),
        ({"response_format": {"type": "text"}, "guided_regex": "[xy]{4}"}, "[xy]{4}"),
    ],
)
def test_the_text_has_the_form_that_is_asked_for(client, fields, matches, stream):
    got = client.chat.completions.create(**ASKED, extra_body=fields, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in got]
        text = "".join(choice.delta.content or "" for choice in choices)
        reason = choices[-1].finish_reason
    else:
        text, reason = got.choices[0].message.content, got.choices[0].finish_reason
    assert re.fullmatch(matches, text)
    assert reason == "stop"


def test_a_completion_has_the_form_that_is_asked_for(client):
    got = client.completions.create(
        model=MODEL, prompt=["a", "b"], max_tokens=20, extra_body={"guided_regex": "[xy]{4}"}
    )
    assert all(re.fullmatch("[xy]{4}", choice.text) for choice in got.choices)


def test_any_object(client):
    """A text that max_tokens cuts is the beginning of one."""
    asked = {**ASKED, "max_tokens": 5, "response_format": {"type": "json_object"}}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.message.content.lstrip().startswith("{")
    assert choice.finish_reason in ("length", "stop")


def test_tokens_are_allowed_forbidden_and_preferred(client, served):
    ids = served.llm.tokenizer.encode("abc")
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 12, "seed": 1}
    allowed = client.completions.create(**asked, extra_body={"allowed_token_ids": ids})
    assert re.fullmatch("[abc]+", allowed.choices[0].text)
    forbidden = client.completions.create(
        **asked, extra_body={"allowed_token_ids": ids, "bad_words": ["a", "bc"]}
    )
    assert re.fullmatch("[bc]+", forbidden.choices[0].text)
    assert "bc" not in forbidden.choices[0].text
    preferred = client.completions.create(**asked, logit_bias={str(ids[0]): 100})
    assert preferred.choices[0].text == "a" * 12


def test_tools_are_called_when_they_must_be(calling):
    answer = calling.chat.completions.create(**ASKED, tools=TOOLS, tool_choice="required")
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    for call in choice.message.tool_calls:
        arguments = json.loads(call.function.arguments)
        assert call.type == "function" and call.id
        assert (call.function.name, arguments) in [
            *(("move", {"x": letter}) for letter in "ab"),
            ("stop", {}),
        ]


@pytest.mark.parametrize("name", ["move", "stop"])
def test_a_function_is_forced_and_streamed(calling, name):
    named = {"type": "function", "function": {"name": name}}
    asked = {**ASKED, "tools": TOOLS, "tool_choice": named}
    whole = calling.chat.completions.create(**asked).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name == name
    with calling.chat.completions.stream(**asked) as events:
        final = events.get_final_completion().choices[0]
    (streamed,) = final.message.tool_calls
    assert streamed.function.name == name
    assert streamed.function.arguments == call.function.arguments
    assert final.finish_reason == whole.finish_reason == "tool_calls"


def test_a_model_may_call_or_not(calling):
    """With random weights it does not: its text is content, whole and streamed."""
    asked = {**ASKED, "max_tokens": 20, "tools": TOOLS}
    whole = calling.chat.completions.create(**asked).choices[0]
    assert whole.message.content and not whole.message.tool_calls
    chunks = [*calling.chat.completions.create(**asked, stream=True)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.message.content


def test_tools_are_part_of_the_prompt_and_calls_of_the_conversation(calling):
    bare = calling.chat.completions.create(**ASKED).usage.prompt_tokens
    shown = calling.chat.completions.create(**ASKED, tools=TOOLS).usage.prompt_tokens
    hidden = calling.chat.completions.create(**ASKED, tools=TOOLS, tool_choice="none").usage
    assert shown > bare == hidden.prompt_tokens
    call = {"id": "call_1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    assert calling.chat.completions.create(**{**ASKED, "messages": messages, "tools": TOOLS})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"guided_json": {"type": "no-type"}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"tools": TOOLS}, "tools"),  # the template of this model shows none
        ({"functions": []}, "functions"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(served: Served, fields, param):
    body = {**ASKED, **fields}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=None)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"].startswith(param), error
    assert param in error["message"]
    assert len(error["message"]) < 1000


def test_others_go_on_while_a_schema_is_compiled(served: Served, client, monkeypatch):
    """A grammar is compiled beside the event loop and beside the engine's thread."""
    make = served.service.engine.text.constraints._compile
    begun, may_end = threading.Event(), threading.Event()

    def slow(wanted):
        begun.set()
        may_end.wait()
        return make(wanted)

    constraints = served.service.engine.text.constraints
    monkeypatch.setattr(constraints, "_compiled", slow)

    async def ask() -> tuple[str, str]:
        base = {"base_url": f"{served.url}/v1", "api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(**base) as both:
            form = {"guided_regex": "[xy]{4}"}
            held = asyncio.ensure_future(both.chat.completions.create(**ASKED, extra_body=form))
            await asyncio.to_thread(begun.wait)
            other = await both.chat.completions.create(**{**ASKED, "max_tokens": 3})
            may_end.set()
            return (await held).choices[0].message.content, other.choices[0].finish_reason

    text, reason = asyncio.run(ask())
    assert re.fullmatch("[xy]{4}", text) and reason == "length"
