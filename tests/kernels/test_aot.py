"""Every kernel compiles for sm_90a without register spills and without serialised wgmma."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own version",
    ),
    pytest.mark.skipif(
        shutil.which("ptxas") is None and not Path("/usr/local/cuda/bin/ptxas").exists(),
        reason="needs ptxas, from CUDA 13 or the wheel nvidia-cuda-nvcc",
    ),
]


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    """What ptxas said about the kernels of each case."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    run = subprocess.run(
        [sys.executable, str(HERE / "compile_offline.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    _, *cases = re.split(r"^CASE ", run.stdout, flags=re.MULTILINE)
    return dict(case.split("\n", 1) for case in cases)


def test_all_cases_compile(reports: dict[str, str]) -> None:
    for name, report in reports.items():
        # The two kernels of a call; XLA compiles its own elsewhere. One case may reuse another's.
        assert len(re.findall(r"Used \d+ registers", report)) >= 1, name


def test_no_register_spills(reports: dict[str, str]) -> None:
    for name, report in reports.items():
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
        assert spills and set(spills) == {"0"}, f"{name}: {report}"


def test_no_serialised_wgmma(reports: dict[str, str]) -> None:
    """ptxas warns where it had to wait after each matrix product."""
    for name, report in reports.items():
        assert "serialized" not in report, f"{name}: {report}"


def test_appends_in_place(reports: dict[str, str]) -> None:
    """Through a loop, and between readers, no pool is copied: a copy would need room."""
    appends = {name: report for name, report in reports.items() if name.startswith("append")}
    assert appends
    for name, report in appends.items():
        sizes = re.search(
            r"caches (\d+) bytes, updated in place (\d+)\n"
            r"smallest cache (\d+) bytes, temporary (\d+)",
            report,
        )
        assert sizes, f"{name}: {report}"
        caches, in_place, smallest, temporary = map(int, sizes.groups())
        assert in_place == caches, name
        assert temporary < smallest, name
