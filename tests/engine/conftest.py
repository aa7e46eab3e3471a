"""Fixtures that modules of this folder share; some have their own of the same name."""

from typing import Any

import pytest
import relay_cases
import tokenizers
from engine_cases import build as build_engine_case
from relay_cases import Build
from tiny_llm import poison, tiny_params, write_pattern

from lserve_jax import LLM, SparsityConfig
from lserve_jax.engine import engine, relay, scoring
from lserve_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pattern(tmp_path_factory.mktemp("patterns") / "half", [[0.1, 0.9]])


@pytest.fixture
def all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts, scores and groups of requests run in the largest size that they can have.

    One program in place of one for every number of rows, groups and pages: for tests whose question
    that is not. Batches that shrink are those of ``attention/test_lserve.py`` and ``test_engine``.
    """
    for module in (engine, relay, scoring):
        monkeypatch.setattr(module, "bucket", lambda n, smallest, largest: largest)


@pytest.fixture
def llm(pattern: str) -> LLM:
    return build_engine_case(pattern)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Makes an ``LLM`` of ``relay_cases``, its caches full of NaN."""
    pattern = write_pattern(tmp_path_factory.mktemp("patterns") / "p", relay_cases.GATES)

    def build(attention: str = "lserve", **settings: Any) -> LLM:
        settings = {
            "max_num_seqs": 4,
            "prefill_chunk_size": 64,
            "burst_steps": 8,
            "max_model_len": 512,
            "max_prefixes": 3,
            "relay": "never",
        } | settings
        sparsity = None
        if attention == "lserve":
            sparsity = SparsityConfig(pattern=pattern, streaming_fraction=0.5, **relay_cases.SIZES)
        llm = LLM(
            (relay_cases.CONFIG, tiny_params(relay_cases.CONFIG)),
            attention=attention,
            sparsity=sparsity,
            **settings,
        )
        poison(llm)
        return llm

    return build


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token for each byte, so that most characters of other alphabets take several tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=None)
