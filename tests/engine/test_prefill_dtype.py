"""Prefill in 8 bits: prompts against float64, decode as it was, and what is held twice."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle_model
import pytest
from engine_cases import build, greedy, oracle, run, tokens_of
from numpy.testing import assert_allclose, assert_array_equal
from tiny_llm import VOCAB, random_prompts, tiny_config, tiny_params, write_pattern

from lserve_jax import LLM, RequestOutput
from lserve_jax.engine.inputs import Chunk
from lserve_jax.engine.judging import is_judged_by_prefill, judge
from lserve_jax.model.params import is_quantised
from lserve_jax.model.quantise import pack_params, quantise_params, with_w8a8
from pallas_kernels import api

CONFIG = dataclasses.replace(
    tiny_config(layers=2, kv_heads=4, group=1, hidden_size=128, tie_word_embeddings=False),
    intermediate_size=256,
    head_dim=32,
)


def codes(x: np.ndarray, kind: str, axis: int) -> np.ndarray:
    """The numbers that x is rounded to, with one scale along ``axis``."""
    dtype, largest = {"int8": (np.int8, 127), "fp8": (ml_dtypes.float8_e4m3fn, 448)}[kind]
    scale = np.abs(x).max(axis=axis, keepdims=True) / largest
    return (np.round(x / scale) if kind == "int8" else x / scale).astype(dtype) * scale


def rows_of(output: RequestOutput) -> np.ndarray:
    """Log probabilities of all tokens, at each step."""
    return np.array([[row[t] for t in range(VOCAB)] for row in output.outputs[0].logprobs or ()])


@pytest.mark.parametrize(("weights", "kind"), [(None, "int8"), (None, "fp8"), ("int8", "int8")])
def test_prompts_in_8_bits_and_answers_in_floats(
    weights: Any, kind: Any, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse attention; chunks, short prompts by themselves or in one call, and a prompt that is
    remembered."""
    pattern = write_pattern(tmp_path / "pattern", [[0.1, 0.9]])
    together = {"deterministic": False, "prefill_chunk_size": 256} if weights == kind else {}
    llm = build(pattern, prefill_dtype=kind, weights=weights, **together)
    prompts = random_prompts(5, [150, 30, 20, 25])
    prefill, calls = llm.engine.runner.prefill, []

    def recorded(chunks: list[Chunk], rows: int = 1) -> Any:
        calls.append((rows, [len(chunk.tokens) for chunk in chunks]))
        return prefill(chunks, rows)

    monkeypatch.setattr(llm.engine.runner, "prefill", recorded)
    outputs = run(llm, prompts, greedy(12))
    assert ((4, [30, 20, 25]) in calls) == bool(together)
    plain = oracle_model._linear

    def rounding(x: np.ndarray, weights: dict) -> np.ndarray:
        return codes(x, kind, axis=1).astype(float) @ codes(weights["kernel"], kind, axis=0)

    away = []
    for prompt, output in zip(prompts, outputs, strict=True):
        rows = rows_of(output)
        wanted = []
        for linear in (rounding, plain):
            model = oracle()
            if weights is not None:
                model.params = jax.tree.map_with_path(
                    lambda path, x: (
                        codes(x, weights, axis=0)
                        if "kernel" in str(path)
                        else codes(x, weights, axis=1)
                        if "embedding" in str(path)
                        else x
                    ),
                    model.params,
                )
            monkeypatch.setattr(oracle_model, "_linear", linear)
            logits = [model.prefill(prompt)[-1]]
            monkeypatch.setattr(oracle_model, "_linear", plain)
            logits += [model.decode(token) for token in tokens_of(output)[:-1]]
            wanted.append(oracle_model.log_softmax(np.array(logits)))
        # Where float32 and float64 round a number of a prompt to other codes, one step of many
        # is between them; else they agree as they do without rounding.
        assert_allclose(rows, wanted[0], rtol=0, atol=5e-3)
        away.append(np.abs(rows - wanted[1]).max())
    assert min(away) > 0.02
    again = run(llm, prompts[:1], greedy(12))
    assert again[0].num_cached_tokens > 0
    # Bit for bit where matches end with chunks; else codes may differ, as above.
    assert_allclose(rows_of(again[0]), rows_of(outputs[0]), rtol=0, atol=5e-3 if together else 0)
    # Judged are answers as generation does, by prefill and decode steps.
    arrays = [np.array(ids, np.int32) for ids in prompts]
    answers = [np.array(tokens_of(output), np.int32) for output in outputs]
    for new, output in zip(judge(llm.engine, arrays, answers), outputs, strict=True):
        logprobs = [
            row[token]
            for token, row in zip(tokens_of(output), output.outputs[0].logprobs, strict=True)
        ]
        assert_allclose(new.logprobs, logprobs, rtol=0, atol=5e-3 if together else 2e-5)


def test_numbers_that_are_none_are_not_lost() -> None:
    """int8 has no code for NaN, and XLA's max on a CPU may take the other operand."""
    params = tiny_params(CONFIG)
    embedding = params["embed_tokens"]["embedding"]
    params["embed_tokens"] = {"embedding": embedding.at[6].set(jnp.nan)}
    llm = LLM((CONFIG, params), max_model_len=64, prefill_dtype="int8")
    with pytest.raises(FloatingPointError, match="tokens of prompt and 0 of output are not"):
        run(llm, [[1, 6, 2, 3] * 8], greedy(1))


def matrix_bytes(params: dict) -> int:
    """Numbers in the matrices of all layers."""
    found = jax.tree.flatten_with_path(params["layers"], is_leaf=is_quantised)[0]
    return sum(x.shape[0] * x.shape[1] for path, x in found if path[-1].key == "kernel")


def test_what_is_held_twice() -> None:
    """Decode's arrays are those of an engine without; codes of the kind are prefill's too."""
    params = tiny_params(CONFIG)
    for weights in (None, *api.WEIGHT_KINDS):
        plain = LLM((CONFIG, params), weights=weights)
        for kind in api.W8A8_KINDS:
            llm = LLM((CONFIG, params), weights=weights, prefill_dtype=kind)
            runner = llm.engine.runner
            jax.tree.map(assert_array_equal, runner.params, plain.engine.params)
            more = llm.memory_plan()["parameters"] - plain.memory_plan()["parameters"]
            if weights == kind:
                assert more == 0
                assert all(
                    a is b
                    for a, b in zip(
                        *map(jax.tree.leaves, (runner.params, runner.prefill_params)), strict=True
                    )
                )
            else:  # a byte a number, and scales
                size = matrix_bytes(runner.params)
                assert size < more < 1.1 * size
            for name in ("embed_tokens", "norm", "lm_head"):
                assert runner.prefill_params[name] is runner.params[name]


def test_decode_is_the_same_program() -> None:
    """Prefill's has other arguments, and does not say what decode would."""
    params, texts = tiny_params(CONFIG), []
    for kind in (None, "fp8"):
        engine = LLM((CONFIG, params), max_model_len=64, prefill_dtype=kind).engine
        nothing = np.zeros((engine.spec.pages_per_sequence,), np.int32)
        chunk = Chunk(
            tokens=np.zeros((16,), np.int32),
            page_table=nothing,
            window_table=nothing,
            start=0,
            prompt_length=16,
        )
        leaves = jax.tree.leaves(engine.runner.prefill_call([chunk]).args, is_leaf=is_quantised)
        assert sum(isinstance(x, api.W8A8Weight) for x in leaves) == (0 if kind is None else 8)
        assert is_judged_by_prefill(engine) == (kind is None)
        call = engine.runner.decode_call(engine.scheduler.burst_inputs(4, 1, None, None))
        texts.append(call.function.lower(*call.args, **call.static).as_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", api.W8A8_KINDS)
def test_packed_codes_are_the_same(kind: Any) -> None:
    plain = quantise_params(tiny_params(CONFIG), kind)
    packed = jax.tree.map(lambda x: x, plain)
    pack_params(packed, set())
    assert isinstance(packed["layers"][0]["mlp"]["down_proj"]["kernel"], api.PackedWeight)
    jax.tree.map(
        assert_array_equal, *(with_w8a8(x, kind, "reference")["layers"] for x in (packed, plain))
    )


def test_unknown_types_are_refused() -> None:
    for value in ("int4", "e4m3", 8):
        with pytest.raises(ValueError, match=f"prefill_dtype={value!r} must be 'int8' or 'fp8'"):
            LLM((CONFIG, tiny_params(CONFIG)), prefill_dtype=value)
