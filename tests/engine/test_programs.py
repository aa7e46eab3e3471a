"""Compiled programs in files: loaded in place of compiling, or ignored with one word.

A file that cannot be used costs time and nothing else: tokens are always the same.
"""

import hashlib
import logging
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from pytest import LogCaptureFixture, MonkeyPatch
from tiny_checkpoints import process_environment
from tiny_llm import tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.engine import program_files
from lserve_jax.engine.calls import Call
from lserve_jax.engine.compiling import compile_anew
from lserve_jax.engine.program_files import ProgramFiles
from lserve_jax.engine.programs import Programs

CONFIG = tiny_config(layers=1, kv_heads=2)
OPTIONS = {"max_model_len": 128, "max_num_seqs": 2, "prefill_chunk_size": 64}
PROMPT = {"prompt_token_ids": [3, 5] * 10}
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def build(directory: Path | bool = False, **options) -> LLM:
    return LLM((CONFIG, tiny_params(CONFIG)), **OPTIONS, compilation_cache=directory, **options)


def tokens(llm: LLM) -> list[int]:
    return llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids


def sources(llm: LLM) -> Counter[str]:
    """How many programs were loaded, and how many compiled."""
    return Counter(made.source for made in llm.engine.runner.programs.times)


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return tokens(build())


@pytest.fixture(scope="module")
def kept(tmp_path_factory, expected) -> dict[str, bytes]:
    """What an engine leaves in an empty directory, by name: three programs and a list."""
    directory = tmp_path_factory.mktemp("programs") / "made"
    llm = build(directory)
    assert tokens(llm) == expected
    assert sources(llm) == {"compiled": 3}
    assert directory.stat().st_mode & 0o777 == 0o700
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def directory(kept, tmp_path) -> Path:
    """A copy of it."""
    directory = tmp_path / "programs"
    directory.mkdir(mode=0o700)
    for name, content in kept.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def traced() -> Iterator[list[str]]:
    """Names of the functions that JAX traces from here on."""
    names: list[str] = []

    def listen(event: str, _start: float, _end: float, **about: str | int) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_time_span_listener(listen)
    yield names
    jax.monitoring.unregister_event_time_span_listener(listen)


def programs_of(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix != ".used"]


def test_the_second_engine_traces_nothing(directory, expected, traced) -> None:
    jax.clear_caches()  # as in a new process
    llm = build(directory)
    assert tokens(llm) == expected
    assert sources(llm) == {"loaded": 3}
    assert not {"prefill_chunks", "insert", "decode_burst"} & set(traced)
    assert tokens(llm) == expected  # donated buffers and all
    assert sources(llm) == {"loaded": 3}
    assert "lserve-programs" not in {thread.name for thread in threading.enumerate()}


def test_new_weights_use_the_same_programs(directory) -> None:
    llm = build(directory)
    for seed in (1, 0):
        llm.update_params(tiny_params(CONFIG, seed))
        fresh = LLM((CONFIG, tiny_params(CONFIG, seed)), **OPTIONS)
        assert tokens(llm) == tokens(fresh)
    assert sources(llm) == {"loaded": 3}


def test_what_a_program_depends_on_is_in_its_name(
    directory, expected, monkeypatch: MonkeyPatch
) -> None:
    llm = build(directory, burst_steps=8)
    assert tokens(llm) == expected
    assert sources(llm) == {"loaded": 2, "compiled": 1}  # of the burst's own size
    files = ProgramFiles(directory)
    names = {files.key("any"), files.key("other")}
    with jax.default_matmul_precision("highest"):
        names.add(files.key("any"))
    monkeypatch.setattr(program_files, "_environment", lambda: "other sources, other driver")
    names.add(files.key("any"))
    assert len(names) == 4


def test_a_program_that_is_wanted_before_its_turn(
    directory, expected, monkeypatch: MonkeyPatch
) -> None:
    """The only thread that preloads is stuck in the last program: the others do not wait."""
    [used] = directory.glob("*.used")
    used.write_text("\n".join(reversed(used.read_text().split())))
    read, asked, others_read = ProgramFiles.read, [], threading.Event()

    def slow(files: ProgramFiles, key: str) -> object:
        if threading.current_thread().name == "lserve-programs":
            others_read.wait(20)
        else:
            asked.append(key)
            if len(asked) == 2:
                others_read.set()
        return read(files, key)

    monkeypatch.setattr(ProgramFiles, "read", slow)
    monkeypatch.setattr("lserve_jax.engine.programs.MOST_HELPERS", 1)
    llm, made = build(directory), []
    # In a thread, so that the test can end where it waits for ever.
    asking = threading.Thread(target=lambda: made.append(tokens(llm)), daemon=True)
    asking.start()
    asking.join(60)
    assert made == [expected]
    assert len(asked) == 2  # the third was preloaded
    assert sources(llm) == {"loaded": 3}


def test_a_nan_is_looked_for_in_the_function_itself(directory) -> None:
    zeros = jax.tree.map(jnp.zeros_like, tiny_params(CONFIG))
    broken = jax.tree.map(lambda x: x.at[:].set(jnp.nan), zeros)
    llm = LLM((CONFIG, broken), **OPTIONS, compilation_cache=directory)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="invalid value"):
        tokens(llm)


class Executed:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


def spoil(directory: Path, how: str) -> None:
    payload = pickle.dumps(Executed(directory.parent / "executed"))
    other = programs_of(directory)[0].read_bytes()
    for path in programs_of(directory):
        content = path.read_bytes()
        if how == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "one bit":
            path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
        elif how == "of another program":
            path.write_bytes(other if content != other else content[:-1])
        else:
            # A whole file, as far as it says: who could write it must not be believed.
            whole = content[: len(program_files._MAGIC) + 64] + payload
            path.write_bytes(whole + hashlib.sha256(whole).digest())
            if how == "others can write the file":
                path.chmod(0o646)
            if how == "a link":
                path.rename(directory.parent / path.name)
                path.symlink_to(directory.parent / path.name)
    if how == "others can write the directory":
        directory.chmod(0o770)
    if how == "another user's":
        os.chown(directory, 12345, -1)


BROKEN = ("truncated", "empty", "one bit", "of another program")
FOREIGN = ("others can write the file", "others can write the directory", "a link")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.mark.parametrize(
    "how", [*BROKEN, *FOREIGN, pytest.param("another user's", marks=needs_root)]
)
def test_files_that_cannot_be_trusted_are_ignored(
    directory, expected, caplog: LogCaptureFixture, how: str
) -> None:
    spoil(directory, how)
    llm = build(directory)
    assert tokens(llm) == expected
    assert sources(llm) == {"compiled": 3}
    assert not (directory.parent / "executed").exists()
    said = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    assert all("is ignored" in line or "not kept" in line for line in said)
    assert said
    if how in (*BROKEN, "others can write the file", "a link"):  # whole ones took their place
        again = build(directory)
        assert tokens(again) == expected
        assert sources(again) == {"loaded": 3}


def test_a_directory_that_cannot_be_made(tmp_path, expected, caplog: LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    llm = build(tmp_path / "file" / "programs")
    assert tokens(llm) == expected
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "compiled programs are not kept" in line]) == 1


@needs_root
def test_a_directory_where_one_may_not_look(tmp_path) -> None:
    files = ProgramFiles(tmp_path / "programs")
    key = files.key("any")
    tmp_path.chmod(0o700)
    os.seteuid(12345)
    try:
        assert not files.has(key)
        assert files.read(key) is None
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_read_only(directory, expected) -> None:
    directory.chmod(0o500)
    llm = build(directory, burst_steps=8)
    assert tokens(llm) == expected
    assert sources(llm) == {"loaded": 2, "compiled": 1}
    assert len(programs_of(directory)) == 3


def test_a_disk_that_is_full(tmp_path, expected, caplog: LogCaptureFixture) -> None:
    """The system refuses to write more than 4 KB into a file; nothing is left behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    llm = build(tmp_path / "programs")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        made = tokens(llm)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert made == expected
    assert sources(llm) == {"compiled": 3}
    assert programs_of(tmp_path / "programs") == []
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "File too large" in line]


@pytest.fixture(scope="module")
def program() -> jax.stages.Compiled:
    return compile_anew(jax.jit(lambda x: x + 1).lower(jnp.zeros(3)))


def test_what_was_not_read_for_the_longest_time_goes_first(tmp_path, program) -> None:
    files = ProgramFiles(tmp_path / "programs")
    keys = [files.key(name) for name in ("old", "read", "new", "newest")]
    for age, key in zip((300, 200, 100), keys, strict=False):
        files.write(key, program, [])
        path = files.directory / key
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert files.read(keys[0])(jnp.zeros(3)).tolist() == [1, 1, 1]
    size = (files.directory / keys[0]).stat().st_size
    files.most_bytes = 3 * size + size // 2
    files.write(keys[3], program, [])
    assert [files.has(key) for key in keys] == [True, False, True, True]


@pytest.mark.parametrize(("backend", "found"), [("cpu", 0), ("gpu", 1)])
def test_kernels_of_a_kept_program_find_their_library(
    tmp_path, program, monkeypatch: MonkeyPatch, backend: str, found: int
) -> None:
    """JAX names it when Mosaic GPU is imported, which on a CPU nobody needs."""
    imported: list[str] = []
    monkeypatch.setattr(program_files.importlib, "import_module", imported.append)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    files = ProgramFiles(tmp_path / "programs")
    files.write(files.key("any"), program, [])
    assert files.read(files.key("any")) is not None
    assert imported == ["jax.experimental.mosaic.gpu"] * found


def test_files_of_others_stay_and_those_of_a_killed_process_go(tmp_path, program) -> None:
    files = ProgramFiles(tmp_path)
    tmp_path.chmod(0o700)
    tmp_path.joinpath("folder").mkdir()
    key = files.key("any")
    kept, removed = ["weights.safetensors", f"{key}.12-34"], [f"{key}.5-6", f"{key}.used.5-6"]
    for name in kept + removed:
        tmp_path.joinpath(name).write_bytes(bytes(1000))
    for name in ["weights.safetensors", "folder", *removed]:
        os.utime(tmp_path / name, (0, 0))
    files.write(key, program, [])
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "folder", key}
    files.most_bytes = 100
    files.write(key, program, [])
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "folder", key}


def test_in_place_of_a_broken_file_this_threads_settings_are_traced(tmp_path) -> None:
    traced = []

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        traced.append(jax.config.jax_default_matmul_precision)
        return x + 1

    call = Call.of(function, jnp.zeros(3))
    with jax.default_matmul_precision("highest"):
        for _ in range(2):
            jax.clear_caches()
            programs = Programs(ProgramFiles(tmp_path / "programs"), "settings")
            programs.prepare([call])
            [kept] = programs_of(tmp_path / "programs")
            kept.write_bytes(b"")
            assert [made.source for made in programs.times] == ["compiled"]
            assert programs.run(call).tolist() == [1, 1, 1]
    assert traced == ["highest"] * 2
    assert len(list((tmp_path / "programs").glob("*.used"))) == 1


def test_an_edit_after_the_import_is_not_taken_for_what_runs(
    tmp_path, program, monkeypatch: MonkeyPatch
) -> None:
    files = ProgramFiles(tmp_path / "programs")
    monkeypatch.setattr(program_files, "_source_digest", lambda: "edited")
    with pytest.raises(ValueError, match="changed after they were imported"):
        files.write(files.key("any"), program, [])
    assert not files.has(files.key("any"))


def test_an_interrupted_write_leaves_nothing(tmp_path, program, monkeypatch: MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    files = ProgramFiles(tmp_path / "programs")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(files.key("any"), program, [])
    assert not list(files.directory.iterdir())


def test_a_policy_of_ones_own_is_code_without_a_name(tmp_path) -> None:
    def newest(scores, **_):
        return scores

    llm = build(tmp_path / "p", attention="lserve", sparsity=SparsityConfig(select=newest))
    assert llm.engine.runner.programs._files is None


def test_where_they_are_kept_by_default(tmp_path, monkeypatch: MonkeyPatch, expected) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokens(build()) == expected
    assert not list(tmp_path.iterdir())
    assert tokens(build(True)) == expected
    assert len(programs_of(tmp_path / "lserve-jax" / "programs")) == 3
    with pytest.raises(TypeError, match="compilation_cache=3 must be True, False or a directory"):
        build(3)  # pyrefly: ignore


def test_weights_on_other_devices_and_on_several(tmp_path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = root / "tests" / "support" / "sharded_programs.py"
    command = [sys.executable, script, tmp_path / "programs"]
    environment = process_environment(PYTHONPATH=str(root))
    subprocess.run(command, check=True, cwd=root, env=environment)
