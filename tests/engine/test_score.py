"""``LLM.score`` and ``LLM.embed``: against the plain model, and against the rollouts themselves."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import log_softmax
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    poison,
    random_prompts,
    tiny_config,
    tiny_params,
    write_pattern,
)

from lserve_jax import LLM, ModelConfig, RopeConfig, SamplingParams, SparsityConfig
from lserve_jax.attention.attend import causal_attend
from lserve_jax.engine.judging import _batches
from lserve_jax.model.bound import bind
from lserve_jax.model.params import Params

CONFIG = tiny_config(layers=1, kv_heads=2, group=2, max_len=4096)
PARAMS = tiny_params(CONFIG, seed=3)
GATES = [[0.9, 0.1]]
SIZES = {
    "page_size": 16,
    "token_budget": 64,
    "decode_sink": 16,
    "decode_local": 32,
    "prefill_sink": 32,
    "prefill_local": 64,
    "reuse_interval": 4,
}
# Rounding of float32 in another order of sums; what another token or page would change is 1e-2.
CLOSE = {"atol": 3e-5, "rtol": 0}


def ids(tokens: list[int]) -> dict:
    return {"prompt_token_ids": tokens}


@functools.partial(jax.jit, static_argnums=0)
def run_plain(config: ModelConfig, params: Params, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    model, positions = bind(config, params), jnp.arange(ids.shape[1])[None]
    attend = causal_attend(config, positions)
    hidden, _ = model(ids, attend, [None] * config.num_hidden_layers)
    return jax.nn.log_softmax(model.unembed(hidden[0])), hidden[0]


def plain(config: ModelConfig, text: list[int], room: int) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities [T, V] and hidden states [T, E] of the whole text, by itself.

    It is padded to ``room``, one shape for several texts: the model is causal.
    """
    row = np.zeros((1, room), np.int32)
    row[0, : len(text)] = text
    logprobs, hidden = run_plain(config, PARAMS, jnp.asarray(row))
    return np.asarray(logprobs)[: len(text)], np.asarray(hidden)[: len(text)]


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    return write_pattern(tmp_path / "pattern", GATES)


def sparse(pattern: str, **options) -> LLM:
    sparsity = SparsityConfig(**SIZES, pattern=pattern)
    options = {"max_model_len": 512, "max_num_seqs": 4, "prefill_chunk_size": 64} | options
    return LLM((CONFIG, PARAMS), attention="lserve", sparsity=sparsity, **options)


def test_dense_scores_and_hidden_states_are_the_models() -> None:
    """Texts that share rows, one with a row of its own, and one that is prefilled in chunks."""
    llm = LLM((CONFIG, PARAMS), max_num_seqs=2, prefill_chunk_size=1024)
    poison(llm)
    texts = random_prompts(1, [3, 70, 600, 20, 1, 400, 2, 2500])
    scores = llm.score([ids(text) for text in texts], return_hidden=True)
    for text, new in zip(texts, scores, strict=True):
        logprobs, hidden = plain(CONFIG, text, 600 if len(text) <= 600 else 2500)
        assert_allclose(new.logprobs, logprobs[np.arange(len(text) - 1), text[1:]], **CLOSE)
        assert_array_equal(new.likeliest, logprobs[:-1].argmax(axis=1))
        assert_allclose(new.hidden, hidden, atol=1e-4)
        assert new.logprobs.dtype == np.float32
    continued = llm.score([ids(text[:2]) for text in texts[1:4]], [t[2:] for t in texts[1:4]])
    for whole, new in zip(scores[1:4], continued, strict=True):
        assert_allclose(new.logprobs, whole.logprobs[1:], **CLOSE)
        assert new.hidden is None
    check_nothing_left(llm.engine)


def test_keys_that_depend_on_the_length_share_a_row() -> None:
    rope = RopeConfig(rope_type="dynamic", factor=4.0)
    config = dataclasses.replace(CONFIG, max_position_embeddings=64, rope=rope)
    llm = LLM((config, PARAMS), max_model_len=256)
    texts = random_prompts(2, [200, 100, 50])
    for text, new in zip(texts, llm.score([ids(text) for text in texts]), strict=True):
        expected = plain(config, text, len(text))[0][np.arange(len(text) - 1), text[1:]]
        assert_allclose(new.logprobs, expected, **CLOSE)


def test_sparse_scores_are_those_of_the_rollout(pattern: str) -> None:
    llm = sparse(pattern, relay="never", deterministic=True)  # one decode program
    poison(llm)
    prompts = [ids(prompt) for prompt in random_prompts(5, [300, 41, 1, 130, 77])]
    lengths = [40, 7, 33, 1, 70]
    sampling = [SamplingParams(seed=n, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, sampling)
    answers = [output.outputs[0] for output in outputs]
    continuations = [answer.token_ids for answer in answers]
    scores = llm.score(prompts, continuations)
    with_hidden = llm.score(prompts, continuations, return_hidden=True)
    dense = LLM((CONFIG, PARAMS)).score(prompts, continuations)
    gaps = []
    unembedding = np.asarray(PARAMS["lm_head"]["kernel"])
    for prompt, answer, new, full, other in zip(
        prompts, answers, scores, with_hidden, dense, strict=True
    ):
        assert new.hidden is None
        for made in (new, full):
            assert_allclose(made.logprobs, answer.token_logprobs, **CLOSE)
        gaps.append(np.abs(other.logprobs - answer.token_logprobs).max())
        # The model's own unembedding of each state gives the distributions again.
        logprobs = log_softmax(full.hidden @ unembedding)
        start = len(prompt["prompt_token_ids"]) - 1
        given = logprobs[start + np.arange(len(answer.token_ids)), answer.token_ids]
        assert_allclose(given, answer.token_logprobs, **CLOSE)
        assert len(logprobs) == start + 1 + len(answer.token_ids)
    assert max(gaps) > 0.1  # dense attention would not say the same
    check_nothing_left(llm.engine)


def test_quantised_keys_are_judged_as_they_are_generated() -> None:
    llm = LLM((CONFIG, PARAMS), kv_dtype="int4", max_model_len=512)
    [prompt] = random_prompts(6, [150])
    [output] = llm.generate(ids(prompt), SamplingParams(seed=0, max_tokens=40, ignore_eos=True))
    [answer] = output.outputs
    [new] = llm.score(ids(prompt), [answer.token_ids])
    assert_allclose(new.logprobs, answer.token_logprobs, **CLOSE)
    [other] = LLM((CONFIG, PARAMS)).score(ids(prompt), [answer.token_ids])
    assert np.abs(other.logprobs - answer.token_logprobs).max() > 1e-3


def test_exact_mode_is_judged_by_dense_attention(pattern: str) -> None:
    llm = sparse(pattern, exact=True)
    [text] = random_prompts(7, [300])
    [new] = llm.score(ids(text))
    assert_allclose(new.logprobs, plain(CONFIG, text, 300)[0][np.arange(299), text[1:]], **CLOSE)


@pytest.mark.parametrize("attention", ["dense", "lserve"])
def test_embeddings(pattern: str, attention: str) -> None:
    llm = LLM((CONFIG, PARAMS)) if attention == "dense" else sparse(pattern)
    texts = random_prompts(8, [30, 1, 50])  # within the prefill window, where all is dense
    mean = llm.embed([ids(text) for text in texts])
    last = llm.embed([ids(text) for text in texts], pooling="last")
    assert mean.dtype == last.dtype == np.float32
    for i, text in enumerate(texts):
        hidden = plain(CONFIG, text, 50)[1]
        assert_allclose(mean[i], hidden.mean(axis=0), atol=1e-4)
        assert_allclose(last[i], hidden[-1], atol=1e-4)
    assert llm.embed([]).shape == (0, CONFIG.hidden_size)
    with pytest.raises(ValueError, match="pooling='first'"):
        llm.embed([ids([1])], pooling="first")  # pyrefly: ignore


def test_rows_hold_every_text_once_and_waste_little() -> None:
    lengths = [*np.random.default_rng(0).integers(1, 300, 200).tolist(), 2048, 1000, 513]
    places: dict[int, tuple[int, int]] = {}
    used, shapes = 0, set()
    for number, (rows, shape) in enumerate(_batches(lengths)):
        assert len(rows) <= shape[0] and shape[0] * shape[1] <= 2048
        used += shape[0] * shape[1]
        shapes.add(shape)
        for row in rows:
            ends = 0
            for i, start in row:
                assert start == ends and i not in places
                ends = start + lengths[i]
                places[i] = (number, start)
            assert ends <= shape[1]
    assert places.keys() == set(range(len(lengths)))
    assert len(shapes) == 3
    assert used < 1.2 * sum(lengths)


def test_what_cannot_be_scored_is_refused() -> None:
    llm = LLM((CONFIG, PARAMS), max_model_len=100)
    for arguments, message in (
        (([ids([])],), "prompt 0 is empty"),
        (([ids([1])], [[1], [2]]), "1 prompts need as many continuations"),
        (([ids([1])], [[VOCAB]]), f"continuation token id {VOCAB} is outside the vocabulary"),
        (([ids([1] * 90)], [[1] * 11]), "a text of 101 tokens is longer than max_model_len=100"),
        (("text",), "the model has no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.score(*arguments)
    with pytest.raises(TypeError, match="prompts must be a prompt or a list of them"):
        llm.score(5)  # pyrefly: ignore
    llm.engine.add_request("mine", [1], SamplingParams(), seed=0)
    with pytest.raises(ValueError, match="still busy with another call's requests"):
        llm.score(ids([1, 2]))
    llm.engine.abandon(["mine"])
    assert llm.score([]) == []
    broken = PARAMS | {"norm": {"scale": PARAMS["norm"]["scale"] * jnp.nan}}
    with pytest.raises(FloatingPointError, match="not finite"):
        LLM((CONFIG, broken)).score(ids([1, 2]))
