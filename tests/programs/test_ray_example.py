"""The Ray example with two actors on this machine's CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import write_chat_model

from lserve_jax import LLM, SamplingParams

pytest.importorskip("ray", reason="needs the extra ray")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_actors_answer_as_one_llm_does(tmp_path):
    model = write_chat_model(tmp_path / "model")
    rows = [{"prompt": f"Name {i} animals.", "number": i} for i in range(10)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [sys.executable, ROOT / "examples" / "batch_inference_ray.py"]
    command += ["--prompts-file", prompts, "--output", tmp_path / "answers", "--model", model]
    command += ["--actors", 2, "--gpus-per-actor", 0, "--batch-size", 2, "--max-tokens", 6]
    # Half a CPU each: two actors and Ray's own tasks fit on a machine of two.
    done = subprocess.run(
        [str(word) for word in (*command, "--cpus-per-actor", 0.5)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    answers = {}
    for path in (tmp_path / "answers").iterdir():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            answers[row["number"]] = row
    assert answers.keys() == set(range(10))
    llm = LLM(str(model))
    texts = [f"[user] {row['prompt']} [answer]" for row in rows]
    alone = llm.generate(texts, SamplingParams(temperature=0, max_tokens=6))
    for row, output in zip(rows, alone, strict=True):
        answer = answers[row["number"]]
        assert answer["prompt"] == row["prompt"]
        assert answer["text"] == output.outputs[0].text
        assert answer["finish_reason"] == "length"
        assert answer["generated_tokens"] == 6
