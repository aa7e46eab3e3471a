"""What a file looked like when it was mapped, to notice that it changes while it is read."""

from pathlib import Path


class FileState:
    """Size and time of a file at the moment this is made.

    Reading mapped memory beyond the end of a file that has become shorter kills the process
    (SIGBUS); no exception can be caught. So readers call ``check`` before each block. What is cut
    off between that check and the end of the block's reading still kills.
    """

    def __init__(self, path: Path):
        self.path = path
        self._before = self._now()

    def check(self) -> None:
        """Raises ``ValueError`` if the file was changed or replaced, ``OSError`` if it is gone."""
        if self._now() != self._before:
            raise ValueError(
                f"{self.path} changed while it was read: it had {self._before[0]} bytes, now "
                f"{self.path.stat().st_size}"
            )

    def _now(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ino
