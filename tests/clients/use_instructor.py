"""instructor: its modes that need no luck of the model."""

from typing import Literal

import instructor
import openai
from plain import BASE_URL, CHAT, MODEL
from pydantic import BaseModel, ConfigDict


class Sea(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a random model would add keys without end

    name: Literal["North Sea", "Baltic Sea"]
    salty: bool


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=BASE_URL, api_key="none"), mode=mode)
    asked = {"model": MODEL, "messages": CHAT, "max_tokens": 200, "temperature": 0}
    sea, answer = client.create_with_completion(response_model=Sea, max_retries=0, **asked)
    assert isinstance(sea, Sea) and answer.usage.completion_tokens > 0
    *_, last = client.create_partial(response_model=Sea, max_retries=0, **asked)
    assert last.name in ("North Sea", "Baltic Sea") and last.salty in (True, False)
