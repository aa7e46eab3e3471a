"""Tokenizers of the trimmed vocabularies."""

import pytest
from tokenizer_files import TEMPLATE, golden, write_gguf

from convert.tokenizers import load_tokenizer
from lserve_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session", params=["gpt2", "qwen2", "mistral"])
def any_vocabulary(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict[str, Tokenizer]:
    """The tokenizers of the trimmed vocabularies, with a chat template."""
    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: load_tokenizer(
            write_gguf(
                folder / f"{name}.gguf",
                golden(name),
                **{"tokenizer.chat_template": TEMPLATE},
            )
        )
        for name in ("gpt2", "qwen2", "mistral")
    }
