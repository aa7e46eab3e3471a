"""openai-agents: both of its model classes, streams, an output type, and a tool's round trip."""

import asyncio
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from plain import BASE_URL, LENGTH, MODEL, QUESTION, chat_text
from pydantic import BaseModel

set_tracing_disabled(True)  # traces go to OpenAI
called = []


class Sea(BaseModel):
    name: Literal["North Sea", "Baltic Sea"]
    salty: bool


@function_tool
def depth(sea: Literal["North Sea", "Baltic Sea"]) -> int:
    """The depth of a sea in metres."""
    called.append(sea)
    return {"North Sea": 700, "Baltic Sea": 459}[sea]


async def main() -> None:
    client = AsyncOpenAI(base_url=BASE_URL, api_key="none")
    chats = OpenAIChatCompletionsModel(MODEL, openai_client=client)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
    ]
    # It takes no answer from /v1/responses that max_tokens ends, so this one ends at a letter.
    stop = chat_text(asked)[12]
    expected = chat_text(asked, stop=stop)
    short = ModelSettings(temperature=0, max_tokens=LENGTH, extra_body={"stop": stop})
    for model in (chats, OpenAIResponsesModel(MODEL, openai_client=client)):
        agent = Agent("sailor", instructions="Be brief.", model=model, model_settings=short)
        answer = await Runner.run(agent, QUESTION)
        assert answer.final_output == expected
        assert 0 < answer.context_wrapper.usage.output_tokens < LENGTH
        streamed = Runner.run_streamed(agent, QUESTION)
        events = [event async for event in streamed.stream_events()]
        deltas = [
            event.data.delta
            for event in events
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
        assert "".join(deltas) == streamed.final_output == expected

    settings = ModelSettings(temperature=0, max_tokens=200)
    agent = Agent("sailor", model=chats, model_settings=settings, output_type=Sea)
    assert isinstance((await Runner.run(agent, QUESTION)).final_output, Sea)

    settings = ModelSettings(
        temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False
    )
    agent = Agent("sailor", model=chats, model_settings=settings, tools=[depth])
    answer = await Runner.run(agent, QUESTION)  # a call first, then it may answer
    assert called and isinstance(answer.final_output, str)


asyncio.run(main())
