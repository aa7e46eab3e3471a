"""litellm: its three ways to a server like this one."""

import asyncio
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm
from plain import BASE_URL, CHAT, LENGTH, MODEL, QUESTION, chat_text, completion_text

GREEDY = {"api_base": BASE_URL, "api_key": "none", "temperature": 0, "max_tokens": LENGTH}


async def asynchronous(asked: dict) -> str:
    return (await litellm.acompletion(**asked)).choices[0].message.content


expected = chat_text()
for provider in ("openai", "hosted_vllm"):
    asked = {"model": f"{provider}/{MODEL}", "messages": CHAT, **GREEDY}
    answer = litellm.completion(**asked)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == LENGTH
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.completion_tokens == LENGTH
    assert asyncio.run(asynchronous(asked)) == expected
    litellm.completion(**asked, top_k=3, min_p=0.1, user="somebody", metadata={"a": "b"})
    try:
        litellm.completion(**{**asked, "model": f"{provider}/another"})
    except litellm.NotFoundError as error:
        assert "another" in str(error)
    else:
        raise AssertionError("another model was taken")

text = completion_text(QUESTION)
asked = {"model": f"text-completion-openai/{MODEL}", "prompt": QUESTION, **GREEDY}
assert litellm.text_completion(**asked).choices[0].text == text
assert "".join(c.choices[0].text or "" for c in litellm.text_completion(**asked, stream=True)) == (
    text
)

response = litellm.responses(
    model=f"hosted_vllm/{MODEL}",
    input=QUESTION,
    api_base=BASE_URL,
    api_key="none",
    temperature=0,
    max_output_tokens=LENGTH,
)
assert response.output[0].content[0].text == expected
