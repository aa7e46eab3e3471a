"""Teacher forcing through decode steps, against the float64 oracle and the plain model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import Oracle, log_softmax, streaming_heads
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    poison,
    random_prompts,
    tiny_config,
    tiny_params,
    write_pattern,
)

from lserve_jax import LLM, SparsityConfig, logits
from lserve_jax.engine.scoring import Score, score
from lserve_jax.eval.language import Prediction, kl_divergence, make_windows, predict

pytestmark = pytest.mark.usefixtures("all_slots")

# As in test_lserve.py: float32 roundings against float64; a page more or less changes 1e-3.
ORACLE = {"atol": 2e-5, "rtol": 0}

CONFIG = tiny_config(layers=1, kv_heads=2, group=2)
GATES = [[0.9, 0.1]]
CHUNK = {"prefill_chunk_size": 64}  # one shape of prompt to compile
SIZES = {
    "page_size": 16,
    "token_budget": 64,
    "decode_sink": 16,
    "decode_local": 32,
    "prefill_sink": 32,
    "prefill_local": 64,
}


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG, seed=3)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    return write_pattern(tmp_path_factory.mktemp("pattern") / "p", GATES)


def lserve(params, pattern: str, interval: int = 4, **changes) -> LLM:
    sparsity = SparsityConfig(
        **{**SIZES, "pattern": pattern, "reuse_interval": interval, **changes}
    )
    return LLM((CONFIG, params), attention="lserve", sparsity=sparsity, max_num_seqs=4, **CHUNK)


def check_score(new: Score, expected: np.ndarray, tokens: list[int]) -> None:
    """``expected`` [n, V]: log probabilities at every step."""
    assert_allclose(new.logprobs, expected[np.arange(len(tokens)), tokens], **ORACLE)
    assert_array_equal(new.likeliest, expected.argmax(axis=-1))
    if new.distributions is not None:
        assert_allclose(new.distributions, expected, **ORACLE)


@pytest.mark.parametrize("interval", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_sparse_scores_are_the_oracles(params, pattern, interval):
    llm = lserve(params, pattern, interval)
    poison(llm)
    prompts = random_prompts(5, [300, 41, 1, 130, 77])  # more than there are slots; one of 1 token
    continuations = random_prompts(6, [40, 7, 33, 1, 20])  # more steps than one call runs
    scores = score(llm.engine, prompts, continuations, distributions=True)
    sparsity = SparsityConfig(**SIZES, reuse_interval=interval)
    for prompt, continuation, new in zip(prompts, continuations, scores, strict=True):
        oracle = Oracle(CONFIG, params, sparsity=sparsity, streaming=streaming_heads(GATES, 0.5))
        if len(prompt) > 1:
            oracle.prefill(prompt[:-1])
        steps = [oracle.decode(token) for token in [prompt[-1], *continuation[:-1]]]
        check_score(new, log_softmax(np.array(steps)), continuation)
    check_nothing_left(llm.engine)


def test_dense_scores_are_the_models(params):
    llm = LLM((CONFIG, params), max_num_seqs=2, **CHUNK)
    (prompt,), (continuation,) = random_prompts(1, [100]), random_prompts(2, [50])
    (new,) = score(llm.engine, [prompt], [continuation], distributions=True)
    tokens = jnp.asarray([prompt + continuation])
    rows = np.asarray(jax.jit(logits, static_argnums=0)(CONFIG, params, tokens))[0, 99:-1]
    whole = log_softmax(rows.astype(np.float64))
    check_score(new, whole, continuation)


def test_requests_that_do_not_fit_together_take_turns(params):
    prompts, continuations = random_prompts(1, [60, 70, 80]), random_prompts(2, [10, 20, 9])
    one = LLM((CONFIG, params), max_num_seqs=1, max_model_len=64, max_prefixes=0)
    page = one.memory_plan()["retrieval"]
    llm = LLM((CONFIG, params), kv_cache_bytes=3 * page, max_num_seqs=2, max_model_len=128, **CHUNK)
    assert llm.spec.num_pages == 3  # each of the three needs two
    poison(llm)
    scores = score(llm.engine, prompts, continuations)
    for prompt, continuation, new in zip(prompts, continuations, scores, strict=True):
        oracle = Oracle(CONFIG, params)
        whole = log_softmax(oracle.prefill(prompt + continuation))
        check_score(new, whole[len(prompt) - 1 : -1], continuation)
        assert new.distributions is None
    check_nothing_left(llm.engine)


@pytest.mark.parametrize(
    ("prompt", "continuation", "message"),
    [
        ([], [1], "at least one token of prompt"),
        ([1], [], "at least one token of prompt and one of continuation"),
        ([1, 2], [VOCAB], f"token id {VOCAB} is outside the vocabulary"),
        ([1, VOCAB, 2], [1], f"token id {VOCAB} is outside the vocabulary"),
        ([1] * 1000, [1] * 25, "max_model_len=1024"),
    ],
)
def test_bad_requests_are_refused(params, prompt, continuation, message):
    llm = LLM((CONFIG, params), max_num_seqs=1)
    with pytest.raises(ValueError, match=message):
        score(llm.engine, [prompt], [continuation])
    check_nothing_left(llm.engine)


class NoBos:
    """All that ``make_windows`` asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        return []


class Bos(NoBos):
    def encode(self, text: str) -> list[int]:
        return [7]


def test_windows_are_spread_over_the_text():
    text = list(range(100, 200))
    windows = make_windows(NoBos(), text, source="t", lengths=(20, 40), windows=3, scored=5)
    starts = {20: [], 40: []}
    for window in windows:
        first, length = window.token_ids[0], window.length
        assert window.token_ids == list(range(first, first + length))
        starts[length].append(first)
    assert starts == {20: [100, 130, 160], 40: [100, 130, 160]}
    (window,) = make_windows(Bos(), text, source="t", lengths=(20,), windows=1, scored=5)
    assert window.token_ids == [7, *range(100, 119)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (50, 101)}, "the text has 100 tokens, a window of 101 needs 101"),
        ({"windows": 0}, "windows=0 must be at least 1"),
        ({"scored": 20}, "scored=20 tokens must be at least 1 and fewer than the shortest"),
    ],
)
def test_impossible_windows_are_refused(changes, message):
    arguments = {"source": "t", "lengths": (20, 40), "windows": 3, "scored": 5, **changes}
    with pytest.raises(ValueError, match=message):
        make_windows(NoBos(), list(range(100)), **arguments)


WINDOWS = make_windows(
    NoBos(), random_prompts(9, [400])[0], source="t", lengths=(200, 380), windows=1, scored=24
)


def compare(llm: LLM, reference: list[Score] | None) -> tuple[list[Prediction], list[Score]]:
    return predict(llm, WINDOWS, reference, agreement=True, progress=lambda n: None)


@pytest.fixture(scope="module")
def dense_scores(params) -> list[Score]:
    dense = LLM((CONFIG, params), max_num_seqs=2, **CHUNK)
    predictions, reference = compare(dense, None)
    assert all((p.divergence == 0).all() and p.same_token.all() for p in predictions)
    return reference


def test_lserve_that_reads_everything_agrees_with_dense(params, dense_scores):
    sparsity = SparsityConfig(page_size=16, token_budget=1024)
    llm = LLM((CONFIG, params), attention="lserve", sparsity=sparsity, max_num_seqs=2, **CHUNK)
    for prediction in compare(llm, dense_scores)[0]:
        assert np.abs(prediction.divergence).max() < 1e-6  # of float32 log probabilities
        assert prediction.same_token.all()


def test_lserve_that_prunes_differs_from_dense(params, pattern, dense_scores):
    for prediction in compare(lserve(params, pattern), dense_scores)[0]:
        assert prediction.divergence.mean() > 1e-2
        assert prediction.divergence.min() > -1e-6


def test_divergence_is_its_definition():
    def score_of(*rows: list[float]) -> Score:
        distributions = np.log(np.array(rows, np.float32))
        zeros = np.zeros(len(rows))
        return Score(
            logprobs=zeros.astype(np.float32),
            likeliest=zeros.astype(np.int32),
            distributions=distributions,
        )

    reference, other = score_of([0.5, 0.5], [0.9, 0.1]), score_of([0.25, 0.75], [0.9, 0.1])
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert_allclose(kl_divergence(reference, other), [expected, 0], atol=1e-6)
