"""What requests read, over HTTP: JSON, its store and its bounds; and the page's files."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from lserve_cases import sizes
from numpy.testing import assert_array_equal
from served import Served, byte_tokenizer, serve, tiny_llm
from tiny_llm import write_pattern

from lserve_jax import SparsityConfig
from lserve_jax.attention.cache import StreamingWindow
from lserve_jax.engine.metrics import RequestMetrics
from lserve_jax.engine.reads import PageReads, Selection
from lserve_jax.outputs import CompletionOutput
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.reads import ReadsStore, token_texts

QUESTION = "Grüße aus dem Süden, 你好 🙂 " * 8


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two heads that rank and one that streams in each of two layers."""
    gates = write_pattern(tmp_path_factory.mktemp("p") / "p", [[0.1, 0.9], [0.9, 0.8]])
    sparsity = SparsityConfig(
        pattern=gates,
        streaming_fraction=0.25,
        **sizes(16, 16, 64, 4, (16, 32, 32, 64)),
    )
    with serve(tiny_llm(layers=2, attention="lserve", sparsity=sparsity)) as served:
        yield served


def chat(served: Served, **body: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0} | body
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=120)


def get(served: Served, path: str) -> httpx.Response:
    return httpx.get(f"{served.url}{path}", timeout=120)


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_read_is_what_the_engine_recorded(served: Served, stream: bool) -> None:
    answer = chat(served, max_tokens=30, record_reads=True, stream=stream)
    if stream:
        completion_id = httpx.Response(200, content=answer.content).text.split('"id":"')[1]
        completion_id = completion_id.split('"')[0]
    else:
        completion_id = answer.json()["id"]
    described = get(served, f"/v1/reads/{completion_id}").json()
    entry = served.service.reads._entries[completion_id]
    made = entry.reads
    assert described["id"] == completion_id
    assert described["head_kinds"] == [["streaming", "ranked"], ["ranked", "ranked"]]
    assert described["page_size"] == 16 and described["exact"] is False
    assert described["prompt_tokens"] == len(entry.prompt) == made.prompt_tokens
    assert len(described["answer_tokens"]) == len(entry.answer)
    # Every character of the conversation is in some page, and none twice.
    tokenizer = served.service.tokenizer
    whole = tokenizer.decode([*entry.prompt, *entry.answer], skip_special_tokens=False)
    assert "".join(page["text"] for page in described["pages"]) == whole
    assert QUESTION.strip() in whole
    starts = [page["start"] for page in described["pages"]]
    assert starts == list(range(0, len(entry.prompt) + len(entry.answer), 16))
    for token in range(len(entry.answer)):
        told = get(served, f"/v1/reads/{completion_id}/{token}").json()
        wanted = made.pages(token)
        assert told["num_pages"] == wanted.shape[2]
        assert told["context_tokens"] == len(entry.prompt) + token
        bits = [[base64.b64decode(head) for head in layer] for layer in told["read"]]
        got = np.unpackbits(np.array(bits, "V").view(np.uint8), axis=-1, bitorder="little")
        got = got.reshape(*wanted.shape[:2], -1)[:, :, : wanted.shape[2]]
        assert_array_equal(got.astype(bool), wanted)
        assert told["share"] == pytest.approx(wanted.mean(), abs=1e-6)
        assert told["layer_share"] == pytest.approx(wanted.mean(axis=(1, 2)), abs=1e-6)
    assert not made.pages(len(entry.answer) - 1).all()  # something was left out


def test_only_who_asks_is_recorded(served: Served) -> None:
    completion_id = chat(served, max_tokens=4).json()["id"]
    for path in (completion_id, f"{completion_id}/0", "chatcmpl-0", "%3Cscript%3E"):
        answer = get(served, f"/v1/reads/{path}")
        assert answer.status_code == 404
        assert "record_reads" in answer.json()["error"]["message"]
    completion_id = chat(served, max_tokens=4, record_reads=True, ignore_eos=True).json()["id"]
    answer = get(served, f"/v1/reads/{completion_id}/4")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "the answer has 4 tokens, no token 4"
    assert get(served, f"/v1/reads/{completion_id}/-1").status_code == 404
    answer = chat(served, max_tokens=4, record_reads=True, n=2, temperature=1)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "record_reads"


def test_reads_need_the_key_and_the_page_does_not() -> None:
    with serve(tiny_llm(), api_keys=("sesame",)) as served:
        assert get(served, "/v1/reads/chatcmpl-0").status_code == 401
        assert get(served, "/").status_code == 200


def completion(tokens: int, selections: int) -> CompletionOutput:
    """One whose ``selections`` take 1,000 bytes each."""
    window = StreamingWindow(sink=16, local=16, page_size=16)
    chosen = np.zeros((1, 1, 1000), np.uint8)
    made = [Selection(first_token=1 + i, together=0, chosen=chosen) for i in range(selections)]
    return CompletionOutput(
        index=0,
        text="",
        token_ids=[1] * tokens,
        cumulative_logprob=0.0,
        logprobs=None,
        token_logprobs=np.zeros((tokens,), np.float32),
        top_token_ids=np.zeros((tokens, 0), np.int32),
        top_logprobs=np.zeros((tokens, 0), np.float32),
        finish_reason="length",
        stop_reason=None,
        metrics=RequestMetrics(),
        page_reads=PageReads(
            page_size=16,
            prompt_tokens=10,
            reuse_interval=1,
            head_kinds=(("ranked",),),
            prefill_window=window,
            decode_window=window,
            exact=False,
            selections=tuple(made),
        ),
    )


def test_the_store_is_bounded() -> None:
    store = ReadsStore(most_requests=3, most_bytes=10_000)
    for i in range(5):
        store.add(str(i), [1] * 10, completion(4, 1))
    assert list(store._entries) == ["2", "3", "4"]
    store.add("big", [1] * 10, completion(4, 8))
    assert list(store._entries) == ["4", "big"]
    store.add("too big", [1] * 10, completion(4, 11))  # one that never fits
    assert list(store._entries) == []
    with pytest.raises(ApiError, match="nothing is kept of what 'too big' read"):
        store.token("too big", 0)
    plain = CompletionOutput(**{**vars(completion(1, 1)), "page_reads": None})
    with pytest.raises(ValueError, match="'x' was not asked to record"):
        store.add("x", [1], plain)


def test_texts_of_tokens_join_to_the_text_and_stay_cheap() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé🙂<|im_end|>b")
    assert token_texts(tokenizer, ids) == ["a", "", "é", "", "", "", "🙂", "<|im_end|>", "b"]
    assert token_texts(tokenizer, []) == []
    assert token_texts(tokenizer, [tokenizer.vocab_size + 5]) == [""]
    # Half characters without end: what is held back is let go now and then.
    half = tokenizer.encode("é")[:1] * 1000
    texts = token_texts(tokenizer, half)
    assert len(texts) == 1000
    assert "".join(texts) == "\N{REPLACEMENT CHARACTER}" * 1000
    assert max(map(len, texts)) == 64


def test_the_page_is_there_and_may_load_nothing_else(served: Served) -> None:
    folder = Path(__file__).parents[2] / "lserve_jax" / "serve" / "page"
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/"}
    for path in folder.iterdir():
        answer = get(served, "/" if path.name == "index.html" else f"/{path.name}")
        assert answer.status_code == 200
        assert answer.content == path.read_bytes()
        assert answer.headers["Content-Type"].startswith(types[path.suffix])
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert get(served, "/page/page.js").status_code == 404
    assert get(served, "/..%2fapp.py").status_code == 404
