"""The host side of generation: requests in, token ids out.

A request waits until a slot and pages for its prompt are free. Its prompt is prefilled chunk by
chunk, between bursts of decode steps, so that those who decode already never wait for longer than
a chunk; short prompts run together, as many as make one. It then decodes with its neighbours until
it stops.

The device is kept busy: a step of the engine first dispatches the next work and only then fetches
the results of the work before.

    host     | dispatch n | fetch n-1, return tokens   | dispatch n+1 | fetch n, ...
    device   ...burst n-1 |  chunk n   |   burst n                    |  chunk n+1 ...
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lserve_jax.attention.cache import CacheSpec
from lserve_jax.checks import check_bool
from lserve_jax.engine.buckets import bucket, shape_buckets
from lserve_jax.engine.costs import BurstRow, CacheUnits
from lserve_jax.engine.draft_times import DraftTimes
from lserve_jax.engine.drafting import decide_all
from lserve_jax.engine.host_tier import HostTier, check_pinned_memory, take_pinned_memory
from lserve_jax.engine.metrics import DraftDecision, EngineCounts, EngineMetrics, StepMetrics
from lserve_jax.engine.prefill import Prefill
from lserve_jax.engine.prefix import Prefix
from lserve_jax.engine.prefix_cache import PrefixCache
from lserve_jax.engine.prefix_store import PrefixStore
from lserve_jax.engine.reads import PageReads, head_kinds
from lserve_jax.engine.relay import RelayMode, check_mode, group_by_prefix
from lserve_jax.engine.request import InFlight, PromptIds, Request, TokenOutput, check_deadline
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.sampling import check_stop_ids, sampling_row
from lserve_jax.engine.scheduler import Scheduler
from lserve_jax.engine.state import Sample
from lserve_jax.engine.token_rules import Constraint, request_rules
from lserve_jax.engine.weights import Intake
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params
from lserve_jax.sampling_params import SamplingParams


class Engine:
    """Runs requests through a fixed number of slots. ``build_engine`` makes one.

    runner: the model and its cache; this engine's alone.
    burst_steps: decode steps between two looks at the queue, rounded up to whole selection
        intervals.
    enable_prefix_caching: whether requests leave their prompts for others to go on from.
    host_cache_bytes: host memory for remembered prompts whose pages others were given.
    relay: whether requests with one beginning read it together: "always", "never", or "auto" by the
        rule of ``relay.py``.
    deterministic: always runs all slots, so that no request's numbers depend on how many there are.
    head_order: of each layer, the checkpoint's number of the KV head at each place of the
        parameters; None: they are in the checkpoint's order.
    clock: tells the time in seconds.
    intake: how parameters come in, for ``update_params``; None: they stay as they are.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        burst_steps: int,
        enable_prefix_caching: bool = True,
        host_cache_bytes: int = 0,
        relay: RelayMode = "auto",
        deterministic: bool = False,
        head_order: Sequence[Sequence[int]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        intake: Intake | None = None,
    ):
        spec = runner.spec
        check_mode(relay, deterministic)
        self.runner, self.max_model_len = runner, max_model_len
        self.eos_token_ids = tuple(eos_token_ids)
        # A whole number of selection intervals, so that every burst begins with a selection.
        self.burst_steps = -(-burst_steps // spec.burst_unit) * spec.burst_unit
        # Else keys depend on the length of their prompt: no prompt can go on from another's.
        fixed = runner.config.rope.rope_type != "dynamic"
        self.enable_prefix_caching = enable_prefix_caching and fixed
        self.host_cache_bytes = host_cache_bytes
        self.relay: RelayMode = relay
        self.deterministic, self.clock, self.intake = deterministic, clock, intake
        self.units = CacheUnits.of(runner.config, spec, runner.dtype)
        self.head_kinds = head_kinds(runner.config, spec, head_order)
        self._counts = EngineCounts()
        self._draft_times = DraftTimes(clock)
        self._next_number = 0
        self.resets = 0  # how often it began anew
        if host_cache_bytes > 0:
            check_pinned_memory(host_cache_bytes)
        self._start_empty()
        if self.scheduler.prefix_cache.host is not None:
            take_pinned_memory(host_cache_bytes)

    def _start_empty(self) -> None:
        heads, spec = self.config.num_key_value_heads, self.spec
        prefix_cache = PrefixCache(
            spec,
            streams=any(retrieval < heads for retrieval in spec.heads.num_retrieval),
            chunk_size=self.runner.chunk_size,
            deterministic=self.deterministic,
            enabled=self.enable_prefix_caching,
            host=self._host_tier(),
        )
        self.scheduler = Scheduler(spec, self.burst_steps, prefix_cache)
        self.prefix_store = PrefixStore(
            self.runner,
            self.scheduler,
            self.max_model_len,
            self._finish_prompt,
            lambda: self.abandon(()),
        )
        self.unfinished: dict[str, Request] = {}  # those that wait or run
        self._cancelled: dict[str, TokenOutput] = {}  # last outputs that are not yet returned
        self._in_flight: InFlight | None = None
        self.prefill = Prefill(
            self.runner,
            self.scheduler,
            self._counts,
            deterministic=self.deterministic,
            clock=self.clock,
        )
        self._last_step: StepMetrics | None = None

    def _host_tier(self) -> HostTier | None:
        if self.host_cache_bytes == 0 or not self.enable_prefix_caching:
            return None
        limit = self.host_cache_bytes // self.units.remembered_page
        if limit == 0:
            raise ValueError(
                f"host_cache_bytes={self.host_cache_bytes} holds no page: one takes "
                f"{self.units.remembered_page} bytes"
            )
        return HostTier(limit, self.runner.read_block, self.runner.write_block)

    def reset(self) -> None:
        """Begins anew with an empty cache and no requests, also after a failure on the device."""
        self.runner.reset()
        self.prefix_store.forget()
        self.resets += 1
        self._start_empty()

    def update_params(self, params: Params) -> None:
        """Runs other weights from now on; see ``LLM.update_params``."""
        if self.intake is None:
            raise ValueError("the engine was made without an intake: its params cannot change")
        if self.unfinished:
            raise ValueError(
                f"params cannot change while {len(self.unfinished)} requests run: "
                "finish or cancel them first"
            )
        self.intake.check(params)
        self.prefix_store.release_all()
        self.reset_prefix_cache()
        self.runner.update_params(functools.partial(self.intake.later, params))

    # What it is asked.

    @property
    def config(self) -> ModelConfig:
        """The model's architecture as it runs."""
        return self.runner.config

    @property
    def params(self) -> Params:
        """The parameters as they run, of the same function as those that came in.

        Heads may be in another order, matrices quantised, or packed for kernels; on a CPU a tied
        model has an output projection of its own.
        """
        return self.runner.params

    @property
    def spec(self) -> CacheSpec:
        """Sizes of the cache."""
        return self.runner.spec

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether some request's end is not yet returned."""
        return bool(self.unfinished or self._cancelled)

    def owes(self, request_id: str) -> bool:
        """Whether the request's end is not yet returned."""
        return request_id in self.unfinished or request_id in self._cancelled

    @property
    def room(self) -> int:
        """How many more requests may wait so that the next step can fill every slot."""
        return max(self.spec.max_num_seqs - len(self.scheduler.waiting), 0)

    def metrics(self) -> EngineMetrics:
        """A snapshot; cheap, nothing is fetched from the device.

        Any thread may ask. Beside the one that steps, its numbers can be of two moments.
        """
        scheduler, cache = self.scheduler, self.scheduler.prefix_cache
        waiting = len(scheduler.waiting)
        host_pages = 0 if cache.host is None else len(cache.host)
        return EngineMetrics(
            waiting=waiting,
            running=max(len(self.unfinished) - waiting, 0),
            free_pages=cache.free_pages,
            cached_pages=cache.cached_pages,
            pinned_pages=cache.pinned_pages,
            cached_bytes=cache.cached_pages * self.units.page,
            host_pages=host_pages,
            host_bytes=host_pages * self.units.remembered_page,
            evicted_pages=cache.tree.evicted_pages,
            evicted_windows=cache.tree.evicted_windows,
            num_pages=self.spec.num_pages,
            prompt_tokens=self.runner.prompt_tokens,
            compilations=self.runner.compilations,
            last_step=self._last_step,
            **dataclasses.asdict(self._counts),
        )

    def memory_plan(self) -> dict[str, int]:
        """Bytes of the parameters and of each part of the cache (see ``attention/cache.py``)."""
        return self.runner.memory_plan()

    def shape_buckets(self) -> dict[str, list[int]]:
        """All sizes that jitted functions run with.

        A prompt chunk compiles once a size, and once more for each number of prompts that run in
        one call (their size as often in "joined_tokens"), a burst once for each combination of
        slots, relay groups, prefix pages (with relay) and ``SamplingMode`` that occurs;
        ``prompt_logprobs`` are chunks of their own.
        """
        chunks, relays = self.runner.chunk_buckets(), self.relay != "never"
        joined = [n for n in chunks for rows in self.runner.row_counts(n) if rows > 1]
        return shape_buckets(
            self.spec,
            chunks,
            joined=[] if self.deterministic else joined,
            relays=relays,
            all_slots=self.deterministic,
        )

    def most_new_tokens(self, prompt: PromptIds, cache_salt: str | None = None) -> int:
        """Most ``max_tokens`` of a prompt; below 1 where it cannot run at all."""
        cache = self.scheduler.prefix_cache
        found = self.scheduler.pinned_match(prompt.ids, cache_salt)
        held_by_others = cache.pinned_pages - found
        # The last token is never fed back.
        cached = (self.spec.num_pages - held_by_others) * self.spec.page_size + 1
        return min(self.max_model_len, cached) - len(prompt.ids)

    def check_request(
        self,
        prompt: PromptIds | Sequence[int] | np.ndarray,
        sampling: SamplingParams,
        constraint: Constraint | None = None,
        cache_salt: str | None = None,
    ) -> PromptIds:
        """The prompt, checked; raises ``ValueError`` for a request that could never run."""
        if not isinstance(sampling, SamplingParams):
            raise TypeError(f"sampling must be SamplingParams, got {sampling!r}")
        ids = PromptIds.check(prompt, self.config.vocab_size)
        if len(ids) == 0:
            raise ValueError("the prompt is empty: generation needs at least one token")
        if len(ids) + sampling.max_tokens > self.max_model_len:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and max_tokens={sampling.max_tokens} make "
                f"{len(ids) + sampling.max_tokens}, more than max_model_len={self.max_model_len}"
            )
        check_stop_ids(sampling, self.eos_token_ids, self.config.vocab_size)
        if not isinstance(cache_salt, str | None) or cache_salt == "":
            raise ValueError(f"{cache_salt=} must be a text that is not empty, or None")
        self.scheduler.check_pages(ids.ids, sampling, cache_salt)
        request_rules(sampling, constraint, self.eos_token_ids, self.config.vocab_size)
        return ids

    def add_request(
        self,
        request_id: str,
        prompt: PromptIds | Sequence[int] | np.ndarray,
        sampling: SamplingParams,
        *,
        seed: int,
        completion: int = 0,
        deadline: float | None = None,
        constraint: Constraint | None = None,
        record_reads: bool = False,
        cache_salt: str | None = None,
    ) -> None:
        """Queues a request; ``seed`` is used where ``sampling.seed`` is None.

        ``completion`` numbers requests that sample the same prompt with the same seed: each draws
        from a random stream of its own. ``deadline`` seconds from now the request ends with what
        it has (``finish_reason`` "deadline"). ``constraint``, this request's alone, is what
        ``bad_words`` and ``structured_outputs`` mean for tokens; ``TextEngine`` makes it.
        ``record_reads`` notes which pages each token reads (``TokenOutput.page_reads``): bursts
        are of one selection meanwhile, tokens are the same. ``cache_salt``: only prompts of one
        salt share what was computed, so that nobody learns from the time to the first token what
        others asked.

        Raises ``ValueError`` for a duplicate id (``TypeError`` for one that is no text) or a
        request that could never run.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"{request_id=} must be a text")
        if self.owes(request_id):
            raise ValueError(f"a request with id {request_id!r} is already in the engine")
        check_deadline(deadline)
        check_bool("record_reads", record_reads)
        self.runner.check_params()
        ids = self.check_request(prompt, sampling, constraint, cache_salt)
        now = self.clock()
        request = Request(
            request_id=request_id,
            number=self._next_number,
            prompt=ids.ids,
            cache_salt=cache_salt,
            block_sparse=self.spec.is_block_sparse(len(ids)),
            sampling=sampling,
            sampling_row=sampling_row(
                sampling,
                eos_token_ids=self.eos_token_ids,
                default_seed=seed,
                completion=completion,
            ),
            rules=request_rules(sampling, constraint, self.eos_token_ids, self.config.vocab_size),
            arrival=now,
            deadline=None if deadline is None else now + deadline,
            reads=PageReads.of(self.spec, self.head_kinds, len(ids)) if record_reads else None,
        )
        self._next_number += 1
        self.unfinished[request_id] = request
        self.scheduler.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request now; its slot and pages are free at once.

        Nothing more comes of it but a last output, with ``finish_reason`` "cancelled" and no token,
        which the next step returns.

        Raises ``ValueError`` if no such request waits or runs.
        """
        request = self._find(request_id)
        self._cancel(request)
        self._cancelled[request_id] = request.output(None, "cancelled", self.units)

    def _cancel(self, request: Request) -> None:
        self._stop(request)
        self._counts.cancelled += 1

    def finish(self, request_id: str) -> None:
        """Ends a request whose text is complete, as by a stop string: it counts as finished.

        Raises ``ValueError`` if no such request waits or runs.
        """
        self._stop(self._find(request_id))
        self._counts.finished += 1

    def _find(self, request_id: str) -> Request:
        if not isinstance(request_id, str) or request_id not in self.unfinished:
            raise ValueError(f"no request with id {request_id!r} is waiting or running")
        return self.unfinished[request_id]

    def abandon(self, request_ids: Iterable[str]) -> None:
        """After an error in the middle of a call: ends its requests, as far as there are any.

        Nothing more comes of them, no last output either.

        Resets the engine if the device failed, or if it is interrupted itself.
        """
        try:
            for request_id in request_ids:
                self._cancelled.pop(request_id, None)
                if request_id in self.unfinished:
                    self._cancel(self.unfinished[request_id])
            self.runner.wait()
        except RuntimeError:  # JAX's, of a computation that failed
            self.reset()
        except BaseException:
            self.reset()
            raise

    def _stop(self, request: Request) -> None:
        """Takes a request out before its end; the device may be in the middle of a burst of it.

        What that burst still writes goes to pages whose next owner writes after it.
        """
        request.finished = True
        del self.unfinished[request.request_id]
        if request.slot in self.scheduler.running:
            self.runner.stop(request.slot)
        self.scheduler.release(request)

    def stream(self) -> Iterator[TokenOutput]:
        """Runs until no request is left; yields tokens as they come. Requests may be added.

        Raises ``ValueError`` if the engine is reset while it runs: its requests are gone then.
        """
        resets = self.resets
        while self.has_unfinished_requests:
            # Of one that is cancelled while they are taken only its last output comes.
            yield from (
                n for n in self.step() if n.finish_reason or n.request_id in self.unfinished
            )
            if self.resets != resets:
                raise ValueError("the engine was reset while requests ran: they are gone")

    def step(self) -> list[TokenOutput]:
        """Dispatches the next work: prompt chunks, then a burst of decode steps.

        Returns what came of the burst before. If the last step completed prompts, only waits for
        their first tokens, while the burst behind them runs. At most ``runner.chunk_size`` prompt
        tokens are run.
        """
        cancelled, self._cancelled = list(self._cancelled.values()), {}
        if self.prefill.first_tokens:
            return cancelled + self._collect_first_tokens()
        before, prompt_tokens = dataclasses.replace(self._counts), self.runner.prompt_tokens
        outputs = cancelled + self._expire()
        self.prefill.run()
        burst, early = self._dispatch()
        outputs += early + self._collect()
        self._in_flight = burst
        self._counts.steps += 1
        self._last_step = StepMetrics.between(
            before,
            self._counts,
            prefill_tokens=self.runner.prompt_tokens - prompt_tokens,
            **({} if burst is None else burst.metrics),
        )
        return outputs

    def _expire(self) -> list[TokenOutput]:
        now = self.clock()
        late = [
            request
            for request in self.unfinished.values()
            if request.deadline is not None and now > request.deadline
        ]
        outputs = {new.request_id: new for new in self._collect()} if late else {}
        for request in late:
            if not request.finished:
                self._stop(request)
                self._counts.finished += 1
                end = request.output(None, "deadline", self.units)
                # Its last tokens and its end are one output: there is one a request and step.
                last = outputs.get(request.request_id, end)
                outputs[request.request_id] = dataclasses.replace(last, finish_reason="deadline")
        return list(outputs.values())

    # Prompts.

    def _collect_first_tokens(self) -> list[TokenOutput]:
        """Fetches those that are not yet fetched."""
        outputs: list[TokenOutput] = []
        for request, first in self.prefill.take_first_samples():
            fetched = jax.device_get((request.judged, request.attended_blocks))
            judged, attended = fetched[0], int(sum(fetched[1]))
            self._counts.prefill_blocks += attended
            self._counts.causal_prefill_blocks += request.causal_blocks
            if first is None:  # of the prompt's own tokens none is new
                first = jax.tree.map(lambda x: x[:0], judged[0])
            if not request.finished:
                request.begin(self.clock(), judged, attended)
                outputs += self._emit(request, first)
        return outputs

    # Decoding.

    def _dispatch(self) -> tuple[InFlight | None, list[TokenOutput]]:
        """Starts a burst of all running requests; also returns outputs fetched to make room."""
        outputs: list[TokenOutput] = []
        if self.scheduler.has_stepwise:  # what they may sample follows from all their tokens
            outputs = self._collect() + self._collect_first_tokens()
        steps = self.scheduler.burst_length()
        if self.scheduler.is_short_of_pages(steps):
            # The burst before may have ended requests, and who is preempted must have all its
            # tokens.
            outputs += self._collect()
            steps = self.scheduler.burst_length()
        for slot in self.scheduler.reserve(steps):
            self.runner.stop(slot)
            self._counts.preemptions += 1
        requests = sorted(self.scheduler.running.items())
        if not requests:
            return None, outputs
        most = self.spec.max_num_seqs
        rows = most if self.deterministic else bucket(requests[-1][0] + 1, 1, most)
        groups, decisions = group_by_prefix(
            requests, self.relay, self.runner, self.units, num_rows=rows
        )
        times = None if self.deterministic else self._draft_times
        none = {slot: DraftDecision(drafts=0, reason="") for slot, _ in requests}

        def dense_is_ready() -> bool:
            return self.runner.has_program(self.scheduler.burst_inputs(steps, rows, groups, none))

        drafts = decide_all(requests, self.runner, self.units, times, rows, dense_is_ready)
        inputs = self.scheduler.burst_inputs(steps, rows, groups, drafts)
        burst, timed = self.runner.decode(inputs), None
        if times is not None and drafts and all(d.dense_bytes for d in drafts.values()):
            others = self.runner.prompt_tokens, self.runner.compilations
            timed = times.begin(rows, drafts, others)
        chosen = {s: self.runner.selected_pages(s) for s, r in requests if r.records_selections}
        self._counts.relay_bursts += groups is not None
        for _, request in requests:
            request.scheduled += request.steps_of(steps)
            if request.remaining == 0:
                # Surely at its end after this burst: the next request can have its slot, since
                # what it runs comes after the burst.
                self.scheduler.release(request)
        in_flight = InFlight(
            burst=burst,
            inputs=inputs,
            requests=requests,
            decisions=decisions,
            chosen=chosen,
            timed=timed,
        )
        return in_flight, outputs

    # Results.

    def _collect(self) -> list[TokenOutput]:
        """Fetches the burst in flight, if there is one."""
        if self._in_flight is None:
            return []
        in_flight, self._in_flight = self._in_flight, None
        steps: Any = in_flight.burst.steps  # an array, whose type says nothing of ``is_ready``
        waited = not steps.is_ready()
        result = jax.device_get(in_flight.burst)
        now = self.clock()
        done = {slot: BurstRow.of(result, slot) for slot, _ in in_flight.requests}
        if in_flight.timed is None:
            self._draft_times.untimed()
        else:
            self._draft_times.end(in_flight.timed, done, now, waited=waited)
        outputs: list[TokenOutput] = []
        for slot, request in in_flight.requests:
            if request.finished:
                continue
            row, drafts = done[slot], in_flight.drafts(slot)
            request.record(in_flight, slot)
            relay = in_flight.decisions.get(slot)
            request.add_costs(row, self.units, relay, now, drafts=drafts)
            self._counts.tokens_attended += round(row.attended)
            self._counts.selector_runs += row.selections
            samples = jax.tree.map(lambda x, s=slot, n=row.steps: x[:n, s], result.samples)
            outputs += self._emit(request, samples)
        return outputs

    def _emit(self, request: Request, samples: Sample) -> list[TokenOutput]:
        """Returns new tokens (leaves ``[n, ...]``); ends the request if they end it."""
        new = request.take(samples)
        self._counts.generated_tokens += len(new.token)
        finish_reason = request.finish_reason()
        if finish_reason is not None:
            self._stop(request)
            self._counts.finished += 1
        elif len(new.token) == 0:
            return []
        return [request.output(new, finish_reason, self.units)]

    # Prefixes.

    def reset_prefix_cache(self) -> None:
        """Forgets all prompts that no request runs on and nobody asked to keep."""
        self.scheduler.prefix_cache.clear()

    def add_prefix(self, token_ids: Sequence[int] | np.ndarray) -> Prefix:
        """Computes a prefix and holds it; requests that begin with it share it from then on.

        The same tokens again give the same prefix, to be released once more, if they fill a page.
        Returns when the device has the work; a prompt in prefill is finished first.

        Raises ``ValueError`` if a token is outside the vocabulary, the prefix is longer than
        ``max_model_len``, or there is no room for it.
        """
        return self.prefix_store.add(token_ids)

    def load_prefix(self, path: str | os.PathLike[str]) -> Prefix:
        """A prefix that ``Prefix.save`` wrote, of the same model and cache layout.

        Raises ``ValueError`` for a file that is missing, broken or of something else, and where
        there is no room.
        """
        return self.prefix_store.load(path)

    def _finish_prompt(self) -> None:
        """Runs what is left of a prompt in prefill: the prefix needs its window."""
        try:
            self.prefill.finish_prompt()
        except BaseException:
            # Whoever asks for the prefix knows nothing of the request, whose own caller must hear
            # that it is gone: ``TextEngine.step`` says so after a reset.
            self.reset()
            raise
