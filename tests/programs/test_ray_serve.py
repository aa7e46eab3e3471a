"""The Ray Serve example with one replica on this machine's CPU, by a real client."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tiny_checkpoints import write_chat_model

from lserve_jax import LLM, SamplingParams

pytest.importorskip("ray", reason="needs the extra ray")

ROOT = Path(__file__).resolve().parents[2]
CHAT = [{"role": "user", "content": "Name the sea."}]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_chat_model(tmp_path / "model")


@pytest.fixture
def url(model: Path, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "serve_ray.py", "--model", model]
    command += ["--port", port, "--gpus-per-replica", 0, "--cpus-per-replica", 0.5]
    command += ["--api-key", "secret", "--max-num-seqs", 4]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, "HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as server,
    ):
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("Serving at ")), None)
        assert line is not None, (tmp_path / "log").read_text()
        try:
            yield line.split()[-1]
        finally:
            server.send_signal(signal.SIGINT)
            server.stdout.read()
        assert server.wait() == 0, (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_replica_answers_as_one_llm_does(model, url):
    sampling = SamplingParams(temperature=0, max_tokens=20)
    expected = LLM(str(model)).chat(CHAT, sampling)[0].outputs[0].text
    asked = {"model": str(model), "messages": CHAT, "temperature": 0, "max_tokens": 20}
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "length"
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected
        assert len(chunks) > 1
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(**asked | {"temperature": -1})
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
