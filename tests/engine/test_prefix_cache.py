"""Prompts that the engine remembers: cold and warm are the same, and what runs is never given up.

An engine that remembers nothing is the standard. Models are tiny and random; caches hold NaN first.
"""

import dataclasses
from typing import Any

import pytest
from numpy.testing import assert_array_equal
from relay_cases import CONFIG, Build, P, assert_same, prompts_with, run
from tiny_llm import check_nothing_left, check_pages, random_prompts, tiny_params

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.request import PromptIds

GREEDY = SamplingParams(temperature=0, max_tokens=8)
CHUNK = 64
pytestmark = pytest.mark.usefixtures("all_slots")


def ids(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt_token_ids": prompt, **more}


@pytest.mark.parametrize(
    ("attention", "kv_dtype"),
    [("dense", "auto"), ("lserve", "auto"), ("dense", "fp8"), ("lserve", "int4")],
)
def test_cold_is_warm_bit_for_bit(attention: str, kv_dtype: str, build: Build) -> None:
    """In deterministic mode: whole chunks are shared, and every number is what it was.

    A document with several questions, shorter and longer than a chunk, and prompts that end in the
    middle of it; twice, so that the second time all of it was there.
    """
    [document] = random_prompts(1, [5 * CHUNK + 9])
    prompts = [*prompts_with(document, 2, [3, 30, 100]), document[:200], document[: 3 * CHUNK]]
    settings = {"deterministic": True, "kv_dtype": kv_dtype}
    forgets = build(attention, enable_prefix_caching=False, **settings)
    cold = run(forgets, prompts, 12)
    assert forgets.engine.metrics().cached_pages == forgets.engine.metrics().prefix_tokens == 0
    llm = build(attention, **settings)
    warm = run(llm, prompts, 12)
    # Shorter ones run first; of the prompt of three whole chunks the last is computed.
    assert llm.engine.metrics().prefix_tokens == (3 + 3 + 5 + 5) * CHUNK
    for again in (warm, run(llm, prompts, 12)):
        for one, other in zip(again, cold, strict=True):
            assert one.tokens == other.tokens
            assert_array_equal(one.logprobs, other.logprobs)
    check_nothing_left(llm.engine)


@pytest.mark.parametrize("attention", ["dense", "lserve"])
def test_whole_pages_are_shared(attention: str, build: Build) -> None:
    """Otherwise sums of a chunk that begins elsewhere are rounded in another way, and that is all.

    Of a prompt equal to one that was there its last page runs, with the whole window of that place.
    """
    page = P if attention == "lserve" else 64
    [document] = random_prompts(3, [310])
    prompts = [*prompts_with(document, 4, [3, 130]), document, document[: 4 * page]]
    cold = run(build(attention, enable_prefix_caching=False), prompts, 12)
    llm = build(attention)
    assert_same(run(llm, prompts, 12), cold)
    outputs = llm.generate([ids(prompt) for prompt in prompts], GREEDY)
    whole = 310 // page * page
    found = [output.num_cached_tokens for output in outputs]
    # Of the second all but its last, partial page: it was there whole.
    assert found == [313 // page * page, 440 // page * page, whole, 3 * page]


@pytest.mark.parametrize(("end", "found"), [(480, 480), (470, 464), (430, 416), (415, 32)])
def test_a_match_ends_where_the_window_is(end: int, found: int, build: Build) -> None:
    """Streaming heads see 32 tokens of sinks and a window of 64.

    Of the document another prompt has left window pages of the sinks, the window and three behind
    it: one can go on from its end and from up to four pages before, and further up only behind the
    sinks.
    """
    llm = build(max_prefixes=1)
    assert llm.spec.num_window_pages == 2 * (2 + 5 + 3)
    document, other, own = random_prompts(5, [480, 200, 20])
    for prompt in (document, other):
        llm.generate(ids(prompt), GREEDY)
    prompt = document[:end] + own
    cold = run(build(enable_prefix_caching=False), [prompt], 8)
    [output] = llm.generate(ids(prompt), GREEDY)
    assert output.num_cached_tokens == found
    assert output.outputs[0].token_ids == cold[0].tokens
    check_nothing_left(llm.engine)


def test_windows_nobody_needs_go_first(build: Build) -> None:
    """With room for one remembered prompt beside the one that runs: pages stay, windows go.

    A prompt whose window is gone is computed again, and gives its window back to the pages.
    """
    llm = build(max_prefixes=1, kv_cache_bytes=1 << 20)
    first, second, third = random_prompts(6, [300, 300, 300])
    alone = run(build(enable_prefix_caching=False), [first], 8)
    for prompt in (first, second, third):
        llm.generate(ids(prompt), GREEDY)
    metrics = llm.engine.metrics()
    assert metrics.evicted_pages == 0 and metrics.cached_pages == 3 * (300 // P)
    assert metrics.evicted_windows > 0
    assert_same(run(llm, [first], 8), alone)
    assert llm.engine.metrics().cached_pages == 3 * (300 // P)
    [output] = llm.generate(ids(first), GREEDY)
    assert output.num_cached_tokens == 299 // P * P
    check_nothing_left(llm.engine)


def test_as_many_documents_stay_as_there_is_room_for(build: Build) -> None:
    """Questions about them in turn: of each only the first computes its document."""
    llm = build()  # for three
    documents = random_prompts(9, [12 * P] * 3)
    for turn in range(3):
        questions = random_prompts(10 + turn, [2 * P + 3] * 3)
        prompts = [ids(document + own) for document, own in zip(documents, questions, strict=True)]
        found = [output.num_cached_tokens for output in llm.generate(prompts, GREEDY)]
        assert found == [12 * P if turn else 0] * 3


def test_prompts_of_one_call_that_begin_alike_run_after_each_other(build: Build) -> None:
    """Five documents and room for three: given in turn, each is computed once all the same."""
    llm = build(max_num_seqs=2)
    documents = random_prompts(9, [12 * P] * 5)
    questions = random_prompts(10, [2 * P + 3] * 15)
    prompts = [ids(documents[i % 5] + own) for i, own in enumerate(questions)]
    outputs = llm.generate(prompts, GREEDY)
    assert sorted(output.num_cached_tokens for output in outputs) == [0] * 5 + [12 * P] * 10
    by_themselves = build(enable_prefix_caching=False, max_num_seqs=2).generate(prompts, GREEDY)
    for output, alone in zip(outputs, by_themselves, strict=True):
        assert output.prompt_token_ids == alone.prompt_token_ids
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_what_is_drawn_does_not_depend_on_the_order_in_which_prompts_run(build: Build) -> None:
    drawn = SamplingParams(max_tokens=8, ignore_eos=True)
    prompts = [ids(prompt) for prompt in random_prompts(3, [40] * 5)]
    together, in_turn = (build("dense", max_num_seqs=n).generate(prompts, drawn) for n in (8, 2))
    for one, other in zip(together, in_turn, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_each_turn_of_a_chat_computes_what_is_new(build: Build) -> None:
    """The answer's tokens too, since decode steps make other keys than a prefill."""
    llm, computed, known = build(), 0, 0
    [prompt] = random_prompts(7, [200])
    for turn in range(10):
        [output] = llm.generate(ids(prompt), GREEDY)
        computed += len(prompt) - known
        assert llm.engine.metrics().prompt_tokens == computed
        known = len(prompt) // P * P
        prompt = prompt + output.outputs[0].token_ids + random_prompts(turn, [25])[0]


def test_with_nothing_remembered_a_released_prefix_is_gone(build: Build) -> None:
    """Also where a request still reads it when it is released."""
    llm = build("dense", enable_prefix_caching=False)
    [document] = random_prompts(8, [130])
    prompt = [*document, 1, 2, 3]
    prefix = llm.prefix(ids(document))
    llm.engine.add_request("0", prompt, SamplingParams(temperature=0, max_tokens=40), seed=0)
    llm.engine.step()
    prefix.release()
    check_pages(llm.engine)
    assert llm.engine.unfinished["0"].node is not None
    for _ in llm.engine.stream():
        pass
    assert llm.engine.metrics().cached_pages == 0
    [output] = llm.generate(ids(prompt), GREEDY)
    assert output.num_cached_tokens == 0
    check_nothing_left(llm.engine)


def test_a_held_prefix_takes_no_room_from_prompts_that_begin_with_it(build: Build) -> None:
    """Of thirteen pages it has eight; with their salt others cannot read it."""
    llm = build("dense", kv_cache_bytes=13 * 64 * 2 * 2 * 16 * 4, max_model_len=1024)
    [document] = random_prompts(10, [8 * 64])
    llm.prefix(ids(document))
    prompt = PromptIds.check([*document, 1, 2, 3], CONFIG.vocab_size)
    room = llm.engine.most_new_tokens(prompt)
    assert room == 13 * 64 + 1 - len(prompt)
    llm.engine.check_request(prompt, SamplingParams(max_tokens=room))
    with pytest.raises(ValueError, match="the request needs 6 pages of 64 tokens"):
        llm.engine.check_request(prompt, SamplingParams(max_tokens=room + 1))
    assert llm.engine.most_new_tokens(prompt, "salt") == 5 * 64 + 1 - len(prompt)


def test_prompts_of_another_salt_are_not_found(build: Build) -> None:
    llm = build("dense")
    [prompt] = random_prompts(8, [200])
    found = []
    for salt in (None, "a", "b", "a", None):
        given = ids(prompt) if salt is None else ids(prompt, cache_salt=salt)
        found.append(llm.generate(given, GREEDY)[0].num_cached_tokens)
    assert found == [0, 0, 0, 192, 192]
    held = llm.prefix(ids(prompt))
    assert llm.generate(ids(prompt, cache_salt="c"), GREEDY)[0].num_cached_tokens == 0
    held.release()
    with pytest.raises(ValueError, match="cache_salt=5 must be a text that is not empty, or None"):
        llm.generate(ids(prompt, cache_salt=5), GREEDY)


def test_what_runs_gets_pages_before_what_is_remembered(build: Build) -> None:
    """Thirteen pages for prompts of five: each runs, and the oldest are forgotten."""
    llm = build("dense", max_num_seqs=2, kv_cache_bytes=13 * 64 * 2 * 2 * 16 * 4)
    assert llm.spec.num_pages == 13
    prompts = random_prompts(9, [300] * 6)
    cold = run(build("dense", enable_prefix_caching=False), prompts, 8)
    for pair in range(0, 6, 2):
        assert_same(run(llm, prompts[pair : pair + 2], 8), cold[pair : pair + 2])
    metrics = llm.engine.metrics()
    assert metrics.preemptions == 0 and metrics.evicted_pages > 0
    assert metrics.free_pages == metrics.num_pages == 13
    [newest] = llm.generate(ids(prompts[-1]), GREEDY)
    [oldest] = llm.generate(ids(prompts[0]), GREEDY)
    assert (newest.num_cached_tokens, oldest.num_cached_tokens) == (256, 0)
    check_nothing_left(llm.engine)


def test_what_a_preempted_request_finds_of_itself_does_not_count(build: Build) -> None:
    """Two of 300 and 150 tokens need sixteen pages of thirteen."""
    llm = build("dense", max_num_seqs=2, kv_cache_bytes=13 * 64 * 2 * 2 * 16 * 4)
    sampling = SamplingParams(temperature=0, max_tokens=150)
    outputs = llm.generate([ids(prompt) for prompt in random_prompts(11, [300, 300])], sampling)
    metrics = llm.engine.metrics()
    assert metrics.preemptions > 0
    assert (metrics.prefix_queries, metrics.prefix_tokens) == (600, 0)
    assert [output.num_cached_tokens for output in outputs] == [0, 0]


def test_what_a_prompt_finds_of_itself_does_not_count(build: Build) -> None:
    """It is preempted while its seven chunks are read, beside a request that grows."""
    options = {"kv_cache_bytes": 10 * 64 * 2 * 2 * 16 * 4, "relay": "never"}
    engine = build("dense", max_num_seqs=2, burst_steps=64, **options).engine
    running, read = random_prompts(3, [60, 420])
    long = SamplingParams(temperature=0, max_tokens=320, ignore_eos=True)
    engine.add_request("running", running, long, seed=0)
    engine.step()
    engine.step()
    engine.add_request("read", read, GREEDY, seed=0)
    ends = {new.request_id: new.metrics for new in engine.stream()}
    assert ends["read"].preemptions == 1
    assert engine.metrics().prefix_tokens == ends["read"].prefix_tokens == 0


def test_a_prefix_that_is_kept_has_its_window(build: Build, tmp_path) -> None:
    """Some of its pages had window pages for another prompt's end, which are wanted meanwhile."""
    llm = build("lserve", max_num_seqs=1, max_prefixes=2)
    documents = random_prompts(1, [376, 364, 388])
    for number, length in ((1, 364), (0, 132), (2, 128), (0, 272), (2, 32)):
        llm.generate(ids([*documents[number][:length], 7]), SamplingParams(max_tokens=1))
    llm.prefix(ids(documents[1][:144])).release()
    kept = llm.prefix(ids(documents[0][:208]))
    check_pages(llm.engine)
    kept.save(tmp_path / "kept.safetensors")


@pytest.mark.parametrize(("attention", "kv_dtype"), [("dense", "auto"), ("lserve", "int4")])
def test_pages_come_back_from_host_memory(attention: str, kv_dtype: str, build: Build) -> None:
    """Bit for bit what they were, windows and statistics too; the least recently used go first."""
    page = P if attention == "lserve" else 64
    settings = {"deterministic": True, "kv_dtype": kv_dtype, "max_num_seqs": 2}
    prompts = random_prompts(20, [5 * CHUNK + 9] * 4)
    units = build(attention, **settings).engine.units
    settings["kv_cache_bytes"] = (400 // page + 1) * units.page
    forgets = build(attention, enable_prefix_caching=False, **settings)
    cold = [run(forgets, [prompt], 8)[0] for prompt in prompts]
    room = 3 * (320 // page) * units.remembered_page
    llm = build(attention, host_cache_bytes=room, **settings)
    for prompt, made in zip(prompts, cold, strict=True):
        assert_same(run(llm, [prompt], 8), [made])
    metrics = llm.engine.metrics()
    assert metrics.evicted_pages >= 3 * (320 // page) - 400 // page
    assert metrics.host_pages > 0
    assert metrics.host_bytes == metrics.host_pages * llm.engine.units.remembered_page
    assert metrics.host_bytes <= 3 * (320 // page) * llm.engine.units.remembered_page
    for number in (2, 1, 3):
        computed = llm.engine.metrics().prompt_tokens
        [again] = run(llm, [prompts[number]], 8)
        assert llm.engine.metrics().prompt_tokens == computed + 9, number
        assert again.tokens == cold[number].tokens
        assert_array_equal(again.logprobs, cold[number].logprobs)
        check_nothing_left(llm.engine)
    computed = llm.engine.metrics().prompt_tokens
    prefix = llm.prefix(ids(prompts[1]))
    assert llm.engine.metrics().prompt_tokens == computed
    [again] = run(llm, [prompts[1]], 8)
    assert_array_equal(again.logprobs, cold[1].logprobs)
    check_nothing_left(llm.engine)
    prefix.release()
    llm.reset_prefix_cache()
    assert llm.engine.metrics().host_pages == 0


@pytest.mark.parametrize("pages", ["in the tree", "gone too"])
def test_windows_come_back_from_host_memory(pages: str, build: Build) -> None:
    """Bit for bit: there are windows for two prompts, and pages for all or, if long, for two.

    Whole chunks are shared: of 200 tokens 8 run, of 300 tokens 44.
    """
    length = 200 if pages == "in the tree" else 300
    prompts = random_prompts(6, [length] * 3)
    settings = {"deterministic": True, "max_prefixes": 1, "max_num_seqs": 1}
    settings["kv_cache_bytes"] = 2 * (320 // P) * build(**settings).engine.units.page
    alone = run(build(enable_prefix_caching=False, **settings), prompts, 8)
    llm = build(host_cache_bytes=1 << 22, **settings)
    for turn, number in enumerate((0, 1, 2, 0, 1, 2, 2)):
        before = llm.engine.metrics()
        [again] = run(llm, [prompts[number]], 8)
        after = llm.engine.metrics()
        if turn >= len(prompts):
            assert before.evicted_windows > 0
            assert after.prompt_tokens - before.prompt_tokens == length % CHUNK
        assert again.tokens == alone[number].tokens
        assert_array_equal(again.logprobs, alone[number].logprobs)
        check_nothing_left(llm.engine)
    assert (after.evicted_pages > 0) == (pages == "gone too")


def test_a_cancelled_prompt_leaves_what_was_computed(build: Build) -> None:
    engine = build().engine
    [prompt] = random_prompts(10, [400])
    engine.add_request("a", prompt, GREEDY, seed=0)
    for _ in range(3):
        engine.step()
    assert engine.scheduler.prefilling
    engine.cancel("a")
    check_pages(engine)
    assert list(engine.stream())
    engine.add_request("b", prompt, GREEDY, seed=0)
    *_, last = engine.stream()
    assert last.metrics.prefix_tokens == 3 * CHUNK
    check_nothing_left(engine)


def test_a_prompt_of_dynamic_rotation_is_not_remembered() -> None:
    """Its keys depend on its length."""
    rope = dataclasses.replace(CONFIG.rope, rope_type="dynamic", factor=2.0)
    config = dataclasses.replace(CONFIG, rope=rope)
    llm = LLM((config, tiny_params(config)), max_model_len=512, max_num_seqs=1)
    for _ in range(2):
        [output] = llm.generate(ids(random_prompts(11, [200])[0]), GREEDY)
        assert output.num_cached_tokens == 0


def test_requests_read_together_the_longest_beginning_that_pays(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody registered anything. Two questions read their document together; what that one and
    three other prompts begin with these three read together; the last one shares too little."""
    token_bytes = 2 * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
    monkeypatch.setattr("lserve_jax.engine.relay.LEAST_SAVED_BYTES", 200 * token_bytes)
    common, own = random_prompts(12, [128, 192])
    prompts = [
        *prompts_with(common + own, 13, [5, 9]),
        *prompts_with(common, 14, [10, 70, 3]),
        common[:64] + random_prompts(15, [30])[0],
    ]
    sampling = SamplingParams(temperature=0, max_tokens=9)
    cold = run(build("dense", enable_prefix_caching=False), prompts, 9)
    llm = build("dense", relay="auto", prefill_chunk_size=2048, max_num_seqs=8)
    engine = llm.engine  # all begin in one step
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, sampling, seed=0)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    decisions, reasons = set(), {}
    for new in engine.stream():
        tokens[new.request_id] += new.token_ids
        reasons[new.request_id] = new.metrics.relay_reason
        relay = engine.metrics().last_step.relay
        decisions |= {(d.used, d.prefix_tokens, d.requests) for d in relay}
    assert [tokens[str(i)] for i in range(len(prompts))] == [made.tokens for made in cold]
    assert decisions == {(True, 320, 2), (True, 128, 3)}
    assert reasons["5"] == "nobody shares its beginning"
    check_nothing_left(engine)
