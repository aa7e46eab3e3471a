"""Who runs where: the queue, slots and pages. Decides; knows nothing of arrays or devices.

First come, first served: nobody overtakes the request at the head of the queue. A request gets
pages as it grows. When there are none left, the newest request is preempted: it loses slot and
pages, goes back to its place in the queue and later begins again from its prompt.
"""

import bisect
import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np

from lserve_jax.attention.cache import CacheSpec
from lserve_jax.engine.prefix import Prefix
from lserve_jax.engine.request import Request


class PagePool:
    """Physical pages with reference counts: a page is free when nobody holds it."""

    def __init__(self, num_pages: int):
        self.references = np.zeros((num_pages,), np.int32)
        self.free = list(range(num_pages))[::-1]

    def take(self, count: int) -> list[int]:
        """``count`` free pages, now held once; there must be as many."""
        if count > len(self.free):
            raise ValueError(f"{count} pages are wanted, {len(self.free)} are free")
        pages = [self.free.pop() for _ in range(count)]
        self.references[pages] += 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Holds pages that somebody holds already."""
        self.references[list(pages)] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one hold on each page."""
        self.references[list(pages)] -= 1
        self.free.extend(page for page in pages if self.references[page] == 0)


class Scheduler:
    """Queue, slots and pages of an engine.

    A request is in one place: ``waiting``, ``prefilling`` (at most one, since the prefill window
    is one) or ``running``. ``page_table`` ``[S, M]`` int32 holds the pages of every slot; entries
    past a sequence's pages are 0.
    """

    def __init__(self, spec: CacheSpec, burst_steps: int):
        self.spec, self.burst_steps = spec, burst_steps
        self.waiting: deque[Request] = deque()
        self.prefilling: Request | None = None
        self.running: dict[int, Request] = {}  # by slot
        self.prefixes: dict[int, Prefix] = {}  # by their place
        self.free_slots = list(range(spec.max_num_seqs))  # a heap: low slots keep the batch small
        self.pool = PagePool(spec.num_pages)
        self.page_table = np.zeros((spec.max_num_seqs, spec.pages_per_sequence), np.int32)

    # What is there.

    def placed(self) -> list[Request]:
        """Requests that have a slot, the oldest first."""
        placed = [*self.running.values()]
        if self.prefilling is not None:
            placed.append(self.prefilling)
        return sorted(placed, key=lambda request: request.number)

    @property
    def pinned_pages(self) -> int:
        """Pages that prefixes hold for good: not those kept only until their requests end."""
        return sum(len(prefix.pages) for prefix in self.prefixes.values() if prefix.pins)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.spec.page_size)

    # Prefixes.

    def match(self, prompt: np.ndarray) -> tuple[Prefix | None, int]:
        """The prefix that saves most of a prompt's prefill, and how many tokens it saves.

        Whole pages, and never the whole prompt: its last token has to run for the logits.
        """
        best, most = None, 0
        for prefix in self.prefixes.values():
            if not prefix.pins:
                continue
            shared = prefix.shared_tokens_of(prompt)
            if shared > most:
                best, most = prefix, shared
        return best, most

    def most_pages(self, prompt: np.ndarray, max_tokens: int) -> int:
        """Pages that a request must be able to get: all its tokens but the last, less shared ones.

        The last token generated is never fed back.
        """
        total = self.pages_for(len(prompt) + max_tokens - 1)
        return total - self.match(prompt)[1] // self.spec.page_size

    def add_prefix(self, prefix: Prefix, num_pages: int) -> None:
        """Gives a prefix a place and pages. Raises ``ValueError`` where there is no room."""
        spec = self.spec
        free_places = set(range(spec.max_prefixes)) - self.prefixes.keys()
        if not free_places:
            raise ValueError(
                f"{spec.max_prefixes} prefixes are held already: release one, or make room for "
                "more (max_prefixes)"
            )
        if num_pages > len(self.pool.free):
            raise ValueError(
                f"the prefix needs {num_pages} pages of {spec.page_size} tokens, "
                f"{len(self.pool.free)} of {spec.num_pages} are free"
            )
        left = spec.num_pages - self.pinned_pages - num_pages
        for request in [*self.placed(), *self.waiting]:
            pages = self.most_pages(request.prompt, request.sampling.max_tokens)
            if pages > left:
                raise ValueError(
                    f"the prefix needs {num_pages} pages and would leave {left}; request "
                    f"{request.request_id!r} can need {pages}"
                )
        prefix.index = min(free_places)
        prefix.pages = self.pool.take(num_pages)
        self.prefixes[prefix.index] = prefix

    def drop_prefix(self, prefix: Prefix) -> None:
        """Frees the pages of a prefix that nobody holds or uses any more."""
        if prefix.pins == 0 and prefix.ref_count == 0 and prefix.index >= 0:
            del self.prefixes[prefix.index]
            self.pool.release(prefix.pages)
            prefix.pages, prefix.windows, prefix.index = [], [], -1

    # From place to place.

    def admit(self) -> Request | None:
        """Gives the request at the head of the queue a slot and pages for its prompt, if it can.

        It must leave what the running requests need for their next burst, or one of them would be
        preempted at once.
        """
        if self.prefilling is not None or not self.waiting or not self.free_slots:
            return None
        request = self.waiting[0]
        prefix, shared = self.match(request.prompt)
        shared_pages = shared // self.spec.page_size
        steps = min(self.burst_steps, request.sampling.max_tokens - 1)
        needed = self.pages_for(len(request.prompt) + steps) - shared_pages
        if needed + self._missing(self.burst_steps) > len(self.pool.free):
            return None
        self.waiting.popleft()
        self.prefilling = request
        request.slot = heapq.heappop(self.free_slots)
        request.prefix, request.shared_tokens = prefix, shared
        request.prefilled, request.scheduled, request.received = shared, 0, 0
        if prefix is not None:
            request.pages = prefix.pages[:shared_pages]
            self.pool.share(request.pages)
            prefix.ref_count += 1
        self._grow(request, len(request.prompt))
        return request

    def start(self, request: Request) -> None:
        """The prompt of the prefilling request is in the cache: it decodes from now on."""
        assert request is self.prefilling
        self.prefilling = None
        self.running[request.slot] = request

    def release(self, request: Request) -> None:
        """Takes a request out, wherever it is; its slot and pages are free at once.

        One that is out already, since its last burst was handed out, stays so.
        """
        if request.slot < 0:
            if request in self.waiting:
                self.waiting.remove(request)
            return
        if request is self.prefilling:
            self.prefilling = None
        else:
            del self.running[request.slot]
        heapq.heappush(self.free_slots, request.slot)
        self.pool.release(request.pages)
        self.page_table[request.slot] = 0
        prefix = request.prefix
        request.slot, request.pages, request.prefix = -1, [], None
        if prefix is not None:
            prefix.ref_count -= 1
            self.drop_prefix(prefix)

    # Growing.

    def _steps(self, request: Request, steps: int) -> int:
        """Of the next ``steps``, those in which the request still feeds a token."""
        return max(min(steps, request.remaining), 0)

    def _missing(self, steps: int) -> int:
        """Pages that running requests lack for their next ``steps``."""
        return sum(self._lacks(r, r.length + self._steps(r, steps)) for r in self.running.values())

    def is_short_of_pages(self, steps: int) -> bool:
        return self._missing(steps) > len(self.pool.free)

    def reserve(self, steps: int) -> list[tuple[int, Request]]:
        """Gives running requests the pages of their next ``steps``.

        Returns (slot that it had, request) of those preempted for it. The newest goes first, so
        that the oldest always gets on.
        """
        preempted = []
        for request in sorted(self.running.values(), key=lambda r: r.number):
            length = request.length + self._steps(request, steps)
            while request.slot >= 0 and self._lacks(request, length) > len(self.pool.free):
                victim = self.placed()[-1]
                preempted.append((victim.slot, victim))
                self._preempt(victim)
            if request.slot >= 0:
                self._grow(request, length)
        return preempted

    def _lacks(self, request: Request, tokens: int) -> int:
        return max(self.pages_for(tokens) - len(request.pages), 0)

    def _grow(self, request: Request, tokens: int) -> None:
        request.pages = request.pages + self.pool.take(self._lacks(request, tokens))
        self.page_table[request.slot, : len(request.pages)] = request.pages

    def _preempt(self, request: Request) -> None:
        self.release(request)
        at = bisect.bisect([r.number for r in self.waiting], request.number)
        self.waiting.insert(at, request)
