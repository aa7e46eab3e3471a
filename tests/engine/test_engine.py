"""The host side of generation: queue, slots, pages, ends of requests; and what a request costs.

One tiny model for all tests, with a retrieval and a streaming head, and a pool of 20 pages that
four slots can want 64 of. Where outputs matter they are compared with the float64 oracle.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_allclose, assert_array_equal
from oracle_model import Oracle
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    check_pages,
    expected,
    generate,
    poison,
    random_prompts,
    tiny_config,
    tiny_params,
    write_pattern,
)

from lserve_jax import LLM, RequestOutput, SamplingParams, SparsityConfig
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.request import TokenOutput
from lserve_jax.tokenizer import Tokenizer

P, PAGES, BUDGET, C = 16, 20, 48, 4
# One retrieval head, float32: keys, values and kmax, kmin of one logical page a page.
PAGE_BYTES = (2 * P + 2) * 16 * 4
SIZES = {
    "page_size": P,
    "token_budget": BUDGET,
    "reuse_interval": C,
    "decode_sink": 16,
    "decode_local": 32,
    "prefill_sink": 16,
    "prefill_local": 64,
}
CONFIG = tiny_config(layers=1, kv_heads=2, max_len=256)
ORACLE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pattern(tmp_path_factory.mktemp("patterns") / "half", [[0.1, 0.9]])


@pytest.fixture
def llm(pattern: str) -> LLM:
    return build(pattern)


def build(pattern: str, **settings: Any) -> LLM:
    settings = {"max_num_seqs": 4, "prefill_chunk_size": 64, "burst_steps": 8} | settings
    llm = LLM(
        (CONFIG, tiny_params(CONFIG)),
        attention="lserve",
        sparsity=SparsityConfig(pattern=pattern, **SIZES),
        kv_cache_bytes=PAGES * PAGE_BYTES,
        **settings,
    )
    poison(llm)
    return llm


def oracle() -> Oracle:
    sparsity = SparsityConfig(**SIZES)
    return Oracle(CONFIG, tiny_params(CONFIG), sparsity=sparsity, streaming=[[True, False]])


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=VOCAB, **settings)


def run(llm: LLM, prompts: list[list[int]], sampling: Any, **settings: Any) -> list[RequestOutput]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, **settings)
    check_nothing_left(llm.engine)
    return outputs


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def drain(engine: Engine) -> list[TokenOutput]:
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
        check_pages(engine)
    return outputs


# Slots and pages.


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_random_traffic(seed: int, llm: LLM) -> None:
    """Arrivals, ends and cancellations in any order: pages stay owned once, outputs stay right."""
    rng = np.random.default_rng(seed)
    engine, prompts, made = llm.engine, {}, {}
    running, finished, cancelled = [], [], []
    queue = [f"r{i}" for i in range(30)]
    started: list[str] = []
    while queue or engine.has_unfinished_requests:
        if queue and rng.random() < 0.5:
            name = queue.pop(0)
            prompts[name] = rng.integers(0, VOCAB, rng.integers(1, 150)).tolist()
            engine.add_request(name, prompts[name], greedy(int(rng.integers(1, 60))), seed=0)
            running.append(name)
            made[name] = []
        if running and rng.random() < 0.05:
            name = running.pop(rng.integers(len(running)))
            engine.cancel(name)
            cancelled.append(name)
        for new in engine.step():
            if not made[new.request_id]:
                started.append(new.request_id)
            made[new.request_id].append(new)
            if new.finish_reason is not None:
                running.remove(new.request_id)
                finished.append(new.request_id)
        check_pages(engine)
    check_nothing_left(engine)
    assert len(finished) + len(cancelled) == 30
    assert len(finished) > 15
    assert cancelled
    assert started == sorted(started, key=lambda name: int(name[1:]))  # first come, first served
    for name in finished:
        tokens = [token for new in made[name] for token in new.token_ids]
        rows = [row for new in made[name] for row in new.top_logprobs]
        logprobs = [[row[token] for token in range(VOCAB)] for row in rows]
        assert_allclose(logprobs, expected(oracle(), prompts[name], tokens), **ORACLE)
        assert made[name][-1].finish_reason == "length"
        assert made[name][-1].metrics.generated_tokens == len(tokens)


def test_recycled_pages_hold_nothing_of_their_last_owner(llm: LLM) -> None:
    """Bit for bit the same on fresh, on recycled and on spoiled recycled pages."""
    prompts, others = random_prompts(1, [70, 33, 16, 90]), random_prompts(2, [100, 20, 80, 7])
    runs = [generate(llm, prompts, 20)]
    generate(llm, others, [25, 3, 11, 30])
    runs.append(generate(llm, prompts, 20))
    poison(llm)
    runs.append(generate(llm, prompts, 20))
    for again in runs[1:]:
        for one, other in zip(runs[0], again, strict=True):
            assert one.tokens == other.tokens
            assert_array_equal(one.logprobs, other.logprobs)


def test_requests_wait_for_pages(llm: LLM) -> None:
    """None overtakes the one that waits, though there is a slot, and pages enough for it."""
    engine = llm.engine
    prompts = dict(zip("abc", random_prompts(3, [200, 190, 5]), strict=True))
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(30), seed=0)  # at least 13, 12 and 1 of 20 pages
    outputs = engine.step()
    scheduler = engine.scheduler
    while any(request.request_id == "a" for request in scheduler.placed()):
        assert [request.request_id for request in scheduler.waiting] == ["b", "c"]
        assert len(scheduler.free_slots) == 3
        outputs += engine.step()
        check_pages(engine)
    outputs += drain(engine)
    assert [*dict.fromkeys(new.request_id for new in outputs)] == ["a", "b", "c"]
    assert engine.metrics().preemptions == 0
    for name in "bc":
        new = [x for x in outputs if x.request_id == name]
        tokens = [token for x in new for token in x.token_ids]
        logprobs = [[row[t] for t in range(VOCAB)] for x in new for row in x.top_logprobs]
        assert_allclose(logprobs, expected(oracle(), prompts[name], tokens), **ORACLE)
    check_nothing_left(engine)


def test_more_pages_than_there_are_is_refused(pattern: str) -> None:
    """At once, with both numbers, before anything of the batch runs."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=1024)
    llm = LLM(
        (config, tiny_params(config)),
        max_num_seqs=4,
        attention="lserve",
        sparsity=SparsityConfig(pattern=pattern, **SIZES),
        kv_cache_bytes=PAGES * PAGE_BYTES,
    )
    small, fits, large = random_prompts(4, [5, 311, 312])
    llm.engine.check_request(fits, greedy(10))  # 320 tokens are cached: the last one never is
    with pytest.raises(ValueError, match="needs 21 pages of 16 tokens, the KV cache has 20"):
        run(llm, [small, large], greedy(10))
    check_nothing_left(llm.engine)
    with pytest.raises(ValueError, match=f"1 takes|one takes {PAGE_BYTES} bytes"):
        LLM(
            (CONFIG, tiny_params(CONFIG)),
            attention="lserve",
            sparsity=SparsityConfig(pattern=pattern, **SIZES),
            kv_cache_bytes=PAGE_BYTES - 1,
        )


def test_more_requests_than_slots(llm: LLM) -> None:
    prompts = random_prompts(5, [3, 40, 20, 9, 61, 30, 17])
    for prompt, output in zip(prompts, run(llm, prompts, greedy(9)), strict=True):
        assert output.prompt_token_ids == prompt
        completion = output.outputs[0]
        logprobs = [[row[token] for token in range(VOCAB)] for row in completion.logprobs]
        assert_allclose(logprobs, expected(oracle(), prompt, completion.token_ids), **ORACLE)


@pytest.mark.slow
@pytest.mark.parametrize("burst_steps", [1, 9])
def test_bursts_are_whole_reuse_intervals(burst_steps: int, pattern: str) -> None:
    """Whatever is asked for: the reuse clock of a sequence must not depend on it."""
    llm = build(pattern, burst_steps=burst_steps)
    assert llm.engine.burst_steps == -(-burst_steps // C) * C
    prompts = random_prompts(6, [100, 33, 60, 47])
    for prompt, made in zip(prompts, generate(llm, prompts, 22), strict=True):
        assert_allclose(made.logprobs, expected(oracle(), prompt, made.tokens), **ORACLE)


# Ends of a request.


def test_cancel(llm: LLM) -> None:
    """Waiting, in prefill or running, a request goes at once; its neighbours do not notice."""
    engine = llm.engine
    prompts = random_prompts(7, [50, 60, 70, 10])
    for name, prompt in zip("abcd", prompts, strict=True):
        engine.add_request(name, prompt, greedy(30), seed=0)
    outputs = engine.step() + engine.step() + engine.step()
    running, waiting = engine.scheduler.running, engine.scheduler.waiting
    assert [request.request_id for request in running.values()] == ["a", "b"]
    assert engine.scheduler.prefilling.request_id == "c"
    assert [request.request_id for request in waiting] == ["d"]
    engine.cancel("d")  # waits
    engine.cancel("c")  # in prefill
    check_pages(engine)
    outputs += engine.step()
    engine.cancel("a")  # runs
    check_pages(engine)
    assert [request.request_id for request in running.values()] == ["b"]
    outputs += drain(engine)
    check_nothing_left(engine)
    assert {new.request_id for new in outputs} == {"a", "b"}
    tokens = [token for new in outputs if new.request_id == "b" for token in new.token_ids]
    rows = [row for new in outputs if new.request_id == "b" for row in new.top_logprobs]
    logprobs = [[row[token] for token in range(VOCAB)] for row in rows]
    assert_allclose(logprobs, expected(oracle(), prompts[1], tokens), **ORACLE)
    for name in ("a", "never"):
        with pytest.raises(ValueError, match=f"'{name}' is waiting or running"):
            engine.cancel(name)


def test_duplicate_ids_are_refused(llm: LLM) -> None:
    engine, [prompt] = llm.engine, random_prompts(8, [5])
    engine.add_request("a", prompt, greedy(3), seed=0)
    with pytest.raises(ValueError, match="id 'a' is already in the engine"):
        engine.add_request("a", prompt, greedy(3), seed=0)
    engine.step()
    with pytest.raises(ValueError, match="id 'a' is already in the engine"):
        engine.add_request("a", prompt, greedy(3), seed=0)
    drain(engine)
    engine.add_request("a", prompt, greedy(3), seed=0)  # the first is gone
    assert len(drain(engine)) == 2


def test_max_tokens_of_one(llm: LLM) -> None:
    """Prefill alone: no decode step, nothing read."""
    [prompt] = random_prompts(9, [90])
    [output] = run(llm, [prompt], greedy(1))
    assert len(tokens_of(output)) == 1
    assert output.outputs[0].finish_reason == "length"
    metrics = output.metrics
    assert (metrics.prompt_tokens, metrics.generated_tokens) == (90, 1)
    assert (metrics.decode_steps, metrics.selector_runs, metrics.bypassed_steps) == (0, 0, 0)
    assert metrics.kv_bytes_read_per_step == 0


def first_occurrence(tokens: list[int], after: int) -> int:
    """The index of a token, past ``after``, that has not been there before it."""
    return next(i for i in range(after, len(tokens)) if tokens[i] not in tokens[:i])


def test_stop_tokens(llm: LLM) -> None:
    """A stop id or EOS ends a request in the middle of a burst; ids say which, EOS does not."""
    [prompt] = random_prompts(10, [30])
    tokens = tokens_of(run(llm, [prompt], greedy(40))[0])
    end = first_occurrence(tokens, 5)
    stop = tokens[end]

    [output] = run(llm, [prompt], greedy(40, stop_token_ids=[VOCAB - 1, stop]))
    completion = output.outputs[0]
    assert completion.token_ids == tokens[: end + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.metrics.generated_tokens == end + 1
    assert completion.metrics.decode_steps == end

    llm.engine.eos_token_ids = (stop,)  # as the model's configuration would have it
    completion = run(llm, [prompt], greedy(40))[0].outputs[0]
    assert completion.token_ids == tokens[: end + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    [output] = run(llm, [prompt], greedy(40, ignore_eos=True))
    assert tokens_of(output) == tokens
    assert output.outputs[0].finish_reason == "length"


def test_stop_token_first_of_all(llm: LLM) -> None:
    """Drawn from the prompt's logits: the request ends before it decodes."""
    [prompt] = random_prompts(11, [30])
    [first, *_] = tokens_of(run(llm, [prompt], greedy(5))[0])
    completion = run(llm, [prompt], greedy(5, stop_token_ids=[first]))[0].outputs[0]
    assert completion.token_ids == [first]
    assert completion.finish_reason == "stop"


def test_stop_token_last_of_all(llm: LLM) -> None:
    """At max_tokens, a stop id still is the reason."""
    [prompt] = random_prompts(12, [30])
    tokens = tokens_of(run(llm, [prompt], greedy(40))[0])
    end = first_occurrence(tokens, 5)
    completion = run(llm, [prompt], greedy(end + 1, stop_token_ids=[tokens[end]]))[0].outputs[0]
    assert completion.token_ids == tokens[: end + 1]
    assert completion.finish_reason == "stop"


def test_min_tokens(llm: LLM) -> None:
    """A stop id is impossible before; the step that would have taken it takes the next best."""
    [prompt] = random_prompts(13, [30])
    tokens = tokens_of(run(llm, [prompt], greedy(40))[0])
    end = first_occurrence(tokens, 5)
    sampling = greedy(40, stop_token_ids=[tokens[end]], min_tokens=end + 5)
    completion = run(llm, [prompt], sampling)[0].outputs[0]
    made = completion.token_ids
    assert made[:end] == tokens[:end]
    ranked = sorted(completion.logprobs[end], key=completion.logprobs[end].get)
    assert (ranked[-1], ranked[-2]) == (tokens[end], made[end])
    assert tokens[end] not in made[: end + 5]
    assert len(made) >= end + 5


def test_requests_are_checked_before_anything_runs(llm: LLM) -> None:
    good = {"prompt_token_ids": [1, 2, 3]}
    for bad, message in (
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": [1, VOCAB]}, rf"token id {VOCAB} is outside .* \[0, {VOCAB}\)"),
        ({"prompt_token_ids": [-1]}, "token id -1 is outside"),
        ({"prompt_token_ids": [1] * 250}, "250 tokens and max_tokens=7 make 257, .*=256"),
        ({"prompt": "text"}, r"'prompt_token_ids', got \{'prompt': 'text'\}"),
        ("text", "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate([good, bad], greedy(7))
        check_nothing_left(llm.engine)
    with pytest.raises(ValueError, match=r"stop=.*'x'.* needs a tokenizer"):
        llm.generate([good], greedy(7, stop="x"))
    with pytest.raises(ValueError, match="2 prompts need as many sampling params, got 1"):
        llm.generate([good, good], [greedy(7)])
    with pytest.raises(ValueError, match=r"33 stop token ids.*exceed 32"):
        llm.generate([good], greedy(7, stop_token_ids=range(33)))
    assert llm.generate([], greedy(7)) == []


def test_longest_request(llm: LLM) -> None:
    """Prompt and generation fill max_model_len to the last token."""
    [prompt] = random_prompts(14, [200])
    [made] = generate(llm, [prompt], 56)
    assert len(made.tokens) == 56
    assert_allclose(made.logprobs, expected(oracle(), prompt, made.tokens), **ORACLE)


# Text.


@pytest.fixture
def texting(pattern: str) -> LLM:
    """With a tokenizer that writes token i as the character 33 + i."""
    vocabulary = {chr(33 + i): i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=None)
    return build(pattern, tokenizer=tokenizer)


def spell(tokens: list[int]) -> str:
    return "".join(chr(33 + token) for token in tokens)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(include: bool, texting: LLM) -> None:
    """Found across tokens and bursts; never shown, not even its beginning; the engine stops too."""
    [prompt] = random_prompts(15, [20])
    neighbour = random_prompts(16, [50])[0]
    [whole, other] = run(texting, [prompt, neighbour], greedy(40))
    text = whole.outputs[0].text
    assert text == spell(tokens_of(whole))
    stop = text[10:13]
    at = text.find(stop)
    sampling = greedy(40, stop=["\u1234", stop], include_stop_str_in_output=include)
    shown: list[tuple[int, int, str]] = []
    stopped, unaware = run(
        texting,
        [prompt, neighbour],
        [sampling, greedy(40)],
        on_text=lambda *new: shown.append(new),
    )
    completion = stopped.outputs[0]
    assert completion.text == (text[: at + 3] if include else text[:at])
    assert completion.token_ids == tokens_of(whole)[: at + 3]
    assert len(completion.logprobs) == at + 3
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert "".join(new for prompt, _, new in shown if prompt == 0) == completion.text
    assert "".join(new for prompt, _, new in shown if prompt == 1) == other.outputs[0].text
    assert tokens_of(unaware) == tokens_of(other)


def test_text_prompts(texting: LLM) -> None:
    [prompt] = random_prompts(17, [20])
    text = spell(prompt)
    by_text = texting.generate(text, greedy(5))[0]
    assert (by_text.prompt, by_text.prompt_token_ids) == (text, prompt)
    assert tokens_of(by_text) == tokens_of(run(texting, [prompt], greedy(5))[0])


@pytest.mark.parametrize("calls", [1, 3, 7])
def test_errors_in_on_text_leave_nothing_behind(calls: int, texting: LLM) -> None:
    """Also when others have just ended in the same burst, or the failing one has."""
    prompts = random_prompts(18, [20, 30, 40, 50, 60, 70])
    seen = []

    def fail(*new: Any) -> None:
        seen.append(new)
        if len(seen) == calls:
            raise KeyError("from on_text")

    with pytest.raises(KeyError, match="from on_text"):
        run(texting, prompts, greedy(4), on_text=fail)
    check_nothing_left(texting.engine)
    outputs = run(texting, prompts, greedy(4))
    for prompt, output in zip(prompts, outputs, strict=True):
        oracle_logprobs = expected(oracle(), prompt, tokens_of(output))
        assert tokens_of(output) == oracle_logprobs.argmax(axis=1).tolist()


# Sampling through the engine; what a row draws is tested in test_sampling.py.


def test_completions_of_one_prompt(llm: LLM) -> None:
    """n completions differ, and come again with the same seed, whoever is beside them."""
    prompt, other = random_prompts(19, [25, 60])
    sampling = SamplingParams(n=3, max_tokens=12, seed=5)
    [output] = run(llm, [prompt], sampling)
    completions = [completion.token_ids for completion in output.outputs]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(tokens) for tokens in completions}) == 3
    assert all(len(tokens) == 12 for tokens in completions)
    crowd = run(llm, [other, prompt], [SamplingParams(max_tokens=9), sampling])
    assert [completion.token_ids for completion in crowd[1].outputs] == completions
    assert output.outputs[0].logprobs is None
    for tokens, completion in zip(completions, output.outputs, strict=True):
        rows = expected(oracle(), prompt, tokens)
        picked = rows[np.arange(12), tokens].sum()
        assert completion.cumulative_logprob == pytest.approx(picked, abs=1e-4)


@pytest.mark.slow
def test_seeds(pattern: str) -> None:
    """Requests without a seed draw from the LLM's, each differently."""
    [prompt] = random_prompts(20, [25])
    sampling = SamplingParams(max_tokens=12)

    def draw(seed: int) -> list[list[int]]:
        llm = build(pattern, seed=seed)
        return [tokens_of(output) for _ in "ab" for output in run(llm, [prompt] * 2, sampling)]

    one, again, other = draw(1), draw(1), draw(2)
    assert one == again
    assert len({tuple(tokens) for tokens in one + other}) == 8


@pytest.mark.slow
def test_penalties_of_one_request_only(llm: LLM) -> None:
    """A request with penalties joins one that has none: both as if alone."""
    prompts = random_prompts(21, [25, 40, 30])
    penalty = SamplingParams(temperature=0, max_tokens=15, presence_penalty=2, frequency_penalty=2)
    plain = SamplingParams(temperature=0, max_tokens=15)
    alone = [tokens_of(run(llm, [p], s)[0]) for p, s in zip(prompts, [plain, penalty, plain],
                                                            strict=True)]  # fmt: skip
    together = run(llm, prompts, [plain, penalty, plain])
    assert [tokens_of(output) for output in together] == alone
    assert len(set(alone[1])) == 15  # a penalty of 4 against logits of size 3
    [without] = run(llm, [prompts[1]], plain)
    assert tokens_of(without) != alone[1]


# Numbers.


def test_metrics(llm: LLM) -> None:
    """Selections, bypassed steps and attended pages, counted once more step by step."""
    prompts = random_prompts(22, [5, 40, 48, 49, 100])
    for prompt, output in zip(prompts, run(llm, prompts, greedy(24)), strict=True):
        metrics, model = output.metrics, oracle()
        model.prefill(prompt)
        attended = selections = bypassed = statistics = 0
        for token in tokens_of(output)[:-1]:
            model.decode(token)
            attended += sum(map(len, model.attended.values()))
            pruned = model.tail > BUDGET // P - 1
            bypassed += not pruned
            if pruned and (model.steps - 1) % C == 0:
                selections += 1
                statistics += -(-model.length // P)
        assert metrics.decode_steps == 23
        assert (metrics.selector_runs, metrics.bypassed_steps) == (selections, bypassed)
        assert metrics.pages_attended_per_step == pytest.approx(attended / 23 / 2 / P)
        token_bytes, page_statistics = 2 * 16 * 4, 2 * 16 * 4
        # Selections of one burst all count the pages that there are at its end.
        read = (attended * token_bytes + statistics * page_statistics) / 23
        assert metrics.kv_bytes_read_per_step == pytest.approx(read, rel=0.01)
        lengths = range(len(prompt) + 1, len(prompt) + 24)
        assert metrics.dense_kv_bytes_read_per_step == pytest.approx(
            sum(lengths) * 2 * token_bytes / 23
        )
        assert metrics.kv_bytes_held == -(-(len(prompt) + 23) // P) * PAGE_BYTES + 4 * P * (
            2 * 16 * 4
        )
        assert 0 < metrics.prefill_seconds <= metrics.first_token_seconds
        assert 0 <= metrics.queue_seconds <= metrics.first_token_seconds


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "sparse"}, "attention='sparse' must be 'dense' or 'lserve'"),
        ({"sparsity": SparsityConfig()}, "needs attention='lserve', got attention='dense'"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4'"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_model_len": 0}, "max_model_len=0 must be a positive integer"),
        ({"prefill_chunk_size": 96}, "prefill_chunk_size=96 must be a power of two"),
        ({"prefill_chunk_size": 32}, "prefill_chunk_size=32 must be a power of two of at least 64"),
        ({"burst_steps": 0}, "burst_steps=0 must be at least 1"),
        ({"adapter": "somewhere"}, "adapter='somewhere' needs a checkpoint"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_llm_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM((CONFIG, tiny_params(CONFIG)), **settings)


def test_backend_is_checked_before_the_model_is_loaded() -> None:
    with pytest.raises(
        NotImplementedError, match=r"backend='mosaic' needs a Hopper GPU, .* is cpu"
    ):
        LLM("no-such-model", backend="mosaic")
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; known: .*'auto', 'mosaic'"):
        LLM("no-such-model", backend="cuda")
    assert build(None).engine.runner.backend == "reference"


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_bfloat16(kv_dtype: str, pattern: str) -> None:
    """All arrays are bfloat16 and no step mixes it with float32; the output stays close."""
    llm = build(pattern, dtype="bfloat16", kv_dtype=kv_dtype)
    runner = llm.engine.runner
    cache, params = runner.read_cache(0), runner.params
    dtypes = {x.dtype for x in (cache.prefill_window.k, cache.key_stats, *jax.tree.leaves(params))}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert cache.retrieval.k.dtype == cache.streaming.k.dtype
    assert cache.retrieval.k.dtype == ("int8" if kv_dtype == "int8" else "bfloat16")
    prompts = random_prompts(23, [20, 100, 64, 47])
    for prompt, made in zip(prompts, generate(llm, prompts, 20), strict=True):
        error = np.abs(made.logprobs - expected(oracle(), prompt, made.tokens))
        # bfloat16 has 8 bits. Where two pages nearly tie the other may be chosen: a quantile.
        assert 1e-3 < np.quantile(error, 0.9) < 0.1
