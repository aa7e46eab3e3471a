"""A tiny model with a byte tokenizer, and an independent account of what may come next.

The tokenizer has a token for each byte, some longer ones that cross the boundaries of JSON's
parts, an end of text and another special token. The model's vocabulary is padded beyond it.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import engine_cases
import numpy as np
import tokenizers
from tiny_llm import poison, tiny_params

from lserve_jax import LLM, SparsityConfig
from lserve_jax.tokenizer import Tokenizer

VOCAB = 288
CONFIG = dataclasses.replace(engine_cases.CONFIG, vocab_size=VOCAB)
_PAIRS = [("a", "b"), ("t", "r"), ("u", "e"), ("tr", "ue"), ('"', ":"), ("{", '"'), ('"', "}")]
_PAIRS += [("b", "a"), ("c", "a"), ("ca", "t"), ("o", "k")]
EOS, SPECIAL = "<|end|>", "<|tool|>"


def make_tokenizer(*, has_end: bool = True) -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(pair) for pair in _PAIRS)]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=_PAIRS))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([EOS, SPECIAL])
    markers, ends = {}, ()
    if has_end:
        markers, ends = {"eos_token": EOS}, (backend.token_to_id(EOS),)
    return Tokenizer(backend=backend, markers=markers, eos_token_ids=ends, chat_template=None)


TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_ids[0]


def build(
    pattern: str | None = None, *, tokenizer: Tokenizer | None = TOKENIZER, **settings: Any
) -> LLM:
    """With sparse attention if there is a head pattern; caches begin full of NaN."""
    sparse: dict[str, Any] = {}
    if pattern is not None:
        sparsity = SparsityConfig(pattern=pattern, **engine_cases.SIZES)
        pages = engine_cases.PAGES * engine_cases.PAGE_BYTES
        sparse = {"attention": "lserve", "sparsity": sparsity, "kv_cache_bytes": pages}
    settings = {
        "max_num_seqs": 4,
        "prefill_chunk_size": 64,
        "burst_steps": 8,
        "relay": "never",
        "deterministic": True,
    } | settings
    llm = LLM((CONFIG, tiny_params(CONFIG)), tokenizer=tokenizer, **sparse, **settings)
    poison(llm)
    return llm


def prompts(seed: int, lengths: Collection[int]) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [{"prompt_token_ids": rng.integers(0, 256, n).tolist()} for n in lengths]


def token_bytes() -> list[bytes | None]:
    """What each id stands for; None: no text."""
    texts: list[bytes | None] = [None] * VOCAB
    letters = _byte_of_letter()
    special = set(TOKENIZER.backend.get_added_tokens_decoder())
    for word, number in TOKENIZER.backend.get_vocab().items():
        if number not in special:
            texts[number] = bytes(letters[letter] for letter in word)
    return texts


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


TEXTS = token_bytes()


def allowed_next(language: Collection[bytes], before: bytes) -> np.ndarray:
    """Mask of the tokens that can follow ``before`` on the way to a text of ``language``."""
    mask = np.zeros((VOCAB,), bool)
    for token, text in enumerate(TEXTS):
        if text is not None:
            mask[token] = any(whole.startswith(before + text) for whole in language)
    mask[END] = before in language
    return mask
