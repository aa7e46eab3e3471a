"""The table of memories: it is what the program writes, and an engine takes what it says."""

import dataclasses
from pathlib import Path

import memory
import pytest
from tiny_llm import tiny_config, tiny_params

from lserve_jax import LLM
from lserve_jax.engine import build
from pallas_kernels.api import WEIGHT_KINDS, WeightKind

ROOT = Path(__file__).parents[2]
CONFIG = dataclasses.replace(
    tiny_config(layers=2, kv_heads=4, group=1, hidden_size=128, tie_word_embeddings=False),
    intermediate_size=256,
    head_dim=32,
    max_position_embeddings=memory.MOST,
)


def test_the_document_is_what_the_program_writes(tmp_path: Path) -> None:
    assert (ROOT / "docs" / "memory.md").read_text() == memory.tables(tmp_path)


@pytest.mark.parametrize(
    ("kind", "packed"), [*((kind, False) for kind in (None, *WEIGHT_KINDS)), ("int4", True)]
)
def test_parameters_take_what_it_says(
    kind: WeightKind | None, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = memory.parameter_bytes(CONFIG, kind, packed=packed)
    if packed:  # as for the kernels of a Hopper GPU; here it unpacks them again
        monkeypatch.setattr(build, "resolve_backend", lambda _: "mosaic")
    llm = LLM(
        (CONFIG, tiny_params(CONFIG)),
        dtype="bfloat16",
        weights=kind,
        weight_group=memory.GROUP,
        max_model_len=64,
    )
    assert llm.memory_plan()["parameters"] == said


@pytest.mark.parametrize("attention", memory.ATTENTION)
def test_an_engine_has_the_pages(attention, tmp_path: Path) -> None:
    """Those of a sequence of the length that fits, in the share of memory that is for them."""
    spec, sizes = memory.plan(CONFIG, attention, tmp_path / "half")
    free = 20 << 20
    length = memory.longest(spec, sizes, free)
    assert length > 1000
    llm = LLM(
        (CONFIG, tiny_params(CONFIG)),
        dtype="bfloat16",
        attention="lserve" if attention.sparse else "dense",
        sparsity=memory.half_stream(CONFIG, tmp_path / "half") if attention.sparse else None,
        kv_dtype=attention.kv_dtype,
        max_model_len=length,
        max_num_seqs=1,
        max_prefixes=0,
        kv_cache_bytes=free,
    )
    assert llm.spec.num_pages * llm.spec.page_size == length
    plan = llm.memory_plan()
    pages = plan["retrieval"] + plan["key_stats"]
    fixed = sum(plan.values()) - plan["parameters"] - pages
    page = pages // llm.spec.num_pages
    # A fifth of what is free beside the fixed parts is for activations.
    assert pages <= 0.8 * (free - fixed) < pages + 2 * page
