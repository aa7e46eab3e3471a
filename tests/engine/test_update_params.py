"""Other weights in a running engine: what it says then, what it shares, and what it refuses."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiny_checkpoints import process_environment
from tiny_llm import check_nothing_left, random_prompts, tiny_config, tiny_params, write_pattern

from lserve_jax import LLM, ModelConfig, SamplingParams, SparsityConfig, logits
from lserve_jax.model.params import Params

pytestmark = pytest.mark.usefixtures("all_slots")

CONFIG = tiny_config(layers=1, kv_heads=2)
SIZES = {"max_model_len": 256, "max_num_seqs": 2}  # the same programs for all
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
[PROMPT] = random_prompts(0, [40])


def make(config: ModelConfig, seed: int = 0) -> Params:
    params = tiny_params(CONFIG, seed)
    return {k: v for k, v in params.items() if k != "lm_head" or not config.tie_word_embeddings}


def tokens(llm: LLM) -> list[int]:
    [output] = llm.generate({"prompt_token_ids": PROMPT}, GREEDY)
    return output.outputs[0].token_ids


@contextmanager
def no_compilation() -> Iterator[None]:
    compiled = []

    def count(name: str, *args: object, **settings: object) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled


@pytest.fixture(params=["dense", "tied", "lserve", "int8", "prefill"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> dict:
    options: dict = dict(SIZES)
    if request.param == "lserve":
        pattern = write_pattern(tmp_path / "pattern", [[0.1, 0.9]])
        sparsity = SparsityConfig(pattern=pattern, streaming_fraction=0.5, token_budget=128)
        options |= {"attention": "lserve", "sparsity": sparsity}
    if request.param == "int8":
        options["weights"] = "int8"
    if request.param == "prefill":
        options["prefill_dtype"] = "int8"
    return {"config": TIED if request.param == "tied" else CONFIG, "options": options}


def test_new_weights_answer_as_an_engine_made_of_them(case: dict) -> None:
    config, options = case["config"], case["options"]
    expected = [tokens(LLM((config, make(config, seed)), **options)) for seed in (0, 1)]
    assert expected[0] != expected[1]
    llm = LLM((config, make(config)), **options)
    assert tokens(llm) == expected[0]
    with no_compilation():
        for seed in (1, 0, 1):
            llm.update_params(make(config, seed))
            assert tokens(llm) == expected[seed]
    assert llm.config is llm.engine.config
    check_nothing_left(llm.engine)


def test_the_engines_parameters_fit_its_config() -> None:
    params = make(TIED)
    llm = LLM((TIED, params), **SIZES)
    assert llm.config == TIED
    ids = jnp.asarray([PROMPT])
    of = jax.jit(logits, static_argnums=0)
    ours = of(llm.config, llm.engine.params, ids)
    assert_allclose(ours, of(TIED, params, ids), atol=1e-5)


def test_arrays_that_need_not_change_are_shared() -> None:
    llm = LLM((CONFIG, tiny_params(CONFIG)), **SIZES)
    params = jax.tree.map(jnp.copy, tiny_params(CONFIG, 1))
    llm.update_params(params)
    same = jax.tree.map(lambda a, b: a is b, params, llm.engine.params)
    assert all(jax.tree.leaves(same))


def test_donated_weights_are_refused_until_the_next_update() -> None:
    llm = LLM((CONFIG, tiny_params(CONFIG)), **SIZES)
    params = jax.tree.map(jnp.copy, tiny_params(CONFIG))
    llm.update_params(params)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)
    following = step(params)
    with pytest.raises(ValueError, match="params were donated to another computation or deleted"):
        tokens(llm)
    with pytest.raises(ValueError, match=r"\['norm'\]\['scale'\] was donated or deleted"):
        llm.update_params(params)
    llm.update_params(following)
    assert tokens(llm) == tokens(LLM((CONFIG, following), **SIZES))


def test_prefixes_of_the_old_weights_are_gone() -> None:
    llm = LLM((CONFIG, tiny_params(CONFIG)), **SIZES)
    [ids] = random_prompts(1, [140])
    prefix = llm.prefix({"prompt_token_ids": ids})
    before = [tokens(llm)]
    llm.update_params(tiny_params(CONFIG, 1))
    assert prefix.is_released
    metrics = llm.engine.metrics()
    assert metrics.pinned_pages == metrics.cached_pages == 0
    prompt = {"prompt_token_ids": [*ids, 3]}
    [new] = llm.generate(prompt, GREEDY)
    [alone] = LLM((CONFIG, tiny_params(CONFIG, 1)), **SIZES).generate(prompt, GREEDY)
    assert new.outputs[0].token_ids == alone.outputs[0].token_ids
    assert new.metrics.prefix_tokens == 0
    llm.update_params(tiny_params(CONFIG))
    assert [tokens(llm)] == before
    check_nothing_left(llm.engine)


def test_an_update_while_requests_run_is_refused() -> None:
    llm = LLM((CONFIG, tiny_params(CONFIG)), burst_steps=2, **SIZES)
    expected = tokens(llm)
    prompt = {"prompt_token_ids": PROMPT}
    stream = llm.stream((p, GREEDY) for p in [prompt] * 9)
    next(stream)
    with pytest.raises(ValueError, match=r"params cannot change while \d requests run"):
        llm.update_params(tiny_params(CONFIG, 1))
    assert {tuple(output.outputs[0].token_ids) for _, output in stream} == {tuple(expected)}
    llm.update_params(tiny_params(CONFIG, 1))
    assert tokens(llm) != expected


def test_all_differences_are_named_and_nothing_changes() -> None:
    llm = LLM((CONFIG, tiny_params(CONFIG)), **SIZES)
    expected = tokens(llm)
    params: dict = tiny_params(CONFIG, 1)
    params["more"] = jnp.zeros(3)
    params["norm"] = {"scale": jnp.ones(47)}
    params["embed_tokens"] = {"embedding": np.zeros((96, 48), np.int32)}
    params["lm_head"] = {"kernel": params["lm_head"]["kernel"].astype(jnp.bfloat16)}
    params["layers"][0]["mlp"] = {"gate_up_proj": params["layers"][0]["mlp"]["gate_up_proj"]}
    params["layers"][0]["input_layernorm"] = {"scale": "ones"}
    with pytest.raises(ValueError) as caught:
        llm.update_params(params)
    message = str(caught.value)
    for part in (
        "differ from those that the engine began with in 6 of 9 leaves",
        "['more'] is not of the model",
        "['norm']['scale'] is float32 (47,), expected float32 (48,)",
        "['embed_tokens']['embedding'] is int32 (96, 48), expected float32 (96, 48)",
        "['lm_head']['kernel'] is bfloat16 (48, 96), expected float32 (48, 96)",
        "['layers'][0]['mlp']['down_proj']['kernel'] is missing",
        "['layers'][0]['input_layernorm']['scale'] is no array but str",
    ):
        assert part in message
    for wrong in (None, [], {}, (CONFIG, tiny_params(CONFIG))):
        with pytest.raises(ValueError, match=r"params (differ from those|must be the nested dict)"):
            llm.update_params(wrong)  # pyrefly: ignore
    assert tokens(llm) == expected


def test_float32_weights_of_a_trainer_in_a_bfloat16_engine() -> None:
    llm = LLM((CONFIG, tiny_params(CONFIG)), dtype="bfloat16", **SIZES)
    params = tiny_params(CONFIG, 1)
    llm.update_params(params)
    expected = tokens(llm)
    llm.update_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert tokens(llm) == expected
    with pytest.raises(ValueError, match=r"is float16 .*, expected bfloat16 or float32"):
        llm.update_params(jax.tree.map(lambda x: x.astype(jnp.float16), params))


def test_memory_that_runs_out_in_an_update_is_said_until_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM((CONFIG, tiny_params(CONFIG)), **SIZES)
    expected = tokens(llm)

    def fail(*args: object) -> None:
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.intake, "later", fail)
        with pytest.raises(MemoryError):
            llm.update_params(tiny_params(CONFIG))
    with pytest.raises(ValueError, match="no params since an update of them failed"):
        tokens(llm)
    llm.update_params(tiny_params(CONFIG))
    assert tokens(llm) == expected


def test_sharded_weights_keep_their_sharding() -> None:
    root = Path(__file__).resolve().parents[2]
    script = root / "tests" / "support" / "sharded_update.py"
    environment = process_environment(PYTHONPATH=str(root))
    subprocess.run([sys.executable, script], check=True, cwd=root, env=environment)
