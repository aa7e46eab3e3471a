"""/v1/prefixes: registered, found by requests, listed, pinned, released."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from served import MODEL, Served, serve, tiny_llm

SYSTEM = {"role": "system", "content": "You answer letters from the sea. " * 10}
GREEDY = {"temperature": 0, "max_tokens": 8}
PATH = "/v1/prefixes"


@pytest.fixture
def served() -> Iterator[Served]:
    with serve(tiny_llm(max_prefixes=2)) as served:
        yield served


@pytest.fixture
def prefixes(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=None) as client:
        yield client


def chat(client: openai.OpenAI, text: str):
    messages = [SYSTEM, {"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, **GREEDY)


def test_a_registered_conversation_is_cached_for_chats_that_begin_with_it(client, prefixes, served):
    before = chat(client, "Hello.")
    assert before.usage.prompt_tokens_details.cached_tokens == 0
    card = prefixes.post(PATH, json={"messages": [SYSTEM], "add_generation_prompt": False}).json()
    page = served.llm.spec.page_size
    beginning = len(
        served.llm.chat_prompt([SYSTEM], add_generation_prompt=False)["prompt_token_ids"]
    )
    assert card["object"] == "prefix"
    assert card["tokens"] == beginning - 1
    assert card["shared_tokens"] == card["pages"] * page == card["tokens"] // page * page
    after = chat(client, "Hello.")
    # The first one left its whole prompt, and the conversation is a part of that.
    assert after.usage.prompt_tokens_details.cached_tokens >= card["shared_tokens"] > 0
    assert after.choices[0].message.content == before.choices[0].message.content
    response = client.responses.create(
        model=MODEL,
        instructions=SYSTEM["content"],
        input="Hello.",
        temperature=0,
        max_output_tokens=8,
    )
    assert response.usage.input_tokens_details.cached_tokens >= card["shared_tokens"]
    assert response.output_text == before.choices[0].message.content
    pinned = served.service.engine.text.engine.metrics().pinned_pages
    assert pinned == card["pages"]


def test_prompts_of_one_salt_share_what_was_computed(client):
    def cached(**more) -> int:
        messages = [SYSTEM, {"role": "user", "content": "Hello."}]
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, extra_body=more, **GREEDY
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="b") == cached() == 0
    assert cached(cache_salt="a") == cached() > 300
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        cached(cache_salt="")
    prompt = {"model": MODEL, "prompt": "a" * 200, "max_tokens": 1}
    for salt, found in (("a", 0), ("a", 192), ("b", 0)):
        answer = client.completions.create(**prompt, extra_body={"cache_salt": salt})
        assert answer.usage.prompt_tokens_details.cached_tokens == found


def test_its_life(prefixes, client, served):
    ids = list(range(100)) + list(range(100))
    card = prefixes.post(PATH, json={"prompt": ids}).json()
    assert (card["tokens"], card["pins"], card["requests"]) == (200, 1, 0)
    again = prefixes.post(PATH, json={"prompt": ids}).json()
    assert again == card | {"pins": 2}
    assert prefixes.post(f"{PATH}/{card['id']}/pin").json() == card | {"pins": 3}
    assert prefixes.get(PATH).json() == {"object": "list", "data": [card | {"pins": 3}]}
    assert prefixes.get(f"{PATH}/{card['id']}").json() == card | {"pins": 3}
    for pins in (2, 1):
        released = prefixes.delete(f"{PATH}/{card['id']}").json()
        assert (released["pins"], released["deleted"]) == (pins, False)
    last = prefixes.delete(f"{PATH}/{card['id']}").json()
    assert (last["pins"], last["deleted"]) == (0, True)
    assert prefixes.get(PATH).json()["data"] == []
    metrics = served.service.engine.text.engine.metrics()
    assert metrics.free_pages == metrics.num_pages
    gone = prefixes.delete(f"{PATH}/{card['id']}")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "prefix_not_found"


def test_of_a_text_the_last_token_is_left_out(prefixes):
    text = "The sea is wide. " * 20
    card = prefixes.post(PATH, json={"prompt": text}).json()
    assert card["tokens"] == len(text) - 1  # a token a byte


def test_after_the_engine_began_anew_none_is_held(prefixes, served):
    card = prefixes.post(PATH, json={"prompt": list(range(200))}).json()
    served.llm.engine.reset()  # nothing runs
    assert prefixes.get(PATH).json()["data"] == []
    assert prefixes.get(f"{PATH}/{card['id']}").status_code == 404
    assert prefixes.post(PATH, json={"prompt": list(range(200))}).json()["id"] != card["id"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "either prompt or messages"),
        ({"prompt": [1, 2, 3]}, "prompt", "at least"),
        ({"prompt": [100_000] * 100}, "prompt", "100000 is outside the vocabulary"),
        ({"prompt": "a" * 5000}, "prompt", "max_model_len"),
        ({"prompt": "a", "name": "b"}, "name", "'name' is not known"),
        ({"messages": []}, "messages", "messages"),
    ],
)
def test_what_cannot_be_a_prefix_is_refused(prefixes, body, param, words):
    answer = prefixes.post(PATH, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert prefixes.get(PATH).json()["data"] == []


def test_no_more_are_held_than_there_is_room_for(prefixes):
    cards = []
    for first in range(1, 250):
        full = prefixes.post(PATH, json={"prompt": [first] * 800})
        if full.status_code != 200:
            break
        cards.append(full.json())
    assert cards and full.status_code == 400
    assert "the prefix needs 12 pages of 64 tokens" in full.json()["error"]["message"]
    prefixes.delete(f"{PATH}/{cards[0]['id']}")
    assert prefixes.post(PATH, json={"prompt": [first] * 800}).status_code == 200


def test_they_need_a_key_where_there_are_keys():
    with serve(tiny_llm(), api_keys=("secret",)) as served:
        url = f"{served.url}/v1/prefixes"
        assert httpx.get(url, timeout=None).status_code == 401
        assert (
            httpx.get(url, headers={"Authorization": "Bearer secret"}, timeout=None).status_code
            == 200
        )
