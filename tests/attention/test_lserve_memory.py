"""What LServe holds and reads: its formulas, and no copy of what it caches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from lserve_cases import build
from tiny_llm import VOCAB, random_prompts, tiny_config, tiny_params, write_pattern

import lserve_jax.engine.runner
from lserve_jax import LLM, SamplingParams, SparsityConfig


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_kv_bytes_held(kv_dtype: str, tmp_path: Path) -> None:
    """LServe's formula: per token for retrieval heads, constant for streaming heads."""
    D, P, logical, retrieval_heads, streaming_heads = 16, 32, 16, 2, 1
    bits, scales = (32, 0) if kv_dtype == "auto" else (4, 16)
    per_token = retrieval_heads * (2 * D * bits // 8 + scales + 2 * D * 4 // logical)
    ring = streaming_heads * (1 + 2 + 1) * P * (2 * D * bits // 8 + scales)
    llm = build("page 32, one layer", tmp_path, kv_dtype=kv_dtype)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in random_prompts(16, [1, 32, 33, 600])],
        SamplingParams(temperature=0, max_tokens=10, logprobs=VOCAB),
    )
    for output in outputs:
        written = len(output.prompt_token_ids) + 9  # the last token is never fed back
        pages = -(-written // P)
        assert output.metrics.kv_bytes_held == pages * P * per_token + ring
    plan = llm.memory_plan()
    assert plan["retrieval"] + plan["key_stats"] == llm.spec.num_pages * P * per_token
    caches = [llm.engine.runner.read_cache(i) for i in range(llm.config.num_hidden_layers)]
    rings = 4 * ring
    assert plan["streaming"] == rings
    held = jax.tree.leaves([[c.retrieval, c.key_stats, c.streaming] for c in caches])
    assert sum(x.nbytes for x in held) == rings + llm.spec.num_pages * P * per_token


LONG = tiny_config(layers=1, kv_heads=2, max_len=33_000)


@pytest.fixture(scope="module")
def long_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """One retrieval and one streaming head, room for 32K tokens."""
    pattern = write_pattern(tmp_path_factory.mktemp("patterns") / "long", [[0.1, 0.9]])
    return LLM(
        (LONG, tiny_params(LONG)),
        max_num_seqs=1,
        attention="lserve",
        sparsity=SparsityConfig(pattern=pattern, token_budget=1024, prefill_local=256),
        prefill_chunk_size=1024,
    )


def test_kv_bytes_read_do_not_grow(long_llm: LLM, optimised: None) -> None:
    """From 4K to 32K tokens. Only the statistics that rank pages grow, by 1/64 of dense."""
    P, token, steps = 64, 2 * 16 * 4, 8
    read = []
    for length in (4_096, 32_768):
        [prompt] = random_prompts(17, [length])
        sampling = SamplingParams(temperature=0, max_tokens=steps + 1)
        [output] = long_llm.generate([{"prompt_token_ids": prompt}], sampling)
        metrics = output.metrics
        assert metrics.selector_runs == steps / 4
        assert metrics.bypassed_steps == 0
        # Of one selection: kmax and kmin of four logical pages a page, in float32.
        statistics = (length // P + 1) * 4 * 2 * 16 * 4 / 4
        assert metrics.kv_bytes_read_per_step > statistics
        read.append(metrics.kv_bytes_read_per_step - statistics)
        # 16 pages for the retrieval head, 6 for the ring: sink and local.
        assert 21 < metrics.pages_attended_per_step * 2 <= 22
        dense = sum(2 * (length + i) for i in range(1, steps + 1)) * token / steps
        assert metrics.dense_kv_bytes_read_per_step == pytest.approx(dense)
    assert abs(read[0] - read[1]) <= P * token
    assert abs(read[0] / token - (1024 + 128 + 256)) <= P


class Calls:
    """Records the shapes of the arguments of the engine's jitted functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.lowered: dict[str, Any] = {}
        for name in names:
            monkeypatch.setattr(lserve_jax.engine.runner, name, self._recording(name))

    def _recording(self, name: str) -> Callable:
        function = getattr(lserve_jax.engine.runner, name)

        def record(*args: Any, **static: Any) -> Any:
            self.lowered[name] = function.lower(*args, **static)
            return function(*args, **static)

        return record


def test_pools_are_updated_in_place(
    long_llm: LLM, monkeypatch: pytest.MonkeyPatch, optimised: None
) -> None:
    """No step of generation has room for a copy of the keys it caches, or for a T x T mask."""
    calls = Calls(monkeypatch, "prefill_chunks", "decode_burst", "insert")
    [prompt] = random_prompts(18, [1_024])
    sampling = SamplingParams(temperature=0, max_tokens=9)
    long_llm.generate([{"prompt_token_ids": prompt}], sampling)
    runner = long_llm.engine.runner
    caches = [runner.read_cache(layer) for layer in range(runner.config.num_hidden_layers)]
    for name, lowered in calls.lowered.items():
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(caches)), name
        assert memory.temp_size_in_bytes < 0.7 * caches[0].retrieval.k.nbytes, name
