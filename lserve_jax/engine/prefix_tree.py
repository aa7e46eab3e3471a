"""Prompts that were computed before, as a radix tree over pages: what a new prompt can go on from.

Bookkeeping on the host. A node is one page of a prompt: its tokens, the retrieval page that holds
their keys and values, and, for streaming heads, a page of the prefill window, as long as there is
one. A path from a root is a prompt's beginning; there is a root for each ``salt``, and
one more for prompts that are read block-sparsely: they have other keys, and may end elsewhere.

    root -- "You are ..." -- "... helpful" -- "What is ..."
                                          \\- "How do ..."

Retrieval pages stay until somebody wants them: the leaf that was used longest ago goes first, and
never one that a running request uses (*locked*) or that somebody asked to keep (*pinned*).

Streaming heads go on from the sinks and the last ``prefill_local`` tokens, so a match ends where
these still have their window pages. A window page can be given up by itself: its node stays, as a
tombstone in which no match ends that would need it.
"""

import hashlib
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lserve_jax.attention.cache import StreamingWindow
from lserve_jax.engine.pages import PagePool


@dataclass(eq=False, slots=True, repr=False)
class Node:
    """One page of a prompt, or a root, which has none."""

    parent: "Node | None"
    key: bytes  # the page's token ids, int32
    page: int  # in the retrieval pool; -1: a root
    digest: bytes  # of salt and tokens up to here
    depth: int  # pages from the root up to this one
    used: int = 0  # on the tree's clock
    locks: int = 0  # requests and pins at or below it
    pins: int = 0  # of these, pins
    window: int = -1  # its page in the window pool; -1: a tombstone
    window_pins: int = 0  # pins whose window this page belongs to
    children: "dict[bytes, Node]" = field(default_factory=dict)

    def path(self) -> "list[Node]":
        """The nodes from the one below the root down to this one."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Evicted(NamedTuple):
    """A page that was given up, or only its window page, which is -1 if it had none."""

    digest: bytes
    page: int
    window: int


class Pin(NamedTuple):
    """What ``PrefixTree.pin`` keeps."""

    node: Node
    windows: list[Node]  # whose window pages it keeps


def root_digest(salt: str | None, block_sparse: bool = False) -> bytes:
    """What ``Node.digest`` is at a root."""
    root = (salt, "block_sparse") if block_sparse else salt
    return hashlib.blake2b(repr(root).encode(), digest_size=16).digest()


def next_digest(digest: bytes, key: bytes) -> bytes:
    """``Node.digest`` of the page ``key`` below the node of ``digest``."""
    return hashlib.blake2b(digest + key, digest_size=16).digest()


class PrefixTree:
    """Remembered prompts, on pages of ``pool`` and window pages of ``windows``.

    page_size: tokens of a page.
    grain: pages; paths grow, and matches end, at multiples of it.
    block_grain: the same for prompts that are read block-sparsely.
    window: what streaming heads need to go on; None: no head streams.
    """

    def __init__(
        self,
        pool: PagePool,
        windows: PagePool,
        *,
        page_size: int,
        grain: int,
        block_grain: int = 1,
        window: StreamingWindow | None,
    ):
        self.pool, self.windows = pool, windows
        self.page_size, self.grain, self.window = page_size, grain, window
        self.block_grain = block_grain
        self.evicted_pages = self.evicted_windows = 0  # so far, for others
        # Called with what is given up for others, before the pages are anybody else's.
        self.spill: Callable[[list[Evicted]], None] = lambda evicted: None
        self._roots: dict[bytes, Node] = {}  # by digest
        self._clock = 0
        self.num_nodes = 0
        self.num_unlocked = 0  # nodes that could be evicted, one after another
        self.num_pinned = 0
        self.num_pinned_windows = 0
        # Unlocked leaves by when they were used, and entries that no longer hold.
        self._leaves: list[tuple[int, int, Node]] = []
        # Nodes whose window pages can be given up, in this order: first those that no end needs.
        self._loose: OrderedDict[Node, None] = OrderedDict()
        self._kept: OrderedDict[Node, None] = OrderedDict()

    # Finding.

    def walk(self, tokens: np.ndarray, salt: str | None, block_sparse: bool = False) -> list[Node]:
        """The nodes that a prompt's whole pages have in the tree, from the first page on."""
        node = self._roots.get(root_digest(salt, block_sparse))
        found: list[Node] = []
        if node is None:
            return found
        whole, size = tokens.astype(np.int32, copy=False).tobytes(), 4 * self.page_size
        for at in range(0, len(whole) - size + 1, size):
            node = node.children.get(whole[at : at + size])
            if node is None:
                break
            found.append(node)
        return found

    def match(
        self, tokens: np.ndarray, salt: str | None, block_sparse: bool = False
    ) -> Node | None:
        """Where a prompt can go on from: the deepest node that leaves it a token to compute.

        The last token of a prompt always runs, for its logits. None: nothing of it is there.
        """
        path = self.walk(tokens[:-1], salt, block_sparse)
        deepest = self.deepest_end([node.window >= 0 for node in path], block_sparse)
        return path[deepest - 1] if deepest else None

    def pinned_match(self, tokens: np.ndarray, salt: str | None, block_sparse: bool = False) -> int:
        """Pages of a prompt that are sure to be found: they are pinned, and so is the window."""
        walked = self.walk(tokens[:-1], salt, block_sparse)
        path = itertools.takewhile(lambda n: n.pins, walked)
        return self.deepest_end([node.window_pins > 0 for node in path], block_sparse)

    def grain_of(self, block_sparse: bool) -> int:
        """Pages at whose multiples paths of a kind grow and matches end."""
        return self.block_grain if block_sparse else self.grain

    def deepest_end(self, has_window: Sequence[bool], block_sparse: bool = False) -> int:
        """The longest beginning of some pages, whole grains, whose end has its window."""
        grain = self.grain_of(block_sparse)
        if self.window is None:
            return len(has_window) // grain * grain
        sinks, reach = self.window.sink_pages, self.window.local_pages - 1
        deepest = row = 0  # ``row``: pages one after another that have their window pages
        for depth, there in enumerate(has_window, start=1):
            row = row + 1 if there else 0
            if depth <= sinks and not row:
                break  # nothing deeper has the sinks
            if depth % grain == 0 and row >= min(depth, reach):
                deepest = depth
        return deepest

    # Growing.

    def insert(
        self,
        above: Node | None,
        salt: str | None,
        tokens: np.ndarray,
        pages: Sequence[int],
        windows: Sequence[int],
        block_sparse: bool = False,
    ) -> tuple[Node, list[int], list[int]]:
        """Adds pages of a prompt, at least one, below ``above``, which the caller holds locked.

        None: they are a prompt's first. ``windows`` are their window pages, -1 where there is none.
        The tree holds what it keeps once more. Where a page, or a window page, is there already,
        the caller's hold moves to that one.

        Returns the last node, which the caller holds locked instead of ``above``, and the pages and
        window pages that the prompt reads from now on.
        """
        size, now = self.page_size, self._tick()
        root = root_digest(salt, block_sparse)
        node = above or self._roots.setdefault(root, Node(None, b"", -1, root, 0))
        held: list[int] = []
        held_windows: list[int] = []
        for at, (page, window) in enumerate(zip(pages, windows, strict=True)):
            key = tokens[at * size : (at + 1) * size].astype(np.int32, copy=False).tobytes()
            child = node.children.get(key)
            if child is None:
                child = Node(node, key, page, next_digest(node.digest, key), node.depth + 1)
                node.children[key] = child
                self.num_nodes += 1
                self.num_unlocked += 1  # until it is locked below
                self.pool.share([page])
            elif child.page != page:
                self.pool.share([child.page])
                self.pool.release([page])
            if child.window < 0 <= window:
                self.give_window(child, window)
            elif window not in (-1, child.window):
                self.windows.share([child.window])
                self.windows.release([window])
            self._lock_one(child, now)
            held.append(child.page)
            held_windows.append(-1 if window < 0 else child.window)
            node = child
        return node, held, held_windows

    def give_window(self, node: Node, window: int) -> None:
        """A tombstone has its window page, which the tree holds once more."""
        self.windows.share([window])
        node.window = window
        self._loose[node] = None

    def lock(self, node: Node) -> None:
        """Somebody uses a path: nothing of it is evicted until it is unlocked."""
        now = self._tick()
        for each in node.path():
            self._lock_one(each, now)

    def _lock_one(self, node: Node, now: int) -> None:
        self.num_unlocked -= node.locks == 0
        node.locks += 1
        node.used = now

    def unlock(self, node: Node) -> None:
        """Undoes one ``lock``; the path counts as used now."""
        now = self._tick()
        for each in node.path():
            each.locks -= 1
            each.used = now
            self.num_unlocked += each.locks == 0
        self._offer(node)

    def pin(self, node: Node) -> "Pin":
        """Locks a path, and what a prompt needs of its window that goes on from its end.

        Also from a page before its end: a prompt that is the path's tokens runs its last page.
        """
        self.lock(node)
        path = node.path()
        for each in path:
            self.num_pinned += each.pins == 0
            each.pins += 1
        windows = [each for each in self._ending(path) if each.window >= 0]
        for each in windows:
            self.num_pinned_windows += each.window_pins == 0
            each.window_pins += 1
            self._loose.pop(each, None)
            self._kept.pop(each, None)
        return Pin(node, windows)

    def unpin(self, pin: "Pin") -> None:
        """Undoes a ``pin``."""
        for each in pin.node.path():
            each.pins -= 1
            self.num_pinned -= each.pins == 0
        for each in pin.windows:
            each.window_pins -= 1
            if each.window_pins == 0:
                self.num_pinned_windows -= 1
                self._kept[each] = None
        self.unlock(pin.node)

    def unpinned_windows(self, path: Sequence[Node], depth: int) -> int:
        """Window pages that a pin of ``depth`` pages, which begin with ``path``, would add."""
        windows = self._ending([*path, *[None] * (depth - len(path))])
        return sum(node is None or node.window_pins == 0 for node in windows)

    def _ending[T](self, path: Sequence[T]) -> list[T]:
        """The sinks, and the nodes of the window at a path's end."""
        if self.window is None:
            return []
        sinks, local = self.window.sink_pages, self.window.local_pages
        return [*path[:sinks], *path[max(sinks, len(path) - local) :]]

    def keep_windows(self, nodes: Sequence[Node]) -> None:
        """The window pages of some nodes are those used last; some end needs them."""
        for node in nodes:
            if node.window >= 0 and node.window_pins == 0:
                self._loose.pop(node, None)
                self._kept[node] = None
                self._kept.move_to_end(node)

    # Giving up.

    @property
    def available(self) -> int:
        """Pages that ``make_room`` can make free."""
        return len(self.pool.free) + self.num_unlocked

    def make_room(self, count: int) -> bool:
        """Evicts until ``count`` pages are free, if that many can be; else nothing."""
        if count > self.available:
            return False
        evicted = []
        while count > len(self.pool.free):
            evicted.append(self._evict_leaf())
        if evicted:
            self.evicted_pages += len(evicted)
            self.spill(evicted)
        return True

    def _evict_leaf(self) -> Evicted:
        while True:
            used, _, node = heapq.heappop(self._leaves)
            if used == node.used and self._is_idle_leaf(node):
                break
        assert node.parent is not None
        evicted = Evicted(node.digest, node.page, node.window)
        self._drop_window(node)
        del node.parent.children[node.key]
        self.pool.release([node.page])
        self.num_nodes -= 1
        self.num_unlocked -= 1
        self._offer(node.parent)
        if node.depth == 1 and not node.parent.children:
            del self._roots[node.parent.digest]
        node.parent = None  # entries of it that are left hold no longer
        return evicted

    @staticmethod
    def _is_idle_leaf(node: Node) -> bool:
        return node.parent is not None and node.locks == 0 and not node.children

    def _offer(self, node: Node) -> None:
        """A node may have become a leaf that can be evicted."""
        if not self._is_idle_leaf(node):
            return
        if len(self._leaves) > 2 * self.num_nodes + 64:
            self._leaves = [e for e in self._leaves if e[0] == e[2].used and e[2].parent]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.used, id(node), node))

    def take_windows(self, count: int) -> list[int]:
        """Window pages, now held once. There are as many, or ``PagePool.take`` raises.

        What is given up and some end needs is spilled, with its node's page, which stays.
        """
        evicted = []
        while count > len(self.windows.free):
            node = self._next_window()
            if node is None:
                break
            if node in self._kept:
                evicted.append(Evicted(node.digest, node.page, node.window))
            self._drop_window(node)
            self.evicted_windows += 1
        if evicted:
            self.spill(evicted)
        return self.windows.take(count)

    def _next_window(self) -> Node | None:
        """Whose window page is given up next."""
        for node in itertools.chain(self._loose, self._kept):
            if self.windows.references[node.window] == 1:  # no prompt in prefill reads it
                return node
        return None

    def _drop_window(self, node: Node) -> None:
        if node.window >= 0:
            self.windows.release([node.window])
            node.window = -1
            self._loose.pop(node, None)
            self._kept.pop(node, None)

    def clear(self) -> None:
        """Forgets everything that is not locked."""
        while self.num_unlocked:
            self._evict_leaf()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    # Checking.

    def nodes(self) -> Iterator[Node]:
        """All but the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Raises ``AssertionError`` unless all that the tree counts agrees with its nodes."""
        nodes = list(self.nodes())
        assert len(nodes) == self.num_nodes
        assert sum(node.locks == 0 for node in nodes) == self.num_unlocked
        assert sum(node.pins > 0 for node in nodes) == self.num_pinned
        assert sum(node.window_pins > 0 for node in nodes) == self.num_pinned_windows
        pages = [node.page for node in nodes]
        held = [node.window for node in nodes if node.window >= 0]
        assert len(set(pages)) == len(pages) and len(set(held)) == len(held)
        assert (self.pool.references[pages] > 0).all()
        assert (self.windows.references[held] > 0).all()
        offered = {entry[2] for entry in self._leaves if entry[0] == entry[2].used}
        for node in nodes:
            assert node.parent is not None and node.parent.children[node.key] is node
            assert node.depth == node.parent.depth + 1
            below = node.children.values()
            assert node.pins <= node.locks and sum(n.locks for n in below) <= node.locks
            if node.locks == 0:
                assert all(child.used <= node.used for child in below)
                assert self.pool.references[node.page] == 1
                assert node.children or node in offered
            listed = (node in self._loose) + (node in self._kept)
            assert listed == (node.window >= 0 and node.window_pins == 0)
            assert node.window_pins == 0 or node.window >= 0
