"""The host side of generation: requests in, token ids out.

A request waits until a slot and pages for its prompt are free. Its prompt is prefilled chunk by
chunk, between bursts of decode steps, so that those who decode already never wait for longer than
a chunk. It then decodes with its neighbours until it stops.

The device is kept busy: a step of the engine first hands out the next work and only then fetches
the results of the work before.

    host     | hand out n | fetch n-1, give out tokens | hand out n+1 | fetch n, ...
    device   ...burst n-1 |  chunk n   |   burst n                    |  chunk n+1 ...

Every jitted call has one of a few shapes: prompts are padded to power-of-two chunk lengths, decode
runs on power-of-two numbers of slots (``Engine.shape_buckets``).
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.attention.attend import PrefixGroups
from lserve_jax.attention.cache import CacheSpec, cache_bytes, init_layer_cache
from lserve_jax.engine.metrics import EngineMetrics, RelayDecision, RequestMetrics, StepMetrics
from lserve_jax.engine.prefix import Prefix, read_prefix
from lserve_jax.engine.relay import RelayMode, check_mode, decide
from lserve_jax.engine.request import Request, TokenOutput
from lserve_jax.engine.sampling import SamplingArrays, SamplingMode, sampling_row
from lserve_jax.engine.scheduler import Scheduler
from lserve_jax.engine.steps import (
    Burst,
    Caches,
    DecodeState,
    Sample,
    deactivate,
    decode_burst,
    insert,
    keep_prefix,
    prefill_chunk,
    read_prefix_pages,
    restore_window,
    write_prefix_pages,
)
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params
from lserve_jax.sampling_params import SamplingParams
from pallas_kernels.api import MOST_SELECTED_PAGES, Backend, resolve_backend

SMALLEST_CHUNK = 64  # shorter prompts are padded to this
MAX_STOP_IDS = 32  # of one request, end-of-text ids included


@dataclass(kw_only=True)
class _InFlight:
    """A burst on the device whose results are not yet fetched."""

    burst: Burst
    steps: int
    requests: list[tuple[int, Request]]  # (slot, request)
    relays: dict[int, RelayDecision]  # by slot, of those whose request has a prefix


def bucket(n: int, smallest: int, largest: int) -> int:
    """The power of two at or above ``n``, within the two limits."""
    return min(max(smallest, 1 << (n - 1).bit_length()), largest)


def _buckets(smallest: int, largest: int) -> list[int]:
    return sorted({bucket(n, smallest, largest) for n in range(smallest, largest + 1)})


class Engine:
    """Runs requests through a fixed number of slots.

    ``params`` and the spec's head counts must agree on the order of heads (retrieval first; see
    ``convert.attention_patterns.permute_heads``).

    prefill_chunk_size: prompt tokens run at once, a power of two; also the most that are run
        between two bursts, by whatever number of prompts.
    burst_steps: decode steps between two looks at the queue, rounded up to whole selection
        intervals.
    relay: whether requests with one prefix read it together: "always", "never", or "auto" by the
        rule of ``relay.py``.
    deterministic: always runs all slots, so that a request's numbers do not depend on how many
        others there are; needs relay="never", in dense attention "always" will do too.
    clock: tells the time in seconds.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        spec: CacheSpec,
        *,
        dtype,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        prefill_chunk_size: int,
        burst_steps: int,
        relay: RelayMode = "auto",
        deterministic: bool = False,
        backend: Backend = "auto",
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_mode(relay, deterministic, spec.sparsity)
        self.config, self.params, self.spec = config, params, spec
        self.backend = resolve_backend(backend)
        if relay == "always" and not self._has_prefix_kernel:
            raise NotImplementedError(
                f"{relay=} with kv_dtype={spec.kv_dtype!r} has no kernel: prefix_attention reads "
                "bfloat16 pages"
            )
        if self.backend == "mosaic" and spec.num_ranked > MOST_SELECTED_PAGES:
            assert spec.sparsity is not None  # nothing is ranked in dense attention
            raise NotImplementedError(
                f"token_budget={spec.sparsity.token_budget} is more than {MOST_SELECTED_PAGES} "
                f"pages of selected_page_size={spec.selected_page_size}, which the kernel can "
                "select; lower the one or raise the other"
            )
        self.max_model_len = max_model_len
        self.eos_token_ids = tuple(eos_token_ids)
        self.prefill_chunk_size = prefill_chunk_size
        # A whole number of selection intervals, so that every burst begins with a selection.
        self.burst_steps = -(-burst_steps // spec.reuse_interval) * spec.reuse_interval
        self.relay: RelayMode = relay
        self.deterministic, self.clock = deterministic, clock
        self._dtype = dtype
        sizes = cache_bytes(config, spec, dtype)
        self._page_bytes = (sizes["retrieval"] + sizes["key_stats"]) // spec.num_pages
        self._statistics_bytes = sizes["key_stats"] // spec.num_pages
        self._slot_bytes = (
            sizes["streaming"] // spec.num_streaming_pages * spec.decode_window.num_pages
        )
        code_bytes = 1 if spec.kv_dtype == "int8" else jnp.dtype(dtype).itemsize
        scale_bytes = 4 if spec.kv_dtype == "int8" else 0
        self._token_bytes = 2 * (config.head_dim * code_bytes + scale_bytes)  # one KV head
        # In the retrieval heads of a layer, on average.
        num_retrieval = sum(spec.num_retrieval_heads) / len(spec.num_retrieval_heads)
        self.retrieval_token_bytes = num_retrieval * self._token_bytes
        self._shapes: set[tuple] = set()  # that jitted functions were called with
        self._counts = dict.fromkeys(
            ("finished", "cancelled", "prompt_tokens", "prefix_tokens", "generated_tokens",
             "selector_runs", "relay_bursts", "steps", "preemptions", "tokens_attended"), 0,
        )  # fmt: skip
        self._next_number = 0
        self.scheduler = Scheduler(spec, self.burst_steps)
        self.reset()

    @property
    def _has_prefix_kernel(self) -> bool:
        return self.backend == "reference" or self.spec.kv_dtype != "int8"

    def reset(self) -> None:
        """Drops every request and prefix and begins with an empty cache.

        Also the way back after a failure on the device: what a failed call was given to update
        in place is lost.
        """
        config, spec = self.config, self.spec
        self.caches: Caches = []  # the old ones go first: there may be no room for both
        self.caches = [
            init_layer_cache(config, spec, layer, self._dtype)
            for layer in range(config.num_hidden_layers)
        ]
        self.state = self._empty_state()
        for prefix in self.scheduler.prefixes.values():
            prefix.pins, prefix.pages, prefix.windows, prefix.index = 0, [], [], -1
        self.scheduler = Scheduler(spec, self.burst_steps)
        self.unfinished: dict[str, Request] = {}  # those whose end is not yet handed out
        self._in_flight: _InFlight | None = None
        self._first_tokens: list[tuple[Request, Sample]] = []  # not yet fetched
        self._last_step: StepMetrics | None = None

    def _empty_state(self) -> DecodeState:
        S = self.spec.max_num_seqs

        def zeros() -> jax.Array:  # one buffer a field: donated buffers must not be shared
            return jnp.zeros((S,), jnp.int32)

        return DecodeState(
            token=zeros(),
            position=zeros(),
            active=jnp.zeros((S,), bool),
            generated=zeros(),
            max_tokens=zeros(),
            tail=zeros(),
            sampling=SamplingArrays.empty(S, MAX_STOP_IDS),
            output_counts=None,
            prompt_mask=None,
        )

    # What it is asked.

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.unfinished)

    def metrics(self) -> EngineMetrics:
        """A snapshot; cheap, nothing is fetched from the device."""
        scheduler, counts = self.scheduler, self._counts
        return EngineMetrics(
            waiting=len(scheduler.waiting),
            running=len(self.unfinished) - len(scheduler.waiting),
            free_pages=len(scheduler.pool.free),
            pinned_pages=scheduler.pinned_pages,
            num_pages=self.spec.num_pages,
            compilations=len(self._shapes),
            last_step=self._last_step,
            **{name: counts[name] for name in counts if name not in ("steps", "tokens_attended")},
        )

    def shape_buckets(self) -> dict[str, list[int]]:
        """All sizes that jitted functions run with.

        A prompt chunk compiles once a size, a burst once for each combination of slots, relay
        groups, prefix pages (with relay) and ``SamplingMode`` that occurs.
        """
        spec = self.spec
        slots = [spec.max_num_seqs] if self.deterministic else _buckets(1, spec.max_num_seqs)
        groups = [] if self.relay == "never" else _buckets(1, 2 * spec.max_prefixes)
        return {
            "chunk_tokens": _buckets(SMALLEST_CHUNK, self.prefill_chunk_size),
            "slots": slots,
            "relay_groups": [0, *groups],
            "prefix_pages": _buckets(1, spec.pages_per_sequence),
        }

    def check_request(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Raises ``ValueError`` for a request that could never run."""
        n, V = len(prompt_token_ids), self.config.vocab_size
        if n == 0:
            raise ValueError("the prompt is empty: generation needs at least one token")
        for token in prompt_token_ids:
            if not 0 <= token < V:
                raise ValueError(f"prompt token id {token} is outside the vocabulary [0, {V})")
        if n + sampling.max_tokens > self.max_model_len:
            raise ValueError(
                f"the prompt's {n} tokens and max_tokens={sampling.max_tokens} make "
                f"{n + sampling.max_tokens}, more than max_model_len={self.max_model_len}"
            )
        for token in sampling.stop_token_ids:
            if token >= V:
                raise ValueError(f"stop token id {token} is outside the vocabulary [0, {V})")
        eos_token_ids = () if sampling.ignore_eos else self.eos_token_ids
        stop_ids = len({*sampling.stop_token_ids, *eos_token_ids})
        if stop_ids > MAX_STOP_IDS:
            raise ValueError(
                f"{stop_ids} stop token ids, end-of-text ids included, exceed {MAX_STOP_IDS}"
            )
        scheduler = self.scheduler
        pages = scheduler.most_pages(np.asarray(prompt_token_ids, np.int32), sampling.max_tokens)
        pinned = scheduler.pinned_pages
        if pages > self.spec.num_pages - pinned:
            held = f", {pinned} of them held by prefixes" if pinned else ""
            raise ValueError(
                f"the request needs {pages} pages of {self.spec.page_size} tokens, the KV cache "
                f"has {self.spec.num_pages}{held}: give it more memory (kv_cache_bytes) or ask "
                "for less"
            )

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        seed: int,
        completion: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Queues a request; ``seed`` is used where ``sampling.seed`` is None.

        ``completion`` numbers requests that sample the same prompt with the same seed: each draws
        from a random stream of its own. ``deadline`` seconds from now the request ends with what
        it has (``finish_reason`` "deadline").

        Raises ``ValueError`` for a duplicate id or a request that could never run.
        """
        if request_id in self.unfinished:
            raise ValueError(f"a request with id {request_id!r} is already in the engine")
        if deadline is not None and not deadline > 0:
            raise ValueError(f"{deadline=} must be positive: it is in seconds from now")
        self.check_request(prompt_token_ids, sampling)
        now = self.clock()
        request = Request(
            request_id=request_id,
            number=self._next_number,
            prompt=np.array(prompt_token_ids, np.int32),  # a copy: the caller may go on writing
            sampling=sampling,
            sampling_row=sampling_row(
                sampling,
                eos_token_ids=self.eos_token_ids,
                default_seed=seed,
                completion=completion,
            ),
            arrival=now,
            deadline=None if deadline is None else now + deadline,
        )
        self._next_number += 1
        self.unfinished[request_id] = request
        self.scheduler.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request now; its slot and pages are free at once.

        Raises ``ValueError`` if no such request waits or runs.
        """
        request = self.unfinished.get(request_id)
        if request is None:
            raise ValueError(f"no request with id {request_id!r} is waiting or running")
        self._counts["cancelled"] += 1
        self._stop(request)

    def abandon(self, request_ids: Iterable[str]) -> None:
        """After an error in the middle of a call: ends its requests, as far as there are any.

        Resets the engine if the error came from the device, whose state is lost then.
        """
        try:
            for request_id in request_ids:
                if request_id in self.unfinished:
                    self.cancel(request_id)
            jax.block_until_ready((self.caches, self.state))
        except RuntimeError:  # JAX's, of a computation that failed and of arrays that it consumed
            self.reset()

    def _stop(self, request: Request) -> None:
        """Takes a request out before its end; the device may be in the middle of a burst of it.

        What that burst still writes goes to pages whose next owner writes after it.
        """
        request.finished = True
        del self.unfinished[request.request_id]
        if request.slot in self.scheduler.running:
            self.state = deactivate(self.state, jnp.int32(request.slot))
        self.scheduler.release(request)

    def stream(self) -> Iterator[TokenOutput]:
        """Runs until no request is left; yields tokens as they come. Requests may be added."""
        while self.has_unfinished_requests:
            yield from self.step()

    def step(self) -> list[TokenOutput]:
        """Hands out the next work: prompt chunks, then a burst of decode steps.

        Returns what came of the burst before. If the last step completed prompts, only waits for
        their first tokens, while the burst behind them runs. At most ``prefill_chunk_size`` prompt
        tokens are run.
        """
        if self._first_tokens:
            pending, self._first_tokens = self._first_tokens, []
            return [new for request, first in pending for new in self._first_token(request, first)]
        before = dict(self._counts)
        outputs = self._expire()
        self._first_tokens += self._prefill()
        burst, early = self._dispatch()
        outputs += early + self._collect()
        self._in_flight = burst
        self._counts["steps"] += 1
        counts = {name: self._counts[name] - before[name] for name in before}
        self._last_step = StepMetrics(
            number=self._counts["steps"],
            prefill_tokens=counts["prompt_tokens"],
            prefix_tokens=counts["prefix_tokens"],
            selector_runs=counts["selector_runs"],
            pages_attended=counts["tokens_attended"] / self.spec.page_size,
            decode_requests=len(burst.requests) if burst else 0,
            decode_steps=burst.steps if burst else 0,
            relay=tuple({id(x): x for x in burst.relays.values()}.values()) if burst else (),
        )
        return outputs

    def _expire(self) -> list[TokenOutput]:
        now = self.clock()
        late = [
            request
            for request in self.unfinished.values()
            if request.deadline is not None and now > request.deadline
        ]
        outputs = self._collect() if late else []
        for request in late:
            if not request.finished:
                self._stop(request)
                self._counts["finished"] += 1
                outputs.append(self._output(request, None, "deadline"))
        return outputs

    # Prompts.

    def prefill_waiting(self) -> None:
        """Prefills waiting requests, as many as slots and pages allow, and decodes nothing.

        For those who run decode steps of their own on the caches (``eval/scoring.py``).
        """
        while self.scheduler.prefilling is not None or self._admit() is not None:
            self._prefill()

    def _prefill(self) -> list[tuple[Request, Sample]]:
        """Runs chunks as far as the step's budget goes; returns prompts that are through.

        The budget, which counts padding too, never cuts a chunk: its bounds are the request's own,
        and so are its numbers.
        """
        done, spent = [], 0
        while True:
            request = self.scheduler.prefilling or self._admit()
            if request is None:
                break
            size = self._padded(len(request.prompt) - request.prefilled)
            if spent and spent + size > self.prefill_chunk_size:
                break
            spent += size
            first = self._next_chunk(request)
            if first is not None:
                done.append((request, first))
        return done

    def _padded(self, tokens: int) -> int:
        """Length of the next chunk of so many tokens, padding included."""
        return bucket(tokens, SMALLEST_CHUNK, self.prefill_chunk_size)

    def _next_chunk(self, request: Request) -> Sample | None:
        """Prefills the request's next chunk; its first token if that was the last."""
        chunk = request.prompt[request.prefilled :][: self.prefill_chunk_size]
        logits = self._run_chunk(
            chunk,
            self.scheduler.page_table[request.slot],
            start=request.prefilled,
            total=len(request.prompt),
        )
        request.prefilled += len(chunk)
        if request.prefilled < len(request.prompt):
            return None
        return self._start(request, logits)

    def _admit(self) -> Request | None:
        request = self.scheduler.admit()
        if request is None:
            return None
        request.prefill_start = self.clock()
        if request.prefix is not None:
            windows = request.prefix.windows
            if any(window.k.size for window in windows):  # else no head streams
                self._count_shape("restore_window", windows[0].k.shape)
                self.caches = restore_window(self.caches, windows)
            self._counts["prefix_tokens"] += request.shared_tokens
        return request

    def _run_chunk(
        self, chunk: np.ndarray, page_table: np.ndarray, *, start: int, total: int
    ) -> jax.Array:
        """Prefills ``chunk``, tokens ``start`` on of ``total``; returns the last one's logits."""
        padded = np.zeros((self._padded(len(chunk)),), np.int32)
        padded[: len(chunk)] = chunk
        self._count_shape("prefill_chunk", len(padded))
        self._counts["prompt_tokens"] += len(chunk)
        logits, self.caches = prefill_chunk(
            self.config,
            self.spec,
            self.params,
            self.caches,
            jnp.asarray(padded),
            jnp.asarray(page_table.copy()),  # the scheduler goes on writing to it
            jnp.int32(start),
            jnp.int32(len(chunk)),
            jnp.int32(total),
            backend=self.backend,
        )
        return logits

    def _start(self, request: Request, logits: jax.Array) -> Sample:
        """Gives the prefilled request its slot's state and samples its first token."""
        self.scheduler.start(request)
        prompt_mask = self._count_tokens(request)
        sampling = self.state.sampling.with_row(request.slot, request.sampling_row)
        self.state = dataclasses.replace(self.state, sampling=sampling)
        mode = SamplingMode.of([request.sampling])
        self._count_shape("insert", mode, prompt_mask is None)
        self.state, self.caches, first = insert(
            self.spec,
            self.caches,
            self.state,
            jnp.int32(request.slot),
            logits,
            jnp.int32(len(request.prompt)),
            jnp.int32(request.sampling.max_tokens),
            jnp.int32(request.tokens[0] if request.tokens else -1),
            jnp.asarray(not self._shares_sinks(request)),
            prompt_mask,
            mode=mode,
        )
        request.scheduled = 1
        if request.remaining == 0:
            self.scheduler.release(request)
        return first

    def _shares_sinks(self, request: Request) -> bool:
        """Whether its streaming heads read the sinks of its prefix: they all lie in it."""
        return request.prefix is not None and request.shared_tokens >= self.spec.decode_window.sink

    def _count_tokens(self, request: Request) -> jax.Array | None:
        """The prompt mask for penalties, once any request has asked for them; else None."""
        V = self.config.vocab_size
        if self.state.output_counts is None:
            if not request.sampling.uses_penalties:
                return None
            shape = (self.spec.max_num_seqs, V)
            self.state = dataclasses.replace(
                self.state,
                output_counts=jnp.zeros(shape, jnp.int32),
                prompt_mask=jnp.zeros(shape, bool),
            )
        mask = np.zeros((V,), bool)
        mask[request.prompt] = True
        return jnp.asarray(mask)

    def _first_token(self, request: Request, first: Sample) -> list[TokenOutput]:
        first = jax.device_get(first)
        if request.finished:
            return []
        now = self.clock()
        if request.first_token is None:
            request.first_token = now
            request.metrics = dataclasses.replace(
                request.metrics,
                prompt_tokens=len(request.prompt),
                prefix_tokens=request.shared_tokens,
                queue_seconds=request.prefill_start - request.arrival,
                prefill_seconds=now - request.prefill_start,
                first_token_seconds=now - request.arrival,
            )
        return self._emit(request, first)

    # Decoding.

    def _dispatch(self) -> tuple[_InFlight | None, list[TokenOutput]]:
        """Starts a burst of all running requests; also returns outputs fetched to make room."""
        outputs: list[TokenOutput] = []
        steps = self._steps()
        if self.scheduler.is_short_of_pages(steps):
            # The burst before may have ended requests, and who is preempted must have all its
            # tokens.
            outputs = self._collect()
            steps = self._steps()
        for slot, request in self.scheduler.reserve(steps):
            self.state = deactivate(self.state, jnp.int32(slot))
            self._counts["preemptions"] += 1
            request.metrics = dataclasses.replace(
                request.metrics, preemptions=request.metrics.preemptions + 1
            )
        requests = sorted(self.scheduler.running.items())
        if not requests:
            return None, outputs
        rows = self.spec.max_num_seqs
        if not self.deterministic:
            rows = bucket(requests[-1][0] + 1, 1, rows)
        mode = SamplingMode.of([request.sampling for _, request in requests])
        relay, relays = self._relay(requests, rows)
        groups = None if relay is None else relay.page_table.shape
        self._count_shape("decode_burst", rows, groups, mode, self.state.output_counts is None)
        self.state, self.caches, burst = decode_burst(
            self.config,
            self.spec,
            self.params,
            self.caches,
            self.state,
            *self.decode_tables(),
            relay,
            jnp.asarray(self._forced_tokens(requests, rows)),
            jnp.int32(steps),
            rows=rows,
            burst=self.burst_steps,
            mode=mode,
            backend=self.backend,
        )
        self._counts["relay_bursts"] += relay is not None
        for _, request in requests:
            request.scheduled += min(steps, request.remaining)
            if request.remaining == 0:
                # Surely at its end after this burst: whoever is next can have its place, since
                # what it runs comes after the burst.
                self.scheduler.release(request)
        in_flight = _InFlight(burst=burst, steps=steps, requests=requests, relays=relays)
        return in_flight, outputs

    def _steps(self) -> int:
        """Length of the next burst: no longer than any request needs."""
        longest = max((r.remaining for r in self.scheduler.running.values()), default=0)
        interval = self.spec.reuse_interval
        return min(self.burst_steps, -(-longest // interval) * interval)

    def decode_tables(self) -> tuple[jax.Array, jax.Array]:
        """What decode must know of every slot's pages, int32.

        The page table ``[S, M]``, and the streaming pages where the slots' sinks begin ``[S]``.
        """
        sinks = np.array([self.spec.slot_sink(s) for s in range(self.spec.max_num_seqs)], np.int32)
        for slot, request in self.scheduler.running.items():
            if request.prefix is not None and self._shares_sinks(request):
                sinks[slot] = self.spec.prefix_sink(request.prefix.index)
        # A copy: the scheduler goes on writing to its own.
        return jnp.asarray(self.scheduler.page_table.copy()), jnp.asarray(sinks)

    def _forced_tokens(self, requests: Sequence[tuple[int, Request]], rows: int) -> np.ndarray:
        """Tokens that preempted requests have made before, ``[burst_steps, rows]`` int32."""
        forced = np.full((self.burst_steps, rows), -1, np.int32)
        for slot, request in requests:
            replayed = request.tokens[request.scheduled :][: self.burst_steps]
            forced[: len(replayed), slot] = replayed
        return forced

    def _relay(
        self, requests: Sequence[tuple[int, Request]], rows: int
    ) -> tuple[PrefixGroups | None, dict[int, RelayDecision]]:
        """Which requests of a burst read their prefix together, and why the others do not."""
        groups: dict[tuple[int, int], list[tuple[int, Request]]] = {}
        for slot, request in requests:
            if request.prefix is not None:
                key = (request.prefix.index, request.shared_tokens)
                groups.setdefault(key, []).append((slot, request))
        decisions = {}
        for (place, shared), members in groups.items():
            private = sum(request.length - shared for _, request in members) // len(members)
            decision = decide(
                self.relay,
                self.spec,
                token_bytes=self.retrieval_token_bytes,
                prefix_tokens=shared,
                private_tokens=private,
                requests=len(members),
            )
            if decision.used and not self._has_prefix_kernel:
                reason = f"no kernel for {self.spec.kv_dtype} pages"
                decision = dataclasses.replace(decision, used=False, reason=reason)
            decisions[place, shared] = decision
        by_slot = {slot: decisions[key] for key in groups for slot, _ in groups[key]}
        used = [key for key, decision in decisions.items() if decision.used]
        if not used:
            return None, by_slot
        P = self.spec.page_size
        count = bucket(len(used), 1, 2 * self.spec.max_prefixes)
        longest = max(shared // P for _, shared in used)
        pages = np.zeros((count, bucket(longest, 1, self.spec.pages_per_sequence)), np.int32)
        tokens, group = np.zeros((count,), np.int32), np.full((rows,), -1, np.int32)
        for i, key in enumerate(used):
            tokens[i] = key[1]
            pages[i, : key[1] // P] = groups[key][0][1].pages[: key[1] // P]
            group[[slot for slot, _ in groups[key]]] = i
        relay = PrefixGroups(
            page_table=jnp.asarray(pages), length=jnp.asarray(tokens), group=jnp.asarray(group)
        )
        return relay, by_slot

    # Results.

    def _collect(self) -> list[TokenOutput]:
        """Fetches the burst in flight, if there is one."""
        if self._in_flight is None:
            return []
        in_flight, self._in_flight = self._in_flight, None
        result = jax.device_get(in_flight.burst)
        now = self.clock()
        outputs: list[TokenOutput] = []
        for slot, request in in_flight.requests:
            if request.finished:
                continue
            metrics = request.metrics
            assert request.first_token is not None  # it came before any burst was fetched
            steps, selections = int(result.steps[slot]), int(result.selections[slot])
            position = len(request.prompt) + request.received - 1
            request.position_sum += sum(range(position + 1, position + steps + 1))
            attended = float(result.attended[slot])
            request.attended += attended
            self._counts["tokens_attended"] += round(attended)
            request.statistics_pages += int(result.scored[slot])
            decision = in_flight.relays.get(slot)
            if decision is not None and decision.used:
                heads = sum(self.spec.num_retrieval_heads)
                attended -= steps * heads * decision.prefix_tokens * (1 - 1 / decision.requests)
            request.read += attended
            self._counts["selector_runs"] += selections
            request.metrics = dataclasses.replace(
                metrics,
                decode_seconds=now - request.first_token,
                decode_steps=metrics.decode_steps + steps,
                relay_steps=metrics.relay_steps + steps * (decision is not None and decision.used),
                relay_reason="no prefix" if decision is None else decision.reason,
                selector_runs=metrics.selector_runs + selections,
                bypassed_steps=metrics.bypassed_steps + int(result.bypassed[slot]),
            )
            samples = jax.tree.map(lambda x, s=slot, n=steps: x[:n, s], result.samples)
            outputs += self._emit(request, samples)
        return outputs

    def _emit(self, request: Request, samples: Sample) -> list[TokenOutput]:
        """Hands over new tokens (leaves ``[n, ...]``); ends the request if they end it."""
        count = len(samples.token)
        replayed = min(max(len(request.tokens) - request.received, 0), count)
        request.received += count
        new: Sample = jax.tree.map(lambda x: x[replayed:], samples)
        request.tokens += [int(token) for token in new.token]
        self._counts["generated_tokens"] += count - replayed
        finish_reason = None
        if request.tokens[-1] in request.sampling_row["stop_token_ids"]:
            finish_reason = "stop"
        elif len(request.tokens) >= request.sampling.max_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            request.finished = True
            del self.unfinished[request.request_id]
            self._counts["finished"] += 1
            self.scheduler.release(request)
        elif count == replayed:
            return []
        return [self._output(request, new, finish_reason)]

    def _output(
        self, request: Request, new: Sample | None, finish_reason: str | None
    ) -> TokenOutput:
        request.metrics = self._with_kv_metrics(
            request, dataclasses.replace(request.metrics, generated_tokens=len(request.tokens))
        )
        wanted = request.sampling.logprobs or 0
        return TokenOutput(
            request_id=request.request_id,
            token_ids=[] if new is None else [int(token) for token in new.token],
            logprobs=[] if new is None else [float(x) for x in new.logprob],
            top_logprobs=[]
            if new is None
            else [
                dict(zip(ids[:wanted].tolist(), values[:wanted].tolist(), strict=True))
                for ids, values in zip(new.top_ids, new.top_logprobs, strict=True)
            ],
            finish_reason=finish_reason,
            metrics=request.metrics,
        )

    def _with_kv_metrics(self, request: Request, metrics: RequestMetrics) -> RequestMetrics:
        steps = max(metrics.decode_steps, 1)
        heads = self.config.num_hidden_layers * self.config.num_key_value_heads
        written = max(len(request.prompt) + len(request.tokens) - 1, 0)
        pages = self.scheduler.pages_for(written)
        read = request.read * self._token_bytes
        read += request.statistics_pages * self._statistics_bytes
        dense = request.position_sum * heads * self._token_bytes
        return dataclasses.replace(
            metrics,
            pages_attended_per_step=request.attended / steps / heads / self.spec.page_size,
            kv_bytes_held=pages * self._page_bytes + self._slot_bytes,
            kv_bytes_read_per_step=read / steps,
            dense_kv_bytes_read_per_step=dense / steps,
        )

    def _count_shape(self, *shape: object) -> None:
        self._shapes.add(shape)

    # Prefixes.

    def add_prefix(self, token_ids: Sequence[int] | np.ndarray) -> Prefix:
        """Computes a prefix and holds it; requests that begin with it share it from then on.

        The same tokens again give the same prefix, to be released once more. The call returns when
        the device has the work; a prompt in the middle of its prefill is finished first.

        Raises ``ValueError`` if a token is outside the vocabulary, the prefix is longer than
        ``max_model_len``, or there is no room for it.
        """
        ids = self._check_prefix(token_ids)
        held = self._hold_again(ids)
        if held is not None:
            return held
        prefix = self._place_prefix(ids)
        try:
            self._fill_prefix(prefix)
        except BaseException:  # an error on the device, or Ctrl-C: its pages hold nothing of use
            prefix.release()
            raise
        return prefix

    def _check_prefix(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """A copy as int32; raises ``ValueError`` for what cannot be a prefix."""
        ids = np.array(token_ids)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"prefix token ids must be integers, got {ids.dtype}")
        if len(ids) > self.max_model_len:
            raise ValueError(
                f"the prefix has {len(ids)} tokens, more than max_model_len={self.max_model_len}"
            )
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(wrong):
            raise ValueError(
                f"prefix token id {wrong[0]} is outside the vocabulary "
                f"[0, {self.config.vocab_size})"
            )
        return ids.astype(np.int32)

    def _hold_again(self, ids: np.ndarray) -> Prefix | None:
        """Holds the prefix of these tokens once more; None if there is none."""
        for prefix in self.scheduler.prefixes.values():
            if prefix.pins and np.array_equal(prefix.token_ids, ids):
                prefix.pins += 1
                return prefix
        return None

    def _fill_prefix(self, prefix: Prefix) -> None:
        """Computes the prefix's pages, and keeps what its requests need of the window."""
        if not prefix.pages:
            return
        ids = prefix.token_ids
        shared = prefix.num_shared_tokens
        table = np.zeros((self.spec.pages_per_sequence,), np.int32)
        table[: len(prefix.pages)] = prefix.pages
        for start in range(0, shared, self.prefill_chunk_size):
            chunk = ids[start:shared][: self.prefill_chunk_size]
            self._run_chunk(chunk, table, start=start, total=shared)
        kept = bucket(len(prefix.pages), 1, self.spec.prefill_window.num_pages)
        self._count_shape("keep_prefix", kept)
        sinks = jnp.int32(self.spec.prefix_sink(prefix.index))
        self.caches, prefix.windows = keep_prefix(self.spec, self.caches, sinks, num_pages=kept)

    @property
    def can_hold_prefix(self) -> bool:
        """Whether the model's prompts can share keys, and there is a place for one more prefix."""
        has_place = len(self.scheduler.prefixes) < self.spec.max_prefixes
        return has_place and self.config.rope.rope_type != "dynamic"

    def _place_prefix(self, ids: np.ndarray) -> Prefix:
        if self.config.rope.rope_type == "dynamic":
            raise NotImplementedError(
                "rope_type='dynamic' rotates a key by the length of its prompt: prompts of "
                "different lengths cannot share keys"
            )
        self._finish_prompt()
        prefix = Prefix(token_ids=ids, page_size=self.spec.page_size, owner=self)
        num_pages = len(ids) // self.spec.page_size
        if num_pages:
            self.scheduler.add_prefix(prefix, num_pages)
        return prefix

    def _finish_prompt(self) -> None:
        """Runs what is left of the prompt in prefill: there is one prefill window."""
        request = self.scheduler.prefilling
        first = None
        while request is not None and first is None:
            first = self._next_chunk(request)
        if request is not None and first is not None:
            self._first_tokens.append((request, first))

    def release_prefix(self, prefix: Prefix) -> None:
        """See ``Prefix.release``."""
        if prefix.is_released:
            raise ValueError(f"the prefix of {len(prefix.token_ids)} tokens is released already")
        prefix.pins -= 1
        self.scheduler.drop_prefix(prefix)

    def prefix_arrays(self, prefix: Prefix) -> dict[str, jax.Array]:
        """What ``Prefix.save`` writes, by name."""
        if prefix.is_released:
            raise ValueError(f"the prefix of {len(prefix.token_ids)} tokens is released")
        if not prefix.pages:
            return {}
        kept = read_prefix_pages(self.caches, *self._prefix_pages(prefix))
        leaves, _ = jax.tree.flatten_with_path((kept, prefix.windows))
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def _prefix_pages(self, prefix: Prefix) -> tuple[jax.Array, jax.Array]:
        """Its retrieval pages, and the pages of its sinks in the streaming pool."""
        sinks = self.spec.prefix_sink(prefix.index) + np.arange(self.spec.decode_window.sink_pages)
        return jnp.asarray(prefix.pages, jnp.int32), jnp.asarray(sinks, jnp.int32)

    def prefix_identity(self) -> dict[str, str]:
        """What a saved prefix must agree with, by name."""
        spec = self.spec
        logical = None if spec.sparsity is None else spec.sparsity.logical_page_size
        return {
            "page size": f"{spec.page_size}, logical {logical}",
            "kv_dtype": f"{spec.kv_dtype}, {jnp.dtype(self._dtype).name}",
            "number of retrieval heads": str(spec.num_retrieval_heads),
            "sink and local sizes": f"{spec.decode_window} {spec.prefill_window}",
            "model": self._fingerprint(),
        }

    def _fingerprint(self) -> str:
        """Of the architecture and the first numbers of every weight, head order included."""
        digest = hashlib.sha256(repr(self.config).encode())
        for leaf in jax.device_get([x.ravel()[:64] for x in jax.tree.leaves(self.params)]):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:32]

    def load_prefix(self, path: str | Path) -> Prefix:
        """A prefix that ``Prefix.save`` wrote, of the same model and cache layout.

        Raises ``ValueError`` for a file that is missing, broken or of something else, and where
        there is no room.
        """
        ids, arrays = read_prefix(path, self.prefix_identity())
        ids = self._check_prefix(ids)
        held = self._hold_again(ids)
        if held is not None:
            return held
        prefix = self._place_prefix(ids)
        try:
            self._write_prefix(prefix, arrays)
        except BaseException:  # see add_prefix
            prefix.release()
            raise
        return prefix

    def _write_prefix(self, prefix: Prefix, arrays: dict[str, jax.Array]) -> None:
        """Puts a saved prefix's arrays on its pages."""
        if not prefix.pages:
            return
        num_windows = bucket(len(prefix.pages), 1, self.spec.prefill_window.num_pages)
        wanted = jax.eval_shape(
            lambda: (
                read_prefix_pages(self.caches, *self._prefix_pages(prefix)),
                [jax.tree.map(lambda x: x[:, :num_windows], c.prefill_window) for c in self.caches],
            )
        )
        paths, tree = jax.tree.flatten_with_path(wanted)
        leaves = [arrays[jax.tree_util.keystr(key)] for key, _ in paths]
        kept, prefix.windows = jax.tree.unflatten(tree, leaves)
        self.caches = write_prefix_pages(self.caches, kept, *self._prefix_pages(prefix))
