"""llm: its command line, streamed and whole, chats and completions, with a log of both."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from plain import BASE_URL, LENGTH, MODEL, QUESTION, chat_text, completion_text

LLM = str(Path(sys.executable).parent / "llm")

with tempfile.TemporaryDirectory() as folder:
    models = [
        {"model_id": "served", "model_name": MODEL, "api_base": BASE_URL},
        {"model_id": "texts", "model_name": MODEL, "api_base": BASE_URL, "completion": True},
    ]  # YAML is a superset of JSON
    (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps(models))
    environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

    def run(*arguments: str) -> bytes:
        command = [LLM, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    for model, expected in (("served", chat_text()), ("texts", completion_text(QUESTION))):
        asked = ["-m", model, QUESTION, "-o", "temperature", "0", "-o", "max_tokens", str(LENGTH)]
        assert run(*asked).decode() == expected + "\n"
        assert run(*asked, "--no-stream").decode() == expected + "\n"
    logged = json.loads(run("logs", "list", "-n", "0", "--json"))
    # Of completions llm asks for the usage and does not read it.
    assert [entry["output_tokens"] for entry in logged] == [LENGTH, LENGTH, None, None]
