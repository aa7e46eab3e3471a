"""Programs compiled while weights are read: what is planned for is what comes."""

import threading
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llm import tiny_config, tiny_params

import convert
from lserve_jax import LLM, SamplingParams
from lserve_jax.engine import programs
from lserve_jax.engine.array_bytes import tree_bytes
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.calls import Call
from lserve_jax.engine.compiling import Traced
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.options import EngineOptions
from lserve_jax.engine.programs import Programs
from lserve_jax.engine.warmup import warmup_calls
from lserve_jax.engine.weights import Intake
from lserve_jax.model.heads import partition_of
from lserve_jax.model.llama import init_params
from lserve_jax.model.params import Params, abstract_params
from lserve_jax.model.quantise import quantise_params

CONFIG = tiny_config(layers=1, kv_heads=2)
OPTIONS = {"max_model_len": 256, "max_num_seqs": 2, "prefill_chunk_size": 128}
PROMPT = {"prompt_token_ids": [3, 5] * 10}
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SECONDS = 300  # that a test waits for another thread before it fails


def build(make, *, expected: Params | None = None, **options) -> Engine:
    expected = abstract_params(CONFIG) if expected is None else expected
    return build_engine(CONFIG, make, EngineOptions(**OPTIONS, **options), expected=expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_the_shapes_of_parameters_are_known_before_these(weights, tied) -> None:
    """With heads in their order and in another, matrices of prefill's and drafts' own, and packed.

    Quantised when they are read, or by the engine.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    config = tiny_config(layers=1, kv_heads=2, tie_word_embeddings=tied, **sizes)
    floats, shapes = init_params(config), abstract_params(config)
    forms = [(floats, shapes)]
    if weights is not None:
        forms += [
            (
                quantise_params(floats, weights),
                jax.eval_shape(lambda tree: quantise_params(tree, weights), shapes),
            )
        ]
    for streams in ([[False, False]], [[True, False]]):
        heads = np.array(streams)
        kinds = [{}, {"prefill_dtype": "int8"}]
        kinds += [{"draft_weights": "int4"}] if weights is None else []
        for kind in kinds:
            for packed in (False, True):
                for params, described in forms:
                    intake = Intake(
                        config=config,
                        partition=partition_of(heads, dense=np.zeros_like(heads)),
                        dtype=jnp.float32,
                        weights=weights,
                        weight_group=32,
                        packed=packed,
                        **kind,
                    )
                    expected = intake.expected(described)
                    # Fails where they differ.
                    made = intake.first(lambda params=params: params, expected)
                    assert tree_bytes(expected) == tree_bytes(made)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_what_a_checkpoint_will_be_is_known_before_it_is_read(weights, tmp_path) -> None:
    config = tiny_config(layers=1, kv_heads=2, hidden_size=64)
    convert.export_hf(tmp_path / "hf", config, init_params(config))
    source, form = convert.resolve(tmp_path / "hf"), {"dtype": "bfloat16", "weights": weights}
    expected = convert.expected_params(source, config, **form)
    read = convert.load(source, **form)[1]
    assert expected == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), read)
    assert not any(x.committed for x in jax.tree.leaves(read))
    assert convert.expected_params(source, config, dtype="bfloat16", weights="checkpoint") is None
    convert.save(tmp_path / "orbax", config, init_params(config))
    source = convert.resolve(tmp_path / "orbax")
    assert convert.expected_params(source, config, dtype="bfloat16") is None


def test_programs_compile_while_weights_are_read(tmp_path, monkeypatch) -> None:
    """Of a checkpoint, whose reading waits here until one is compiled; a second start loads."""
    convert.export_hf(tmp_path / "hf", CONFIG, tiny_params(CONFIG))
    made, load, compiled = threading.Event(), convert.load, Programs._note

    def note(self: Programs, *given: object) -> None:
        compiled(self, *given)
        made.set()

    def read(*given, **named):
        assert made.wait(SECONDS)
        return load(*given, **named)

    monkeypatch.setattr(Programs, "_note", note)
    monkeypatch.setattr(convert, "load", read)
    plain = LLM((CONFIG, tiny_params(CONFIG)), **OPTIONS)
    wanted = plain.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    for source in ("compiled", "loaded"):
        made.clear()
        llm = LLM(tmp_path / "hf", **OPTIONS, warmup="auto", compilation_cache=tmp_path / "kept")
        times = llm.engine.runner.programs.times
        assert [x.source for x in times] == [source] * 5
        assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == wanted
        assert len(times) == 5  # what was prepared fits


def test_a_call_made_of_shapes_is_that_made_of_arrays(monkeypatch) -> None:
    """Its key too, so that each finds the programs that the other kept."""
    calls: list[Call] = []

    def seen(self: Programs, given: list[Call], *, progress: bool) -> AbstractContextManager:
        calls.extend(given)
        return nullcontext()

    monkeypatch.setattr(Programs, "preparing", seen)
    options = {"attention": "lserve", "exact": True, "draft": "ngram", "host_cache_bytes": 1 << 20}
    engine = build(lambda: tiny_params(CONFIG), **options, warmup="auto")
    assert {call.name for call in calls} >= {"prefill_chunks", "insert", "write_block"}
    for call, again in zip(calls, warmup_calls(engine, "auto"), strict=True):
        assert call.description() == again.description()
        assert call.signature(sharded=True) == again.signature(sharded=True)
    # Blocks from the host are put where the caches lie: bound there, arrays and shapes alike.
    pages, runner = np.zeros((1,), np.int32), engine.runner
    shapes = runner.block_shapes(pages, pages[:0])
    block = [jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for x in shapes]
    described, real = (runner.write_block_call(x, pages, pages[:0]) for x in (shapes, block))
    assert described.description() == real.description()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_weights_that_cannot_be_read_wait_for_no_program(error, monkeypatch) -> None:
    """And no further one is begun."""
    compiling, released = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def compile_(*_: object) -> None:
        threads.append(threading.current_thread())
        compiling.set()
        assert released.wait(SECONDS)

    def read() -> Params:
        assert compiling.wait(SECONDS)
        raise error("no weights")

    monkeypatch.setattr(programs, "MOST_COMPILING", 1)
    monkeypatch.setattr(Programs, "_compile", compile_)
    try:
        with pytest.raises(error, match="no weights"):
            build(read, warmup="auto")
        assert threads[0].is_alive()
    finally:
        released.set()
    threads[0].join(SECONDS)
    assert not threads[0].is_alive() and len(threads) == 1


def test_a_program_that_cannot_be_compiled_is_heard_of_when_weights_are_read(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no code for this")

    read: list[None] = []
    monkeypatch.setattr(Programs, "_compile", fail)
    with pytest.raises(RuntimeError, match="no code for this"):
        build(lambda: read.append(None) or tiny_params(CONFIG), warmup="auto")
    assert read


def test_parameters_that_are_not_as_expected() -> None:
    expected = jax.eval_shape(lambda tree: quantise_params(tree, "int8"), abstract_params(CONFIG))
    with pytest.raises(ValueError, match=r"differ from those expected .*o_proj'\]\['kernel'\]"):
        build(lambda: tiny_params(CONFIG), expected=expected)


def test_settings_of_the_calling_thread_hold(monkeypatch) -> None:
    """Another thread would not have them, so programs are traced here, after the weights."""
    seen: list[object] = []
    of = Traced.of

    def traced(call: object) -> object:
        seen.append(threading.current_thread())
        return of(call)

    monkeypatch.setattr(Traced, "of", traced)
    with jax.default_matmul_precision("highest"):
        build(lambda: seen.append("read") or tiny_params(CONFIG), warmup="auto")
    assert seen == ["read", *[threading.current_thread()] * 5]


def test_pages_are_planned_by_the_parameters_that_will_come(monkeypatch) -> None:
    stats = {"bytes_limit": 2_000_000, "bytes_in_use": 1000}
    device = SimpleNamespace(memory_stats=lambda: dict(stats))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])

    def read() -> Params:
        params = tiny_params(CONFIG)
        stats["bytes_in_use"] = 1000 + sum(x.nbytes for x in jax.tree.leaves(params))
        return params

    before = build(read, max_prefixes=2**20)
    stats["bytes_in_use"] = 1000
    after = build_engine(CONFIG, read, EngineOptions(**OPTIONS, max_prefixes=2**20))
    assert before.spec == after.spec

    stats["bytes_in_use"] = stats["bytes_limit"] - 1000
    with pytest.raises(MemoryError, match=r"\d{5} bytes for the weights, .*, where 1000 are free"):
        build(lambda: pytest.fail("they were read"))
