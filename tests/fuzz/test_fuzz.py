"""A sample of the fuzz cases, always the same. All of them: ``python tests/fuzz/driver.py``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bases import make
from driver import run_family
from families import FAMILIES

SAMPLE = {"gguf": 150, "safetensors": 60, "tokenizer": 100, "config": 80, "lora": 50, "orbax": 50}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("fuzz") / "base"
    make(base)
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_mutated_files_are_read_right_or_refused_clearly(base, family):
    results = list(run_family(family, base, SAMPLE[family]))
    assert len(results) == SAMPLE[family] + 1
    assert results[0].outcome == "accepted"  # the one that is as it was
    assert sum(result.outcome == "refused" for result in results) > SAMPLE[family] // 5
    faults = [
        f"{result.fault}: {result.name}: {result.detail}" for result in results if result.fault
    ]
    assert not faults, "\n".join(faults)
