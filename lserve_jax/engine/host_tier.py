"""Remembered prompts in host memory: where pages go that the prefix tree gives up.

A second place to look, behind the tree: what is evicted is copied to the host, and a prompt that
wants it later has it copied back instead of computing it. Pages that are given up together form a
block, which is one array (one for each dtype) and so one transfer, into memory that the GPU writes
and reads by itself (``pinned_host``); it comes back as a whole. Least recently used blocks go
first. Nobody waits for a transfer, but for the oldest when several are under way.
"""

import itertools
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.engine.prefix_tree import Evicted, next_digest

log = logging.getLogger(__name__)

Pages = list[jax.Array]  # as ``ModelRunner.read_block`` returns them
BLOCK_SIZES = 64, 16, 4, 1  # pages of a block; each is a program that reads and one that writes
FEWEST_BLOCKS = 4  # for which there is room, so that a new one does not end all others
# Blocks that may be on their way: until they have arrived they take memory of the device.
MOST_COMING = 4
PART = 256 << 20  # bytes of pinned memory that are taken at once
LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
NOWHERE = np.iinfo(np.int32).max  # a page that is written to no page


@dataclass(eq=False, slots=True)
class Block:
    """Pages in host memory that went there together."""

    pages: Pages
    places: int  # pages that it holds
    has_windows: bool  # each with its window page, or none
    live: set[bytes] = field(default_factory=set)  # digests that no later block has


@dataclass(frozen=True, eq=False, slots=True)
class HostPage:
    """Where a page of a prompt lies, with its window page if the block has them."""

    block: Block
    place: int

    @property
    def has_window(self) -> bool:
        return self.block.has_windows


class HostTier:
    """Up to ``limit`` pages; ``read`` and ``write`` are those of the runner.

    ``write`` leaves out what goes to page ``NOWHERE``. ``sizes`` are those of blocks, in pages; all
    of a block's pages have window pages, or none has.
    """

    def __init__(
        self,
        limit: int,
        read: Callable[[np.ndarray, np.ndarray], Pages],
        write: Callable[[Pages, np.ndarray, np.ndarray], None],
    ):
        self.limit, self._read, self._write = limit, read, write
        self.sizes = [n for n in BLOCK_SIZES if n * FEWEST_BLOCKS <= max(limit, FEWEST_BLOCKS)]
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
        for has_windows, run in itertools.groupby(new, lambda page: page.window >= 0):
            pages = list(run)
            while pages:
                # Exactly as many as fill a block: what is held is what was asked to be kept.
                size = next(n for n in self.sizes if n <= len(pages))
                self._take(pages[:size], has_windows)
                pages = pages[size:]

    def _has(self, evicted: Evicted) -> bool:
        """Whether the same page is here already, as one that came back is."""
        page = self._pages.get(evicted.digest)
        return page is not None and (page.has_window or evicted.window < 0)

    def _take(self, evicted: Sequence[Evicted], has_windows: bool) -> None:
        while len(self._coming) >= MOST_COMING:
            jax.block_until_ready(self._coming.popleft().pages)
        while self._held + len(evicted) > self.limit:
            self._drop(next(iter(self._blocks)))
        windows = [page.window for page in evicted] if has_windows else []
        read = self._read(_int32([page.page for page in evicted]), _int32(windows))
        host = [x.sharding.with_memory_kind("pinned_host") for x in read]
        block = Block(jax.device_put(read, host), len(evicted), has_windows)
        self._coming.append(block)
        self._blocks[block] = None
        self._held += block.places
        for place, page in enumerate(evicted):
            self._forget(page.digest)
            self._pages[page.digest] = HostPage(block, place)
            block.live.add(page.digest)

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
                windows_of_block = block.places if block.has_windows else 0
                targets[block] = _nowhere(block.places), _nowhere(windows_of_block)
            if to >= 0:
                targets[block][0][page.place] = to
            if window >= 0:
                targets[block][1][page.place] = window
        last = None
        for block, at in targets.items():
            device = [x.sharding.with_memory_kind("device") for x in block.pages]
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
            assert page.place < page.block.places
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


def take_pinned_memory(size: int) -> None:
    """Has XLA take ``size`` bytes of memory that a GPU reaches, which it then keeps.

    That takes about a second for each GB, for which requests would wait later.
    """
    if jax.default_backend() != "gpu":
        return
    start = time.perf_counter()
    part = jnp.zeros((min(size, PART),), jnp.uint8)
    host = part.sharding.with_memory_kind("pinned_host")
    # All of them are there at the same time, and go at the end.
    jax.block_until_ready([jax.device_put(part, host) for _ in range(-(-size // part.size))])
    log.info("%d bytes of host memory taken in %.1f s", size, time.perf_counter() - start)


def _nowhere(places: int) -> np.ndarray:
    return np.full(places, NOWHERE, np.int32)


def _int32(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, np.int32)
