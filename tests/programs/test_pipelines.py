"""Every program of docs/pipelines.md runs, in order, on a tiny model and four CPU devices."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import process_environment, write_chat_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_programs_of_the_page(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(programs) == 8
    write_chat_model(tmp_path / "my-model")
    # Each program stands at its line of the page, so that a traceback names it.
    lines = [""] * text.count("\n")
    for program in programs:
        start = text[: text.index(program)].count("\n")
        lines[start : start + program.count("\n")] = program.splitlines()
    (tmp_path / "pipelines.py").write_text("\n".join(lines))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    environment["JAX_NUM_CPU_DEVICES"] = "4"
    done = subprocess.run(
        [sys.executable, "pipelines.py"],
        cwd=tmp_path,
        env=process_environment(**environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert {"my-adapter", "my-run", "my-checkpoint", "my-export"} <= written
