"""A prompt is checked once, as an array."""

from collections.abc import Sequence

import numpy as np
import pytest
import tokenizers
from tiny_llm import random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.options import EngineOptions
from lserve_jax.engine.request import PromptIds
from lserve_jax.text_engine import TextEngine
from lserve_jax.tokenizer import Tokenizer

CONFIG = tiny_config(layers=1, kv_heads=1)
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def params() -> dict:
    return tiny_params(CONFIG)


@pytest.fixture
def text(params: dict, tokenizer: Tokenizer) -> TextEngine:
    options = EngineOptions(max_num_seqs=2, max_model_len=256, burst_steps=4)
    return TextEngine(build_engine(CONFIG, params, options), tokenizer)


class CountingIds:
    """Token ids that count how often they are read."""

    def __init__(self, ids: Sequence[int]):
        self.ids, self.reads = ids, 0

    def __len__(self) -> int:
        return len(self.ids)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.reads += 1
        return np.array(self.ids, dtype)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(n=3, seed=0, max_tokens=2)])
def test_a_prompt_is_read_once(params: dict, sampling: SamplingParams) -> None:
    llm = LLM((CONFIG, params), max_model_len=256)
    [prompt] = random_prompts(4, [20])
    counting = CountingIds(prompt)
    [output] = llm.generate([{"prompt_token_ids": counting}], sampling)
    assert counting.reads == 1
    assert output.prompt_token_ids == prompt


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([1, 2.0], "prompt token id 2.0 must be an integer"),
        (np.array([1.0, 2.0]), "must be an integer"),
        ([1, "2"], "prompt token id '2' must be an integer"),
        ([1, None], "prompt token id None must be an integer"),
        ([1, 96], r"prompt token id 96 is outside the vocabulary \[0, 96\)"),
        ([-1], r"prompt token id -1 is outside the vocabulary \[0, 96\)"),
        ([2**70], rf"prompt token id {2**70} is outside the vocabulary"),
        ([[1, 2], [3, 4]], r"must be a list of integers, got shape \(2, 2\)"),
        (None, "must be a list of integers, got None"),
        ("12", "must be a list of integers, got '12'"),
        ([True, 2], "prompt token id True must be an integer"),
        ([1, np.True_], "prompt token id np.True_ must be an integer"),
        (np.array([True]), "prompt token id np.True_ must be an integer"),
        ([np.timedelta64(1, "s")], "prompt token id np.timedelta64.* must be an integer"),
        (np.array([1, 2], "m8[s]"), "prompt token id np.timedelta64.* must be an integer"),
        (np.array([1, 2], "M8[s]"), "prompt token id np.datetime64.* must be an integer"),
    ],
)
def test_prompts_that_are_refused(token_ids, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptIds.check(token_ids, 96)


def test_a_checked_prompt_is_a_copy_that_nobody_changes() -> None:
    given_ids = np.array([1, 2, 3])
    checked = PromptIds.check(given_ids, 96)
    given_ids[:] = 50
    assert checked.ids.tolist() == [1, 2, 3]
    assert checked.ids.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        checked.ids[0] = 7
    assert PromptIds.check(checked, 96) is checked
    with pytest.raises(ValueError, match=r"token id 3 is outside the vocabulary \[0, 3\)"):
        PromptIds.check(checked, 3)


def test_a_text_that_cannot_fit_is_not_tokenised_whole(text: TextEngine, monkeypatch) -> None:
    """256 tokens fit; each character is one token, or four for a face."""
    assert text.tokenizer is not None
    seen, encode = [], tokenizers.Tokenizer.encode

    def count(self, piece: str, **options):
        seen.append(len(piece))
        return encode(self, piece, **options)

    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, t, **options: count(self.backend, t, **options).ids
    )
    for character in ("a", "\N{GRINNING FACE}"):
        seen.clear()
        with pytest.raises(ValueError, match=r"has 1000000 characters: .* max_model_len=256"):
            text.submit(character * 1_000_000, GREEDY)
        assert sum(seen) < 4000
    with pytest.raises(ValueError, match="2000 tokens and max_tokens=12 make 2012"):
        text.submit("a" * 2000, GREEDY)  # short enough to be counted
    assert not text.has_unfinished_requests


def test_a_long_text_of_few_tokens_is_not_refused(params: dict) -> None:
    """A run of 400 spaces is one token, so that its beginnings say little about it."""
    vocabulary = {"<unk>": 0, "a": 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=None)
    options = EngineOptions(max_num_seqs=2, max_model_len=256, burst_steps=4)
    text = TextEngine(build_engine(CONFIG, params, options), tokenizer)
    checked = text.check((" " * 400 + "a") * 200, GREEDY)
    assert checked.ids.ids.tolist() == [1] * 200
    with pytest.raises(ValueError, match="more than max_model_len=256"):
        text.check((" " * 400 + "a") * 100_000, GREEDY)
