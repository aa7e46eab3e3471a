"""What held prefixes cost beside their pages, and what a saved one says of its model."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny_llm import random_prompts, tiny_config, tiny_params, write_pattern

from lserve_jax import LLM, ModelConfig, SparsityConfig
from lserve_jax.attention.cache import cache_bytes, make_spec

CONFIG = tiny_config(layers=2, kv_heads=2, group=2, max_len=1024)
SIZES = {"page_size": 16, "token_budget": 96, "decode_sink": 16, "decode_local": 32}
WINDOW = {"prefill_sink": 16, "prefill_local": 64}


@pytest.fixture(scope="module")
def sparsity(tmp_path_factory: pytest.TempPathFactory) -> SparsityConfig:
    pattern = write_pattern(tmp_path_factory.mktemp("p") / "half", [[0.2, 0.9], [0.8, 0.1]])
    return SparsityConfig(pattern=pattern, **SIZES, **WINDOW)


def build(sparsity: SparsityConfig | None, params=None, **settings) -> LLM:
    attention = "dense" if sparsity is None else "lserve"
    params = tiny_params(CONFIG) if params is None else params
    settings = {"max_num_seqs": 2, "prefill_chunk_size": 64} | settings
    return LLM((CONFIG, params), attention=attention, sparsity=sparsity, **settings)


def test_the_plan_has_what_held_prefixes_keep(sparsity: SparsityConfig) -> None:
    llm = build(sparsity, kv_cache_bytes=1 << 20)
    assert llm.memory_plan()["prefix_windows"] == 0
    prompts = random_prompts(0, [200, 200])
    held = [llm.prefix({"prompt_token_ids": prompt}) for prompt in prompts]
    # Two layers with a streaming head of 16 channels each; sink, local and one more page of 16
    # tokens; K and V in float32; for two prefixes.
    window = 2 * (16 + 64 + 16) * 16 * 2 * 4
    assert llm.memory_plan()["prefix_windows"] == 2 * window
    assert llm.memory_plan()["prefill_window"] == window
    held[0].release()
    assert llm.memory_plan()["prefix_windows"] == window
    llm.engine.reset()
    assert llm.memory_plan()["prefix_windows"] == 0
    dense = build(None)
    dense.prefix({"prompt_token_ids": prompts[0]})
    assert dense.memory_plan()["prefix_windows"] == 0  # no head streams


def test_a_prefix_of_llama_3_8b_keeps_549_megabytes() -> None:
    """Half of its heads stream, with the default windows, in bf16."""
    config = ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
    )
    spec = make_spec(
        config,
        sparsity=SparsityConfig(),
        num_retrieval_heads=(4,) * 32,
        max_model_len=131072,
        max_num_seqs=1,
        num_pages=1,
        max_prefixes=1,
        kv_dtype="auto",
    )
    assert cache_bytes(config, spec, jnp.bfloat16)["prefill_window"] == 549_453_824


def test_on_a_gpu_the_plan_sets_aside_what_prefixes_can_keep(
    sparsity: SparsityConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 3_000_000  # bytes
    stats = {"bytes_limit": free + 1000, "bytes_in_use": 1000}
    device = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    plans = []
    for max_prefixes in (0, 8):
        llm = build(sparsity, max_num_seqs=64, max_prefixes=max_prefixes, memory_fraction=0.5)
        plan = llm.memory_plan()
        pages = plan["retrieval"] + plan["key_stats"]
        page = pages // llm.spec.num_pages
        rest = sum(plan.values()) - plan["parameters"] - pages
        room = 0.5 * (free - rest - page - max_prefixes * plan["prefill_window"])
        assert llm.spec.num_pages == room // page
        plans.append(llm.spec.num_pages)
    assert plans[0] > plans[1]


def changed(params: dict, place: int) -> dict:
    """Other in one number of one weight."""
    head = params["lm_head"]["kernel"]
    kernel = head.ravel().at[place].add(1e-3).reshape(head.shape)
    return params | {"lm_head": {"kernel": kernel}}


def test_a_saved_prefix_knows_every_number_of_its_model(
    sparsity: SparsityConfig, tmp_path: Path
) -> None:
    params = tiny_params(CONFIG)
    llm, path = build(sparsity, params), tmp_path / "prefix.safetensors"
    llm.prefix({"prompt_token_ids": random_prompts(1, [100])[0]}).save(path)
    fingerprint = llm.engine.runner.fingerprint()
    assert build(sparsity, params).engine.runner.fingerprint() == fingerprint
    swapped = params["layers"] | {0: params["layers"][1], 1: params["layers"][0]}
    head = params["lm_head"]["kernel"]
    for name, other in {
        "first number": changed(params, 0),
        "last number": changed(params, -1),
        "one in the middle": changed(params, head.size // 2),
        "layers in another order": params | {"layers": swapped},
        "rows of a weight in another order": params | {"lm_head": {"kernel": head[::-1]}},
    }.items():
        model = build(sparsity, other)
        assert model.engine.runner.fingerprint() != fingerprint, name
        with pytest.raises(ValueError, match="made with another model"):
            model.load_prefix(path)
    theta = dataclasses.replace(CONFIG.rope, rope_theta=20_000.0)
    config = dataclasses.replace(CONFIG, rope=theta)
    other = LLM((config, params), attention="lserve", sparsity=sparsity, max_num_seqs=2)
    assert other.engine.runner.fingerprint() != fingerprint
    bf16 = build(sparsity, params, dtype="bfloat16")
    assert bf16.engine.runner.fingerprint() != fingerprint
