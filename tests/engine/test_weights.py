"""Engines with quantised weights: their answers are those of the numbers that the weights are."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lserve_cases import CASES
from numpy.testing import assert_allclose
from tiny_llm import random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.scoring import score, score_rollouts
from lserve_jax.functional import logits
from lserve_jax.model.quantise import code_types, pack_params, quantise_params
from pallas_kernels import api

pytestmark = pytest.mark.usefixtures("all_slots")

CONFIG = tiny_config(layers=2, kv_heads=4, group=1, hidden_size=64)


def rounded(params: dict, kind) -> dict:
    """Float parameters that are what quantised ones stand for."""

    def back(leaf):
        return api.dequantize_weight(leaf) if isinstance(leaf, api.Weight) else leaf

    quantised = quantise_params(params, kind)
    return jax.tree.map(back, quantised, is_leaf=lambda x: isinstance(x, api.Weight))


@pytest.mark.parametrize("kind", api.WEIGHT_KINDS)
def test_scores_are_those_of_the_rounded_model(kind) -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=False)
    params = tiny_params(config)
    prompts, continuations = random_prompts(1, [40, 7]), random_prompts(2, [9, 20])
    got, wanted = (
        score(LLM((config, tree), max_num_seqs=2, weights=how).engine, prompts, continuations)
        for tree, how in ((params, kind), (rounded(params, kind), None))
    )
    for a, b in zip(got, wanted, strict=True):
        assert_allclose(a.logprobs, b.logprobs, atol=2e-5, rtol=0)


def test_heads_are_put_in_order_first(tmp_path: Path) -> None:
    """Sparse attention and exact mode over the same quantised weights: exact is dense."""
    case = CASES["page 32, one layer"]
    config = dataclasses.replace(case.config, hidden_size=64)
    path, params = case.write(tmp_path / "heads"), tiny_params(config, seed=3)
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(4, [300, 500])]
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    answers = []
    for settings in (
        {"attention": "dense"},
        {"attention": "lserve", "sparsity": case.sparsity(path), "exact": True},
    ):
        llm = LLM((config, params), max_num_seqs=2, weights="int8", **settings)
        answers.append([x.outputs[0].token_ids for x in llm.generate(prompts, sampling)])
    assert answers[0] == answers[1]


def test_a_saved_prefix_is_of_its_weights(tmp_path: Path) -> None:
    """Refused under other weights, also of the same type; loaded under the same again."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False, hidden_size=128)
    params = tiny_params(config)
    ways: list[dict] = [
        {},
        {"weights": "int8"},
        {"weights": "fp8"},
        {"weights": "int4", "weight_group": 32},
        {"weights": "int4", "weight_group": 64},
        {"prefill_dtype": "int8"},
    ]
    prompt = {"prompt_token_ids": random_prompts(1, [70])[0]}

    def build(way: dict) -> LLM:
        return LLM((config, params), max_num_seqs=2, max_model_len=128, **way)

    for number, way in enumerate(ways):
        build(way).prefix(prompt).save(tmp_path / str(number))
    for way in ways:
        llm = build(way)
        for number, saved in enumerate(ways):
            path = tmp_path / str(number)
            if saved == way:
                assert llm.load_prefix(path).num_shared_tokens == 64
                continue
            kinds = [(x.get("weights"), x.get("prefill_dtype")) for x in (way, saved)]
            same = kinds[0] == kinds[1]
            words = "another model" if same else "another type of codes in the weights: "
            with pytest.raises(ValueError, match=f"the prefix in '{path}' was made with {words}"):
                llm.load_prefix(path)


def test_prompts_are_remembered() -> None:
    """Cold and warm are the same bit for bit."""
    config = tiny_config(layers=1, kv_heads=2, hidden_size=64)
    settings = {"prefill_chunk_size": 64, "deterministic": True, "relay": "never"}
    llm = LLM((config, tiny_params(config)), max_num_seqs=1, weights="int4", **settings)
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=5)
    prompt = {"prompt_token_ids": random_prompts(5, [100])[0]}
    cold, warm = (llm.generate(prompt, sampling)[0] for _ in range(2))
    assert warm.outputs[0].logprobs == cold.outputs[0].logprobs
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 64)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [None, *api.WEIGHT_KINDS])
def test_what_they_take(kind, tied) -> None:
    """By the plan, by the shapes, and on the device."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = tiny_params(config)
    llm = LLM((config, params), dtype="bfloat16", weights=kind)
    sizes = {jax.tree_util.keystr(x): y.shape for x, y in jax.tree.flatten_with_path(params)[0]}
    if tied:  # on a CPU its output layer is a matrix of its own
        sizes["['lm_head']['kernel']"] = sizes["['embed_tokens']['embedding']"][::-1]
    wanted = 0
    for name, shape in sizes.items():
        bits, scales = 16, 0  # of a number; bytes of scales and zero points
        table = "embedding" in name and not tied
        if kind is not None and ("kernel" in name or table):
            bits = 4 if kind == "int4" and "lm_head" not in name else 8
            inputs, outputs = shape[::-1] if table else shape
            scales = 8 * outputs * (inputs // 32) if bits == 4 else 4 * outputs
        wanted += math.prod(shape) * bits // 8 + scales
    assert llm.memory_plan()["parameters"] == wanted
    held = jax.tree.leaves(llm.engine.params)
    assert sum(x.on_device_size_in_bytes() for x in held) == wanted


@pytest.mark.parametrize("kind", api.WEIGHT_KINDS)
def test_a_table_of_codes(kind) -> None:
    """Only where an output layer stands beside it; its rows are of the engine's dtype."""
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=tied)
        params = quantise_params(tiny_params(config), kind)
        engine = LLM((config, tiny_params(config)), dtype="bfloat16", weights=kind).engine
        for tree in (params, engine.params):
            table = tree["embed_tokens"]["embedding"]
            assert isinstance(table, api.Weight) != tied
            if isinstance(table, api.Weight):
                assert table.codes.dtype == ("uint4" if kind == "int4" else "int8")
                assert table.scale.shape == (config.vocab_size, 2 if kind == "int4" else 1)
                with pytest.raises(ValueError, match=r"embedding is quantised and, with tie_word"):
                    LLM((dataclasses.replace(config, tie_word_embeddings=True), params))
        [scores] = score_rollouts(engine, [[3, 1, 4]], [[1, 5, 9]], keep_hidden=True)
        assert scores.hidden is not None
        assert scores.hidden.dtype == jnp.bfloat16


def test_an_update_is_rounded_too() -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    llm = LLM((config, tiny_params(config)), weights="int4")
    llm.update_params(tiny_params(config, seed=1))
    wanted = LLM((config, tiny_params(config, seed=1)), weights="int4").engine.params
    jax.tree.map(np.testing.assert_array_equal, llm.engine.params, wanted)
    # Codes are updated by codes.
    codes = quantise_params(tiny_params(config), "int4")
    llm = LLM((config, codes))
    llm.update_params(quantise_params(tiny_params(config, seed=1), "int4"))
    jax.tree.map(np.testing.assert_array_equal, llm.engine.params, wanted)
    codes["embed_tokens"] = tiny_params(config)["embed_tokens"]
    with pytest.raises(ValueError, match=r"\['embed_tokens'\]\['embedding'\].codes is missing"):
        llm.update_params(codes)


def test_refusals() -> None:
    params = tiny_params(CONFIG)
    with pytest.raises(ValueError, match="weights='int5' must be 'int8', 'int4', 'fp8' or"):
        LLM((CONFIG, params), weights="int5")
    with pytest.raises(ValueError, match=r"weight_group=48 must be one of \(32, 64, 128\)"):
        LLM((CONFIG, params), weights="int4", weight_group=48)
    odd = tiny_config(layers=1, kv_heads=1, hidden_size=48)
    with pytest.raises(ValueError, match=r"kernel has 48 inputs, which weight_group=32 does not"):
        LLM((odd, tiny_params(odd)), weights="int4")
    int8 = quantise_params(params, "int8")
    same = quantise_params(int8, "int8")
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (same, int8)), strict=True))
    for kind, group in (("fp8", 32), ("int4", 32)):
        with pytest.raises(
            ValueError, match=r"kernel is quantised already, as int8 with .* no zero"
        ):
            quantise_params(int8, kind, group=group)
    int4 = quantise_params(params, "int4")
    with pytest.raises(ValueError, match="already, as uint4 with 32 inputs to a scale and zero"):
        quantise_params(int4, "int4", group=64)


@pytest.mark.parametrize("kind", api.WEIGHT_KINDS)
def test_packed_matrices_give_the_same_answers(kind) -> None:
    """Those that have the size for it. Without their kernel they are unpacked."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
    config = dataclasses.replace(CONFIG, **sizes)
    plain = quantise_params(tiny_params(config), kind)
    packed = jax.tree.map(lambda x: x, plain)
    pack_params(packed, set())
    leaves = jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, api.PackedWeight))
    sized = [x for x in leaves if isinstance(x, api.PackedWeight)]
    assert len(sized) > 2 * 2 and {x.paired for x in sized} == {True, False}
    assert code_types(packed) == code_types(plain)
    tokens = np.array(random_prompts(1, [12]))
    of = jax.jit(logits, static_argnums=0)
    got, wanted = (of(config, tree, tokens) for tree in (packed, plain))
    np.testing.assert_array_equal(got, wanted)
