"""pydantic-ai: text, output types by tools and by schema, streams, responses."""

import asyncio
from typing import Literal

from plain import BASE_URL, LENGTH, MODEL, QUESTION, chat_text
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=BASE_URL, api_key="none")
CHATS = OpenAIChatModel(MODEL, provider=PROVIDER)
SHORT = {"temperature": 0, "max_tokens": LENGTH}
LONG = {"temperature": 0, "max_tokens": 200}


class Sea(BaseModel):
    name: Literal["North Sea", "Baltic Sea"]
    salty: bool


async def streamed(agent: Agent) -> str:
    async with agent.run_stream(QUESTION) as answer:
        return "".join([text async for text in answer.stream_text(delta=True, debounce_by=None)])


expected = chat_text()
for model in (CHATS, OpenAIResponsesModel(MODEL, provider=PROVIDER)):
    agent = Agent(model, model_settings=SHORT)
    answer = agent.run_sync(QUESTION)
    assert answer.output == expected and answer.usage.output_tokens == LENGTH
    assert asyncio.run(streamed(agent)) == expected

for output in (Sea, ToolOutput(Sea, strict=True), NativeOutput(Sea, strict=True)):
    assert isinstance(
        Agent(CHATS, output_type=output, model_settings=LONG).run_sync(QUESTION).output, Sea
    )

try:
    Agent(OpenAIChatModel("another", provider=PROVIDER)).run_sync(QUESTION)
except ModelHTTPError as error:
    assert error.status_code == 404 and "another" in str(error.body)
else:
    raise AssertionError("another model was taken")
