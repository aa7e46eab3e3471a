"""The prefix tree alone, against a plain list of remembered prompts that is searched in full."""

import numpy as np
import pytest

from lserve_jax.attention.cache import StreamingWindow
from lserve_jax.engine.pages import PagePool
from lserve_jax.engine.prefix_tree import Node, Pin, PrefixTree, root_digest

P = 2  # tokens of a page
WINDOW = StreamingWindow(sink=P, local=2 * P, page_size=P)


def make(pages: int, windows: int = 0, *, grain: int = 1) -> PrefixTree:
    window = WINDOW if windows else None
    return PrefixTree(PagePool(pages), PagePool(windows), page_size=P, grain=grain, window=window)


def remember(tree: PrefixTree, tokens: list[int], salt: str | None = None) -> Node:
    """A request that computes all whole pages of its prompt and ends."""
    ids = np.array(tokens, np.int32)
    count = len(ids) // P
    assert tree.make_room(count)
    pages = tree.pool.take(count)
    windows = [-1] * count if tree.window is None else tree.take_windows(count)
    if count == 0:
        return Node(None, b"", -1, b"", 0)
    node, held, windows = tree.insert(None, salt, ids, pages, windows)
    assert [n.window for n in node.path()] == windows  # nobody else's, who may give it up
    tree.pool.release(held)
    tree.windows.release([w for w in windows if w >= 0])
    tree.keep_windows([*node.path()[1:], node.path()[0]])
    tree.unlock(node)
    tree.check()
    return node


def matched(tree: PrefixTree, tokens: list[int], salt: str | None = None) -> int:
    node = tree.match(np.array(tokens, np.int32), salt)
    return 0 if node is None else node.depth


def test_a_match_ends_at_the_deepest_page_that_leaves_a_token() -> None:
    tree = make(20)
    remember(tree, [1, 2, 3, 4, 5, 6])
    assert matched(tree, [1, 2, 3, 4, 5, 6, 7]) == 3
    assert matched(tree, [1, 2, 3, 4, 5, 6]) == 2
    assert matched(tree, [1, 2, 3, 4, 9, 6, 7]) == 2
    assert matched(tree, [1, 2]) == 0
    assert matched(tree, [2, 1, 3, 4]) == 0
    assert matched(tree, [1, 2, 3, 4, 5], salt="other") == 0
    coarse = make(20, grain=2)
    remember(coarse, [1, 2, 3, 4, 5, 6, 7, 8])
    assert matched(coarse, [1, 2, 3, 4, 5, 6, 7, 8]) == 2
    assert matched(coarse, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 4


def test_what_was_used_longest_ago_goes_first_and_what_is_used_never() -> None:
    tree = make(6)
    b, a = remember(tree, [1, 1, 5, 5]), remember(tree, [1, 1, 2, 2, 3, 3])
    tree.lock(b)
    tree.unlock(b)
    assert tree.make_room(3)  # two are free
    assert (matched(tree, [1, 1, 2, 2, 3, 3, 0]), matched(tree, [1, 1, 5, 5, 0])) == (2, 2)
    assert a.parent is None
    tree.lock(b)
    assert not tree.make_room(5)  # of its two pages none
    assert matched(tree, [1, 1, 2, 2, 0]) == 2  # nothing was evicted for nothing
    assert tree.make_room(4)
    assert matched(tree, [1, 1, 2, 2, 0]) == 1
    tree.unlock(b)
    tree.clear()
    tree.check()
    assert tree.num_nodes == 0 and len(tree.pool.free) == 6


def test_the_same_pages_twice_are_held_once() -> None:
    tree = make(8)
    remember(tree, [1, 2, 3, 4])
    ids, own = np.array([1, 2, 3, 4, 5, 6], np.int32), tree.pool.take(3)
    node, held, _ = tree.insert(None, None, ids, own, [-1] * 3)
    assert held[2] == own[2] and not set(held[:2]) & set(own)
    assert len(tree.pool.free) == 5
    tree.check()
    tree.pool.release(held)
    tree.unlock(node)
    assert tree.num_unlocked == tree.num_nodes == 3


def test_a_match_needs_the_window_of_its_end_and_the_sinks() -> None:
    """One sink page and two of the window; window pages go, pages stay."""
    tree = make(40, 8)
    long = list(range(12))
    remember(tree, long)  # six pages
    assert matched(tree, [*long, 0]) == 6
    remember(tree, [90, 91, 92, 93, 94, 95])  # three: the first one's oldest go, not its sink
    assert tree.evicted_windows == 1
    assert matched(tree, [*long, 0]) == 6
    assert matched(tree, long[:9]) == 4  # pages 3 and 4 have theirs, and so has the sink, page 1
    assert matched(tree, long[:7]) == 1  # page 2 has not
    pin = tree.pin(tree.match(np.array([*long, 0]), None))
    assert tree.num_pinned_windows == 4  # one more: of a prompt that is the same its last page runs
    for base in (100, 200):
        remember(tree, [base, base + 1, base + 2, base + 3])
    tree.check()
    assert matched(tree, [*long, 0]) == 6 and matched(tree, long) == 5
    sink, *_ = tree.walk(np.array(long), None)
    assert tree.pinned_match(np.array([*long, 0]), None) == 6
    assert tree.pinned_match(np.array(long), None) == 5
    tree.unpin(pin)
    assert tree.pinned_match(np.array([*long, 0]), None) == 0
    tree.check()
    tree._drop_window(sink)
    assert matched(tree, [*long, 0]) == 0


def test_a_tombstone_gets_its_window_from_who_computes_it_again() -> None:
    tree = make(40, 5)
    long = list(range(10))
    remember(tree, long)
    remember(tree, [50, 51, 52, 53])
    assert matched(tree, [*long[:8], 99]) == 1
    nodes = tree.num_nodes
    remember(tree, long)
    assert tree.num_nodes == nodes
    assert matched(tree, [*long, 0]) == 5


class Naive:
    """Remembered beginnings in full, one entry a page; nothing is ever computed from it."""

    def __init__(self) -> None:
        self.pages: set[tuple[str | None, tuple[int, ...]]] = set()

    def add(self, salt: str | None, tokens: list[int]) -> None:
        for end in range(P, len(tokens) + 1, P):
            self.pages.add((salt, tuple(tokens[:end])))

    def match(self, salt: str | None, tokens: list[int]) -> int:
        ends = range(P, len(tokens), P)
        return max((e // P for e in ends if (salt, tuple(tokens[:e])) in self.pages), default=0)


@pytest.mark.parametrize("seed", range(4))
def test_random_use_against_full_lists(seed: int) -> None:
    """Without windows a match is what a list says; the tree says of itself what was evicted."""
    rng = np.random.default_rng(seed)
    tree, naive = make(24), Naive()
    locked: list[tuple[Node, list[int]]] = []
    pins: list[Pin] = []
    for _ in range(400):
        salt = [None, "a"][int(rng.integers(2))]
        tokens = rng.integers(0, 2, rng.integers(1, 12)).tolist()
        action = rng.integers(6)
        if action <= 1 and tree.make_room(len(tokens) // P):
            remember(tree, tokens, salt)
            naive.add(salt, tokens)
        elif action == 2 and (node := tree.match(np.array(tokens), salt)) is not None:
            tree.lock(node)
            locked.append((node, [n.page for n in node.path()]))
        elif action == 3 and locked:
            node, pages = locked.pop(int(rng.integers(len(locked))))
            assert [n.page for n in node.path()] == pages  # it was not evicted
            tree.unlock(node)
        elif action == 4 and (node := tree.match(np.array(tokens), salt)) is not None:
            pins.append(tree.pin(node))
        elif action == 5 and pins:
            tree.unpin(pins.pop(int(rng.integers(len(pins)))))
        tree.check()
        there = {
            (s, tuple(np.frombuffer(b"".join(n.key for n in node.path()), np.int32).tolist()))
            for s in (None, "a", "b")
            for node in tree.nodes()
            if _root_of(node).digest == root_digest(s)
        }
        assert there <= naive.pages
        naive.pages = there
        for tokens in (rng.integers(0, 2, 9).tolist() for _ in range(3)):
            for salt in (None, "a", "b"):
                assert matched(tree, tokens, salt) == naive.match(salt, tokens)
    for node, _ in locked:
        tree.unlock(node)
    for pin in pins:
        tree.unpin(pin)
    evicted = tree.evicted_pages
    tree.clear()
    tree.check()
    assert tree.num_nodes == 0 and len(tree.pool.free) == 24 and not tree._roots
    assert tree.evicted_pages == evicted > 50  # nobody was given what was forgotten


@pytest.mark.parametrize("seed", range(3))
def test_random_use_with_windows(seed: int) -> None:
    """A match is the deepest end whose sink and last two pages have window pages; pins keep theirs.

    There are fewer window pages than pages, and never too few for the prompt that is computed.
    """
    rng = np.random.default_rng(seed)
    tree = make(40, 24)
    pins: list[tuple[Pin, np.ndarray]] = []
    for _ in range(300):
        tokens = rng.integers(0, 2, rng.integers(2, 14)).tolist()
        node = tree.match(np.array(tokens), None)
        action = rng.integers(4)
        if action <= 1 and tree.make_room(len(tokens) // P):
            remember(tree, tokens)
        elif action == 2 and node is not None and tree.num_pinned_windows < 12:
            pins.append((tree.pin(node), np.array(tokens)))
        elif action == 3 and pins:
            tree.unpin(pins.pop(int(rng.integers(len(pins))))[0])
        tree.check()
        for pin, pinned in pins:
            assert tree.pinned_match(pinned, None) >= pin.node.depth
        tokens = np.array(rng.integers(0, 2, 13))
        path = tree.walk(tokens[:-1], None)
        ends = [
            depth
            for depth in range(1, len(path) + 1)
            if all(n.window >= 0 for n in [path[0], *path[max(depth - 2, 0) : depth]])
        ]
        assert matched(tree, tokens.tolist()) == max(ends, default=0)
    assert tree.evicted_windows > 50
    for pin, _ in pins:
        tree.unpin(pin)
    tree.clear()
    tree.check()
    assert len(tree.windows.free) == 24 and len(tree.pool.free) == 40


def _root_of(node: Node) -> Node:
    while node.parent is not None:
        node = node.parent
    return node


def test_a_tree_that_lost_count_is_found_out() -> None:
    tree = make(8)
    node = remember(tree, [1, 2, 3, 4])
    for spoil in (
        lambda: setattr(node, "locks", 1),
        lambda: setattr(node, "page", node.parent.page),
        lambda: tree.pool.share([node.page]),
        lambda: setattr(tree, "num_nodes", 1),
    ):
        saved = node.locks, node.page, tree.num_nodes, tree.pool.references.copy()
        spoil()
        with pytest.raises(AssertionError):
            tree.check()
        node.locks, node.page, tree.num_nodes, tree.pool.references = saved
    tree.check()
