"""Settings that LServe refuses, and what follows from those it takes."""

from typing import Any

import numpy as np
import pytest
from tiny_llm import tiny_config, tiny_params, write_pattern

from lserve_jax import LLM, SparsityConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"page_size": 48}, ["page_size=48", "(16, 32, 64, 128)"]),
        ({"logical_page_size": 8}, ["logical_page_size=8", "(16, 32)"]),
        ({"page_size": 16, "logical_page_size": 32}, ["page_size=16", "logical_page_size=32"]),
        ({"selected_page_size": 128}, ["selected_page_size=128", "divide page_size=64"]),
        ({"selected_page_size": 8}, ["selected_page_size=8", "logical_page_size=16"]),
        ({"selected_page_size": 48}, ["selected_page_size=48", "divide page_size=64"]),
        ({"selected_page_size": 0}, ["selected_page_size=0"]),
        ({"token_budget": 1000}, ["token_budget=1000", "selected_page_size=16"]),
        (
            {"token_budget": 1056, "selected_page_size": 64},
            ["token_budget=1056", "selected_page_size=64"],
        ),
        ({"token_budget": 32}, ["token_budget=32", "48", "1 forced"]),
        (
            {"token_budget": 256, "forced_sink_pages": 3, "selected_page_size": 64},
            ["token_budget=256", "320"],
        ),
        ({"token_budget": -64}, ["token_budget=-64", "48"]),
        ({"lower_bound_weight": -0.5}, ["lower_bound_weight=-0.5", "[0, 1]"]),
        ({"lower_bound_weight": 1.5}, ["lower_bound_weight=1.5", "[0, 1]"]),
        ({"lower_bound_weight": np.nan}, ["lower_bound_weight=nan", "[0, 1]"]),
        ({"reuse_interval": 0}, ["reuse_interval=0", "at least 1"]),
        ({"forced_sink_pages": -1}, ["forced_sink_pages=-1"]),
        ({"decode_sink": 100}, ["decode_sink=100", "page_size=64"]),
        ({"decode_local": 100}, ["decode_local=100", "page_size=64"]),
        ({"prefill_sink": 100}, ["prefill_sink=100", "page_size=64"]),
        ({"prefill_local": 1000}, ["prefill_local=1000", "page_size=64"]),
        ({"prefill_sink": -64}, ["prefill_sink=-64"]),
        ({"decode_local": 0}, ["decode_local=0", "page_size=64"]),
        ({"decode_sink": 256}, ["decode_sink=256", "prefill_sink=128"]),
        ({"prefill_local": 128}, ["decode_local=256", "prefill_local=128"]),
        ({"streaming_fraction": 0.5}, ["streaming_fraction=0.5", "pattern"]),
        ({"dense_heads": -1, "pattern": "x"}, ["dense_heads=-1", "not be negative"]),
        (
            {"dense_heads": 1, "pattern": "x", "head_shares": None},
            ["dense_heads=1", "head_shares=None"],
        ),
        ({"head_shares": ""}, ["head_shares=''", "must not be empty"]),
        ({"budget_share": 0.0}, ["budget_share=0.0", "(0, 1]"]),
        ({"budget_share": 1.1}, ["budget_share=1.1", "(0, 1]"]),
        ({"budget_share": np.nan}, ["budget_share=nan", "(0, 1]"]),
        ({"budget_share": 0.1, "token_budget": 512}, ["budget_share=0.1", "token_budget=512"]),
        ({"pattern": "x", "streaming_fraction": 1.5}, ["streaming_fraction=1.5", "[0, 1]"]),
        ({"pattern": "x", "streaming_fraction": -0.1}, ["streaming_fraction=-0.1", "[0, 1]"]),
        ({"pattern": "x", "streaming_fraction": np.nan}, ["streaming_fraction=nan", "[0, 1]"]),
    ],
    ids=str,
)
def test_sparsity_config_refuses(settings: dict[str, Any], words: list[str]) -> None:
    """Naming the value and what it contradicts."""
    with pytest.raises(ValueError) as error:
        SparsityConfig(**settings)
    for word in words:
        assert word in str(error.value)


def test_none_by_name() -> None:
    """A command line has no None."""
    assert SparsityConfig(head_shares="none").head_shares is None


def test_llm_refuses_patterns_that_do_not_fit(tmp_path) -> None:
    config = tiny_config(layers=1, kv_heads=2)
    model = (config, tiny_params(config))
    narrow = SparsityConfig(pattern=write_pattern(tmp_path / "narrow", [[0.1, 0.2, 0.3]]))
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        LLM(model, attention="lserve", sparsity=narrow)
    fits = SparsityConfig(pattern=write_pattern(tmp_path / "fits", [[0.1, 0.2]]))
    with pytest.raises(ValueError, match=r"attention='lserve'.*attention='dense'"):
        LLM(model, attention="dense", sparsity=fits)
    broken = SparsityConfig(pattern=write_pattern(tmp_path / "broken", [[0.1, np.nan]]))
    with pytest.raises(ValueError, match=r"finite.*nan.*layer 0, head 1"):
        LLM(model, attention="lserve", sparsity=broken)
