"""A tiny model whose tokens are words, and a text of them, for the calibration commands."""

import re
import shutil

import numpy as np
import pytest
import tokenizers

from lserve_jax.calibrate.passkeys import ORDINALS, PREFACE, QUESTIONS, WORDS, _question, _statement
from lserve_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def word_model(conformance, tmp_path_factory):
    """A tiny random model (3 layers, 2 KV heads, 512 positions) with a token for every word."""
    directory = tmp_path_factory.mktemp("calibrate") / "model"
    shutil.copytree(conformance / "llama-tied", directory)
    frame = PREFACE + QUESTIONS + _statement("", "") + _question("", "")
    words = {*re.findall(r"\w+|[^\w\s]+", frame), *WORDS, *ORDINALS, *(f"w{i}" for i in range(40))}
    vocabulary = {word: i for i, word in enumerate(("?unknown", *sorted(words)))}
    assert len(vocabulary) <= 160  # of the model
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab=vocabulary, unk_token="?unknown")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=None)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def word_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrate") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(f"w{i}" for i in rng.integers(0, 40, 600)))
    return path
