"""Remembered prompts in host memory: where pages go that the prefix tree gives up.

A second place to look, behind the tree: what is evicted is read off the device, and a prompt that
wants it later has it written back instead of computing it. Least recently used pages go first. The
host waits for a copy when somebody looks for pages, or when several are under way.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lserve_jax.engine.buckets import bucket
from lserve_jax.engine.prefix_tree import Evicted, next_digest

Pages = list[dict[str, Any]]  # of each layer, as ``ModelRunner.read_pages`` returns them
MOST_AT_ONCE = 64  # pages that are read or written in one call
# Copies that may be under way: until they have arrived they take memory of the device.
MOST_COMING = 4


@dataclass(frozen=True, eq=False, slots=True)
class HostPage:
    """A page of a prompt, and its window page if it had one, in memory of their own."""

    parts: Pages  # its arrays; of a window page that is not there ``[heads, 0, ...]``
    has_window: bool


class HostTier:
    """Up to ``limit`` pages; ``read`` and ``write`` are those of the runner."""

    def __init__(
        self,
        limit: int,
        read: Callable[[np.ndarray, np.ndarray], Pages],
        write: Callable[[Pages, np.ndarray, np.ndarray], None],
    ):
        self.limit, self._read, self._write = limit, read, write
        self._pages: OrderedDict[bytes, HostPage] = OrderedDict()
        self._coming: list[tuple[list[Evicted], Pages]] = []

    def __len__(self) -> int:
        return len(self._pages) + sum(len(evicted) for evicted, _ in self._coming)

    def clear(self) -> None:
        """Forgets everything."""
        self._pages.clear()
        self._coming = []

    def spill(self, evicted: Sequence[Evicted]) -> None:
        """Takes pages that the tree gives up, before anybody writes to them."""
        evicted = evicted[-self.limit :] if self.limit else []
        for first in range(0, len(evicted), MOST_AT_ONCE):
            if len(self._coming) == MOST_COMING:
                self._settle()
            part = list(evicted[first : first + MOST_AT_ONCE])
            windows = [e.window for e in part if e.window >= 0]
            copy = self._read(_padded([e.page for e in part]), _padded(windows))
            for leaf in jax.tree.leaves(copy):
                leaf.copy_to_host_async()
            self._coming.append((part, copy))

    def _settle(self) -> None:
        for evicted, copy in self._coming:
            copy, windows = jax.device_get(copy), 0
            for at, page in enumerate(evicted):
                has_window = page.window >= 0
                parts = _cut(copy, slice(at, at + 1), slice(windows, windows + has_window))
                windows += has_window
                self._pages.pop(page.digest, None)
                self._pages[page.digest] = HostPage(parts, has_window)
        self._coming = []
        while len(self._pages) > self.limit:
            self._pages.popitem(last=False)

    def find(self, digest: bytes, keys: Sequence[bytes]) -> list[HostPage]:
        """Pages that follow the one of ``digest``, as far as they are here.

        ``keys`` are the token ids of each.
        """
        self._settle()
        found, digests = [], []
        for key in keys:
            digest = next_digest(digest, key)
            page = self._pages.get(digest)
            if page is None:
                break
            found.append(page)
            digests.append(digest)
        for digest in reversed(digests):  # a page is of use only with all before it
            self._pages.move_to_end(digest)
        return found

    def restore(
        self, found: Sequence[HostPage], pages: Sequence[int], windows: Sequence[int]
    ) -> None:
        """Writes pages back to ``pages`` of the device; ``windows`` has -1 where none is wanted."""
        for first in range(0, len(found), MOST_AT_ONCE):
            last = first + MOST_AT_ONCE
            part = found[first:last]
            wanted = [at for at, window in enumerate(windows[first:last]) if window >= 0]
            targets = _padded(pages[first:last])
            window_targets = _padded([windows[first + at] for at in wanted])
            pages_of = [page.parts for page in part]
            windows_of = [part[at].parts for at in wanted]
            kept = []
            for layer, names in enumerate(pages_of[0]):
                parts = {
                    name: _side_by_side([page[layer][name] for page in pages_of])
                    for name in names
                    if name != "window"
                }
                nothing = jax.tree.map(lambda x: x[:, :0], names["window"])
                window = _side_by_side([page[layer]["window"] for page in windows_of]) or nothing
                kept.append({**parts, "window": window})
            self._write(kept, targets, window_targets)


def _padded(pages: Sequence[int]) -> np.ndarray:
    """Filled up to a power of two with the last one, so that little is compiled; int32."""
    if not pages:
        return np.zeros((0,), np.int32)
    size = bucket(len(pages), 1, MOST_AT_ONCE)
    return np.array([*pages, *[pages[-1]] * (size - len(pages))], np.int32)


def _cut(copy: Pages, pages: slice, windows: slice) -> Pages:
    """Some pages of a copy, whose memory they do not hold."""
    return [
        {
            name: jax.tree.map(
                lambda x, at=windows if name == "window" else pages: x[:, at].copy(), part
            )
            for name, part in parts.items()
        }
        for parts in copy
    ]


def _side_by_side(parts: Sequence[Any]) -> Any:
    """A part of several pages, filled up as ``_padded`` does; None of none."""
    if not parts:
        return None
    filled = [parts[i] for i in _padded(range(len(parts)))]
    return jax.tree.map(lambda *pages: np.concatenate(pages, axis=1), *filled)
