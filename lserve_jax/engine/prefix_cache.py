"""Pages of prompts: from the prefix tree, computed, and left to it.

A prompt begins with what the tree has of it. What it computes enters the tree chunk by chunk, so
that the next prompt can go on from there at once, and stays when its request ends. Only prompts do:
a decode step's keys are not bit for bit what a prefill of the same tokens makes, and in sparse
attention not nearly.

A prompt is prefilled in chunks from its beginning, or from where a match ends. Sums of another
chunk are rounded in another way, and with pages of codes its tokens read other keys as they were
before they were rounded. Where that must not be (codes, ``deterministic``), the tree has whole
chunks only, with the bounds that they have in every prompt, and matches end there.

So it always has whole chunks only of prompts that are read block-sparsely: which queries choose
blocks together follows from where their chunk begins. Prompts that are read causally have other
keys, and the two kinds share nothing.

Streaming heads see a prompt's sinks and its last tokens. Their window pages are the prompt's while
it is prefilled, twice as far back as it sees, so that a prompt can also go on from a bit before
another one's end; then they are the tree's, until others want them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from lserve_jax.attention.cache import CacheSpec
from lserve_jax.engine.host_tier import HostPage, HostTier
from lserve_jax.engine.pages import PagePool
from lserve_jax.engine.prefix_tree import Node, Pin, PrefixTree, root_digest


@dataclass(kw_only=True, eq=False)
class PromptPages:
    """A prompt, and where its keys and values are, while it is prefilled and as long as it runs."""

    prompt: np.ndarray  # [prompt length] int32
    cache_salt: str | None = None  # prompts of one salt share
    block_sparse: bool = False  # how it is read; prompts of one kind share
    goes_on: bool = False  # it is only the beginning of longer prompts
    pages: list[int] = field(default_factory=list)  # in order, those of ``node`` first
    node: Node | None = None  # the last page of it that is in the tree, locked
    window: dict[int, int] = field(default_factory=dict)  # window page of pages of the prompt
    shared_tokens: int = 0  # of the prompt, that were there when it began
    prefilled: int = 0  # prompt tokens that are in the cache

    @property
    def reusable(self) -> int:
        """Tokens whose whole pages are as in longer prompts: the end of a block-sparse one is not.

        Its last chunk, that is, since such prompts share whole chunks.
        """
        return len(self.prompt) - (self.block_sparse and not self.goes_on)


class Match(NamedTuple):
    """What a prompt goes on from: a node, None for nothing, and pages in host memory behind it."""

    node: Node | None
    behind: list[HostPage]
    # Of pages in the tree, by their number, those whose window page is only in host memory.
    windows: Mapping[int, HostPage] = MappingProxyType({})

    @property
    def depth(self) -> int:
        """Pages of the node's path."""
        return 0 if self.node is None else self.node.depth


class PrefixCache:
    """The pages of an engine and what of prompts they hold.

    streams: whether some head streams.
    chunk_size: most tokens of a chunk of a prompt.
    deterministic: whether a prompt that goes on from another must be the same bit for bit.
    enabled: whether requests leave their prompts; else only prefixes that somebody asked for stay.
    host: where pages go that the tree gives up; None: nowhere.
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        streams: bool,
        chunk_size: int,
        deterministic: bool,
        enabled: bool,
        host: HostTier | None = None,
    ):
        self.spec, self.enabled, self.deterministic = spec, enabled, deterministic
        self.pool, self.windows = PagePool(spec.num_pages), PagePool(spec.num_window_pages)
        window, P = spec.prefill_window, spec.page_size
        chunk = math.lcm(chunk_size, P) // P
        self.tree = PrefixTree(
            self.pool,
            self.windows,
            page_size=P,
            grain=chunk if deterministic or spec.kv_dtype != "auto" else 1,
            block_grain=chunk,
            window=window if streams else None,
        )
        self.streams, self.host = streams, host
        if host is not None:
            self.tree.spill = host.spill
        # Pages behind the newest that a prompt in prefill keeps; see ``make_spec``.
        more = spec.num_window_pages > window.num_pages
        self._kept_pages = window.local_pages + (window.behind_pages if more else 0)

    # What is there.

    @property
    def free_pages(self) -> int:
        """Pages that nobody uses: those that hold remembered prompts too."""
        return self.tree.available

    def free_beside(self, match: Node | None) -> int:
        """Pages that can be had by a prompt that goes on from ``match``."""
        path = [] if match is None else match.path()
        return self.free_pages - sum(node.locks == 0 for node in path)

    @property
    def cached_pages(self) -> int:
        """Of these, pages that hold remembered prompts."""
        return self.tree.num_unlocked

    @property
    def pinned_pages(self) -> int:
        """Pages that prefixes hold until they are released."""
        return self.tree.num_pinned

    @property
    def pinnable_windows(self) -> int:
        """Window pages that may be pinned, so that one prompt in prefill always has its own."""
        own = self.spec.prefill_window.sink_pages + self._kept_pages
        return self.spec.num_window_pages - own

    def remembers(self, judged: bool) -> bool:
        """Whether a request leaves its prompt, whose tokens are ``judged`` one by one or are not.

        Judging them is part of the program, and another program may round in another way.
        """
        return self.enabled and not (judged and self.deterministic)

    def whole_pages(self, tokens: int, block_sparse: bool) -> int:
        """Pages that so many tokens of a prompt can leave to the tree."""
        grain = self.tree.grain_of(block_sparse)
        return tokens // self.spec.page_size // grain * grain

    def has_windows(self, prompts: Sequence[PromptPages]) -> bool:
        """Whether all of these can be in prefill at the same time, each with a window of its own.

        A single one always can.
        """
        if not self.streams:
            return True
        P, most = self.spec.page_size, self.spec.prefill_window.sink_pages + self._kept_pages
        wanted = sum(min(-(-len(prompt.prompt) // P), most) for prompt in prompts)
        return wanted <= self.spec.num_window_pages - self.tree.num_pinned_windows

    # A prompt on its way.

    def match(self, prompt: PromptPages) -> Match:
        """Where a prompt can go on from: the deepest end that leaves it a token to compute."""
        tokens, kind = prompt.prompt, (prompt.cache_salt, prompt.block_sparse)
        if self.host is None:
            return Match(self.tree.match(tokens, *kind), [])
        tokens, P = tokens[:-1], self.spec.page_size
        path = self.tree.walk(tokens, *kind)
        rest = tokens[len(path) * P : len(tokens) // P * P].astype(np.int32, copy=False)
        keys = [page.tobytes() for page in rest.reshape(-1, P)]
        behind = self.host.find(path[-1].digest if path else root_digest(*kind), keys)
        there = {
            number: page
            for number, node in enumerate(path if self.streams else [])
            if node.window < 0 and (page := self.host.window(node.digest)) is not None
        }
        has_window = [node.window >= 0 or number in there for number, node in enumerate(path)]
        has_window += [page.has_window for page in behind]
        end = self.tree.deepest_end(has_window, prompt.block_sparse)
        node = path[min(end, len(path)) - 1] if end and path else None
        windows = {number: there[number] for number in self._kept(end) if number in there}
        return Match(node, behind[: max(end - len(path), 0)], windows)

    def will_have_more(
        self, prompt: PromptPages, match: Match, others: Iterable[PromptPages]
    ) -> bool:
        """Whether a prompt will find more than ``match`` once one of ``others``, which are in
        prefill, is through."""
        pages = match.depth + len(match.behind) + self.tree.grain_of(prompt.block_sparse)
        end = pages * self.spec.page_size
        if not self.enabled or end > len(prompt.prompt) - 1:
            return False
        kind, begins = (prompt.cache_salt, prompt.block_sparse), prompt.prompt[:end]
        return any(
            kind == (other.cache_salt, other.block_sparse)
            and end <= other.reusable
            and np.array_equal(begins, other.prompt[:end])
            for other in others
        )

    def begin(self, prompt: PromptPages, match: Match) -> None:
        """Gives a prompt the pages of what it goes on from, those in the tree."""
        path = [] if match.node is None else match.node.path()
        prompt.node, prompt.pages = match.node, [node.page for node in path]
        end = len(path) + len(match.behind)
        prompt.prefilled = len(path) * self.spec.page_size
        prompt.shared_tokens, prompt.window = end * self.spec.page_size, {}
        if match.node is None:
            return
        self.tree.lock(match.node)
        self.pool.share(prompt.pages)
        if self.streams:
            seen = [path[n] for n in self._kept(end) if n < len(path)]
            self.tree.keep_windows(seen)
            prompt.window = {node.depth - 1: node.window for node in seen if node.window >= 0}
            self.windows.share(list(prompt.window.values()))

    def restore(self, prompt: PromptPages, match: Match) -> None:
        """Brings pages back from host memory to those that the prompt has been given for them."""
        found = [*match.windows.values(), *match.behind]
        if self.host is None or not found:
            return
        begin = match.depth
        end = begin + len(match.behind)
        numbers = [*match.windows, *range(begin, end)]
        kept = set(self._kept(end)) if self.streams else set()
        self.add_windows(
            prompt,
            [n for n, page in zip(numbers, found, strict=True) if n in kept and page.has_window],
        )
        pages = [prompt.pages[n] if n >= begin else -1 for n in numbers]
        self.host.restore(found, pages, [prompt.window.get(n, -1) for n in numbers])
        path = [] if match.node is None else match.node.path()
        for number in match.windows:
            self.tree.give_window(path[number], prompt.window[number])
        self.computed(prompt, len(match.behind) * self.spec.page_size, remember=True)

    def _kept(self, end: int) -> list[int]:
        """Of ``end`` pages of a prompt those whose windows it keeps, the sinks last."""
        sinks = self.spec.prefill_window.sink_pages
        return [*range(max(sinks, end - self._kept_pages), end), *range(min(sinks, end))]

    def grow(self, prompt: PromptPages, num_pages: int) -> None:
        """Gives a prompt more pages, until it has ``num_pages``; there must be as many."""
        wanted = max(num_pages - len(prompt.pages), 0)
        self.tree.make_room(wanted)
        prompt.pages = prompt.pages + self.pool.take(wanted)

    def add_windows(self, prompt: PromptPages, numbers: Sequence[int]) -> None:
        """Gives window pages to some pages of a prompt, which will be written."""
        taken = self.tree.take_windows(len(numbers))
        prompt.window.update(zip(numbers, taken, strict=True))

    def window_table(self, prompt: PromptPages, end: int) -> np.ndarray:
        """Where the window lies for the next chunk, which ends before position ``end``.

        Window pages ``[M]`` int32, -1 for pages that are not kept. Those that the chunk reads are
        there, and places for what of it is kept; they may be the same.
        """
        table = np.full((self.spec.pages_per_sequence,), -1, np.int32)
        if not self.streams:
            return table
        P, sinks = self.spec.page_size, self.spec.prefill_window.sink_pages
        newest, held = (end - 1) // P, prompt.window
        oldest = newest - self._kept_pages + 1
        table[list(held)] = list(held.values())
        out_of_sight = [held.pop(n) for n in list(held) if sinks <= n < oldest]
        self.windows.release(out_of_sight)
        numbers = range(prompt.prefilled // P, newest + 1)
        new = [n for n in numbers if n not in held and (n < sinks or n >= oldest)]
        self.add_windows(prompt, new)
        table[new] = [held[n] for n in new]
        return table

    def computed(self, prompt: PromptPages, tokens: int, *, remember: bool) -> None:
        """The next ``tokens`` of a prompt are computed; with ``remember`` they enter the tree."""
        prompt.prefilled += tokens
        begin = 0 if prompt.node is None else prompt.node.depth
        end = self.whole_pages(min(prompt.prefilled, prompt.reusable), prompt.block_sparse)
        if not remember or end <= begin:
            return
        P = self.spec.page_size
        prompt.node, prompt.pages[begin:end], windows = self.tree.insert(
            prompt.node,
            prompt.cache_salt,
            prompt.prompt[begin * P : end * P],
            prompt.pages[begin:end],
            [prompt.window.get(number, -1) for number in range(begin, end)],
            prompt.block_sparse,
        )
        prompt.window |= {begin + n: page for n, page in enumerate(windows) if page >= 0}

    def finish(self, prompt: PromptPages) -> None:
        """A prompt is prefilled, or given up: its window is the tree's."""
        if prompt.node is not None and prompt.window:
            path = prompt.node.path()
            self.tree.keep_windows([path[n] for n in self._kept(len(path))])
        self.windows.release(list(prompt.window.values()))
        prompt.window = {}

    def clear(self) -> None:
        """Forgets everything that no prompt uses and nobody has pinned."""
        self.tree.clear()
        if self.host is not None:
            self.host.clear()

    def release(self, prompt: PromptPages) -> None:
        """Takes all pages from a prompt; what of it is in the tree stays there."""
        self.finish(prompt)
        self.pool.release(prompt.pages)
        if prompt.node is not None:
            self.tree.unlock(prompt.node)
            self._forget_unasked()
        prompt.pages, prompt.node = [], None

    def unpin(self, pin: Pin) -> None:
        """Nobody asks for a prefix any more."""
        self.tree.unpin(pin)
        self._forget_unasked()

    def _forget_unasked(self) -> None:
        if not self.enabled:
            self.tree.clear()
