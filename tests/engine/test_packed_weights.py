"""Engines whose quantised weights are packed for kernels, on a CPU: there they are unpacked again.

So answers are those of the codes, number by number; a GPU's kernel is tested in ``kernels/``.
"""

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_update_params import no_compilation
from tiny_llm import check_nothing_left, random_prompts, tiny_config, tiny_params, write_pattern

import convert
from lserve_jax import LLM, SamplingParams, SparsityConfig, logits
from lserve_jax.engine import build
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.options import EngineOptions
from lserve_jax.model import quantise
from lserve_jax.model.lora import init_adapter, merge
from lserve_jax.model.params import Params, is_quantised
from lserve_jax.model.quantise import quantise_params
from pallas_kernels import api, linear_ops

CONFIG = tiny_config(
    layers=1,
    kv_heads=2,
    group=2,
    hidden_size=128,
    head_dim=64,
    intermediate_size=256,
    tie_word_embeddings=False,
)
CONFIG = dataclasses.replace(CONFIG, vocab_size=128)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
PROMPTS = random_prompts(0, [40])
OPTIONS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 2, "dtype": "bfloat16"}


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether engines pack, as they do for the kernels of a Hopper GPU."""

    def switch(on: bool) -> None:
        backend = "mosaic" if on else "reference"
        monkeypatch.setattr(build, "resolve_backend", lambda _: backend)

    switch(True)
    return switch


def integer_zeros(params: Params, *, other: bool = False) -> Params:
    """4 bits as in many checkpoints: scales of 16 bits, zero points that are integers.

    ``other``: scales of 32 bits, as rounding makes none.
    """

    def change(x: Any) -> Any:
        if not isinstance(x, api.Weight) or x.zero is None:
            return x
        scale = x.scale / 3 if other else x.scale.astype(jnp.bfloat16).astype(jnp.float32)
        return x._replace(scale=scale, zero=jnp.abs(jnp.round(x.zero)))

    return jax.tree.map(change, params, is_leaf=lambda x: isinstance(x, api.Weight))


def made(seed: int = 0, kind: api.WeightKind | None = None) -> Params:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params(CONFIG, seed))
    return params if kind is None else quantise_params(params, kind)


def packed_leaves(params: Params) -> list[api.PackedWeight]:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, api.PackedWeight))
    return [x for x in leaves if isinstance(x, api.PackedWeight)]


def answers(llm: LLM) -> list:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], GREEDY)
    return [(x.outputs[0].token_ids, x.outputs[0].logprobs) for x in outputs]


@pytest.mark.parametrize(
    ("kind", "attention"), [("int8", "dense"), ("fp8", "dense"), ("int4", "lserve")]
)
def test_answers_are_those_of_the_codes(packing, kind, attention: str, tmp_path: Path) -> None:
    options = OPTIONS | {"weights": kind, "attention": attention}
    if attention == "lserve":  # heads change places before matrices are packed
        pattern = write_pattern(tmp_path / "pattern", [[0.1, 0.9]])
        options["sparsity"] = SparsityConfig(
            pattern=pattern, streaming_fraction=0.5, token_budget=128
        )
    runs = []
    for on in (False, True):
        packing(on)
        llm = LLM((CONFIG, made()), **options)
        assert len(packed_leaves(llm.engine.params)) == 5 * on  # four of a layer, the output layer
        # Rounded zero points have no words of their own in packed matrices.
        zeros = [
            x.zero.nbytes
            for x in jax.tree.leaves(llm.engine.params["layers"], is_leaf=is_quantised)
            if isinstance(x, api.Weight) and x.zero is not None
        ]
        parameters = llm.memory_plan()["parameters"] - sum(zeros)
        runs.append((answers(llm), parameters, llm.engine.runner.fingerprint()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_update_is_packed_alike(packing, kind) -> None:
    """From zeros alone, and back."""
    nothing = jax.tree.map(jnp.zeros_like, made())
    wanted = answers(LLM((CONFIG, made(1)), weights=kind, **OPTIONS))
    llm = LLM((CONFIG, nothing), weights=kind, **OPTIONS)
    answers(llm)
    llm.update_params(made(1))  # what packs them is compiled
    structure = jax.tree.structure(llm.engine.params)
    llm.update_params(nothing)
    assert jax.tree.structure(llm.engine.params) == structure
    with no_compilation():
        llm.update_params(made(1))
        assert answers(llm) == wanted
    check_nothing_left(llm.engine)


def test_codes_are_packed_alike_as_far_as_they_fit(packing) -> None:
    bytes_, words = (integer_zeros(made(2, "int4"), other=other) for other in (False, True))
    llm = LLM((CONFIG, words), weights="checkpoint", **OPTIONS)
    before = jax.tree.structure(llm.engine.params)
    llm.update_params(bytes_)
    assert jax.tree.structure(llm.engine.params) == before

    llm = LLM((CONFIG, bytes_), weights="checkpoint", **OPTIONS)
    assert {x.zeros for x in packed_leaves(llm.engine.params)} == {"none", "byte"}
    for tree, zeros in ((words, "word"), (bytes_, "word")):
        llm.update_params(tree)
        assert {x.zeros for x in packed_leaves(llm.engine.params)} == {"none", zeros}
        assert answers(llm) == answers(LLM((CONFIG, tree), weights="checkpoint", **OPTIONS))


def test_one_matrix_at_a_time_is_there_twice(packing, monkeypatch) -> None:
    alive: list[weakref.ref] = []
    most = []
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)

    def params() -> Params:
        loaded = quantise_params(tiny_params(config, 3), "int4")
        matrices = [loaded["layers"], loaded["lm_head"]]  # the embedding table is not packed
        leaves = jax.tree.leaves(matrices, is_leaf=lambda x: isinstance(x, api.Weight))
        alive.extend(weakref.ref(x.codes) for x in leaves if isinstance(x, api.Weight))
        return loaded

    def pack_weight(weight: api.Weight, **how: bool) -> api.PackedWeight:
        most.append(sum(x() is not None for x in alive))
        return api.pack_weight(weight, **how)

    monkeypatch.setattr(quantise, "pack_weight", pack_weight)
    build_engine(config, params, EngineOptions(**OPTIONS))
    assert most == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert all(x() is None for x in alive)


def test_what_is_given_stays_as_it_is(packing) -> None:
    given = made(4, "int8")
    llm = LLM((CONFIG, given), **OPTIONS)
    assert not packed_leaves(given) and packed_leaves(llm.engine.params)
    wanted = answers(llm)
    assert answers(LLM((CONFIG, given), **OPTIONS)) == wanted


def test_arrays_on_the_host_are_taken_to_the_device(packing) -> None:
    given = made(4, "int8")
    llm = LLM((CONFIG, jax.tree.map(np.asarray, given)), **OPTIONS)
    assert len(packed_leaves(llm.engine.params)) == 5
    assert answers(llm) == answers(LLM((CONFIG, given), **OPTIONS))


def test_what_an_engine_runs_goes_elsewhere(packing, tmp_path: Path) -> None:
    llm = LLM((CONFIG, made(5)), weights="int4", **OPTIONS)
    params, plain = llm.engine.params, made(5, "int4")
    assert packed_leaves(params)
    tokens = np.array([PROMPTS[0]])
    of = jax.jit(logits, static_argnums=0)
    np.testing.assert_array_equal(of(CONFIG, params, tokens), of(CONFIG, plain, tokens))

    wanted = answers(llm)
    for on in (True, False):
        packing(on)
        other = LLM((CONFIG, params), weights="checkpoint", **OPTIONS)
        assert answers(other) == wanted
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        for got, scored in zip(other.score(prompts), llm.score(prompts), strict=True):
            np.testing.assert_array_equal(got.logprobs, scored.logprobs)
        np.testing.assert_array_equal(other.embed(prompts), llm.embed(prompts))

    convert.save(tmp_path / "saved", CONFIG, params)
    saved = convert.load(tmp_path / "saved", weights="checkpoint")[1]
    assert jax.tree.structure(saved) == jax.tree.structure(plain)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, saved, plain))

    with pytest.raises(NotImplementedError, match="quantised weights cannot be exported"):
        convert.export_hf(tmp_path / "hf", CONFIG, params)
    with pytest.raises(ValueError, match=r"qkv_proj\.kernel is quantised: an adapter is merged"):
        merge(params, init_adapter(CONFIG, rank=2), alpha=1.0)


def test_logits_have_derivatives_also_on_a_gpu(packing, monkeypatch) -> None:
    """No kernel has one, so none runs there, however few rows there are."""
    llm = LLM((CONFIG, made(5)), weights="int8", **OPTIONS)
    resolve = linear_ops.resolve_backend
    monkeypatch.setattr(
        linear_ops, "resolve_backend", lambda name: "mosaic" if name == "auto" else resolve(name)
    )
    tokens = np.array([[3, 1, 4]])

    def loss(embedding: jax.Array, params: Params) -> jax.Array:
        params = params | {"embed_tokens": {"embedding": embedding}}
        return logits(CONFIG, params, tokens)[0, -1, 7]

    got, wanted = (
        jax.jit(jax.grad(loss))(
            made(5)["embed_tokens"]["embedding"].astype(params["norm"]["scale"].dtype), params
        )
        for params in (llm.engine.params, made(5, "int8"))
    )
    assert np.asarray(got, np.float32).any()
    np.testing.assert_array_equal(got, wanted)


def test_a_prefix_is_of_the_weights_packed_or_not(packing, tmp_path: Path) -> None:
    prompt = {"prompt_token_ids": random_prompts(1, [70])[0]}
    LLM((CONFIG, made(6)), weights="int4", **OPTIONS).prefix(prompt).save(tmp_path / "prefix")
    packing(False)
    other = LLM((CONFIG, made(6)), weights="int4", **OPTIONS)
    assert other.load_prefix(tmp_path / "prefix").num_shared_tokens > 0


def test_programs_of_packed_weights_are_kept(packing, tmp_path: Path) -> None:
    options = OPTIONS | {"weights": "int4", "compilation_cache": tmp_path}
    sources, results = [], []
    for on in (True, True, False):
        packing(on)
        llm = LLM((CONFIG, made(7)), **options)
        results.append(answers(llm))
        sources.append({x.name: x.source for x in llm.engine.runner.programs.times})
    first, again, plain = sources
    assert set(first.values()) == {"compiled"}
    assert {plain[name] for name in ("prefill_chunks", "decode_burst")} == {"compiled"}
    assert again == dict.fromkeys(first, "loaded")
    assert results[0] == results[1] == results[2]
