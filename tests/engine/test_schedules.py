"""Whatever the schedule, a request makes the same tokens, and no page is lost or owned twice.

Schedules are drawn at random: arrivals, with salts or without, cancellations, deadlines, prefixes
held and released, remembered prompts forgotten, failures of the device, in an engine with fewer
slots and pages than its requests want, so that they wait, are preempted and take the pages of what
is remembered. What a request makes alone, with nothing remembered, is the standard, bit for bit.
"""

import dataclasses
import gc
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    check_pages,
    random_prompts,
    tiny_config,
    tiny_params,
    write_pattern,
)

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.inputs import Chunk
from lserve_jax.engine.prefix import Prefix
from lserve_jax.engine.request import TokenOutput

CONFIG = tiny_config(layers=1, kv_heads=2, max_len=512)
SIZES = {
    "page_size": 16,
    "token_budget": 48,
    "reuse_interval": 4,
    "decode_sink": 16,
    "decode_local": 32,
    "prefill_sink": 16,
    "prefill_local": 64,
}


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Kind(NamedTuple):
    prompt: list[int]
    sampling: SamplingParams


PREFIXES = random_prompts(1, [70, 130])


def kinds() -> list[Kind]:
    """Requests that schedules are made of: short and long, with prefixes.

    Sampled in one mode, so that one program runs them, whoever is in a batch together. A
    temperature of 0.01 is as good as greedy.
    """
    own = random_prompts(2, [5, 40, 100, 150, 16, 3, 60])
    prompts = [*own[:4], PREFIXES[0] + own[4], PREFIXES[1] + own[5], PREFIXES[1] + own[6]]
    prompts += [PREFIXES[0], own[0]]
    lengths = [90, 80, 70, 50, 40, 35, 1, 10, 12]
    made = []
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(
            temperature=0.8 if i % 4 == 3 else 0.01,
            max_tokens=length,
            seed=i,
            logprobs=1,
            frequency_penalty=0.5 if i == 2 else 0.01,
        )
        made.append(Kind(prompt, params))
    stops = dataclasses.replace(made[5].sampling, stop_token_ids=range(0, VOCAB, 7), min_tokens=4)
    made[5] = Kind(made[5].prompt, stops)
    return made


KINDS = kinds()


def build(attention: str, pattern: str, pages: int, **options: Any) -> LLM:
    sparsity = None
    if attention == "lserve":
        sparsity = SparsityConfig(pattern=pattern, **SIZES)
    heads, page_size = (2, 64) if sparsity is None else (1, 16)
    statistics = 0 if sparsity is None else 2 * 16 * 4
    page_bytes = heads * page_size * 2 * 16 * 4 + statistics
    llm = LLM(
        (CONFIG, tiny_params(CONFIG)),
        attention=attention,
        sparsity=sparsity,
        kv_cache_bytes=pages * page_bytes,
        **{
            "max_num_seqs": 3,
            "prefill_chunk_size": 64,
            "burst_steps": 8,
            "max_prefixes": 1,  # few window pages: they are given up by themselves
            "deterministic": True,
            "relay": "never",
        }
        | options,
    )
    assert llm.spec.num_pages == pages
    return llm


class Machine(NamedTuple):
    engine: Engine
    clock: Clock
    kinds: list[Kind]
    alone: list[list[int]]  # tokens of each kind
    logprobs: list[list[float]]  # of these


def make_machine(
    attention: str, pattern: str, pages: int, kinds: list[Kind] = KINDS, **options: Any
) -> Machine:
    engine, clock = build(attention, pattern, pages, **options).engine, Clock()
    engine.clock = clock
    alone, logprobs = [], []
    for i, kind in enumerate(kinds):
        engine.add_request(str(i), kind.prompt, kind.sampling, seed=0)
        outputs = list(engine.stream())
        engine.reset_prefix_cache()  # each is computed from its first token on
        alone.append([token for new in outputs for token in new.token_ids])
        logprobs.append([x for new in outputs for x in new.logprobs])
    check_nothing_left(engine)
    return Machine(engine, clock, kinds, alone, logprobs)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Machine]:
    pattern = write_pattern(tmp_path_factory.mktemp("patterns") / "half", [[0.1, 0.9]])
    # The longest request needs 13 pages of 16 tokens, or 4 of 64.
    return {
        # Room for some thirty pages in host memory.
        "lserve": make_machine("lserve", pattern, 14, host_cache_bytes=1 << 17),
        "dense": make_machine("dense", pattern, 4),
    }


@pytest.fixture(scope="module")
def by_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Matches end at any page, prompts run together: not bit for bit. Window pages are scarcer than
    pages, and those that are given up come back from host memory.

    All requests are greedy: one program for each number of rows, in place of four.
    """
    pattern = write_pattern(tmp_path_factory.mktemp("patterns") / "half", [[0.1, 0.9]])
    plain = {"temperature": 0, "frequency_penalty": 0}
    greedy = [Kind(k.prompt, dataclasses.replace(k.sampling, **plain)) for k in KINDS]
    settings = {"deterministic": False, "prefill_chunk_size": 128}
    # A few pages in host memory: what comes back was there only just now.
    machine = make_machine("lserve", pattern, 40, greedy, host_cache_bytes=1 << 14, **settings)
    prefill, rows_run = machine.engine.runner.prefill, set()

    def recorded(chunks: list[Chunk], rows: int = 1) -> Any:
        rows_run.add(rows)
        return prefill(chunks, rows)

    machine.engine.runner.prefill = recorded
    yield machine
    assert rows_run == {1, 2}


DEVICE_CALLS = ["prefill", "insert", "decode"]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, len(KINDS) - 1)),
        st.tuples(st.just("add"), st.integers(0, len(KINDS) - 1)),
        st.tuples(st.just("add, one second"), st.integers(0, len(KINDS) - 1)),
        st.tuples(st.just("add with salt"), st.integers(0, len(KINDS) - 1)),
        st.tuples(st.just("add several"), st.integers(0, len(KINDS) - 1)),
        st.tuples(st.just("forget"), st.integers(0, 0)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.integers(0, 1)),
        st.tuples(st.just("hold prefix"), st.integers(0, len(PREFIXES) - 1)),
        st.tuples(st.just("release prefix"), st.integers(0, len(PREFIXES) - 1)),
        st.tuples(st.just("fail"), st.integers(0, len(DEVICE_CALLS) - 1)),
    ),
    min_size=4,
    max_size=24,
)


class Run:
    """One schedule on a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.engine = machine, machine.engine
        self.kind_of: dict[str, int] = {}
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.live: list[str] = []
        self.held: dict[int, Prefix] = {}

    def act(self, action: str, number: int) -> None:
        engine = self.engine
        if action == "add several":
            for kind in range(number, min(number + 3, len(KINDS))):
                self.act("add", kind)
        elif action.startswith("add"):
            name = f"r{len(self.kind_of)}"
            kind = self.machine.kinds[number]
            deadline = 1.0 if action.endswith("second") else None
            salt = "salt" if action.endswith("salt") else None
            try:
                engine.add_request(
                    *(name, kind.prompt, kind.sampling),
                    seed=0,
                    deadline=deadline,
                    cache_salt=salt,
                )
            except ValueError as error:  # prefixes hold the pages that it would need
                assert self.held and "held by prefixes" in str(error)
                return
            self.kind_of[name] = number
            self.outputs[name] = []
            self.live.append(name)
        elif action == "step":
            for _ in range(number):
                self.take(engine.step())
        elif action == "cancel" and self.live:
            engine.cancel(self.live.pop(number % len(self.live)))
        elif action == "wait":
            self.machine.clock.now += 0.6 + number
        elif action == "forget":
            engine.reset_prefix_cache()
        elif action == "hold prefix" and number not in self.held:
            try:
                self.held[number] = engine.add_prefix(PREFIXES[number])
            except ValueError as error:  # requests have the pages, or may need them
                assert "the prefix needs" in str(error) or "the windows of" in str(error)
        elif action == "release prefix" and number in self.held:
            self.held.pop(number).release()
        elif action == "fail":
            self.fail(DEVICE_CALLS[number])
        check_pages(engine)

    def fail(self, call: str) -> None:
        """A step that ends with its first ``call``, if it has one: all requests are lost."""

        def failed(*args: Any) -> None:
            raise RuntimeError("out of memory")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine.runner, call, failed)
            try:
                self.take(self.engine.step())
            except RuntimeError as error:
                assert str(error) == "out of memory"
                self.engine.abandon(self.live)
                self.live.clear()
                check_nothing_left(self.engine)

    def take(self, outputs: list[TokenOutput]) -> None:
        for new in outputs:
            if new.finish_reason == "cancelled":
                assert new.request_id not in self.live and new.token_ids == []
                continue
            assert new.request_id in self.live
            self.outputs[new.request_id].append(new)
            if new.finish_reason is not None:
                self.live.remove(new.request_id)
        check_pages(self.engine)

    def finish(self) -> None:
        while self.engine.has_unfinished_requests:
            self.take(self.engine.step())
        for prefix in self.held.values():
            prefix.release()
        check_nothing_left(self.engine)
        assert not self.live
        for name, outputs in self.outputs.items():
            alone = self.machine.alone[self.kind_of[name]]
            tokens = [token for new in outputs for token in new.token_ids]
            reason = outputs[-1].finish_reason if outputs else None
            if reason in ("stop", "length"):
                assert tokens == alone
            else:  # cancelled, too late or lost
                assert tokens == alone[: len(tokens)]
            wanted = self.machine.logprobs[self.kind_of[name]][: len(tokens)]
            logprobs = [x for new in outputs for x in new.logprobs]
            if self.engine.deterministic:  # bit for bit, whatever was remembered of the prompt
                assert logprobs == wanted
            else:
                assert_allclose(logprobs, wanted, atol=1e-5)  # sums in another order


def any_schedule(machine: Machine, actions: list[tuple[str, int]]) -> None:
    run = Run(machine)
    try:
        for action, number in actions:
            run.act(action, number)
        run.finish()
    except BaseException:
        run.engine.reset()  # the next schedule begins with an empty engine
        raise


def schedules(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@pytest.mark.slow
@schedules(50)
@given(actions=ACTIONS)
def test_any_schedule(machines: dict[str, Machine], actions: list[tuple[str, int]]) -> None:
    any_schedule(machines["lserve"], actions)


@pytest.mark.slow
@schedules(15)
@given(actions=ACTIONS)
def test_any_schedule_of_dense_attention(
    machines: dict[str, Machine], actions: list[tuple[str, int]]
) -> None:
    """There is less of it: no window pages, and pages of one kind."""
    any_schedule(machines["dense"], actions)


@pytest.mark.slow
@schedules(50)
@given(actions=ACTIONS)
def test_any_schedule_by_pages(by_pages: Machine, actions: list[tuple[str, int]]) -> None:
    any_schedule(by_pages, actions)
    spec = by_pages.engine.spec
    assert spec.num_window_pages < spec.num_pages


@pytest.mark.parametrize("attention", ["lserve", "dense"])
def test_preemption(attention: str, machines: dict[str, Machine]) -> None:
    """Three long requests and pages for two: the newest begins again, twice its work, same tokens.

    Also in the middle of its prefill, and while it repeats what it had made.
    """
    run = Run(machines[attention])
    before = run.engine.metrics().preemptions
    for number in (2, 0, 1, 3, 4):
        run.act("add", number)
    run.finish()
    assert run.engine.metrics().preemptions > before
    last = {name: outputs[-1].metrics for name, outputs in run.outputs.items()}
    preempted = [metrics for metrics in last.values() if metrics.preemptions]
    assert preempted
    assert last["r0"].preemptions == 0  # the oldest always gets on
    for metrics in preempted:
        assert metrics.decode_steps >= metrics.generated_tokens - 1


def test_deadlines(machines: dict[str, Machine]) -> None:
    """A request that waits, one in prefill and one that decodes end with what they have."""
    machine = machines["lserve"]
    engine, clock = machine.engine, machine.clock
    engine.reset_prefix_cache()  # else nothing is left to prefill
    for name, number in (("runs", 0), ("prefills", 3), ("waits", 2), ("stays", 1)):
        kind = KINDS[number]
        deadline = None if name == "stays" else 5.0
        engine.add_request(name, kind.prompt, kind.sampling, seed=0, deadline=deadline)
    outputs = engine.step() + engine.step()
    assert [r.request_id for r in engine.scheduler.prefilling] == ["prefills"]
    clock.now += 4.9
    outputs += engine.step()
    clock.now += 0.2
    outputs += engine.step()
    check_pages(engine)
    late = {new.request_id: new for new in outputs if new.finish_reason == "deadline"}
    assert late.keys() == {"runs", "prefills", "waits"}
    assert late["runs"].metrics.generated_tokens > 8
    assert late["waits"].metrics.generated_tokens == 0
    outputs += list(engine.stream())
    tokens = [t for new in outputs if new.request_id == "stays" for t in new.token_ids]
    assert tokens == machine.alone[1]
    with pytest.raises(ValueError, match=r"deadline=0 must be positive"):
        engine.add_request("x", [1], KINDS[0].sampling, seed=0, deadline=0)
    check_nothing_left(engine)


def test_numbers_do_not_depend_on_neighbours(machines: dict[str, Machine]) -> None:
    """In deterministic mode bit for bit, a preemption included."""
    engine, kind = machines["lserve"].engine, KINDS[1]

    def logprobs(outputs: list[TokenOutput], name: str) -> list[float]:
        return [x for new in outputs if new.request_id == name for x in new.logprobs]

    engine.add_request("a", kind.prompt, kind.sampling, seed=0)
    alone = logprobs(list(engine.stream()), "a")
    before = engine.metrics().preemptions
    for name, number in (("b", 2), ("c", 0), ("a", 1)):
        engine.add_request(name, KINDS[number].prompt, KINDS[number].sampling, seed=0)
    outputs = list(engine.stream())
    assert engine.metrics().preemptions > before
    [metrics] = [new.metrics for new in outputs if new.request_id == "a" and new.finish_reason]
    assert metrics.preemptions == 1
    assert logprobs(outputs, "a") == alone


@pytest.mark.slow
def test_many_requests_compile_and_keep_nothing_new() -> None:
    """1,000 short requests through 16 slots: few shapes, and memory does not grow after the first.

    Their prompts fill the pages, and host memory behind these, many times over.
    """
    page_bytes = 2 * 64 * 2 * 16 * 4
    llm = LLM(
        (CONFIG, tiny_params(CONFIG)),
        max_num_seqs=16,
        prefill_chunk_size=128,
        kv_cache_bytes=32 * page_bytes,
        host_cache_bytes=16 * page_bytes,
    )
    engine = llm.engine
    compiled: list[str] = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0, max_tokens=3)
    held, on_host = [], []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for batch in range(5):
            before = len(compiled)
            for i in range(200):
                prompt = rng.integers(0, VOCAB, rng.integers(1, 120)).tolist()
                engine.add_request(f"{batch}-{i}", prompt, sampling, seed=0)
            ended = sum(new.finish_reason is not None for new in engine.stream())
            assert ended == 200
            gc.collect()
            # Host memory has as much as before, in more blocks or fewer.
            live = [x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind != "pinned_host"]
            held.append((len(live), sum(live)))
            on_host.append(sys.getallocatedblocks())
            if batch:
                assert len(compiled) == before
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    metrics = engine.metrics()
    assert metrics.evicted_pages > 5 * 32 and 0 < metrics.host_bytes <= engine.host_cache_bytes
    # Less than a block of Python's memory for each request: nothing of any is kept.
    assert on_host[-1] - on_host[0] < 800, on_host
    assert held[1:] == held[:-1]
    buckets = engine.shape_buckets()
    chunks = buckets["chunk_tokens"] + buckets["joined_tokens"]
    most = len(chunks) + len(buckets["slots"]) + 2  # and inserts, of one or two
    assert engine.metrics().compilations <= most
    assert not engine.unfinished


def test_a_long_prompt_does_not_stall_others(machines: dict[str, Machine]) -> None:
    """Between two bursts of a running request there is at most one chunk of another's prompt.

    What that is in time, ``benchmarks/stall.py`` measures.
    """
    engine = machines["lserve"].engine
    sampling = SamplingParams(temperature=0, max_tokens=40)
    engine.add_request("a", KINDS[0].prompt, sampling, seed=0)
    assert engine.step() == []  # its prompt and a first burst are on their way
    [first] = engine.step()
    assert len(first.token_ids) == 1
    [long_prompt] = random_prompts(3, [150])
    engine.add_request("b", long_prompt, sampling, seed=0)
    chunks = []
    while engine.scheduler.prefilling or engine.scheduler.waiting:
        outputs = engine.step()
        assert [new.request_id for new in outputs][:1] == ["a"]
        last = engine.metrics().last_step
        assert (last.decode_requests, last.decode_steps) == (1 + (len(chunks) == 2), 8)
        chunks.append(last.prefill_tokens)
    assert chunks == [64, 64, 22]
    list(engine.stream())
    check_nothing_left(engine)


def test_many_tiny_prompts_do_not_stall_others_either() -> None:
    """A prompt of one token runs as 64: a step of 64 tokens takes no more than one of them."""
    llm = LLM((CONFIG, tiny_params(CONFIG)), max_num_seqs=4, prefill_chunk_size=64)
    engine = llm.engine
    for i in range(6):
        sampling = SamplingParams(temperature=0, max_tokens=1)
        engine.add_request(str(i), [1], sampling, seed=0)
    while engine.has_unfinished_requests:
        engine.step()
        assert engine.metrics().last_step.prefill_tokens <= 1
