"""Who runs where: the queue, slots and pages. Decides; knows nothing of devices.

First come, first served: nobody overtakes the request at the head of the queue. A request gets
pages as it grows. When there are none left, the newest request is preempted: it loses slot and
pages, goes back to its place in the queue and later begins again from its prompt, or from what the
prefix tree still has of it.
"""

import bisect
import dataclasses
import heapq
from collections import deque
from collections.abc import Mapping

import numpy as np

from lserve_jax.attention.attend import WHOLE_TAIL, PrefixGroups
from lserve_jax.attention.cache import CacheSpec
from lserve_jax.engine.inputs import BurstInputs, Chunk, Start
from lserve_jax.engine.metrics import DraftDecision
from lserve_jax.engine.prefix_cache import Match, PrefixCache, PromptPages
from lserve_jax.engine.prefix_tree import Node
from lserve_jax.engine.request import Request
from lserve_jax.engine.sampling import SamplingMode, rounded_top
from lserve_jax.engine.token_rules import RequestRules, TokenRules
from lserve_jax.sampling_params import SamplingParams


class Scheduler:
    """Queue, slots and pages of an engine.

    A request is in one place: ``waiting``, ``prefilling`` or ``running``. Several are in
    ``prefilling`` while a step of the engine runs them together; from one step to the next at most
    one stays there. ``page_table`` ``[S, M]`` int32 holds the pages of every slot; entries past a
    sequence's pages are 0.
    """

    def __init__(self, spec: CacheSpec, burst_steps: int, prefix_cache: PrefixCache):
        self.spec, self.burst_steps, self.prefix_cache = spec, burst_steps, prefix_cache
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []  # the oldest first
        self.running: dict[int, Request] = {}  # by slot
        self.free_slots = list(range(spec.max_num_seqs))  # a heap: low slots keep the batch small
        self.page_table = np.zeros((spec.max_num_seqs, spec.pages_per_sequence), np.int32)

    # What is there.

    def placed(self) -> list[Request]:
        """Requests that have a slot, the oldest first."""
        placed = [*self.running.values(), *self.prefilling]
        return sorted(placed, key=lambda request: request.number)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.spec.page_size)

    # What the runner must know.

    def next_chunk(self, request: Request, chunk_size: int) -> Chunk:
        """The next tokens of a prompt, at most ``chunk_size``."""
        chunk, wanted = self.chunk_of(request, chunk_size), request.sampling.prompt_logprobs
        if wanted is None:
            return chunk
        return dataclasses.replace(
            chunk,
            following=request.prompt[request.prefilled + 1 :][:chunk_size],
            top_logprobs=rounded_top(wanted),
            keep_hidden=request.keeps_hidden,
        )

    def chunk_of(self, prompt: PromptPages, chunk_size: int) -> Chunk:
        """The next tokens of a prompt, which has its pages, and window pages for them."""
        tokens = prompt.prompt[prompt.prefilled :][:chunk_size]
        end = prompt.prefilled + len(tokens)
        ends = end == len(prompt.prompt) and not prompt.goes_on
        page_table = np.zeros((self.spec.pages_per_sequence,), np.int32)
        page_table[: len(prompt.pages)] = prompt.pages
        return Chunk(
            tokens=tokens,
            page_table=page_table,
            window_table=self.prefix_cache.window_table(prompt, end),
            start=prompt.prefilled,
            prompt_length=len(prompt.prompt),
            block_sparse=prompt.block_sparse,
            whole_from=end - WHOLE_TAIL if ends else end,
        )

    def computed(self, request: Request, tokens: int) -> None:
        """The next ``tokens`` of a request's prompt are in the cache."""
        judged = request.sampling.prompt_logprobs is not None
        self.prefix_cache.computed(request, tokens, remember=self.prefix_cache.remembers(judged))
        self.page_table[request.slot, : len(request.pages)] = request.pages

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
        page_table = self.tables(num_rows)
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
            groups=groups,
            forced=forced,
            rules=TokenRules.of(rules),
            mode=SamplingMode.of([request.sampling for request in self.running.values()]),
            drafts=None if drafts is None else _by_row(drafts, num_rows),
        )

    def tables(self, num_rows: int) -> np.ndarray:
        """The page table ``[num_rows, M]`` int32."""
        return self.page_table[:num_rows].copy()

    # Pages that a request or a prefix can need.

    def most_pages(
        self, prompt: np.ndarray, sampling: SamplingParams, cache_salt: str | None = None
    ) -> int:
        """Pages that a request must be able to get: all its tokens but the last, less pinned ones.

        The last token generated is never fed back.
        """
        total = self.pages_for(len(prompt) + max(sampling.max_tokens - 1, 0))
        if sampling.prompt_logprobs is not None:
            return total
        return total - self.pinned_match(prompt, cache_salt)

    def pinned_match(self, prompt: np.ndarray, cache_salt: str | None) -> int:
        """Pages of a prompt that are sure to be found."""
        block_sparse = self.spec.is_block_sparse(len(prompt))
        return self.prefix_cache.tree.pinned_match(prompt, cache_salt, block_sparse)

    def check_pages(
        self, prompt: np.ndarray, sampling: SamplingParams, cache_salt: str | None
    ) -> None:
        """Raises ``ValueError`` for a request that can never have all its pages."""
        pinned = self.prefix_cache.pinned_pages
        pages = self.most_pages(prompt, sampling, cache_salt)
        if pages > self.spec.num_pages - pinned:
            held = f", {pinned} of them held by prefixes" if pinned else ""
            raise ValueError(
                f"the request needs {pages} pages of {self.spec.page_size} tokens, the KV cache "
                f"has {self.spec.num_pages}{held}: give it more memory (kv_cache_bytes) or ask "
                "for less"
            )

    def check_prefix(self, prefix: PromptPages, match: Node | None) -> None:
        """Raises ``ValueError`` where whole pages of tokens cannot be pinned.

        There is no room for those behind ``match``, which is there, or too little would be left for
        a request that waits or runs.
        """
        cache, tree, spec = self.prefix_cache, self.prefix_cache.tree, self.spec
        num_pages = len(prefix.prompt) // spec.page_size
        path = tree.walk(prefix.prompt, None, prefix.block_sparse)
        there, free = 0 if match is None else match.depth, cache.free_beside(match)
        if num_pages - there > free:
            raise ValueError(
                f"the prefix needs {num_pages} pages of {spec.page_size} tokens, {free} of "
                f"{spec.num_pages} are free"
            )
        windows = tree.num_pinned_windows + tree.unpinned_windows(path, num_pages)
        if windows > cache.pinnable_windows:
            raise ValueError(
                f"the windows of held prefixes would take {windows} pages of {spec.page_size} "
                f"tokens, {max(cache.pinnable_windows, 0)} can be held: release one, or make room "
                "for more (max_prefixes, kv_cache_bytes)"
            )
        new = num_pages - sum(node.pins > 0 for node in path)
        left = spec.num_pages - cache.pinned_pages - new
        for request in [*self.placed(), *self.waiting]:
            pages = self.most_pages(request.prompt, request.sampling, request.cache_salt)
            if pages > left:
                raise ValueError(
                    f"the prefix needs {num_pages} pages and would leave {left}; request "
                    f"{request.request_id!r} can need {pages}"
                )

    # From the queue to a slot and out again.

    def admit(self) -> Request | None:
        """Gives the request at the head of the queue a slot and pages for its prompt, if it can.

        It must leave what the placed requests need for their next burst, or one of them would be
        preempted at once. Beside others in prefill it needs a window of its own, and waits if it
        could go on from what they are about to compute.
        """
        if not self.waiting or not self.free_slots:
            return None
        request, cache = self.waiting[0], self.prefix_cache
        match = Match(None, [])
        if request.sampling.prompt_logprobs is None:  # else each of its tokens is to be judged
            match = cache.match(request)
            if cache.will_have_more(request, match, self.prefilling):
                return None
        needed = self.pages_for(len(request.prompt) + self._first_steps(request))
        left = cache.free_beside(match.node) + match.depth - needed
        # Mostly there is room for whatever they lack: adding it up takes as long as they are many.
        if left < self._most_lacking() and left < self._lacking():
            return None
        if not cache.has_windows([*self.prefilling, request]):
            return None
        cache.begin(request, match)
        self.waiting.popleft()
        self.prefilling.append(request)
        request.slot = heapq.heappop(self.free_slots)
        request.scheduled, request.received = 0, 0
        request.judged, request.attended_blocks, request.causal_blocks = [], [], 0
        self._grow(request, len(request.prompt))
        cache.restore(request, match)
        return request

    def _first_steps(self, request: Request) -> int:
        """Steps of its first burst that feed a token."""
        return max(min(self.burst_steps, request.sampling.max_tokens - 1), 0)

    def start(self, request: Request) -> Start:
        """The prompt of a request in prefill is in the cache: it decodes from now on."""
        self.prefilling.remove(request)
        self.running[request.slot] = request
        request.scheduled = 1
        # All of the window that decode needs was kept for the prompt's last chunk.
        window_table = self.prefix_cache.window_table(request, len(request.prompt))
        self.prefix_cache.finish(request)
        request.path = [] if request.node is None else request.node.path()
        return Start(
            slot=request.slot,
            prompt=request.prompt,
            sampling=request.sampling,
            sampling_row=request.sampling_row,
            forced=request.tokens[0] if request.tokens else -1,
            window_table=window_table,
            rules=request.rules,
        )

    def release(self, request: Request) -> None:
        """Takes a request out, wherever it is; its slot and pages are free at once.

        One that is out already, since its last burst was dispatched, stays so.
        """
        if request.slot < 0:
            if request in self.waiting:
                self.waiting.remove(request)
            return
        slot, request.slot, request.path = request.slot, -1, []
        if request in self.prefilling:
            self.prefilling.remove(request)
        else:
            del self.running[slot]
        heapq.heappush(self.free_slots, slot)
        self.prefix_cache.release(request)
        self.page_table[slot] = 0

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

    def _lacking(self) -> int:
        """Pages that all placed requests lack for their next burst."""
        return self._missing(self.burst_steps) + sum(
            self._lacks(other, len(other.prompt) + self._first_steps(other))
            for other in self.prefilling
        )

    def _most_lacking(self) -> int:
        """No less than ``_lacking``: what a request has scheduled so far, it has pages for."""
        placed = len(self.running) + len(self.prefilling)
        return placed * (self.pages_for(self.burst_steps) + 1)

    def _missing(self, steps: int) -> int:
        """Pages that running requests lack for their next ``steps``."""
        return sum(self._lacks(r, r.length + r.steps_of(steps)) for r in self.running.values())

    def is_short_of_pages(self, steps: int) -> bool:
        return self._missing(steps) > self.prefix_cache.free_pages

    def reserve(self, steps: int) -> list[int]:
        """Gives running requests the pages of their next ``steps``.

        Returns the slots that those preempted for it had. The newest goes first, so that the
        oldest always gets on.
        """
        preempted = []
        for request in sorted(self.running.values(), key=lambda r: r.number):
            length = request.length + request.steps_of(steps)
            while request.slot >= 0 and self._lacks(request, length) > self.prefix_cache.free_pages:
                victim = self.placed()[-1]
                preempted.append(victim.slot)
                self._preempt(victim)
            if request.slot >= 0:
                self._grow(request, length)
        return preempted

    def _lacks(self, request: Request, tokens: int) -> int:
        return max(self.pages_for(tokens) - len(request.pages), 0)

    def _grow(self, request: Request, tokens: int) -> None:
        self.prefix_cache.grow(request, self.pages_for(tokens))
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
