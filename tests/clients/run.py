"""Real clients against the real server: what each must see, it sees.

    .venv/bin/python tests/clients/run.py                    every client
    .venv/bin/python tests/clients/run.py openai litellm     those
    .venv/bin/python tests/clients/run.py --model MODEL      a model other than a tiny random one

Each client is installed in its pinned version into a folder that is removed at the end, from
PyPI or npm. Then the server is started and one small program a client (``use_*``) is run. The
exit status is 1 if any failed, if the server met an error of its own, or if it did not end well.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "support"))

from served import write_served_model  # noqa: E402

from convert import load_tokenizer  # noqa: E402

# Packages of each environment; what they need is theirs to say.
SDKS = (
    *("openai==3.57.0", "litellm==1.110.2", "langchain-openai==1.7.4", "llm==0.36"),
    *("pydantic-ai-slim[openai]==2.68.0", "openai-agents==0.24.0"),
)
INSTRUCTOR = ("instructor==1.17.0", "openai==3.3.0")
NODE = ("openai@6.49.0", "ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7")
LM_EVAL = ("lm_eval[api]==0.4.13", f"{ROOT}[eval]")
GUIDELLM = ("guidellm==0.8.1",)
AIPERF = ("aiperf==0.13.0",)
SECONDS = 600  # for hangs only


@dataclass(frozen=True, kw_only=True)
class Client:
    """A program and the packages that it uses. ``calls``: it needs a model that can call tools
    of its own accord."""

    program: str
    packages: tuple[str, ...]
    calls: bool = False


CLIENTS = {
    "openai": Client(program="use_openai.py", packages=SDKS),
    "litellm": Client(program="use_litellm.py", packages=SDKS),
    "langchain-openai": Client(program="use_langchain.py", packages=SDKS),
    "llm": Client(program="use_llm.py", packages=SDKS),
    "pydantic-ai": Client(program="use_pydantic_ai.py", packages=SDKS),
    "openai-agents": Client(program="use_openai_agents.py", packages=SDKS, calls=True),
    "instructor": Client(program="use_instructor.py", packages=INSTRUCTOR),
    "npm-openai": Client(program="use_openai.mjs", packages=NODE),
    "npm-ai": Client(program="use_ai.mjs", packages=NODE),
    "lm-eval": Client(program="use_lm_eval.py", packages=LM_EVAL),
    "guidellm": Client(program="use_guidellm.py", packages=GUIDELLM),
    "aiperf": Client(program="use_aiperf.py", packages=AIPERF),
}

# Shows tools and calls as Qwen's and Hermes' templates do.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Environments:
    """Folders with packages, each made when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made: dict[tuple[str, ...], list[str]] = {}

    def command(self, client: Client) -> list[str]:
        """How the client's program is started. Raises ``CalledProcessError`` where the packages
        cannot be installed."""
        if client.packages not in self._made:
            place = self.folder / str(len(self._made))
            make = _node if client.program.endswith(".mjs") else _python
            self._made[client.packages] = make(place, client.packages)
        *start, folder = self._made[client.packages]
        return [*start, str(Path(folder) / client.program)]


def _python(place: Path, packages: Sequence[str]) -> list[str]:
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = str(place / "bin" / "python")
    _install([python, "-m", "pip", "install", "--quiet", *packages], place)
    return [python, str(HERE)]


def _node(place: Path, packages: Sequence[str]) -> list[str]:
    place.mkdir()
    (place / "package.json").write_text('{"private": true}')
    _install(["npm", "install", "--silent", "--no-audit", "--no-fund", *packages], place)
    for program in HERE.glob("*.mjs"):  # Node looks for packages beside the program
        shutil.copy(program, place)
    return ["node", str(place)]


def _install(command: Sequence[str], place: Path) -> None:
    """Quiet, unless it fails."""
    done = subprocess.run(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()


@contextlib.contextmanager
def server(model: str, log: Path) -> Iterator[str]:
    """The server's URL, while it runs; what it says goes to ``log``."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "lserve_jax.serve", "--model", model, "--port", "0"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            file.write(line)
            if "serving at" in line:
                break
        else:
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        copy = threading.Thread(target=shutil.copyfileobj, args=(process.stderr, file))
        copy.start()
        try:
            yield line.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            copy.join()


def faults(log: Path) -> list[str]:
    """What the server's log says of errors that are its own."""
    found = []
    for line in log.read_text().splitlines():
        if line.startswith("{"):
            if json.loads(line)["status"] >= 500:
                found.append(line)
        elif "Traceback" in line or "request failed" in line:
            found.append(line)
    return found


def run(command: Sequence[str], *arguments: str) -> tuple[str, str]:
    """A word for the table, and all that the program said."""
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hangs", f"it ran longer than {SECONDS} s"
    return ("ok" if done.returncode == 0 else "FAILED"), done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="Real clients against the real server.")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    parser.add_argument("--model", help="as of lserve_jax.serve; default: a tiny random one")
    args = parser.parse_args()
    if unknown := set(args.clients) - set(CLIENTS):
        parser.error(f"unknown clients {sorted(unknown)}; known are {', '.join(CLIENTS)}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="clients-") as made:
        folder, log = Path(made), Path(made) / "server.log"
        environments = Environments(folder)
        model = args.model or write_served_model(folder / "tiny", template=TEMPLATE, length=4096)
        tokenizer = load_tokenizer(model)
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        can_call = "<tool_call>" in (tokenizer.chat_template or "")
        print(f"{'client':18}{'installed':>12}{'ran':>8}  result", flush=True)
        with server(model, log) as url:
            for name in args.clients or CLIENTS:
                client = CLIENTS[name]
                if client.calls and not can_call:
                    print(f"{name:18}{'':12}{'':8}  left out: the template shows no tools")
                    continue
                began = time.monotonic()
                command = environments.command(client)
                installed = time.monotonic()
                result, said = run(command, url, model, str(folder / "tokenizer"))
                took = installed - began, time.monotonic() - installed
                print(f"{name:18}{took[0]:10.0f} s{took[1]:6.0f} s  {result}", flush=True)
                if result != "ok":
                    failed.append(name)
                    print("    " + "\n    ".join(said.splitlines()[-40:]), flush=True)
        if found := faults(log):
            failed.append("server")
            print("the server met errors of its own:", *found[:20], sep="\n    ")
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
