"""POST /v1/responses through the real client: whole, streamed, by its helper, refused."""

import asyncio
import itertools

import httpx
import openai
import pytest
from served import MODEL, Served

GREEDY = {"temperature": 0, "max_output_tokens": 12}
USER = [{"role": "user", "content": "Hello, sea."}]


def chat_text(client: openai.OpenAI, messages, **more) -> str:
    """What a chat answers: responses are chats."""
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=12, **more
    )
    return answer.choices[0].message.content


def test_a_text_is_answered_as_the_chat_that_it_is(client):
    answer = client.responses.create(model=MODEL, input="Hello, sea.", **GREEDY)
    assert answer.object == "response" and answer.model == MODEL
    assert answer.output_text == chat_text(client, USER)
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", answer.status)
    assert answer.usage.output_tokens == 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_a_conversation_in_items_is_the_same_chat(client):
    answer = client.responses.create(
        model=MODEL,
        instructions="Be short.",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hello."}]},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hi.", "annotations": []}],
            },
            {"role": "user", "content": "Hello, sea."},
        ],
        **GREEDY,
    )
    expected = chat_text(
        client,
        [
            {"role": "system", "content": "Be short."},
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi."},
            *USER,
        ],
    )
    assert answer.output_text == expected


def test_its_stream_is_the_sequence_of_events_that_openai_documents(client):
    whole = client.responses.create(model=MODEL, input="Hello, sea.", **GREEDY)
    events = list(client.responses.create(model=MODEL, input="Hello, sea.", stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [kind for kind, _ in itertools.groupby(event.type for event in events)] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(delta.delta for delta in deltas) == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert last.usage == whole.usage
    assert {event.item_id for event in deltas} == {last.output[0].id}
    assert {e.response.id for e in events if hasattr(e, "response")} == {last.id}


def test_the_stream_helper_puts_it_together(client):
    whole = client.responses.create(model=MODEL, input="Hello, sea.", **GREEDY)
    kinds, text = [], ""
    with client.responses.stream(model=MODEL, input="Hello, sea.", **GREEDY) as stream:
        for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
                assert event.snapshot == text
    assert kinds[-1] == "response.incomplete"
    assert text == whole.output_text


def test_an_answer_that_ends_by_itself_is_completed(client):
    asked = {"model": MODEL, "input": "Hello, sea.", **GREEDY}
    text = client.responses.create(**asked).output_text
    stop = {"stop": [text[5:8]]}
    whole = client.responses.create(**asked, extra_body=stop)
    assert (whole.status, whole.incomplete_details) == ("completed", None)
    assert whole.output_text == text[: text.index(text[5:8])]
    with client.responses.stream(**asked, extra_body=stop) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == whole.output_text


def test_the_async_client(served: Served, client):
    expected = chat_text(client, USER)

    async def ask() -> tuple[str, str]:
        url = f"{served.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as asked:
            whole = await asked.responses.create(model=MODEL, input="Hello, sea.", **GREEDY)
            stream = await asked.responses.create(
                model=MODEL, input="Hello, sea.", stream=True, **GREEDY
            )
            deltas = [e.delta async for e in stream if e.type == "response.output_text.delta"]
            return whole.output_text, "".join(deltas)

    assert asyncio.run(ask()) == (expected, expected)


def test_log_probabilities_are_those_of_the_chat(client):
    answer = client.responses.create(
        model=MODEL,
        input="Hello, sea.",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        **GREEDY,
    )
    chat = client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    )
    found = [entry.to_dict() for entry in answer.output[0].content[0].logprobs]
    assert found == [entry.to_dict() for entry in chat.choices[0].logprobs.content]
    streamed = client.responses.create(
        model=MODEL, input="Hello, sea.", top_logprobs=2, stream=True, **GREEDY
    )
    deltas = [e for e in streamed if e.type == "response.output_text.delta"]
    assert [entry.to_dict() for delta in deltas for entry in delta.logprobs] == found


def test_what_clients_send_that_changes_nothing_is_taken(client):
    answer = client.responses.create(
        model=MODEL,
        input="Hello, sea.",
        include=["reasoning.encrypted_content"],
        metadata={"a": "b"},
        parallel_tool_calls=False,
        reasoning={"effort": "low"},
        service_tier="auto",
        store=True,
        text={"format": {"type": "text"}},
        tool_choice="auto",
        tools=[],
        truncation="disabled",
        user="me",
        previous_response_id=None,
        **GREEDY,
    )
    assert answer.output_text == chat_text(client, USER)
    assert answer.store is False
    assert answer.metadata == {"a": "b"}


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("previous_response_id", "resp_1", "previous_response_id"),
        ("conversation", "conv_1", "conversation"),
        ("background", True, "background"),
        ("truncation", "auto", "truncation"),
        ("tools", [{"type": "web_search"}], "tools"),
        ("text", {"format": {"type": "xml"}}, "text.format"),
        ("text", {"format": {"type": "json_schema"}}, "text.format.schema"),
        ("text", {"format": {"type": "json_schema", "schema": {"type": 5}}}, "text.format"),
        ("temperature", -1, "temperature"),
        ("max_output_tokens", 0, "max_output_tokens"),
        ("max_tokens", 3, "max_tokens"),
        ("n", 2, "n"),
        ("input", [], "input"),
        ("input", [{"type": "item_reference", "id": "x"}], "input[0]"),
        (
            "input",
            [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            "input[0].content[0]",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(served, field, value, param):
    body = {"model": MODEL, "input": "Hello.", "stream": True} | {field: value}
    answer = httpx.post(f"{served.url}/v1/responses", json=body, timeout=None)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] is not None and error["param"].startswith(param), error
    assert field in error["message"]


def test_an_error_in_the_middle_is_a_failed_response(served, client, monkeypatch):
    text = served.llm.text_engine

    def fail():
        raise RuntimeError("the device is gone")

    stream = client.responses.create(
        model=MODEL, input="Hello.", stream=True, temperature=0, max_output_tokens=500
    )
    events = []
    for event in stream:
        events.append(event)
        if event.type == "response.output_text.delta":
            monkeypatch.setattr(text, "step", fail)
    monkeypatch.undo()
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert "the engine failed" in events[-1].response.error.message
    assert "device is gone" not in events[-1].response.error.message
    assert client.responses.create(model=MODEL, input="Hello.", **GREEDY).output_text
