"""Compiled programs in files, so that a second start neither traces nor compiles.

Reading one runs what it holds: JAX's serialised executables are pickles around machine code. So
only files count that nobody but this user can have written, in a directory of which the same is
true. A file ends with a digest of itself, which tells a broken one before it is unpickled. Its
name is a digest of everything that the program was made from: what is out of date never matches.

A file that cannot be used is ignored with a word in the log, and one that cannot be written too.
"""

import contextlib
import functools
import hashlib
import importlib
import logging
import os
import pickle
import platform
import re
import stat
import threading
import time
from collections.abc import Generator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import lserve_jax
from pallas_kernels import api

log = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
_MAGIC = b"lserve-jax program 1\n"
_KEY = re.compile(r"[0-9a-f]{64}")
_OWN = re.compile(rf"({_KEY.pattern})(\.used)?(\.\d+-\d+)?")  # the last: not whole yet
# Whoever still writes a file does not take as long: what is older was left by a killed process.
_LEFT_SECONDS = 3600
# Settings of JAX that say where it writes and what it prints, not what it computes.
_NO_MATTER = re.compile(r"cache|_log_|logging|traceback|pprint|dump")


class ProgramFiles:
    """Files of compiled programs in ``directory``, which is made when the first one is written.

    More than ``most_bytes`` are not kept: those that were not read for the longest time go first.
    Files of other names are left alone. Any number of processes may use one directory.
    """

    def __init__(self, directory: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES):
        self.directory, self.most_bytes = Path(directory), most_bytes
        self._said: set[str] = set()

    def key(self, description: str) -> str:
        """Names the program of a description on this machine, by these sources and settings."""
        return hashlib.sha256(
            f"{_environment()}\n{_settings()}\n{description}".encode()
        ).hexdigest()

    def has(self, key: str) -> bool:
        """Whether there is a file of that key; it may be of no use."""
        return os.path.exists(self.directory / key)  # a Path's own raises where one may not look

    def read(self, key: str) -> Any | None:
        """The program, a ``jax.stages.Compiled``; None where there is none that can be used."""
        content = self._content(key)
        if content is None:
            return None
        header = _MAGIC + key.encode()
        payload, digest = content[len(header) : -32], content[-32:]
        if not content.startswith(header) or hashlib.sha256(content[:-32]).digest() != digest:
            log.warning("%s is ignored: it is broken", self.directory / key)
            return None
        try:
            _find_kernel_runtime()
            ids, serialized, in_tree, out_tree = pickle.loads(payload)
            by_id = {device.id: device for device in jax.devices()}
            return serialize_executable.deserialize_and_load(
                serialized, in_tree, out_tree, execution_devices=[by_id[i] for i in ids]
            )
        except (jax.errors.JaxRuntimeError, ValueError, pickle.UnpicklingError) as error:
            log.warning("%s is ignored: %s", self.directory / key, error)
            return None

    def write(self, key: str, program: Any, mesh_devices: Sequence[jax.Device]) -> None:
        """Keeps a program; ``mesh_devices`` are those that it runs on if there are several.

        Raises ``OSError`` where it cannot be written, ``ValueError``, ``NotImplementedError`` or
        ``JaxRuntimeError`` where JAX cannot serialise it, and ``ValueError`` where its key names
        sources that are no longer those on disk.
        """
        if _source_digest() != _SOURCES:
            # What was imported after the edit is not what the key says.
            raise ValueError("sources of this package were changed after they were imported")
        devices = list(mesh_devices)
        if not devices:
            [device] = jax.tree.leaves(program.output_shardings)[0].device_set
            devices = [device]
        ids = [device.id for device in devices]
        payload = pickle.dumps((ids, *serialize_executable.serialize(program)))
        content = _MAGIC + key.encode() + payload
        self._write(key, content + hashlib.sha256(content).digest())
        self._prune(key)

    def last_used(self, settings_key: str) -> list[str]:
        """Keys of the programs that the last engine of such settings used, in their order."""
        content = self._content(f"{settings_key}.used") or b""
        return _KEY.findall(content.decode("ascii", "replace"))

    def write_last_used(self, settings_key: str, keys: Sequence[str]) -> None:
        """Raises ``OSError`` where that cannot be written."""
        self._write(f"{settings_key}.used", "\n".join(keys).encode())

    def _content(self, name: str) -> bytes | None:
        """The bytes of a file that this user alone can have written; marks it as read now."""
        try:
            with self._opened() as directory:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
                with open(file, "rb") as stream:
                    _check_owner(os.fstat(file), stat.S_ISREG, str(self.directory / name))
                    with contextlib.suppress(OSError):  # read-only
                        os.utime(file)
                    return stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            if str(error) not in self._said:  # of a directory once, not for each of its files
                log.warning("a compiled program is ignored: %s", error)
            self._said.add(str(error))
            return None

    @contextlib.contextmanager
    def _opened(self) -> Generator[int]:
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _check_owner(os.fstat(directory), stat.S_ISDIR, str(self.directory))
            yield directory
        finally:
            os.close(directory)

    def _write(self, name: str, content: bytes) -> None:
        """Under another name until it is whole, so that nobody reads half of it."""
        make_own_directory(self.directory)
        part = f"{name}.{os.getpid()}-{threading.get_ident()}"
        with self._opened() as directory:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            try:
                with open(os.open(part, flags, 0o600, dir_fd=directory), "wb") as stream:
                    stream.write(content)
                os.replace(part, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:  # Ctrl-C, too
                with contextlib.suppress(OSError):
                    os.unlink(part, dir_fd=directory)
                raise

    def _prune(self, newest: str) -> None:
        """Removes what was not read for the longest time, until the rest is small enough.

        And what a killed process left behind.
        """
        now = time.time()
        with self._opened() as directory:
            found = []
            for entry in os.scandir(directory):
                if (name := _OWN.fullmatch(entry.name)) is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    info = entry.stat(follow_symlinks=False)
                    if name[3] is not None and info.st_mtime < now - _LEFT_SECONDS:
                        os.unlink(entry.name, dir_fd=directory)
                    else:
                        found.append((info.st_mtime_ns, info.st_size, entry.name))
            left = sum(size for _, size, _ in found)
            for _, size, name in sorted(found):
                if left <= self.most_bytes:
                    break
                if name != newest:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=directory)
                    left -= size


def make_own_directory(directory: Path) -> None:
    """Makes it where it is not there. Raises ``OSError`` where others can write to it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    _check_owner(directory.stat(), stat.S_ISDIR, str(directory))


def _check_owner(info: os.stat_result, is_kind: Any, where: str) -> None:
    """Raises ``OSError`` for what others could have written."""
    if not is_kind(info.st_mode):
        raise OSError(f"{where} is of another kind")
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{where} belongs to another user, or others may write to it")


@functools.cache
def _environment() -> str:
    """What stays while a process runs: versions, sources, the machine, flags of XLA."""
    client, device = jax.devices()[0].client, jax.devices()[0]
    flags = {k: v for k, v in os.environ.items() if k == "XLA_FLAGS" or k.startswith("MOSAIC_")}
    parts = [
        *(lserve_jax.__version__, jax.__version__, version("jaxlib"), platform.python_version()),
        *(_SOURCES, platform.machine(), _processor(), str(os.cpu_count()), _driver()),
        *(client.platform, client.platform_version, device.device_kind, str(len(jax.devices()))),
        *(str(jax.process_count()), repr(sorted(flags.items()))),
    ]
    return "\n".join(parts)


def _settings() -> str:
    """JAX's settings as this thread has them."""
    settings = sorted(jax.config.values.items())
    return repr(
        [
            # Those that a context can change are attributes, with the value that holds in it.
            (name, getattr(jax.config, name, value))
            for name, value in settings
            if not _NO_MATTER.search(name)
        ]
    )


def _find_kernel_runtime() -> None:
    """Tells this process where the library is that kernels of a read program call.

    JAX does so when Mosaic GPU is imported, which nothing else needs once programs are kept. A
    program that is read before has kernels that cannot be launched.
    """
    if jax.default_backend() == "gpu":
        importlib.import_module("jax.experimental.mosaic.gpu")


def _source_digest() -> str:
    digest = hashlib.sha256()
    for package in (lserve_jax, api):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


# As they were imported: an edit while the process runs must not name what it compiles.
_SOURCES = _source_digest()


def _processor() -> str:
    """Its instructions: code compiled for a CPU uses what there is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    )


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
