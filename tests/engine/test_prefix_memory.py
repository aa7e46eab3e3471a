"""What remembered prompts cost beside their pages, and what a saved one says of its model."""

import dataclasses
import gc
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from budgets import budgets_of
from tiny_llm import random_prompts, tiny_config, tiny_params, write_pattern

import convert
from lserve_jax import LLM, ModelConfig, SamplingParams, SparsityConfig
from lserve_jax.attention.cache import cache_bytes, make_spec
from lserve_jax.engine import build as build_module
from lserve_jax.engine import engine as engine_module
from lserve_jax.engine import host_tier as host_tier_module
from lserve_jax.engine import page_plan
from lserve_jax.engine import runner as runner_module
from lserve_jax.engine.host_tier import HostTier, check_pinned_memory, take_pinned_memory
from lserve_jax.engine.prefix_tree import Evicted, next_digest, root_digest

pytestmark = pytest.mark.usefixtures("all_slots")

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


def test_the_plan_has_the_windows_of_remembered_prompts(sparsity: SparsityConfig) -> None:
    """They are a pool like any other; what is remembered or held takes nothing beside the plan."""
    llm = build(sparsity, kv_cache_bytes=1 << 20, max_prefixes=2)
    # Two layers with a streaming head of 16 channels each, K and V in float32. Of pages of 16
    # tokens: sink, local and one more, and half of local and one more behind these, for the prompt
    # that is read and two others.
    pages = 3 * (1 + 4 + 1 + 2 + 1)
    plan = llm.memory_plan()
    assert plan["prefill_window"] == 2 * pages * 16 * 16 * 2 * 4
    gc.collect()  # what earlier tests left
    arrays = len(jax.live_arrays())
    held = [llm.prefix({"prompt_token_ids": prompt}) for prompt in random_prompts(0, [200] * 3)]
    assert llm.memory_plan() == plan
    assert len(jax.live_arrays()) == arrays
    with pytest.raises(ValueError, match=r"would take 24 pages of 16 tokens, 18 can be held"):
        llm.prefix({"prompt_token_ids": random_prompts(1, [200])[0]})
    held[0].release()
    llm.prefix({"prompt_token_ids": random_prompts(1, [200])[0]})
    assert build(None).memory_plan()["prefill_window"] == 0  # no head streams


def test_there_are_no_windows_of_pages_that_there_are_not(sparsity: SparsityConfig) -> None:
    """Ten pages can have ten window pages, beside the 6 + 3 of a prompt in prefill."""
    page = build(sparsity).engine.units.page
    llm = build(sparsity, kv_cache_bytes=10 * page)
    assert llm.spec.num_pages == 10
    assert llm.spec.num_window_pages == 10 + 6 + 3
    prompts = random_prompts(2, [150, 100, 150])
    for prompt in [*prompts, *prompts]:
        llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=2))
    assert llm.engine.metrics().evicted_windows == 0 < llm.engine.metrics().evicted_pages


def test_on_a_cpu_windows_take_half_of_what_pages_do_unless_asked_for(
    sparsity: SparsityConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But have room for the prompt in prefill, a window and a half, and another one."""
    window_page = 2 * 16 * 16 * 2 * 4  # two layers with a streaming head, as above
    for room, pages in ((40, 40), (10, 6 + 3 + 6), (1000, 9 * (6 + 3))):
        monkeypatch.setattr(page_plan, "CPU_CACHE_BYTES", 2 * room * window_page)
        assert build(sparsity, max_model_len=512).spec.num_window_pages == pages
    asked = build(sparsity, max_model_len=512, kv_cache_bytes=1 << 20)
    assert asked.spec.num_window_pages == 9 * (6 + 3)


def test_a_window_of_llama_3_8b_takes_549_megabytes() -> None:
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
        heads=budgets_of((4,) * 32, SparsityConfig()),
        max_model_len=131072,
        max_num_seqs=1,
        num_pages=1,
        max_prefixes=0,
        kv_dtype="auto",
    )
    assert cache_bytes(config, spec, jnp.bfloat16)["prefill_window"] == 549_453_824


def test_on_a_gpu_windows_are_planned_before_pages(
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
        room = 0.5 * (free - rest - page)
        # Fewer by less than a 64th: a little less memory at the next start gives as many.
        assert (room // page) * 63 / 64 < llm.spec.num_pages <= room // page
        leading = bin(llm.spec.num_pages)[2:9]
        assert llm.spec.num_pages == int(leading, 2) << llm.spec.num_pages.bit_length() - 7
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


def test_weights_do_not_exist_twice_while_pages_are_planned(
    sparsity: SparsityConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory is what pages are planned by: unpermuted attention weights must be gone."""
    config = dataclasses.replace(CONFIG, hidden_size=256)
    convert.save(tmp_path / "model", config, tiny_params(config))
    live = []
    plan = build_module.plan_pages

    def count(*args):
        gc.collect()
        live.append(sum(x.nbytes for x in jax.live_arrays()))
        return plan(*args)

    monkeypatch.setattr(build_module, "plan_pages", count)
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    llm = LLM(tmp_path / "model", attention="lserve", sparsity=sparsity, max_num_seqs=2)
    weights = llm.memory_plan()["parameters"]
    assert live[0] - before <= 1.01 * weights


def test_a_prefix_that_is_not_computed_runs_nobodys_prompt(sparsity: SparsityConfig) -> None:
    llm = build(sparsity, kv_cache_bytes=1 << 22)
    held = llm.prefix({"prompt_token_ids": random_prompts(2, [100])[0]})
    engine, [prompt] = llm.engine, random_prompts(3, [900])
    engine.add_request("long", prompt, SamplingParams(temperature=0, max_tokens=2), seed=0)
    engine.step()  # the first of its chunks
    before = engine.metrics().prompt_tokens
    with pytest.raises(ValueError, match="prefix token id 96 is outside the vocabulary"):
        engine.add_prefix([96] * 100)
    assert engine.add_prefix(held.token_ids) is held
    assert engine.metrics().prompt_tokens == before
    engine.add_prefix(random_prompts(4, [64])[0])
    assert engine.metrics().prompt_tokens == len(prompt) + 100 // 16 * 16 + 64


def test_after_a_failure_in_a_prefix_the_engine_goes_on(
    sparsity: SparsityConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = build(sparsity, kv_cache_bytes=1 << 22)
    prompt = {"prompt_token_ids": random_prompts(5, [100])[0]}
    greedy = SamplingParams(temperature=0, max_tokens=4)
    expected = llm.generate(prompt, greedy)[0].outputs[0].token_ids
    llm.reset_prefix_cache()
    real = runner_module.prefill_chunks

    def fail(*args, **settings):
        real(*args, **settings)  # consumes the donated caches
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "prefill_chunks", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.prefix(prompt)
    assert llm.generate(prompt, greedy)[0].outputs[0].token_ids == expected


def test_a_file_of_an_older_format_is_refused_with_a_reason(
    sparsity: SparsityConfig, tmp_path: Path
) -> None:
    path = tmp_path / "old.safetensors"
    arrays = {"x": jnp.zeros(1)}
    for old in (1, 2):
        safetensors.flax.save_file(arrays, path, {"format": f"lserve_jax prefix {old}"})
        with pytest.raises(
            ValueError, match=r"is of an older version, .* compute the prefix again"
        ):
            build(sparsity).load_prefix(path)


# Host memory.


def host_tier(limit: int) -> HostTier:
    """Of pages with nothing in them but one number."""

    def read(pages: np.ndarray, windows: np.ndarray) -> list[jax.Array]:
        return [jnp.zeros((len(pages) + len(windows),))]

    return HostTier(limit, read, lambda block, pages, windows: None)


def spilled(tier: HostTier, keys: list[bytes]) -> None:
    """As the tree gives up a prompt: its last page first."""
    digests = [root_digest(None)]
    for key in keys:
        digests.append(next_digest(digests[-1], key))
    tier.spill([Evicted(digest, 0, 0) for digest in digests[:0:-1]])
    tier.check()


def test_host_memory_is_what_its_pages_take() -> None:
    """Pages beyond a block's are no padding, and all memory is one that a GPU can reach."""
    tier, blocks = host_tier(100), {}
    for n in range(8):
        keys = [b"%d %d" % (n, i) for i in range(33)]
        spilled(tier, keys)
        blocks |= {page.block: page for page in tier.find(root_digest(None), keys)}
        live = [block for block in blocks if block.live]
        arrays = [array for block in live for array in block.pages]
        assert {array.sharding.memory_kind for array in arrays} == {"pinned_host"}
        assert sum(array.size for array in arrays) == 2 * len(tier) <= 200
    assert len(tier) > 100 - 16  # what gives room is a block


def test_no_more_than_the_pinned_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    check_pinned_memory(1 << 50)  # a CPU has no such limit
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_pinned_memory(64 << 30)
    with pytest.raises(ValueError, match="is more than the 64 GiB of pinned memory"):
        check_pinned_memory((64 << 30) + 1)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
    check_pinned_memory(100 << 30)


def test_pinned_memory_is_taken_where_prompts_are_remembered(
    sparsity: SparsityConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(engine_module, "take_pinned_memory", taken.append)
    rope = dataclasses.replace(CONFIG.rope, rope_type="dynamic", factor=2.0)
    for config, wanted in ((CONFIG, [1 << 20]), (dataclasses.replace(CONFIG, rope=rope), [])):
        taken.clear()
        LLM(
            (config, tiny_params(config)),
            attention="lserve",
            sparsity=sparsity,
            host_cache_bytes=1 << 20,
        )
        assert taken == wanted
    # In parts of one size, which go again: XLA keeps their memory.
    sizes: list[int] = []
    put = jax.device_put
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_put", lambda x, to: sizes.append(x.size) or put(x, to))
    monkeypatch.setattr(host_tier_module, "PART", 1000)
    before = len(jax.live_arrays())
    for size in (10, 1000, 2001):
        take_pinned_memory(size)
    assert sizes == [10, 1000, 1000, 1000, 1000]
    assert len(jax.live_arrays()) == before


def test_a_page_that_came_back_is_not_copied_again() -> None:
    tier, copied = host_tier(10), []
    read = tier._read
    tier._read = lambda pages, windows: copied.append(len(pages)) or read(pages, windows)
    spilled(tier, [b"a"] * 4)
    spilled(tier, [b"a"] * 5)
    assert copied == [1] * 5
    # One that now has a window is, and takes the place of the other.
    digest = next_digest(root_digest(None), b"b")
    for window in (-1, 7, -1):
        tier.spill([Evicted(digest, 3, window)])
        [page] = tier.find(root_digest(None), [b"b"])
        tier.check()
    assert copied == [1] * 7 and len(tier) == 6 and page.has_window


def test_of_a_prompt_that_is_looked_for_in_host_memory_the_end_goes_first() -> None:
    tier = host_tier(10)
    keys = [b"a%d" % i for i in range(6)]
    spilled(tier, keys)
    assert len(tier.find(root_digest(None), keys)) == 6
    spilled(tier, [b"b%d" % i for i in range(6)])
    assert len(tier.find(root_digest(None), keys)) == 4
