"""openai: chats, completions, responses, their helpers, tools and errors; blocking and async."""

import asyncio
from typing import Literal

import openai
from plain import BASE_URL, CHAT, LENGTH, MODEL, QUESTION, chat, chat_text, completion_text
from pydantic import BaseModel

GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": LENGTH}


class Sea(BaseModel):
    name: Literal["North Sea", "Baltic Sea"]
    salty: bool


TOOL = {
    "type": "function",
    "function": {
        "name": "depth",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"sea": {"enum": ["North Sea", "Baltic Sea"]}},
            "required": ["sea"],
            "additionalProperties": False,
        },
    },
}


def chats(client: openai.OpenAI) -> None:
    expected = chat(CHAT)
    text = expected["choices"][0]["message"]["content"]
    answer = client.chat.completions.create(messages=CHAT, **GREEDY)
    assert answer.choices[0].message.content == text
    assert answer.usage.total_tokens == expected["usage"]["total_tokens"]
    chunks = list(
        client.chat.completions.create(
            messages=CHAT, **GREEDY, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == answer.usage
    with client.chat.completions.stream(messages=CHAT, **GREEDY) as stream:
        events = list(stream)
    assert "".join(e.delta for e in events if e.type == "content.delta") == text
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    answer = client.chat.completions.create(
        messages=[{"role": "developer", "content": "Be brief."}, *parts],
        **{**GREEDY, "max_tokens": None},
        max_completion_tokens=LENGTH,
        logprobs=True,
        top_logprobs=2,
        seed=1,
        user="somebody",
        stop=["\n\n"],
        extra_body={"top_k": 5, "ignore_eos": True, "min_tokens": 2},
    )
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    answer = client.chat.completions.create(
        messages=CHAT, **{**GREEDY, "temperature": 1}, n=3, seed=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def completions(client: openai.OpenAI) -> None:
    text = completion_text(QUESTION)
    assert client.completions.create(prompt=QUESTION, **GREEDY).choices[0].text == text
    chunks = client.completions.create(prompt=QUESTION, **GREEDY, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    echoed = client.completions.create(prompt=QUESTION, **GREEDY, echo=True, logprobs=1)
    assert echoed.choices[0].text == QUESTION + text
    assert echoed.choices[0].logprobs.token_logprobs[0] is None


def responses(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": LENGTH}
    answer = client.responses.create(**asked)
    assert answer.output_text == chat_text() and answer.usage.output_tokens == LENGTH
    events = list(client.responses.create(**asked, stream=True))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text
    # The helper has no final response where max_output_tokens ends it: this one ends at a letter.
    stop = answer.output_text[12]
    with client.responses.stream(**asked, extra_body={"stop": stop}) as stream:
        assert stream.get_final_response().output_text == chat_text(stop=stop)
    sea = client.responses.parse(**{**asked, "max_output_tokens": 200}, text_format=Sea)
    assert isinstance(sea.output_parsed, Sea)


def structured(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": CHAT, "max_tokens": 200, "temperature": 0}
    answer = client.chat.completions.parse(**asked, response_format=Sea)
    assert isinstance(answer.choices[0].message.parsed, Sea)
    with client.chat.completions.stream(**asked, response_format=Sea) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert parsed == answer.choices[0].message.parsed


def tools(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "max_tokens": 200, "temperature": 0, "tools": [TOOL]}
    asked["parallel_tool_calls"] = False  # a random model would go on calling
    for choice in ("required", {"type": "function", "function": {"name": "depth"}}):
        answer = client.chat.completions.parse(messages=CHAT, **asked, tool_choice=choice)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.tool_calls and message.content is None
        call = message.tool_calls[0]
        assert call.function.name == "depth"
        assert call.function.parsed_arguments["sea"] in ("North Sea", "Baltic Sea")
        with client.chat.completions.stream(messages=CHAT, **asked, tool_choice=choice) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert streamed.finish_reason == "tool_calls"
        assert [c.function.arguments for c in streamed.message.tool_calls] == [
            c.function.arguments for c in message.tool_calls
        ]
    told = [{"role": "tool", "tool_call_id": c.id, "content": "700"} for c in message.tool_calls]
    turn = message.model_dump(exclude_none=True)
    answer = client.chat.completions.create(
        messages=[*CHAT, turn, *told], **{**asked, "max_tokens": LENGTH}, tool_choice="none"
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def errors(client: openai.OpenAI) -> None:
    for error, fields, said in (
        (openai.BadRequestError, {"extra_body": {"no_such": 1}}, "no_such"),
        (openai.BadRequestError, {"temperature": -1.0}, "temperature"),
        (openai.NotFoundError, {"model": "another"}, "another"),
    ):
        try:
            client.chat.completions.create(messages=CHAT, **{**GREEDY, **fields})
        except error as raised:
            assert said in raised.message and raised.body["message"], raised
        else:
            raise AssertionError(f"{fields} was taken")


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(base_url=BASE_URL, api_key="none") as client:
        asked = client.chat.completions.create(messages=CHAT, **GREEDY)
        stream = await client.chat.completions.create(messages=CHAT, **GREEDY, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == (await asked).choices[0].message.content == chat_text()
        response = await client.responses.create(
            model=MODEL, input=CHAT, temperature=0, max_output_tokens=LENGTH
        )
        assert response.output_text == text


with openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0) as client:
    assert [model.id for model in client.models.list()] == [MODEL]
    for part in (chats, completions, responses, structured, tools, errors):
        part(client)
asyncio.run(asynchronous())
