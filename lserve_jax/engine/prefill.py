"""Prompts on their way into the cache, chunk by chunk, up to their first tokens."""

from collections.abc import Callable, Iterator, Sequence

import jax

from lserve_jax.attention.attend import causal_blocks
from lserve_jax.engine.example_calls import first_calls
from lserve_jax.engine.metrics import EngineCounts
from lserve_jax.engine.prefill_calls import plan_calls
from lserve_jax.engine.request import Request
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.scheduler import Scheduler
from lserve_jax.engine.state import Sample


class Prefill:
    """Runs the prompts of a scheduler's requests, and samples their first tokens.

    ``counts`` are the engine's, to which it adds. In ``deterministic`` mode each prompt runs by
    itself, since sums of several may be rounded in another way.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        counts: EngineCounts,
        *,
        deterministic: bool,
        clock: Callable[[], float],
    ):
        self.runner, self.scheduler, self.counts = runner, scheduler, counts
        self.deterministic, self.clock = deterministic, clock
        # Of prompts that are through, not yet fetched: those of one call with what was sampled, a
        # row for each and more; None where nothing is.
        self.first_tokens: list[tuple[Sequence[Request], Sample | None]] = []

    def run(self) -> None:
        """Runs chunks as far as a step's budget goes, ``runner.chunk_size`` tokens.

        The budget, which counts padding too, never cuts a chunk: its bounds are the request's own,
        and so are its numbers.
        """
        budget, together = self.runner.chunk_size, not self.deterministic
        while calls := plan_calls(self._in_line(), budget, self.runner, together=together):
            if self.runner.compilations == 0 and len(calls) == len(calls[0].requests) == 1:
                self._prepare(calls[0].requests[0])
            for call in calls:
                self._next_chunks(call.requests, call.rows)
                budget -= call.tokens

    def run_waiting(self) -> None:
        """Prefills what waits, as slots and pages allow, before anything decodes."""
        while self.scheduler.prefilling or self._admit() is not None:
            self.run()

    def finish_prompt(self) -> None:
        """Runs what is left of a prompt in prefill, if there is one."""
        while self.scheduler.prefilling:
            self._next_chunks(self.scheduler.prefilling[:1])

    def take_first_samples(self) -> list[tuple[Request, Sample | None]]:
        """Of prompts that are through, fetched; the engine's next step will not return them."""
        taken, self.first_tokens = self.first_tokens, []
        fetched = jax.device_get([first for _, first in taken])
        return [
            (request, jax.tree.map(lambda x, row=row: x[row][None], first))
            for (requests, _), first in zip(taken, fetched, strict=True)
            for row, request in enumerate(requests)
        ]

    def _prepare(self, first: Request) -> None:
        """Compiles what the first request needs at the same time, not as it comes to it."""
        programs = self.runner.programs
        if programs.are_kept and not programs.sharded:  # else XLA says where arrays lie
            # Who waits may be in the first burst too.
            rows = None if self.scheduler.waiting else 1
            rows = self.runner.spec.max_num_seqs if self.deterministic else rows
            programs.prepare(first_calls(self.runner, self.scheduler, first, rows))

    def _in_line(self) -> Iterator[Request]:
        """Requests in prefill, then those that can be admitted."""
        yield from list(self.scheduler.prefilling)
        while (request := self._admit()) is not None:
            yield request

    def _admit(self) -> Request | None:
        request = self.scheduler.admit()
        if request is None:
            return None
        request.prefill_start = self.clock()
        if request.metrics.preemptions > 0:  # what it finds now may be its own
            return request
        request.found_tokens = request.shared_tokens
        if request.sampling.prompt_logprobs is None:
            self.counts.prefix_queries += len(request.prompt)
            self.counts.prefix_tokens += request.found_tokens
        return request

    def _next_chunks(self, requests: Sequence[Request], rows: int = 1) -> None:
        """Prefills the requests' next chunks in one call, and samples first tokens of those that
        are through: a single one, or all."""
        chunks = [self.scheduler.next_chunk(r, self.runner.chunk_size) for r in requests]
        logits, judged, attended = self.runner.prefill(chunks, rows)
        for request, chunk in zip(requests, chunks, strict=True):
            request.judged += [] if judged is None else [judged]
            if attended is not None:
                request.attended_blocks.append(attended)
                blocks = causal_blocks(chunk.start, len(chunk.tokens))
                request.causal_blocks += blocks * sum(self.runner.spec.heads.num_retrieval)
            self.scheduler.computed(request, len(chunk.tokens))
        if any(request.prefilled < len(request.prompt) for request in requests):
            return
        first = None
        if requests[0].sampling.max_tokens > 0:
            first = self.runner.insert(logits, [self.scheduler.start(r) for r in requests])
        for request in requests:
            if request.remaining == 0:
                self.scheduler.release(request)
        self.first_tokens.append((requests, first))
