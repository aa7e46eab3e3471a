"""What finished requests read of their context, as JSON for the page, and a store of the newest.

A request that is to be shown is submitted with ``record_reads=True``. Behind its last delta

    store.add(completion_id, output.prompt_token_ids, output.outputs[0])

and two answers follow, whose bodies are those of ``GET /v1/reads/{id}`` and
``GET /v1/reads/{id}/{token}``:

    store.context(completion_id, tokenizer)  the context page by page, the answer token by token
    store.token(completion_id, 17)           which pages each head read for token 17 of the answer
"""

import base64
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lserve_jax.engine.reads import PageReads
from lserve_jax.outputs import CompletionOutput
from lserve_jax.serve.errors import ApiError
from lserve_jax.tokenizer import Tokenizer

MOST_REQUESTS = 64
MOST_BYTES = 256 << 20
# Tokens without a character among them: more are no text, and what is held back is decoded again
# with every token.
_SILENT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A finished request."""

    prompt: np.ndarray  # [n] int32
    answer: np.ndarray  # [m] int32
    reads: PageReads

    @property
    def nbytes(self) -> int:
        return self.prompt.nbytes + self.answer.nbytes + self.reads.nbytes


class ReadsStore:
    """What the newest requests read, as far as they asked; may be used by several threads.

    The oldest go where there are more than ``most_requests``, or together more than ``most_bytes``
    bytes. Who knows an id sees the text of its request: ids must be unguessable.
    """

    def __init__(self, *, most_requests: int = MOST_REQUESTS, most_bytes: int = MOST_BYTES):
        self._most_requests, self._most_bytes = most_requests, most_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def add(
        self, completion_id: str, prompt_token_ids: Sequence[int], completion: CompletionOutput
    ) -> None:
        """Keeps a finished completion; raises ``ValueError`` for one that recorded nothing."""
        if completion.page_reads is None:
            raise ValueError(f"{completion_id!r} was not asked to record what it reads")
        entry = _Entry(
            prompt=np.asarray(prompt_token_ids, np.int32),
            answer=np.asarray(completion.token_ids, np.int32),
            reads=completion.page_reads,
        )
        with self._lock:
            self._entries[completion_id] = entry
            while len(self._entries) > self._most_requests or self._nbytes() > self._most_bytes:
                self._entries.popitem(last=False)

    def _nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def context(self, completion_id: str, tokenizer: Tokenizer) -> dict[str, Any]:
        """See ``describe_context``; raises ``ApiError`` (404) for an id that is not kept."""
        entry = self._find(completion_id)
        described = describe_context(entry.reads, entry.prompt, entry.answer, tokenizer)
        return {"id": completion_id, **described}

    def token(self, completion_id: str, number: str) -> dict[str, Any]:
        """See ``describe_token``; ``ApiError`` (404) for an id or a token that is not kept."""
        entry = self._find(completion_id)
        count = len(entry.answer)
        known = number.isascii() and number.isdecimal() and len(number) <= len(str(count))
        if not known or (token := int(number)) >= count:
            raise ApiError(f"the answer has {count} tokens, no token {number:.40}", status=404)
        try:
            return {"id": completion_id, **describe_token(entry.reads, token)}
        except ValueError as error:  # dropped, since there were too many
            raise ApiError(str(error), status=404) from None

    def _find(self, completion_id: str) -> _Entry:
        with self._lock:
            if completion_id not in self._entries:
                raise ApiError(
                    f"nothing is kept of what {completion_id!r:.100} read: it is too long ago, or "
                    "it did not ask for record_reads",
                    status=404,
                )
            return self._entries[completion_id]


def describe_context(
    reads: PageReads, prompt: np.ndarray, answer: np.ndarray, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What a map's rows, columns and words are.

    The texts of ``pages``, joined, are that of prompt and answer; a character of several tokens
    stands with the last of them. ``first_known``: tokens of the answer between the first and this
    one are no longer recorded.
    """
    U, texts = reads.page_size, token_texts(tokenizer, [*prompt, *answer])
    return {
        "page_size": U,
        "prompt_tokens": len(prompt),
        "reuse_interval": reads.reuse_interval,
        "exact": reads.exact,
        "head_kinds": [list(layer) for layer in reads.head_kinds],
        "first_known": reads.first_known,
        "pages": [
            {"start": start, "end": min(start + U, len(texts)), "text": "".join(texts[start:][:U])}
            for start in range(0, len(texts), U)
        ],
        "answer_tokens": texts[len(prompt) :],
    }


def describe_token(reads: PageReads, token: int) -> dict[str, Any]:
    """Which of its context's ``num_pages`` pages were read for a token of the answer.

    ``read[layer][head]`` is base64 of a bit a page, the lowest bit of a byte first. ``share`` is
    that of the pages read, ``layer_share`` by layer. Raises ``ValueError`` as ``PageReads.pages``.
    """
    pages = reads.pages(token)
    bits = np.packbits(pages, axis=2, bitorder="little")
    return {
        "token": token,
        "context_tokens": reads.position(token) + 1,
        "num_pages": pages.shape[2],
        "read": [[base64.b64encode(head).decode() for head in layer] for layer in bits],
        "layer_share": [round(float(layer.mean()), 6) for layer in pages],
        "share": round(float(pages.mean()), 6),
    }


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token completes, special tokens written out; "" for one without text."""
    stream, texts, silent = tokenizer.stream(skip_special_tokens=False), [], 0
    for token in ids:
        # Embeddings are often padded beyond the vocabulary: such ids have no text.
        text = stream.step(int(token)) if token < tokenizer.vocab_size else ""
        silent = 0 if text else silent + 1
        if silent == _SILENT_TOKENS:
            text, silent = stream.flush(), 0
        texts.append(text)
    if texts:
        texts[-1] += stream.flush()
    return texts
