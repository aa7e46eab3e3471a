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
    """A page of a prompt in one of the copies that were made, and its window page."""

    copy: Pages
    at: int
    window_at: int  # -1: there is none


class HostTier:
    """Up to ``limit`` pages; ``read`` and ``write`` are those of the runner.

    Memory of a copy is free once all of its pages, at most ``MOST_AT_ONCE``, are.
    """

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
                window_at = windows if page.window >= 0 else -1
                windows += page.window >= 0
                self._pages.pop(page.digest, None)
                self._pages[page.digest] = HostPage(copy, at, window_at)
        self._coming = []
        while len(self._pages) > self.limit:
            self._pages.popitem(last=False)

    def find(self, digest: bytes, keys: Sequence[bytes]) -> list[HostPage]:
        """Pages that follow the one of ``digest``, as far as they are here.

        ``keys`` are the token ids of each.
        """
        self._settle()
        found = []
        for key in keys:
            digest = next_digest(digest, key)
            page = self._pages.get(digest)
            if page is None:
                break
            self._pages.move_to_end(digest)
            found.append(page)
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
            places = [(page.copy, page.at) for page in part]
            window_places = [(part[at].copy, part[at].window_at) for at in wanted]
            kept = []
            for layer, names in enumerate(part[0].copy):
                parts = {
                    name: _side_by_side(places, layer, name) for name in names if name != "window"
                }
                nothing = jax.tree.map(lambda x: x[:, :0], names["window"])
                windows_of_layer = _side_by_side(window_places, layer, "window") or nothing
                kept.append({**parts, "window": windows_of_layer})
            self._write(kept, targets, window_targets)


def _padded(pages: Sequence[int]) -> np.ndarray:
    """Filled up to a power of two with the last one, so that little is compiled; int32."""
    if not pages:
        return np.zeros((0,), np.int32)
    size = bucket(len(pages), 1, MOST_AT_ONCE)
    return np.array([*pages, *[pages[-1]] * (size - len(pages))], np.int32)


def _side_by_side(places: Sequence[tuple[Pages, int]], layer: int, name: str) -> Any:
    """A part of several pages, filled up as ``_padded`` does; None of none."""
    if not places:
        return None
    filled = [places[i] for i in _padded(range(len(places)))]
    trees = [jax.tree.map(lambda x, at=at: x[:, at], copy[layer][name]) for copy, at in filled]
    return jax.tree.map(lambda *parts: np.stack(parts, axis=1), *trees)
