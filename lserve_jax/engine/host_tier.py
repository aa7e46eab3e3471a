"""Remembered prompts in host memory: where pages go that the prefix tree gives up.

A second place to look, behind the tree: what is evicted is copied to the host, and a prompt that
wants it later has it copied back instead of computing it. Pages that are given up together form a
block, which is copied as it was read and comes back as a whole: each array is one transfer, into
memory that the GPU writes and reads by itself (``pinned_host``). Least recently used blocks go
first. Nobody waits for a transfer, but for the oldest when several are under way.
"""

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lserve_jax.engine.buckets import bucket
from lserve_jax.engine.prefix_tree import Evicted, next_digest

Pages = list[dict[str, Any]]  # of each layer, as ``ModelRunner.read_pages`` returns them
MOST_AT_ONCE = 64  # pages of a block
FEWEST_BLOCKS = 4  # for which there is room, so that a new one does not end all others
# Blocks that may be on their way: until they have arrived they take memory of the device.
MOST_COMING = 4
LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
NOWHERE = np.iinfo(np.int32).max  # a page that is written to no page


@dataclass(eq=False, slots=True)
class Block:
    """Pages in host memory that went there together."""

    pages: Pages  # arrays ``[heads, n, ...]``, of windows ``[heads, m, ...]``
    places: int  # n
    window_places: int  # m
    live: set[bytes] = field(default_factory=set)  # digests that no later block has


@dataclass(frozen=True, eq=False, slots=True)
class HostPage:
    """Where a page of a prompt lies, and its window page if it had one."""

    block: Block
    place: int
    window_place: int  # -1: there is none

    @property
    def has_window(self) -> bool:
        return self.window_place >= 0


class HostTier:
    """Up to ``limit`` pages; ``read`` and ``write`` are those of the runner.

    ``write`` leaves out what goes to page ``NOWHERE``.
    """

    def __init__(
        self,
        limit: int,
        read: Callable[[np.ndarray, np.ndarray], Pages],
        write: Callable[[Pages, np.ndarray, np.ndarray], None],
    ):
        self.limit, self._read, self._write = limit, read, write
        self._most_at_once = min(MOST_AT_ONCE, _power_of_two(max(limit // FEWEST_BLOCKS, 1)))
        self._pages: dict[bytes, HostPage] = {}
        self._blocks: OrderedDict[Block, None] = OrderedDict()  # the last used at the end
        self._coming: deque[Block] = deque()
        self._held = 0

    def __len__(self) -> int:
        """Pages for which memory is held."""
        return self._held

    def clear(self) -> None:
        """Forgets everything."""
        self._pages.clear()
        self._blocks.clear()
        self._coming.clear()
        self._held = 0

    def spill(self, evicted: Sequence[Evicted]) -> None:
        """Takes pages that the tree gives up, before anybody writes to them."""
        new = [page for page in evicted if not self._has(page)]
        new = new[len(new) - min(len(new), self.limit) :]
        first = 0
        while first < len(new):
            # Exactly as many as fill a block: what is held is what was asked to be kept.
            size = min(_power_of_two(len(new) - first), self._most_at_once)
            self._take(new[first : first + size])
            first += size

    def _has(self, evicted: Evicted) -> bool:
        """Whether the same page is here already, as one that came back is."""
        page = self._pages.get(evicted.digest)
        return page is not None and (page.has_window or evicted.window < 0)

    def _take(self, evicted: Sequence[Evicted]) -> None:
        while len(self._coming) >= MOST_COMING:
            jax.block_until_ready(self._coming.popleft().pages)
        while self._held + len(evicted) > self.limit:
            self._drop(next(iter(self._blocks)))
        windows = [page.window for page in evicted if page.window >= 0]
        read = self._read(_int32([page.page for page in evicted]), _padded(windows))
        host = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), read)
        block = Block(jax.device_put(read, host), len(evicted), len(_padded(windows)))
        self._coming.append(block)
        self._blocks[block] = None
        self._held += block.places
        window_place = 0
        for place, page in enumerate(evicted):
            has_window = page.window >= 0
            self._forget(page.digest)
            self._pages[page.digest] = HostPage(block, place, window_place if has_window else -1)
            block.live.add(page.digest)
            window_place += has_window

    def _forget(self, digest: bytes) -> None:
        """A later block has the page."""
        page = self._pages.pop(digest, None)
        if page is not None:
            page.block.live.remove(digest)
            if not page.block.live:
                self._drop(page.block)

    def _drop(self, block: Block) -> None:
        for digest in block.live:
            del self._pages[digest]
        block.live.clear()
        del self._blocks[block]
        if block in self._coming:
            self._coming.remove(block)
        self._held -= block.places

    def window(self, digest: bytes) -> HostPage | None:
        """The page of ``digest``, if its window page is here."""
        page = self._pages.get(digest)
        return page if page is not None and page.has_window else None

    def find(self, digest: bytes, keys: Sequence[bytes]) -> list[HostPage]:
        """Pages that follow the one of ``digest``, as far as they are here.

        ``keys`` are the token ids of each.
        """
        found: list[HostPage] = []
        for key in keys:
            digest = next_digest(digest, key)
            page = self._pages.get(digest)
            if page is None:
                break
            found.append(page)
        for page in reversed(found):  # a page is of use only with all before it
            self._blocks.move_to_end(page.block)
        return found

    def restore(
        self, found: Sequence[HostPage], pages: Sequence[int], windows: Sequence[int]
    ) -> None:
        """Writes pages back to ``pages`` and ``windows`` of the device, -1 where none is wanted.

        The next block is on its way to the device while one is written there.
        """
        targets: dict[Block, tuple[np.ndarray, np.ndarray]] = {}
        for page, to, window in zip(found, pages, windows, strict=True):
            block = page.block
            if block not in targets:
                targets[block] = _nowhere(block.places), _nowhere(block.window_places)
            if to >= 0:
                targets[block][0][page.place] = to
            if window >= 0:
                targets[block][1][page.window_place] = window
        last = None
        for block, at in targets.items():
            device = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), block.pages)
            arriving = jax.device_put(block.pages, device), *at
            if last is not None:
                self._write(*last)
            last = arriving
        if last is not None:
            self._write(*last)

    def check(self) -> None:
        """Raises ``AssertionError`` unless all that is counted agrees with the blocks."""
        assert self._held == sum(block.places for block in self._blocks) <= self.limit
        assert set(self._coming) <= set(self._blocks)
        places: dict[Block, set[int]] = {block: set() for block in self._blocks}
        for digest, page in self._pages.items():
            assert digest in page.block.live
            assert page.place < page.block.places and page.window_place < page.block.window_places
            places[page.block].add(page.place)
        # Each page of its own place, none in two blocks, and no block without one.
        assert all(len(found) == len(block.live) > 0 for block, found in places.items())


def check_pinned_memory(wanted: int) -> None:
    """Raises ``ValueError`` for more bytes than XLA gives out of memory that a GPU reaches."""
    limit = int(os.environ.get(LIMIT_VARIABLE, "64"))
    if jax.default_backend() == "gpu" and wanted > limit << 30:
        raise ValueError(
            f"host_cache_bytes={wanted} is more than the {limit} GiB of pinned memory that XLA "
            f"gives out; {LIMIT_VARIABLE} says how many these are"
        )


def _power_of_two(number: int) -> int:
    """The greatest up to ``number``."""
    return 1 << (number.bit_length() - 1)


def _nowhere(places: int) -> np.ndarray:
    return np.full(places, NOWHERE, np.int32)


def _int32(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, np.int32)


def _padded(pages: Sequence[int]) -> np.ndarray:
    """Filled up to a power of two with the last one, so that little is compiled; int32."""
    if not pages:
        return np.zeros((0,), np.int32)
    size = bucket(len(pages), 1, MOST_AT_ONCE)
    return _int32([*pages, *[pages[-1]] * (size - len(pages))])
