"""Who runs where: the queue, slots and pages. Decides; knows nothing of devices.

First come, first served: nobody overtakes the request at the head of the queue. A request gets
pages as it grows. When there are none left, the newest request is preempted: it loses slot and
pages, goes back to its place in the queue and later begins again from its prompt.
"""

import bisect
import dataclasses
import heapq
from collections import deque
from collections.abc import Mapping

import numpy as np

from lserve_jax.attention.attend import PrefixGroups
from lserve_jax.attention.cache import CacheSpec
from lserve_jax.engine.inputs import BurstInputs, Chunk, Start
from lserve_jax.engine.metrics import DraftDecision
from lserve_jax.engine.pages import PagePool
from lserve_jax.engine.prefix import Prefix
from lserve_jax.engine.prefix_cache import Match, PrefixCache
from lserve_jax.engine.request import Request
from lserve_jax.engine.sampling import SamplingMode, rounded_top
from lserve_jax.engine.token_rules import RequestRules, TokenRules
from lserve_jax.sampling_params import SamplingParams


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
        self.free_slots = list(range(spec.max_num_seqs))  # a heap: low slots keep the batch small
        self.pool = PagePool(spec.num_pages)
        self.prefix_cache = PrefixCache(spec, self.pool)
        self.page_table = np.zeros((spec.max_num_seqs, spec.pages_per_sequence), np.int32)

    # What is there.

    def placed(self) -> list[Request]:
        """Requests that have a slot, the oldest first."""
        placed = [*self.running.values()]
        if self.prefilling is not None:
            placed.append(self.prefilling)
        return sorted(placed, key=lambda request: request.number)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.spec.page_size)

    # What the runner must know.

    def next_chunk(self, request: Request, chunk_size: int) -> Chunk:
        """The next tokens of a prompt, at most ``chunk_size``."""
        rest, wanted = request.prompt[request.prefilled :], request.sampling.prompt_logprobs
        return Chunk(
            tokens=rest[:chunk_size],
            page_table=self.page_table[request.slot].copy(),  # this one goes on changing
            start=request.prefilled,
            prompt_length=len(request.prompt),
            following=None if wanted is None else rest[1:][:chunk_size],
            top_logprobs=rounded_top(wanted or 0),
            keep_hidden=request.keeps_hidden,
        )

    def burst_inputs(
        self,
        steps: int,
        num_rows: int,
        groups: PrefixGroups | None,
        drafts: Mapping[int, DraftDecision] | None,
    ) -> BurstInputs:
        """Of a burst of all running requests, whose slots are below ``num_rows``.

        ``drafts`` are by slot; None: not in exact mode.
        """
        page_table, sink_page = self.tables(num_rows)
        # A burst that is no whole interval is a program of its own: all its rows are stepwise.
        most = 1 if steps < self.spec.burst_unit else self.burst_steps
        forced = np.full((most, num_rows), -1, np.int32)
        rules: list[RequestRules | None] = [None] * num_rows
        for slot, request in self.running.items():
            # Tokens that a preempted request has made before.
            replayed = request.tokens[request.scheduled :][:most]
            forced[: len(replayed), slot] = replayed
            rules[slot] = request.rules
        return BurstInputs(
            steps=steps,
            page_table=page_table,
            sink_page=sink_page,
            groups=groups,
            forced=forced,
            rules=TokenRules.of(rules),
            mode=SamplingMode.of([request.sampling for request in self.running.values()]),
            drafts=None if drafts is None else _by_row(drafts, num_rows),
        )

    def tables(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The page table ``[num_rows, M]`` and each row's first sink page ``[num_rows]``; int32."""
        sinks = np.array([self.spec.slot_sink(slot) for slot in range(num_rows)], np.int32)
        for slot, request in self.running.items():
            if request.prefix is not None and self._shares_sinks(request):
                sinks[slot] = self.spec.prefix_sink(request.prefix.index)
        return self.page_table[:num_rows].copy(), sinks

    def _shares_sinks(self, request: Request) -> bool:
        """Whether its streaming heads read the sinks of its prefix: they all lie in it."""
        shared = request.shared_tokens
        return request.prefix is not None and shared >= self.spec.decode_window.sink

    # Pages that a request or a prefix can need.

    def _match(self, prompt: np.ndarray, sampling: SamplingParams) -> Match:
        """The prefix that a request shares: none if each of its tokens is to be judged."""
        if sampling.prompt_logprobs is not None:
            return Match(None, 0)
        return self.prefix_cache.match(prompt)

    def most_pages(self, prompt: np.ndarray, sampling: SamplingParams) -> int:
        """Pages that a request must be able to get: all its tokens but the last, less shared ones.

        The last token generated is never fed back.
        """
        total = self.pages_for(len(prompt) + max(sampling.max_tokens - 1, 0))
        return total - self._match(prompt, sampling).tokens // self.spec.page_size

    def check_pages(self, prompt: np.ndarray, sampling: SamplingParams) -> None:
        """Raises ``ValueError`` for a request that can never have all its pages."""
        pages, pinned = self.most_pages(prompt, sampling), self.prefix_cache.pinned_pages
        if pages > self.spec.num_pages - pinned:
            held = f", {pinned} of them held by prefixes" if pinned else ""
            raise ValueError(
                f"the request needs {pages} pages of {self.spec.page_size} tokens, the KV cache "
                f"has {self.spec.num_pages}{held}: give it more memory (kv_cache_bytes) or ask "
                "for less"
            )

    def add_prefix(self, prefix: Prefix, num_pages: int) -> None:
        """Gives a prefix an index and pages.

        Raises ``ValueError`` where there is no room, or what is left is too little for a request
        that waits or runs.
        """
        self.prefix_cache.check_room(num_pages)
        left = self.spec.num_pages - self.prefix_cache.pinned_pages - num_pages
        for request in [*self.placed(), *self.waiting]:
            pages = self.most_pages(request.prompt, request.sampling)
            if pages > left:
                raise ValueError(
                    f"the prefix needs {num_pages} pages and would leave {left}; request "
                    f"{request.request_id!r} can need {pages}"
                )
        self.prefix_cache.insert(prefix, num_pages)

    # From the queue to a slot and out again.

    def admit(self) -> Request | None:
        """Gives the request at the head of the queue a slot and pages for its prompt, if it can.

        It must leave what the running requests need for their next burst, or one of them would be
        preempted at once.
        """
        if self.prefilling is not None or not self.waiting or not self.free_slots:
            return None
        request = self.waiting[0]
        match = self._match(request.prompt, request.sampling)
        shared = match.tokens
        steps = max(min(self.burst_steps, request.sampling.max_tokens - 1), 0)
        needed = self.pages_for(len(request.prompt) + steps) - shared // self.spec.page_size
        if needed + self._missing(self.burst_steps) > len(self.pool.free):
            return None
        self.waiting.popleft()
        self.prefilling = request
        request.slot = heapq.heappop(self.free_slots)
        request.prefix, request.shared_tokens = match.prefix, shared
        request.prefilled, request.scheduled, request.received = shared, 0, 0
        request.judged = []
        request.pages = self.prefix_cache.lock(match)
        self._grow(request, len(request.prompt))
        return request

    def start(self, request: Request) -> Start:
        """The prompt of the prefilling request is in the cache: it decodes from now on."""
        assert request is self.prefilling
        self.prefilling = None
        self.running[request.slot] = request
        request.scheduled = 1
        return Start(
            prompt=request.prompt,
            sampling=request.sampling,
            sampling_row=request.sampling_row,
            forced=request.tokens[0] if request.tokens else -1,
            own_sinks=not self._shares_sinks(request),
            rules=TokenRules.of([request.rules]),
        )

    def release(self, request: Request) -> None:
        """Takes a request out, wherever it is; its slot and pages are free at once.

        One that is out already, since its last burst was dispatched, stays so.
        """
        if request.slot < 0:
            if request in self.waiting:
                self.waiting.remove(request)
            return
        slot, pages, prefix = request.slot, request.pages, request.prefix
        request.slot, request.pages, request.prefix = -1, [], None
        if request is self.prefilling:
            self.prefilling = None
        else:
            del self.running[slot]
        heapq.heappush(self.free_slots, slot)
        self.pool.release(pages)
        self.page_table[slot] = 0
        if prefix is not None:
            self.prefix_cache.unlock(prefix)

    # Growing.

    @property
    def has_stepwise(self) -> bool:
        """Whether some running request takes one step a burst."""
        return any(request.is_stepwise for request in self.running.values())

    def burst_length(self) -> int:
        """Steps of the next burst: no more than some request needs, in whole burst units.

        With requests that take one step it is as short as the others can have it; a single unit
        where a request records what each selection chose.
        """
        others = [r.remaining for r in self.running.values() if not r.is_stepwise]
        unit = self.spec.burst_unit
        if self.has_stepwise:
            return unit if others else 1
        records = any(r.records_selections for r in self.running.values())
        return min(unit if records else self.burst_steps, -(-max(others, default=0) // unit) * unit)

    def _missing(self, steps: int) -> int:
        """Pages that running requests lack for their next ``steps``."""
        return sum(self._lacks(r, r.length + r.steps_of(steps)) for r in self.running.values())

    def is_short_of_pages(self, steps: int) -> bool:
        return self._missing(steps) > len(self.pool.free)

    def reserve(self, steps: int) -> list[int]:
        """Gives running requests the pages of their next ``steps``.

        Returns the slots that those preempted for it had. The newest goes first, so that the
        oldest always gets on.
        """
        preempted = []
        for request in sorted(self.running.values(), key=lambda r: r.number):
            length = request.length + request.steps_of(steps)
            while request.slot >= 0 and self._lacks(request, length) > len(self.pool.free):
                victim = self.placed()[-1]
                preempted.append(victim.slot)
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
        preemptions = request.metrics.preemptions + 1
        request.metrics = dataclasses.replace(request.metrics, preemptions=preemptions)
        at = bisect.bisect([r.number for r in self.waiting], request.number)
        self.waiting.insert(at, request)


def _by_row(drafts: Mapping[int, DraftDecision], num_rows: int) -> np.ndarray:
    rows = np.zeros((num_rows,), np.int32)
    for slot, decision in drafts.items():
        rows[slot] = decision.drafts
    return rows
