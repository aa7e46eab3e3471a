"""The host side of generation: queue, slots, pages, and the ends of a request.

Where outputs matter they are compared with the float64 oracle.
"""

import dataclasses

import numpy as np
import pytest
from engine_cases import (
    CONFIG,
    ORACLE,
    PAGE_BYTES,
    PAGES,
    SIZES,
    C,
    build,
    drain,
    greedy,
    oracle,
    run,
    tokens_of,
)
from numpy.testing import assert_allclose, assert_array_equal
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    check_pages,
    expected,
    generate,
    poison,
    random_prompts,
    tiny_params,
)

from lserve_jax import LLM, SparsityConfig

# Slots and pages.


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_random_traffic(seed: int, pattern: str) -> None:
    """Arrivals, ends and cancellations in any order: pages stay owned once, outputs stay right."""
    rng = np.random.default_rng(seed)
    engine, prompts, made = build(pattern, deterministic=False).engine, {}, {}
    running, finished, cancelled, ended = [], [], [], []
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
            if new.finish_reason == "cancelled":
                assert new.request_id in cancelled and new.token_ids == []
                ended.append(new.request_id)
                continue
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
    assert cancelled == ended
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
    assert [r.request_id for r in engine.scheduler.prefilling] == ["c"]
    assert [request.request_id for request in waiting] == ["d"]
    engine.cancel("d")  # waits
    engine.cancel("c")  # in prefill
    check_pages(engine)
    with pytest.raises(ValueError, match="id 'c' is already in the engine"):
        engine.add_request("c", prompts[2], greedy(3), seed=0)  # its end is still to come
    outputs += engine.step()
    engine.cancel("a")  # runs
    check_pages(engine)
    assert [request.request_id for request in running.values()] == ["b"]
    outputs += drain(engine)
    check_nothing_left(engine)
    last = {new.request_id: new for new in outputs}
    reasons = {name: new.finish_reason for name, new in last.items()}
    assert reasons == {"a": "cancelled", "b": "length", "c": "cancelled", "d": "cancelled"}
    assert last["a"].token_ids == [] and last["a"].metrics.generated_tokens > 0
    assert [new.request_id for new in outputs].count("d") == 1
    tokens = [token for new in outputs if new.request_id == "b" for token in new.token_ids]
    rows = [row for new in outputs if new.request_id == "b" for row in new.top_logprobs]
    logprobs = [[row[token] for token in range(VOCAB)] for row in rows]
    assert_allclose(logprobs, expected(oracle(), prompts[1], tokens), **ORACLE)
    for name in ("a", "never"):
        with pytest.raises(ValueError, match=f"'{name}' is waiting or running"):
            engine.cancel(name)


def test_of_a_request_cancelled_in_a_stream_only_its_end_comes(llm: LLM) -> None:
    """Also not what the step that is being taken brought of it."""
    engine, came = llm.engine, []
    for name, prompt in zip("ab", random_prompts(7, [6, 6]), strict=True):
        engine.add_request(name, prompt, greedy(30), seed=0)
    for new in engine.stream():
        came.append(new)
        if [new.request_id for new in came] == ["a", "a", "b", "a"]:
            engine.cancel("b")
    ends = [new for new in came[4:] if new.request_id == "b"]
    assert [(new.token_ids, new.finish_reason) for new in ends] == [([], "cancelled")]
    assert len(came) > 6
    check_nothing_left(engine)


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
        ({"prompt": 5}, r"'prompt_token_ids', got \{'prompt': 5\}"),
        ({"prompt": "text"}, "no tokenizer"),
        (good | {"cache_salt": ""}, "cache_salt='' must be a text that is not empty"),
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
