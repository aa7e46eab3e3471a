"""Prefixes that requests can share: found by token ids, locked while a request uses them.

Bookkeeping on the host. It holds pages of the pool, and beside them, unopened, what the device
needs to continue a prefix. The verbs are those of a prefix tree (match, insert, lock, unlock), so
that one can take this place.
"""

from typing import NamedTuple

import numpy as np

from lserve_jax.attention.cache import CacheSpec
from lserve_jax.engine.pages import PagePool
from lserve_jax.engine.prefix import Prefix
from lserve_jax.engine.state import Windows


class Match(NamedTuple):
    """The prefix that saves most of a prompt's prefill, and how many tokens it saves."""

    prefix: Prefix | None
    tokens: int  # whole pages; 0 without a prefix


class PrefixCache:
    """At most ``spec.max_prefixes`` prefixes, whose pages come from ``pool``."""

    def __init__(self, spec: CacheSpec, pool: PagePool):
        self.spec, self.pool = spec, pool
        self.held: dict[int, Prefix] = {}  # by index
        self.windows: dict[int, Windows] = {}  # by index: what ``ModelRunner.save_window`` kept

    @property
    def has_room(self) -> bool:
        return len(self.held) < self.spec.max_prefixes

    @property
    def pinned_pages(self) -> int:
        """Pages that prefixes hold for good: not those kept only until their requests end."""
        # A copy: other threads may ask while the engine's inserts or drops one.
        return sum(len(prefix.pages) for prefix in list(self.held.values()) if prefix.pins)

    @property
    def window_bytes(self) -> int:
        """Bytes on the device that held prefixes keep beside their pages."""
        kept = [array for windows in self.windows.values() for w in windows for array in (w.k, w.v)]
        return sum(array.nbytes for array in kept)

    def find(self, token_ids: np.ndarray) -> Prefix | None:
        """The pinned prefix of exactly these tokens."""
        for prefix in self.held.values():
            if prefix.pins and np.array_equal(prefix.token_ids, token_ids):
                return prefix
        return None

    def match(self, tokens: np.ndarray) -> Match:
        """The longest pinned prefix of a prompt.

        Whole pages, and never the whole prompt: its last token has to run for the logits.
        """
        best = Match(None, 0)
        for prefix in self.held.values():
            shared = prefix.shared_tokens_of(tokens) if prefix.pins else 0
            if shared > best.tokens:
                best = Match(prefix, shared)
        return best

    def check_room(self, num_pages: int) -> None:
        """Raises ``ValueError`` unless one more prefix can be held, on so many free pages."""
        spec = self.spec
        if not self.has_room:
            raise ValueError(
                f"max_prefixes={spec.max_prefixes} prefixes are held already: release one, or "
                "make room for more"
            )
        if num_pages > len(self.pool.free):
            raise ValueError(
                f"the prefix needs {num_pages} pages of {spec.page_size} tokens, "
                f"{len(self.pool.free)} of {spec.num_pages} are free"
            )

    def insert(self, prefix: Prefix, num_pages: int) -> None:
        """Gives a prefix an index and pages; see ``check_room``."""
        self.check_room(num_pages)
        prefix.index = min(set(range(self.spec.max_prefixes)) - self.held.keys())
        prefix.pages = self.pool.take(num_pages)
        self.held[prefix.index] = prefix

    def lock(self, match: Match) -> list[int]:
        """A request uses the match from now on: the pages that it shares, held once more."""
        if match.prefix is None:
            return []
        match.prefix.ref_count += 1
        pages = match.prefix.pages[: match.tokens // self.spec.page_size]
        self.pool.share(pages)
        return pages

    def unlock(self, prefix: Prefix) -> None:
        """A request uses the prefix no longer. Its hold on the pages is its own to release."""
        prefix.ref_count -= 1
        self._drop_unused(prefix)

    def unpin(self, prefix: Prefix) -> None:
        """Whoever asked for the prefix has released it, once."""
        prefix.pins -= 1
        self._drop_unused(prefix)

    def _drop_unused(self, prefix: Prefix) -> None:
        if prefix.pins == 0 and prefix.ref_count == 0 and prefix.index >= 0:
            del self.held[prefix.index]
            self.windows.pop(prefix.index, None)
            self.pool.release(prefix.pages)
            prefix.pages, prefix.index = [], -1

    def release_all(self) -> None:
        """Releases every prefix, for all who hold it; no request may use one."""
        for prefix in list(self.held.values()):
            prefix.pins = 0
            self._drop_unused(prefix)

    def clear(self) -> None:
        """Every prefix is released: the pages hold nothing any more."""
        for prefix in self.held.values():
            prefix.pins, prefix.pages, prefix.index = 0, [], -1
        self.held, self.windows = {}, {}
