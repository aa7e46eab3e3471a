"""langchain-openai: chats, completions, responses, structured output and tools."""

import asyncio
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from plain import BASE_URL, LENGTH, MODEL, QUESTION, chat_text, completion_text
from pydantic import BaseModel

SERVER = {"model": MODEL, "base_url": BASE_URL, "api_key": "none", "temperature": 0}


class Sea(BaseModel):
    """A sea."""

    name: Literal["North Sea", "Baltic Sea"]
    salty: bool


@tool
def depth(sea: Literal["North Sea", "Baltic Sea"]) -> int:
    """The depth of a sea in metres."""
    return {"North Sea": 700, "Baltic Sea": 459}[sea]


expected = chat_text()
model = ChatOpenAI(**SERVER, max_tokens=LENGTH)
answer = model.invoke(QUESTION)
assert answer.content == expected and answer.usage_metadata["output_tokens"] == LENGTH
assert answer.response_metadata["finish_reason"] == "length"
assert "".join(chunk.content for chunk in model.stream(QUESTION)) == expected
assert asyncio.run(model.ainvoke(QUESTION)).content == expected
assert [a.content for a in model.batch([QUESTION] * 3)] == [expected] * 3
logprobs = model.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]
assert len(logprobs["content"]) == LENGTH

texts = OpenAI(**SERVER, max_tokens=LENGTH)
assert texts.invoke(QUESTION) == completion_text(QUESTION)
assert "".join(texts.stream(QUESTION)) == completion_text(QUESTION)

answers = ChatOpenAI(**SERVER, max_tokens=LENGTH, use_responses_api=True)
assert answers.invoke(QUESTION).text == expected
assert "".join(chunk.text for chunk in answers.stream(QUESTION)) == expected

longer = ChatOpenAI(**SERVER, max_tokens=200)
for method in ("json_schema", "function_calling"):
    assert isinstance(longer.with_structured_output(Sea, method=method).invoke(QUESTION), Sea)
(call,) = longer.bind_tools([depth], tool_choice="depth", strict=True).invoke(QUESTION).tool_calls
assert call["name"] == "depth" and depth.invoke(call["args"]) in (700, 459)
