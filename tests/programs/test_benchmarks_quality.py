"""benchmarks/quality.py: every part's settings can be read, and its results are put together."""

import dataclasses
from pathlib import Path

import pytest
import quality
import tyro

from lserve_jax.eval import report
from lserve_jax.eval.settings import parse_settings
from lserve_jax.eval.study import Study

PATTERN = "SmolLM2-135M-Instruct-32K"


def studies_of(*argv: str) -> list[Study]:
    return quality.studies(tyro.cli(quality.Args, args=["--pattern", PATTERN, *argv]))


def test_the_command_names_every_part(tmp_path):
    runs = studies_of("--output", str(tmp_path))  # settings are read here
    parts = [run.output.relative_to(tmp_path).parts[0] for run in runs]
    shares = len(quality.share_settings(PATTERN))
    prefill = len(quality.prefill_settings(PATTERN))
    assert parts == [
        *("heads", "pages", "text", "ruler"),
        *["shares"] * shares,
        *["prefill"] * prefill,
        *("keys", "keys"),
    ]
    assert len({run.output for run in runs}) == len(runs)


def test_the_first_four_parts_are_about_lserves_own_policy():
    for run in studies_of("--parts", "heads", "pages", "text", "ruler"):
        for setting in parse_settings(run.compare):
            sparsity = setting.sparsity
            assert sparsity is None or sparsity.pattern is None or sparsity.head_shares is None


def test_shares_compares_what_it_says():
    runs = studies_of("--parts", "shares")
    (dense, own, default, share, heads, none, half) = [
        setting.sparsity for run in runs for setting in parse_settings(run.compare)
    ]
    assert dense is None
    assert (own.head_shares, own.token_budget) == (None, 2048)
    assert (default.head_shares, default.token_budget, default.budget_share) == ("auto", None, None)
    assert share.budget_share == 1 / 16
    assert (heads.dense_heads, heads.token_budget, heads.head_shares) == (4, 2048, "auto")
    assert (none.streaming_fraction, half.streaming_fraction) == (0, 0.5)
    for run in runs:
        assert run.texts == ("documentation", "stories")
        assert run.depths * run.haystacks >= 40 and 4 * run.haystacks >= 40  # 4: niah_multikey


def test_prefill_compares_what_it_says():
    runs = studies_of("--parts", "prefill")
    causal, *sparse = [s.sparsity for run in runs for s in parse_settings(run.compare)]
    assert causal.prefill == "causal"
    assert [s.prefill_threshold for s in sparse] == [0.8, 0.9, 0.95]
    for s in sparse:
        assert dataclasses.replace(s, prefill="causal", prefill_threshold=0.9) == causal
        assert s.prefill_min_tokens <= 16384
    for run in runs:
        assert run.lengths == (16384, 31744)
        assert run.depths * run.haystacks >= 100 and 4 * run.haystacks >= 100


def result_of(setting: str, score: float) -> dict:
    row = {"setting": setting, "source": "stories", "task": "passkey", "length": 20, "depth": 0.5}
    head = {"model": "m", "dtype": "float32", "device": "cpu", "date": "today", "seed": 0}
    return head | {
        "versions": {"jax": "1"},
        "command": "c",
        "settings": {setting: None},
        "heads": {setting: {"policy": "dense"}},
        "seconds": {setting: 1.0},
        "answers": [row | {"score": score, "read": 1.0}],
        "predictions": [],
    }


def test_settings_that_ran_apart_are_compared(tmp_path: Path):
    whole = quality.together([result_of("dense", 1.0), result_of("other", 0.5)])
    report.write(tmp_path, whole, plots=False)
    table = (tmp_path / "results.md").read_text()
    assert "| stories | `other` | 50.0 | 1 | -50.0 ± 0.0 | 100.0 |  |" in table
    assert report.read(tmp_path)["seconds"] == {"dense": 1.0, "other": 1.0}


def test_a_part_given_twice_is_refused():
    with pytest.raises(ValueError, match="must name parts, each of them once"):
        quality.main(quality.Args(pattern=PATTERN, parts=("heads", "heads")))
    with pytest.raises(ValueError, match="--processes 0 must be at least 1"):
        quality.main(quality.Args(pattern=PATTERN, processes=0))
