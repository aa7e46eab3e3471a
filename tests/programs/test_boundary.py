"""Programs end with one sentence and exit code 2 or with a code that shells know; no traceback."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import process_environment
from tiny_llm import tiny_config, tiny_params

from lserve_jax import LLM, generate
from lserve_jax.batch import ResultsFile
from lserve_jax.cli import exit_code
from lserve_jax.memory import memory_errors

ROOT = Path(generate.__file__).parent.parent
PROGRAMS = ("lserve_jax.generate", "lserve_jax.analysis", "lserve_jax.eval", "lserve_jax.calibrate")


def shell(command: str, model: Path) -> tuple[int, list[str]]:
    """Exit code and the last line of stderr; $GENERATE answers with 4 tokens."""
    options = f"--model {model} --max-tokens 4 --prompt-token-ids 1 2 3"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=process_environment(GENERATE=f"{sys.executable} -m lserve_jax.generate {options}"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    return done.returncode, done.stderr.replace("\r", "\n").splitlines()[-1:]


@pytest.fixture(scope="module")
def model(conformance) -> Path:
    return conformance / "llama-tied"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("$GENERATE --help | true; exit ${PIPESTATUS[0]}", 141, []),
        ("$GENERATE | true; exit ${PIPESTATUS[0]}", 141, None),
        ("$GENERATE >&-", 2, ["error: standard output cannot be written: [Errno 9] Bad file"]),
        ("$GENERATE >/dev/full", 2, ["standard output cannot be written: [Errno 28] No space"]),
        ("$GENERATE 2>&-", 0, []),
        ("${GENERATE%--prompt*} --prompt-file - <&-", 2, ["error: standard input is closed"]),
    ],
)
def test_streams_that_are_closed(model, command, code, said) -> None:
    found, last = shell(command, model)
    assert found == code
    if said is not None:
        assert len(last) == len(said)
        assert all(text in line for text, line in zip(said, last, strict=True))
    assert "Exception ignored" not in "".join(last)


# Imports what the programs share, and then runs each as ``python -m`` does, in a child that ends as
# any Python does: with an exit code, and with what it says last.
UNREADABLE = """
import os, runpy, sys
import convert, lserve_jax.cli, lserve_jax.llm

def print_much():
    print("x" * 99999)

def run(program):
    if program == "print":
        raise SystemExit(lserve_jax.cli.exit_code(print_much))
    sys.argv = [program, "--help"]
    runpy.run_module(program, run_name="__main__", alter_sys=True)

for stdout, name in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork() == 0:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1) if stdout == "full" else os.close(1)
        os.close(full)
        run(name)
        break
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
"""
UNREADABLE_SAYS = {
    "closed": "[Errno 9] Bad file descriptor",
    "full": "[Errno 28] No space left on device",
}


def test_help_that_nobody_can_read() -> None:
    """And a text that is too long for a buffer."""
    programs = (*PROGRAMS, "convert")
    runs = [(("closed", "full")[i % 2], program) for i, program in enumerate(programs)]
    runs += [(stdout, "print") for stdout in UNREADABLE_SAYS]
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, *(word for run in runs for word in run)],
        cwd=ROOT,
        env=process_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    said = "error: standard output cannot be written: {}\n{} 2\n"
    wanted = [said.format(UNREADABLE_SAYS[stdout], name) for stdout, name in runs]
    assert done.stderr == "".join(wanted)


def test_a_conversion_needs_no_stderr(tmp_path: Path) -> None:
    source = ROOT / "tests" / "data" / "conformance" / "mistral"
    command = f"{sys.executable} -m convert {source} {tmp_path / 'new'} 2>&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=process_environment())
    assert done.returncode == 0
    assert (tmp_path / "new" / "config.json").is_file()


SMALL_FILES = """
import resource, sys
from convert.__main__ import main
limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for size, name in ((3_000, "a"), (20_000, "b"), (20_000, "c"), (40_000, "d")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit))
    assert main([sys.argv[1], f"{sys.argv[2]}/{name}"]) == 2
"""


def test_a_conversion_that_does_not_fit_the_disk_says_one_sentence(tmp_path: Path) -> None:
    """Writes of the arrays beside the one that fails go on for a while, and fail as well."""
    source = ROOT / "tests" / "data" / "conformance" / "mistral"
    done = subprocess.run(
        [sys.executable, "-c", SMALL_FILES, source, tmp_path],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("loading:")]
    assert len([line for line in lines if line]) == 4, done.stderr
    assert all("cannot be written" in line and "too large" in line for line in lines if line)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def interrupts_are_heard() -> Iterator[None]:
    """A shell lets what it runs in the background ignore them, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLED = [entry.split(":") for entry in PROJECT["scripts"].values()]
STARTS = (
    *(["-m", program] for program in PROGRAMS),
    ["-m", "convert", "--help"],
    ["-u", "-mconvert"],
    # As an installer writes them.
    *(["-c", f"from {m} import {main}; raise SystemExit({main}())"] for m, main in INSTALLED),
)


@pytest.mark.usefixtures("interrupts_are_heard")
@pytest.mark.parametrize("module", ["jax", "tyro"])
@pytest.mark.parametrize("start", STARTS, ids=" ".join)
def test_an_interrupt_while_it_is_imported_says_nothing(start, module: str, tmp_path) -> None:
    """A module that is imported early sends the signal, so that the moment is always the same."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run(
        [sys.executable, *start],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def ended(capsys, error: BaseException | None) -> tuple[int, str]:
    def program() -> None:
        if error is not None:
            raise error

    code = exit_code(program, lower="--size")
    return code, capsys.readouterr().err


def test_codes(capsys) -> None:
    assert ended(capsys, None) == (0, "")
    assert ended(capsys, KeyboardInterrupt()) == (130, "")
    for error in (ValueError("v"), OSError("v"), NotImplementedError("v"), FloatingPointError("v")):
        assert ended(capsys, error) == (2, "error: v\n")
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        ended(capsys, ZeroDivisionError())


def test_out_of_memory_says_how_much_and_what_to_lower(capsys) -> None:
    assert ended(capsys, MemoryError()) == (2, "error: out of memory: on the host; lower --size\n")
    assert exit_code(lambda: np.zeros(10**15) and None, lower="--size") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory: Unable to allocate 7.11 PiB")
    assert err.endswith("; lower --size\n") and err.count("\n") == 1
    assert exit_code(lambda: jnp.zeros(10**14, jnp.float32) and None) == 2
    err = capsys.readouterr().err
    assert err == (
        "error: out of memory: Out of memory allocating 400000000000000 bytes; lower "
        "--max-model-len, --max-num-seqs or --kv-cache-bytes\n"
    )


def test_out_of_memory_of_the_api_names_the_programs_options(capsys) -> None:
    def program() -> None:
        with memory_errors():
            jnp.zeros(10**14, jnp.float32)

    assert exit_code(program, lower="--size") == 2
    said = "error: out of memory: Out of memory allocating 400000000000000 bytes; lower --size\n"
    assert capsys.readouterr().err == said


def test_out_of_memory_in_a_function_that_ran_before() -> None:
    """JAX says it by a ValueError then."""

    def fill() -> None:
        with memory_errors():
            while True:
                kept.append(jnp.zeros(2**23, jnp.float32))  # 32 MiB

    kept = [jnp.zeros(2**23, jnp.float32) for _ in range(2)]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    room = pages * resource.getpagesize() + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, before[1]))
    try:
        with pytest.raises(MemoryError, match="memory: Out of memory allocating 33554432 bytes;"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def small_disk():
    """Files cannot grow beyond 20,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_prefix_that_does_not_fit_the_disk_leaves_no_file(tmp_path) -> None:
    config = tiny_config(layers=2, kv_heads=2)
    llm = LLM((config, tiny_params(config)), max_model_len=256, max_num_seqs=1)
    prefix = llm.prefix({"prompt_token_ids": [1, 2, 3] * 50})
    prefix.save(tmp_path / "whole")  # what it computes is compiled
    (tmp_path / "whole").unlink()
    with small_disk(), pytest.raises(OSError, match=r"prefix file .* cannot be written: .*large"):
        prefix.save(tmp_path / "prefix.safetensors")
    assert not list(tmp_path.iterdir())
    (tmp_path / "prefix.safetensors").write_text("what was there before")
    with small_disk(), pytest.raises(OSError, match="cannot be written"):
        prefix.save(tmp_path / "prefix.safetensors")
    assert (tmp_path / "prefix.safetensors").read_text() == "what was there before"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_that_is_no_regular_file_is_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/full"), Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"output file '{path}' must be new or a regular file"):
            ResultsFile(path, {})


def test_an_output_file_that_does_not_fit_the_disk_goes_on_later(tmp_path) -> None:
    path, written = tmp_path / "out.jsonl", 0
    with (
        small_disk(),
        pytest.raises(OSError, match=r"output file .*out.jsonl' cannot be written: .*too large"),
        ResultsFile(path, {}) as results,
    ):
        for written in range(1, 1000):
            results.append(written, {"text": "x" * 100})
    with ResultsFile(path, {}) as results:
        assert results.done == set(range(1, written))
    assert all(json.loads(line) for line in path.read_text().splitlines())
