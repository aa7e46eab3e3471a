"""Exact mode that drafts by quantised weights: dense attention with the floats has the last word.

Budgets hold the whole context, so that only codes can make a draft wrong.
"""

import dataclasses
from typing import Any

import jax
import pytest
from tiny_llm import random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.engine import build
from lserve_jax.engine.array_bytes import tree_bytes
from lserve_jax.engine.options import EngineOptions
from lserve_jax.model.params import Params, is_quantised
from lserve_jax.model.quantise import quantise_params
from pallas_kernels.api import PackedWeight, Weight

CONFIG = tiny_config(layers=1, kv_heads=2, group=2, hidden_size=128, head_dim=64, max_len=256)
CONFIG = dataclasses.replace(CONFIG, intermediate_size=256, vocab_size=128)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)
PROMPTS = random_prompts(0, [40, 70])
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=3, max_tokens=40, ignore_eos=True),
]
ROOM: dict[str, Any] = {"max_num_seqs": 2, "relay": "never"}
EXACT: dict[str, Any] = ROOM | {
    "attention": "lserve",
    "sparsity": SparsityConfig(token_budget=256),
    "exact": True,
    "deterministic": True,  # else the time that bursts take has a say in how many drafts there are
    "relay": "never",
}


def answers(llm: LLM) -> tuple[list[tuple[int, ...]], list[Any]]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], PARAMS)
    return [x.outputs[0].token_ids for x in outputs], [x.metrics for x in outputs]


def codes(tree: Params) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=is_quantised) if is_quantised(x)]


@pytest.mark.parametrize(("config", "kind"), [(CONFIG, "int8"), (UNTIED, "int4")])
def test_answers_are_those_of_the_floats(config, kind) -> None:
    params = tiny_params(config)
    wanted, _ = answers(LLM((config, params), **ROOM))
    llm = LLM((config, params), draft_weights=kind, **EXACT)
    got, metrics = answers(llm)
    assert got == wanted
    confirmed, drafted = (
        sum(getattr(m, f"{name}_tokens") for m in metrics) for name in ("confirmed", "drafted")
    )
    # They draft, though attention spares nothing: the codes are less to read. 8 bits are seldom
    # wrong, 4 at times.
    assert 0 < confirmed < drafted or (kind == "int8" and 0 < confirmed == drafted)
    # Four of the layer, and the output layer, held beside the floats.
    runner = llm.engine.runner
    assert not codes(runner.params) and not codes(runner.prefill_params)
    assert len(codes(runner.draft_params)) == 5
    own = tree_bytes(codes(runner.draft_params))
    assert llm.memory_plan()["parameters"] == tree_bytes(runner.params) + own
    # A draft reads these and the norms, not the embedding table, which is no output layer here.
    norms = tree_bytes([x for x in jax.tree.leaves(runner.params) if x.ndim == 1])
    assert runner.draft_step_bytes == own + norms
    table = tree_bytes(runner.params["embed_tokens"])
    assert runner.step_bytes == tree_bytes(runner.params) - table


def test_an_update_changes_the_drafts_too() -> None:
    params = [tiny_params(UNTIED, seed) for seed in (0, 1)]
    llm = LLM((UNTIED, params[1]), draft_weights="int4", **EXACT)
    wanted, metrics = answers(llm)
    llm = LLM((UNTIED, params[0]), draft_weights="int4", **EXACT)
    answers(llm)
    llm.update_params(params[1])
    got, after = answers(llm)
    assert got == wanted
    assert [m.confirmed_tokens for m in after] == [m.confirmed_tokens for m in metrics]


def test_drafts_are_packed_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"draft_weights": "int4", "dtype": "bfloat16", **EXACT}
    plain, _ = answers(LLM((UNTIED, tiny_params(UNTIED)), **options))
    monkeypatch.setattr(build, "resolve_backend", lambda _: "mosaic")
    llm = LLM((UNTIED, tiny_params(UNTIED)), **options)
    packed = [x for x in codes(llm.engine.runner.draft_params) if isinstance(x, PackedWeight)]
    assert len(packed) == 5
    assert not codes(llm.engine.runner.params)
    assert answers(llm)[0] == plain


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draft_weights": "int3"}, "draft_weights='int3' must be"),
        ({"draft_weights": "checkpoint"}, "draft_weights='checkpoint' must be"),
        ({"draft_weights": "int4", "exact": False}, "needs exact=True and draft='sparse'"),
        ({"draft_weights": "int8", "draft": "ngram", "sparsity": None}, "and draft='sparse'"),
        ({"draft_weights": "int4", "weights": "int8"}, "needs weights=None, got weights='int8'"),
    ],
)
def test_refusals(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLM((CONFIG, tiny_params(CONFIG)), **EXACT | settings)


def test_codes_are_refused_and_groups_that_do_not_divide_before_weights_are_read() -> None:
    coded = quantise_params(tiny_params(CONFIG), "int8")
    assert any(isinstance(x, Weight) for x in codes(coded))
    with pytest.raises(ValueError, match="draft_weights='int4' needs floats to quantise"):
        LLM((CONFIG, coded), draft_weights="int4", **EXACT)
    odd = dataclasses.replace(CONFIG, intermediate_size=240)
    options = EngineOptions(draft_weights="int4", **EXACT)

    def read() -> Params:
        raise AssertionError("weights were read")

    with pytest.raises(
        ValueError, match=r"down_proj\.kernel has 240 inputs, which weight_group=32"
    ):
        build.build_engine(odd, read, options)
