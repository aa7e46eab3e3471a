"""The pieces that answers are made of, as OpenAI and vLLM write them."""

import json
import uuid
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import tokenizers

from lserve_jax.outputs import RequestOutput
from lserve_jax.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


def new_id(kind: str) -> str:
    """Of an answer; it cannot be guessed."""
    return f"{kind}-{uuid.uuid4().hex}"


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return (
        b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def finish_reason(reason: str | None) -> str | None:
    """One of OpenAI's: some clients take any other for "stop", which a deadline is not."""
    return "length" if reason == "deadline" else reason


def stop_reason(reason: str | None, stopped_by: int | str | None) -> int | str | None:
    """vLLM's field: the stop string or token id; here also "deadline"."""
    return "deadline" if reason == "deadline" else stopped_by


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Counts of tokens; ``cached_tokens`` are those of the prompt that were there."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Of whole requests; a prompt counts once, however many completions it has."""
    return usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(c.token_ids) for output in outputs for c in output.outputs),
        sum(output.metrics.prefix_tokens for output in outputs),
    )


# A token's own text and bytes.

# How byte-level tokenizers write bytes: printable ones as themselves, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTABLE)
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


@lru_cache(maxsize=65_536)
def token_text(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    """A token's text by itself, U+FFFD for a part of a character, and its bytes."""
    if token_id >= tokenizer.vocab_size:  # embeddings can be padded beyond the vocabulary
        return "", []
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text, list(text.encode())
    written = tokenizer.backend.id_to_token(token_id) or ""
    if isinstance(tokenizer.backend.decoder, tokenizers.decoders.ByteLevel):
        return text, [_BYTES[letter] for letter in written if letter in _BYTES]
    if len(written) == 6 and written.startswith("<0x"):  # SentencePiece's byte tokens
        return text, [int(written[3:5], 16)]
    return text, list(text.encode())


def chat_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    rows: Sequence[Mapping[int, float]],
    top: int,
) -> dict[str, Any]:
    """``logprobs`` of a chat choice: an entry for each token, with the ``top`` likeliest."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(tokenizer, token_id)
        return {"token": text, "logprob": logprob, "bytes": raw}

    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        likeliest = sorted(row.items(), key=lambda item: -item[1])[:top]
        content.append(
            {
                **entry(token_id, row[token_id]),
                "top_logprobs": [entry(*item) for item in likeliest],
            }
        )
    return {"content": content}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    rows: Sequence[Mapping[int, float] | None],
    top: int,
    offset: int,
) -> dict[str, Any]:
    """``logprobs`` of a text completion: lists by token. A row of None is the first of a prompt.

    ``offset`` is where the tokens' text begins in the answer's text.
    """
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(token_text(tokenizer, token_id)[0])
    chosen, likeliest = [], []
    for token_id, row in zip(token_ids, rows, strict=True):
        chosen.append(None if row is None else row[token_id])
        if row is None:
            likeliest.append(None)
            continue
        best = sorted(row.items(), key=lambda item: -item[1])[:top]
        # Two tokens can have the same text: the chosen one's own probability stays.
        named = {_name(tokenizer, i): logprob for i, logprob in reversed(best)}
        likeliest.append(named | {_name(tokenizer, token_id): row[token_id]})
    return {
        "tokens": [_name(tokenizer, token_id) for token_id in token_ids],
        "token_logprobs": chosen,
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them: they differ."""
    text, raw = token_text(tokenizer, token_id)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
