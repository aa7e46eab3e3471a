"""/tokenize, /detokenize and /tokenizer_info, by themselves and as lm-eval's tokenizer."""

import httpx
import pytest
from served import MODEL, TEMPLATE, Served

CHAT = [{"role": "user", "content": "Hello, sea."}]


def post(served: Served, path: str, **body) -> httpx.Response:
    return httpx.post(f"{served.url}{path}", json=body, timeout=None)


def test_a_text_becomes_the_tokenizers_ids_and_comes_back(served):
    tokenizer, text = served.llm.tokenizer, "The sea, été <|im_end|>"
    answer = post(served, "/tokenize", model=MODEL, prompt=text, return_token_strs=True).json()
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == served.llm.max_model_len
    assert answer["token_strs"][-1] == "<|im_end|>"
    assert answer["tokens"][-1] == tokenizer.eos_token_ids[0]
    back = post(served, "/detokenize", model=MODEL, tokens=answer["tokens"]).json()
    assert back == {"prompt": text}


def test_no_strings_unless_asked_for(served):
    assert "token_strs" not in post(served, "/tokenize", prompt="a").json()


def test_a_conversation_has_the_tokens_that_a_chat_has(served, client):
    usage = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=1).usage
    answer = post(served, "/tokenize", messages=CHAT).json()
    assert answer["count"] == usage.prompt_tokens
    expected = served.llm.chat_prompt(CHAT)["prompt_token_ids"]
    assert answer["tokens"] == expected
    without = post(served, "/tokenize", messages=CHAT, add_generation_prompt=False).json()
    assert without["tokens"] == expected[: without["count"]] and without["count"] < len(expected)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "either prompt or messages"),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "pad": True}, "'pad' is not known"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "'other' is not served"),
        ("/detokenize", {"tokens": [100_000]}, "token id 100000"),
        ("/detokenize", {"tokens": ["a"]}, "integer"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(served, path, body, words):
    answer = post(served, path, **body)
    assert answer.status_code in (400, 404)
    assert words in answer.json()["error"]["message"]


def test_what_the_tokenizer_is(served):
    info = httpx.get(f"{served.url}/tokenizer_info", timeout=None).json()
    assert info["eos_token"] == "<|im_end|>"
    assert info["bos_token"] is None
    assert info["chat_template"] == TEMPLATE
    assert info["model_max_length"] == served.llm.max_model_len


def test_lm_evals_remote_tokenizer_works_on_it(served):
    utils = pytest.importorskip("lm_eval.utils")
    tokenizer, text = served.llm.tokenizer, "The sea, été"
    assert utils.check_remote_tokenizer_support(f"{served.url}/v1/completions")
    remote = utils.RemoteTokenizer(f"{served.url}/v1/completions")
    remote.session.close()
    assert remote.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert remote.decode(remote.encode(text)) == text
    assert remote.eos_token_id == tokenizer.eos_token_ids[0]
    assert remote.bos_token_id is None
    assert remote.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
    remote.session.close()
