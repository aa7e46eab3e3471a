"""The LoRA example on a tiny model: the loss falls, and what it wrote changes the model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import process_environment, write_chat_model

import convert
from convert.names import flatten

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the sea is blue and the sea is wide " * 20)
    command = [sys.executable, str(ROOT / "examples" / "train_lora.py")]
    command += ["--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "adapter")]
    command += ["--model", str(model), "--steps", "6", "--length", "24", "--learning-rate", "0.01"]
    done = subprocess.run(
        command,
        env=process_environment(PYTHONPATH=str(ROOT), PATH="", HOME=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 6 and losses[-1] < losses[0]
    plain, tuned = (
        flatten(convert.load(model, adapter=adapter)[1]) for adapter in (None, tmp_path / "adapter")
    )
    changed = {leaf for leaf in plain if np.any(np.asarray(plain[leaf] != tuned[leaf]))}
    assert changed == {
        f"layers.{i}.self_attn.{p}_proj.kernel" for i in (0, 1) for p in ("qkv", "o")
    }
