"""Programs compiled before the first request: of the requests that follow none compiles."""

import dataclasses
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_llm import tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine import build as build_module
from lserve_jax.engine import programs as programs_module
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.calls import Call
from lserve_jax.engine.compiling import Traced
from lserve_jax.engine.options import EngineOptions
from lserve_jax.engine.program_files import ProgramFiles
from lserve_jax.engine.programs import Programs
from lserve_jax.engine.warmup import calls_beside
from pallas_kernels.api import LoweringProcesses

CONFIG = tiny_config(layers=1, kv_heads=2)
OPTIONS = {"max_model_len": 256, "max_num_seqs": 2, "prefill_chunk_size": 128}
SHORT, LONG = {"prompt_token_ids": [3, 5] * 10}, {"prompt_token_ids": [3, 5] * 50}
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
FILTERED = SamplingParams(top_k=5, max_tokens=20, seed=1, ignore_eos=True)


def build(**options) -> LLM:
    return LLM((CONFIG, tiny_params(CONFIG)), **{**OPTIONS, **options})


def tokens(llm: LLM, *requests: tuple[dict, SamplingParams]) -> list[list[int]]:
    prompts, sampling = zip(*requests, strict=True)
    outputs = llm.generate(prompts, sampling)
    return [output.outputs[0].token_ids for output in outputs]


def compiled(llm: LLM) -> int:
    return len(llm.engine.runner.programs.times)


def test_after_a_full_warmup_nothing_compiles() -> None:
    warm, cold = build(warmup="full"), build()
    before = compiled(warm)
    # Lengths of a chunk, ways to sample, alone and for 1 or 2 rows; two short prompts together.
    assert before == 2 + 3 + 6 + (1 + 3)
    for requests in (
        [(SHORT, GREEDY)],
        [(LONG, DRAWN)],
        [(SHORT, GREEDY), (LONG, FILTERED)],
        [(SHORT, DRAWN), (LONG, DRAWN)],
        [(SHORT, GREEDY), (SHORT, DRAWN)],
    ):
        assert tokens(warm, *requests) == tokens(cold, *requests)
    assert compiled(warm) == before
    assert compiled(cold) == 0  # left to JAX


def test_after_a_warmup_nothing_compiles_with_and_without_drafts() -> None:
    exact = {"attention": "lserve", "exact": True, "max_draft_tokens": 1}
    warm, cold = build(warmup="auto", **exact), build(**exact)
    before = compiled(warm)
    assert before == 1 + 2 + 2 * 2
    for sampling in (GREEDY, DRAWN):
        assert tokens(warm, (SHORT, sampling)) == tokens(cold, (SHORT, sampling))
    assert compiled(warm) == before


def test_auto_is_for_a_short_prompt_by_itself() -> None:
    llm = build(warmup="auto")
    before = compiled(llm)
    assert before == 1 + 2 + 2
    for sampling in (GREEDY, DRAWN):
        assert tokens(llm, (SHORT, sampling)) == tokens(build(), (SHORT, sampling))
    assert compiled(llm) == before
    tokens(llm, (LONG, GREEDY))
    assert compiled(llm) == before + 1


def made_beside() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lserve-programs"]


def test_the_rest_is_compiled_while_requests_run(monkeypatch) -> None:
    """Where a device of its own runs them. A request waits for a program that has begun, and for
    no other."""
    monkeypatch.setattr(build_module, "has_cores_beside", lambda: True)
    begun, go_on = threading.Event(), threading.Event()
    compile_one = Programs._compile

    def slowly(programs: Programs, call: Call, lowered: Any) -> Any:
        if threading.current_thread() in made_beside():
            begun.set()
            assert go_on.wait(60)
        return compile_one(programs, call, lowered)

    llm = build(warmup="none")
    wanted = tokens(llm, (SHORT, GREEDY), (LONG, GREEDY))
    monkeypatch.setattr(Programs, "_compile", slowly)
    llm = build(warmup="auto")
    assert compiled(llm) == 5
    assert begun.wait(60)
    assert tokens(llm, (SHORT, GREEDY)) == wanted[:1]  # of one slot: it was there
    go_on.set()
    assert tokens(llm, (SHORT, GREEDY), (LONG, GREEDY)) == wanted
    for thread in made_beside():
        thread.join()
    names = [made.name for made in llm.engine.runner.programs.times]
    assert len(names) == 2 + 3 + 6 + (1 + 3)  # all of "full", each of them once
    assert tokens(llm, (SHORT, DRAWN), (LONG, FILTERED)) == tokens(
        build(), (SHORT, DRAWN), (LONG, FILTERED)
    )
    assert compiled(llm) == len(names)


def test_nothing_more_is_compiled_for_an_engine_that_is_gone(monkeypatch) -> None:
    monkeypatch.setattr(build_module, "has_cores_beside", lambda: True)
    monkeypatch.setattr(programs_module, "usable_cores", lambda: 4)  # for one program at a time
    begun, go_on, seen = threading.Event(), threading.Event(), []
    compile_one = Programs._compile

    def slowly(programs: Programs, call: Call, lowered: Any) -> Any:
        if threading.current_thread() in made_beside():
            seen.append(call.name)
            begun.set()
            assert go_on.wait(60)
        return compile_one(programs, call, lowered)

    monkeypatch.setattr(Programs, "_compile", slowly)
    llm = build(warmup="auto")
    assert begun.wait(60)
    del llm
    gc.collect()
    go_on.set()
    for thread in made_beside():
        thread.join()
    assert len(seen) == 1


def test_beside_requests_two_programs_compile_at_once_on_eight_cores(monkeypatch) -> None:
    """And never are two traced or lowered: that is Python, which requests need."""
    monkeypatch.setattr(build_module, "has_cores_beside", lambda: True)
    monkeypatch.setattr(programs_module, "usable_cores", lambda: 8)
    both, compiling, tracing = threading.Barrier(2), [], threading.Lock()
    compile_one, trace, lower = Programs._compile, Traced.of, Traced.lower
    alone: list[bool] = []

    def together(programs: Programs, call: Call, lowered: Any) -> Any:
        thread = threading.current_thread()
        if thread in made_beside() and thread not in compiling:
            compiling.append(thread)
            both.wait(60)
        return compile_one(programs, call, lowered)

    def alone_for_a_while(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def works(given: Any) -> Any:
            if threading.current_thread() not in made_beside():
                return work(given)
            alone.append(tracing.acquire(blocking=False))
            time.sleep(0.05)  # in which another would begin
            if alone[-1]:
                tracing.release()
            return work(given)

        return works

    monkeypatch.setattr(Programs, "_compile", together)
    monkeypatch.setattr(Traced, "of", alone_for_a_while(trace))
    monkeypatch.setattr(Traced, "lower", alone_for_a_while(lower))
    llm = build(warmup="auto")
    for thread in made_beside():
        thread.join()
    assert len(compiling) == 2
    assert compiled(llm) == 2 + 3 + 6 + (1 + 3)
    assert alone == [True] * 2 * (compiled(llm) - 5)


def test_beside_requests_those_come_first_that_one_needs_by_itself() -> None:
    names = [call.name for call in calls_beside(build().engine)]
    assert names[:2] == ["prefill_chunks"] * 2
    assert names[-6:] == ["decode_burst"] * 6
    assert len(names) == 2 + 3 + 6 + (1 + 3)
    assert set(names[:-6]) == {"prefill_chunks", "insert"}


def test_beside_requests_a_program_is_made_though_processes_take_no_kernel(
    monkeypatch, caplog
) -> None:
    """As when Python ends after it was traced."""

    def refuse(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(LoweringProcesses, "begin", refuse)
    programs = Programs(None)
    call = Call.of(jax.jit(lambda x: x + 1), jnp.zeros(3))
    with caplog.at_level("INFO", "lserve_jax"):
        programs.prepare_beside([call])
        for thread in made_beside():
            thread.join()
    assert "lowered by no other process" in caplog.text
    assert programs.has(call)


def test_beside_requests_nothing_is_kept_of_settings_that_changed_meanwhile(tmp_path) -> None:
    """Its key would say the old ones."""
    began, go_on = threading.Event(), threading.Event()

    def wide(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        began.set()
        assert go_on.wait(60)
        return x, jnp.zeros(3, float)

    programs, call = Programs(ProgramFiles(tmp_path)), Call.of(jax.jit(wide), jnp.zeros(3))
    programs.prepare_beside([call, Call.of(jax.jit(lambda x: x + 1), jnp.zeros(3))])
    assert began.wait(60)
    jax.config.update("jax_enable_x64", True)
    try:
        go_on.set()
        for thread in made_beside():
            thread.join()
    finally:
        jax.config.update("jax_enable_x64", False)
    assert not programs.has(call) and not list(tmp_path.glob("*"))


def test_beside_requests_one_that_fails_is_left_to_who_needs_it(monkeypatch, caplog) -> None:
    """Whatever the error, the next ones are made."""
    monkeypatch.setattr(programs_module, "usable_cores", lambda: 4)
    compile_one = Programs._compile

    def fail(programs: Programs, call: Call, lowered: Any) -> Any:
        if call is first:
            raise ValueError("no such layout")
        return compile_one(programs, call, lowered)

    programs = Programs(None)
    first, second = (Call.of(jax.jit(lambda x, n=n: x + n), jnp.zeros(3)) for n in range(2))
    monkeypatch.setattr(Programs, "_compile", fail)
    monkeypatch.setattr(Call, "described", lambda call: call)
    programs.prepare_beside([first, second])
    for thread in made_beside():
        thread.join()
    assert programs.has(second) and not programs.has(first)
    assert "is not made ahead: ValueError('no such layout')" in caplog.text
    with pytest.raises(ValueError, match="no such layout"):
        programs.run(first)


def run_as_a_script(code: str) -> subprocess.CompletedProcess:
    begin = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp
from lserve_jax.engine.calls import Call
from lserve_jax.engine.program_files import ProgramFiles
from lserve_jax.engine.programs import Programs
programs, call = Programs(None), Call.of(jax.jit(lambda x: x + 1), jnp.zeros(3))
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", begin + code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_ctrl_c_while_a_program_that_ended_waits_for_what_is_made() -> None:
    """XLA compiles for a backend that must still be there."""
    done = run_as_a_script("""
compile_one, compiling = Programs._compile, threading.Event()
def slowly(*given):
    compiling.set()
    time.sleep(2)
    result = compile_one(*given)
    print("made", flush=True)
    return result
Programs._compile = slowly
def interrupt():
    threading.main_thread().join()
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
programs.prepare_beside([call])
compiling.wait()
threading.Thread(target=interrupt, daemon=True).start()
""")
    assert done.returncode >= 0 and done.stdout == "made\n", done


def test_where_the_main_thread_has_ended_programs_are_made_as_they_are_called() -> None:
    """Python begins no pool of threads any more."""
    done = run_as_a_script("""
def work():
    threading.main_thread().join()
    programs.prepare([call])
    with programs.preparing([call]):
        pass
    print(programs.run(call))
threading.Thread(target=work).start()
""")
    assert (done.returncode, done.stdout) == (0, "[1. 1. 1.]\n"), done


def test_what_a_request_compiles_ahead_is_not_made_beside_it(monkeypatch) -> None:
    """Though its turn comes before it is ready."""
    monkeypatch.setattr(programs_module, "usable_cores", lambda: 4)
    functions = [jax.jit(lambda x, n=n: x + n) for n in range(3)]
    first, second, third = (Call.of(function, jnp.zeros(3)) for function in functions)
    begun, go_on, left = threading.Event(), threading.Event(), threading.Event()
    compile_one, compiling = Programs._compile, []

    def slowly(programs: Programs, call: Call, lowered: Any) -> Any:
        compiling.append(call.function)
        if call.function is first.function:
            begun.set()
            assert go_on.wait(60)
        elif compiling == [first.function, second.function]:
            go_on.set()
            assert left.wait(60)
        else:
            left.set()
        return compile_one(programs, call, lowered)

    monkeypatch.setattr(Programs, "_compile", slowly)
    programs = Programs(None)
    programs.prepare_beside([first, second, third])
    assert begun.wait(60)
    programs.prepare([second])
    for thread in made_beside():
        thread.join()
    assert compiling == functions
    assert [float(programs.run(call)[0]) for call in (first, second, third)] == [0, 1, 2]
    assert compiling == functions


def test_a_warmup_of_all_slots_where_tokens_must_not_depend_on_neighbours() -> None:
    llm = build(warmup="auto", deterministic=True, relay="never")
    before = compiled(llm)
    tokens(llm, (SHORT, GREEDY))
    assert compiled(llm) == before


def test_with_host_memory_a_warmup_has_what_moves_pages() -> None:
    """Of two prompts one has room on the device. Blocks have four pages or one."""
    room = {"max_num_seqs": 1, "max_prefixes": 0, "relay": "never", "host_cache_bytes": 1 << 18}
    llm = build(warmup="auto", **room)
    before, prompts = compiled(llm), [{"prompt_token_ids": [n] * 200} for n in (3, 5)]
    assert before == 1 + 2 + 2 + 2 * 2
    for prompt in (*prompts, *prompts):
        tokens(llm, (prompt, GREEDY))
    assert llm.engine.metrics().prefix_tokens > 0
    assert compiled(llm) == before + 1  # that of a longer chunk


def test_programs_are_traced_while_kernels_of_others_are_lowered(monkeypatch) -> None:
    """Here none is lowered before the last program is traced."""
    begun: list[Future[None]] = []

    def begin(processes: LoweringProcesses, jaxpr: object) -> list[Future[None]]:
        begun.append(Future())
        if len(begun) == 5:
            for lowering in begun:
                lowering.set_result(None)
        return begun[-1:]

    monkeypatch.setattr(LoweringProcesses, "begin", begin)
    llm = build(warmup="auto")
    assert compiled(llm) == len(begun) == 5
    assert tokens(llm, (SHORT, GREEDY)) == tokens(build(), (SHORT, GREEDY))
    assert compiled(llm) == 5


@pytest.mark.parametrize("warmup", ["none", "auto"])
def test_processes_for_kernels_begin_before_the_weights_are_there(
    warmup, tmp_path, monkeypatch
) -> None:
    """If no program is known, and end when the first ones are compiled."""
    seen: list[str] = []
    for name in ("start", "close"):
        monkeypatch.setattr(LoweringProcesses, name, lambda _, name=name: seen.append(name))

    def weights():
        seen.append("weights")
        return tiny_params(CONFIG)

    for directory in ("first", "first", "second"):
        build_engine(
            CONFIG,
            weights,
            EngineOptions(**OPTIONS, warmup=warmup, compilation_cache=tmp_path / directory),
        )
    starts = ["start", "weights"] if warmup == "none" else ["start", "weights", "close"]
    again = ["start", "weights"] if warmup == "none" else ["weights", "close"]
    assert seen == [*starts, *again, *starts]
    seen.clear()
    llm = build(compilation_cache=tmp_path / "third")
    tokens(llm, (SHORT, GREEDY))
    assert seen == ["start", "close"]
    llm = build(compilation_cache=tmp_path / "fourth")
    seen.clear()
    tokens(llm, (SHORT, SamplingParams(max_tokens=1, frequency_penalty=1.0)))
    assert seen == ["close"]


def test_processes_for_kernels_end_where_no_engine_comes_of_it(tmp_path, monkeypatch) -> None:
    """As for weights that are of another model, or a cache with no room for a page."""
    seen: list[str] = []
    for name in ("start", "close"):
        monkeypatch.setattr(LoweringProcesses, name, lambda _, name=name: seen.append(name))
    options = EngineOptions(**OPTIONS, compilation_cache=tmp_path / "programs", kv_cache_bytes=1)
    with pytest.raises(ValueError, match="kv_cache_bytes"):
        build_engine(CONFIG, tiny_params(CONFIG), options)
    assert seen == ["start", "close"]


def test_a_second_warmup_loads(tmp_path) -> None:
    for source in ("compiled", "loaded"):
        llm = build(warmup="auto", compilation_cache=tmp_path / "programs")
        assert {made.source for made in llm.engine.runner.programs.times} == {source}
        assert compiled(llm) == 5


@pytest.mark.parametrize("options", [{}, {"deterministic": True, "relay": "never"}])
def test_the_first_request_compiles_all_that_it_needs_at_once(options, tmp_path, monkeypatch):
    prepared: list[int] = []
    prepare = Programs.prepare

    def count(programs: Programs, calls: list[Call]) -> None:
        prepared.append(len(calls))
        prepare(programs, calls)

    monkeypatch.setattr(Programs, "prepare", count)
    llm = build(compilation_cache=tmp_path / "programs", **options)
    long = {"prompt_token_ids": [3, 5] * 82}  # two lengths of a chunk
    assert tokens(llm, (long, GREEDY)) == tokens(build(**options), (long, GREEDY))
    assert prepared == [2 + 1 + 1]
    assert compiled(llm) == 4  # none that it did not need
    tokens(llm, (long, GREEDY), (SHORT, DRAWN))
    assert prepared == [4]


def test_a_first_burst_that_may_look_otherwise_is_not_compiled_before(tmp_path):
    """Another prompt waits for the first one's page."""
    llm = build(compilation_cache=tmp_path / "programs", prefill_chunk_size=256)
    prompts = [LONG, {"prompt_token_ids": [3, 5] * 49 + [7]}]
    llm.generate(prompts, dataclasses.replace(GREEDY, max_tokens=5))
    names = [made.name for made in llm.engine.runner.programs.times]
    assert names.count("decode_burst") == 1


def test_a_first_request_has_bursts_with_drafts_and_without(tmp_path):
    """Whether it drafts is not known yet, and may change."""
    options = {"attention": "lserve", "exact": True, "max_draft_tokens": 1}
    llm = build(compilation_cache=tmp_path / "programs", prefill_chunk_size=256, **options)
    llm.generate([LONG], dataclasses.replace(GREEDY, max_tokens=5))
    names = [made.name for made in llm.engine.runner.programs.times]
    assert names.count("exact_burst") == 2


def test_a_program_that_cannot_be_compiled_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no code for this")

    monkeypatch.setattr("lserve_jax.engine.programs.Programs._compile", fail)
    with pytest.raises(RuntimeError, match="no code for this"):
        build(warmup="auto")


def test_what_warmup_may_be() -> None:
    with pytest.raises(ValueError, match="warmup='all' must be 'none', 'auto' or 'full'"):
        build(warmup="all")
