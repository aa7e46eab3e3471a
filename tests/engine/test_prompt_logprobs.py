"""Log probabilities of a prompt's own tokens, against the float64 oracle and the plain model."""

import functools
from collections.abc import Sequence
from typing import Any

import engine_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from oracle_model import Oracle, log_softmax, streaming_heads
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    check_pages,
    poison,
    random_prompts,
    tiny_config,
    tiny_params,
    write_pattern,
)

from lserve_jax import LLM, RequestOutput, SamplingParams, SparsityConfig, logits
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.request import TokenOutput
from lserve_jax.text_engine import TextEngine
from lserve_jax.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("all_slots")

# float32 roundings against float64; a token more or less in the attention changes 1e-3.
ORACLE = {"atol": 2e-5, "rtol": 0}

CONFIG = tiny_config(layers=1, kv_heads=2, group=2, max_len=512)
PARAMS = tiny_params(CONFIG, seed=3)
GATES = [[0.9, 0.1]]
CHUNK = 64
SINK, LOCAL = 32, 64  # of prefill
SPARSITY = {
    "page_size": 16,
    "token_budget": 64,
    "reuse_interval": 4,
    "decode_sink": 16,
    "decode_local": 32,
    "prefill_sink": SINK,
    "prefill_local": LOCAL,
}
# A token, about a chunk, about two, an odd number of them.
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 100, 2 * CHUNK, 2 * CHUNK + 1, 301]
JUDGE = SamplingParams(prompt_logprobs=VOCAB, max_tokens=0)

Logprobs = list[dict[int, float] | None] | None


def build(pattern: str | None = None, **settings: Any) -> LLM:
    settings = {
        "attention": "dense" if pattern is None else "lserve",
        "sparsity": None if pattern is None else SparsityConfig(pattern=pattern, **SPARSITY),
        "max_num_seqs": 4,
        "prefill_chunk_size": CHUNK,
        "relay": "never",
    } | settings
    llm = LLM((CONFIG, PARAMS), **settings)
    poison(llm)
    return llm


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pattern(tmp_path_factory.mktemp("patterns") / "half", GATES)


@pytest.fixture(scope="module")
def dense() -> LLM:
    return build()


def ids(prompt: Sequence[int]) -> dict[str, Any]:
    return {"prompt_token_ids": list(prompt)}


def judge(llm: LLM, prompts: Sequence[Sequence[int]], **settings: Any) -> list[RequestOutput]:
    outputs = llm.generate([ids(prompt) for prompt in prompts], JUDGE, **settings)
    check_nothing_left(llm.engine)
    return outputs


def whole(found: Logprobs) -> NDArray[np.float64]:
    """``[n - 1, V]`` of what ``prompt_logprobs=VOCAB`` returned."""
    assert found is not None and found[0] is None
    rows = [row for row in found[1:] if row is not None]
    return np.array([[row[token] for token in range(VOCAB)] for row in rows]).reshape(-1, VOCAB)


def plain(prompt: Sequence[int]) -> NDArray[np.float64]:
    """The same of the model without an engine."""
    found = jax.jit(logits, static_argnums=0)(CONFIG, PARAMS, jnp.asarray([prompt]))
    return log_softmax(np.asarray(found[0, :-1], np.float64))


def oracle(prompt: Sequence[int], *, sparse: bool) -> NDArray[np.float64]:
    """The same of the oracle."""
    model = Oracle(CONFIG, PARAMS)
    if sparse:
        streaming = streaming_heads(GATES, 0.5)
        model = Oracle(CONFIG, PARAMS, sparsity=SparsityConfig(**SPARSITY), streaming=streaming)
    return log_softmax(model.prefill(prompt)[:-1])


# Numbers.


def test_dense_is_the_model(dense: LLM) -> None:
    prompts = random_prompts(1, LENGTHS)  # more than there are slots, all at once
    for prompt, output in zip(prompts, judge(dense, prompts), strict=True):
        found = whole(output.prompt_logprobs)
        assert len(found) == len(prompt) - 1
        assert_allclose(found, oracle(prompt, sparse=False), **ORACLE)
        if len(prompt) in (CHUNK + 1, 301):
            assert_allclose(found, plain(prompt), **ORACLE)


@pytest.mark.parametrize("exact", [False, True])
def test_lserve_is_its_prefill(half: str, exact: bool) -> None:
    """Streaming heads stream from sink and local tokens on; in exact mode prefill is dense."""
    prompts = random_prompts(2, LENGTHS)
    for prompt, output in zip(prompts, judge(build(half, exact=exact), prompts), strict=True):
        found = whole(output.prompt_logprobs)
        assert_allclose(found, oracle(prompt, sparse=not exact), **ORACLE)
        streamed = len(prompt) > SINK + LOCAL and not exact
        if len(prompt) > 1:
            difference = abs(found - oracle(prompt, sparse=False)).max()
            assert difference > 1e-3 if streamed else difference < ORACLE["atol"]


@pytest.mark.parametrize("wanted", [0, 1, 3, VOCAB + 5])
def test_the_likeliest_and_the_token_itself(dense: LLM, wanted: int) -> None:
    [prompt] = random_prompts(3, [70])
    sampling = SamplingParams(prompt_logprobs=wanted, max_tokens=0)
    [output] = dense.generate(ids(prompt), sampling)
    expected = oracle(prompt, sparse=False)
    assert output.prompt_logprobs is not None
    for row, token, values in zip(output.prompt_logprobs[1:], prompt[1:], expected, strict=True):
        assert row is not None
        best = np.argsort(-values)[:wanted].tolist()
        assert list(row) == (best if token in best else [*best, token])
        assert_allclose(list(row.values()), values[list(row)], **ORACLE)


def test_they_are_those_of_decode(dense: LLM) -> None:
    """What a greedy answer's tokens got, they get as a prompt."""
    [prompt] = random_prompts(4, [90])
    sampling = SamplingParams(temperature=0, max_tokens=20, logprobs=0, ignore_eos=True)
    [answer] = dense.generate(ids(prompt), sampling)
    completion = answer.outputs[0]
    assert completion.logprobs is not None
    tokens = completion.token_ids
    [judged] = dense.generate(ids(prompt + tokens), SamplingParams(prompt_logprobs=0, max_tokens=0))
    assert judged.prompt_logprobs is not None
    for own, other in zip(completion.logprobs, judged.prompt_logprobs[90:], strict=True):
        assert other is not None and own.keys() == other.keys()
        assert_allclose([*own.values()], [*other.values()], **ORACLE)


# Requests.


def test_a_request_that_ends_with_its_prompt(dense: LLM) -> None:
    longest = random_prompts(5, [dense.max_model_len])[0]
    before = dense.engine.metrics()
    [output] = judge(dense, [longest])
    completion, metrics = output.outputs[0], output.metrics
    assert (completion.text, completion.token_ids, completion.logprobs) == ("", [], None)
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert output.finished and output.error is None
    assert (metrics.prompt_tokens, metrics.generated_tokens) == (len(longest), 0)
    assert metrics.kv_bytes_held >= len(longest) * dense.engine.units.token
    after = dense.engine.metrics()
    assert after.finished == before.finished + 1
    assert after.generated_tokens == before.generated_tokens
    with pytest.raises(ValueError, match="513, more than max_model_len=512"):
        dense.generate(ids([*longest, 1]), JUDGE)


def test_among_others(dense: LLM) -> None:
    """Some judge and generate, some do one of them; nobody changes anybody's numbers."""
    prompts = random_prompts(6, [130, 40, 65, 200, 1])
    greedy = functools.partial(SamplingParams, temperature=0, ignore_eos=True)
    sampling = [
        greedy(max_tokens=30, prompt_logprobs=VOCAB),
        greedy(max_tokens=30),
        JUDGE,
        greedy(max_tokens=1, prompt_logprobs=VOCAB),
        greedy(max_tokens=9, prompt_logprobs=VOCAB),
    ]
    outputs = dense.generate([ids(prompt) for prompt in prompts], sampling)
    check_nothing_left(dense.engine)
    for prompt, asked, output in zip(prompts, sampling, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == asked.max_tokens
        if asked.max_tokens:
            plainly = greedy(max_tokens=asked.max_tokens)
            [alone] = dense.generate(ids(prompt), plainly)
            assert output.outputs[0].token_ids == alone.outputs[0].token_ids
        if asked.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            expected = oracle(prompt, sparse=False)
            assert_allclose(whole(output.prompt_logprobs), expected, **ORACLE)


def test_pages_are_those_of_the_prompt(pattern: str) -> None:
    """A prompt that fills the cache runs, and leaves it to the next."""
    llm = engine_cases.build(pattern, max_num_seqs=1, max_prefixes=0)
    longest = llm.spec.num_pages * engine_cases.P
    assert longest == llm.max_model_len
    for output in judge(llm, random_prompts(7, [longest, longest, longest - 1])):
        assert output.outputs[0].finish_reason == "length"
    scheduler = llm.engine.scheduler
    for length in (engine_cases.P, engine_cases.P + 1):
        assert scheduler.most_pages(np.zeros(length, int), JUDGE) == scheduler.pages_for(length)


def test_a_held_prefix_is_not_shared(half: str) -> None:
    """Every token of the prompt is run; who does not judge shares the prefix as ever."""
    llm = build(half)
    [beginning] = random_prompts(8, [160])
    prompts = [beginning + own for own in random_prompts(9, [7, 40])]
    prefix = llm.prefix(ids(beginning))
    for shared_prefix, found in ((prefix, 160), (None, 192)):
        sampling = [JUDGE, SamplingParams(temperature=0, max_tokens=4)]
        requests = [ids(prompt) for prompt in prompts]
        judged, other = llm.generate(requests, sampling, shared_prefix=shared_prefix)
        assert (judged.num_cached_tokens, other.num_cached_tokens) == (0, found)
        expected = oracle(prompts[0], sparse=True)
        assert_allclose(whole(judged.prompt_logprobs), expected, **ORACLE)
    prefix.release()
    check_nothing_left(llm.engine)


def test_no_prefix_is_computed_for_prompts_that_do_not_share_it(dense: LLM) -> None:
    [beginning] = random_prompts(10, [160])
    prompts = [beginning + own for own in random_prompts(11, [7, 40])]
    before = dense.engine.metrics().prompt_tokens
    judge(dense, prompts)
    assert dense.engine.metrics().prompt_tokens == before + sum(map(len, prompts))


def test_of_several_completions_one_judges(dense: LLM) -> None:
    [prompt] = random_prompts(12, [150])
    drawn = functools.partial(SamplingParams, n=3, max_tokens=6, seed=4, ignore_eos=True)
    [output] = dense.generate(ids(prompt), drawn(prompt_logprobs=VOCAB))
    assert_allclose(whole(output.prompt_logprobs), oracle(prompt, sparse=False), **ORACLE)
    [without] = dense.generate(ids(prompt), drawn())
    assert without.prompt_logprobs is None
    tokens = [completion.token_ids for completion in output.outputs]
    assert tokens == [completion.token_ids for completion in without.outputs]
    # The others share the prompt's whole pages, which are computed once for them.
    shared = [completion.metrics.prefix_tokens for completion in output.outputs]
    assert shared == [0, 128, 128]


# Ends and detours.


def collect(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_unfinished_requests:
        for new in engine.step():
            outputs.setdefault(new.request_id, []).append(new)
        check_pages(engine)
    return outputs


def judged_once(outputs: list[TokenOutput]) -> Logprobs:
    """Of a request's outputs the first has them, the others do not."""
    assert all(new.prompt_logprobs is None for new in outputs[1:])
    return outputs[0].prompt_logprobs


def test_preemption(pattern: str) -> None:
    """Twenty pages for four requests that want more: they begin again, in deterministic mode."""
    llm = engine_cases.build(pattern)
    engine = llm.engine
    prompts = random_prompts(13, [70, 90, 65, 75])
    sampling = engine_cases.greedy(60, prompt_logprobs=VOCAB, ignore_eos=True)
    alone = []
    for prompt in prompts:
        engine.add_request("alone", prompt, sampling, seed=0)
        alone.append(collect(engine)["alone"])
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, sampling, seed=0)
    outputs = collect(engine)
    assert engine.metrics().preemptions > 0
    for number, prompt in enumerate(prompts):
        found = judged_once(outputs[str(number)])
        expected = log_softmax(engine_cases.oracle().prefill(prompt)[:-1])
        assert_allclose(whole(found), expected, **ORACLE)
        assert found == judged_once(alone[number])
        made = [token for new in outputs[str(number)] for token in new.token_ids]
        assert made == [token for new in alone[number] for token in new.token_ids]


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_preempted_in_its_prompt(dense: LLM, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first chunk, its second, and its last, whose results are not fetched yet."""
    engine, scheduler = dense.engine, dense.engine.scheduler
    [prompt] = random_prompts(14, [3 * CHUNK - 5])
    sampling = SamplingParams(temperature=0, prompt_logprobs=VOCAB, max_tokens=40, ignore_eos=True)
    engine.add_request("a", prompt, sampling, seed=0)
    [request] = engine.unfinished.values()

    def preempt(steps: int) -> list[int]:
        slot = request.slot
        scheduler._preempt(request)
        return [slot]

    for step in range(1, chunks + 1):
        with monkeypatch.context() as patch:
            if step == chunks:
                patch.setattr(scheduler, "reserve", preempt)
            assert engine.step() == []
        assert request.prefilled == min(step * CHUNK, len(prompt))
    assert list(scheduler.waiting) == [request]
    outputs = collect(engine)["a"]
    assert_allclose(whole(judged_once(outputs)), oracle(prompt, sparse=False), **ORACLE)
    assert sum(len(new.token_ids) for new in outputs) == 40
    assert outputs[-1].metrics.preemptions == 1


def test_cancelled_and_late(half: str) -> None:
    """In the middle of their prompts; the next request gets numbers of its own only."""
    llm = build(half)
    engine = llm.engine
    now = 0.0
    engine.clock = lambda: now
    prompts = random_prompts(15, [200, 150, 170])
    engine.add_request("cancelled", prompts[0], JUDGE, seed=0)
    engine.step()
    engine.cancel("cancelled")
    engine.add_request("late", prompts[1], JUDGE, seed=0, deadline=5.0)
    engine.add_request("stays", prompts[2], JUDGE, seed=0)
    engine.step()
    now = 6.0
    outputs = collect(engine)
    assert [new.finish_reason for new in outputs.pop("cancelled", [])] in ([], ["cancelled"])
    assert outputs.keys() == {"late", "stays"}
    [late] = outputs["late"]
    assert (late.finish_reason, late.prompt_logprobs) == ("deadline", None)
    [stays] = outputs["stays"]
    assert stays.finish_reason == "length"
    assert_allclose(whole(stays.prompt_logprobs), oracle(prompts[2], sparse=True), **ORACLE)
    check_nothing_left(engine)


def test_a_prompt_ended_by_a_prefix(half: str) -> None:
    """There is one prefill window: what is left of the prompt runs first."""
    llm = build(half)
    prompt, beginning = random_prompts(16, [150, 64])
    llm.engine.add_request("a", prompt, JUDGE, seed=0)
    llm.engine.step()
    prefix = llm.engine.add_prefix(beginning)
    [output] = collect(llm.engine)["a"]
    assert_allclose(whole(output.prompt_logprobs), oracle(prompt, sparse=True), **ORACLE)
    prefix.release()


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_logits_that_are_not_finite(max_tokens: int) -> None:
    bad = VOCAB - 1
    params = tiny_params(CONFIG)
    embedding = params["embed_tokens"]["embedding"]
    params["embed_tokens"]["embedding"] = embedding.at[bad].set(np.nan)
    llm = LLM((CONFIG, params), max_num_seqs=2)
    sampling = SamplingParams(temperature=0, prompt_logprobs=2, max_tokens=max_tokens)
    [(_, output)] = llm.stream([(ids([1, bad, 2]), sampling)])
    assert output.outputs[0].finish_reason == "error"
    assert output.prompt_logprobs is None
    assert output.error is not None and "3 tokens of prompt" in output.error
    check_nothing_left(llm.engine)


# Text.


def test_text_and_deltas(tokenizer: Tokenizer) -> None:
    """The first delta has them, and the last's output; without being asked for, none does."""
    llm = LLM((CONFIG, PARAMS), tokenizer=tokenizer, prefill_chunk_size=CHUNK)
    prompt = "What_the_sea_says_to_the_moon,_the_moon_has_said_to_the_sea_before:_a_word."
    expected = oracle(tokenizer.encode(prompt), sparse=False)
    text = TextEngine(llm.engine, tokenizer)
    asked = functools.partial(SamplingParams, ignore_eos=True, seed=1)
    judging = text.submit(prompt, asked(max_tokens=40, n=2, prompt_logprobs=VOCAB))
    ending = text.submit(prompt, JUDGE)
    other = text.submit(prompt, asked(max_tokens=10))
    deltas = []
    while text.has_unfinished_requests:
        deltas += text.step()
    for request in (judging, ending):
        first, *rest = [d for d in deltas if d.request_id == request and d.index == 0]
        assert_allclose(whole(first.prompt_logprobs), expected, **ORACLE)
        assert all(delta.prompt_logprobs is None for delta in rest)
        [output] = [d.output for d in deltas if d.request_id == request and d.output is not None]
        assert output.prompt_logprobs is first.prompt_logprobs
    [end] = [delta for delta in deltas if delta.request_id == ending]
    assert (end.text, end.token_ids, end.finish_reason) == ("", [], "length")
    for delta in deltas:
        if delta.request_id == other or delta.index == 1:
            assert delta.prompt_logprobs is None
    [generated] = llm.generate(prompt, JUDGE)
    assert_allclose(whole(generated.prompt_logprobs), expected, **ORACLE)
    assert generated.outputs[0].text == ""


def test_a_stream_of_prompts(dense: LLM) -> None:
    prompts = random_prompts(17, [3 + 5 * i for i in range(30)])
    found = dict(dense.stream((ids(prompt), JUDGE) for prompt in prompts))
    assert found.keys() == set(range(30))
    for position, output in found.items():
        assert output.prompt_token_ids == prompts[position]
        expected = oracle(prompts[position], sparse=False)
        assert_allclose(whole(output.prompt_logprobs), expected, **ORACLE)
    check_nothing_left(dense.engine)
