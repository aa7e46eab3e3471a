"""The host side of generation: slots, pages and the queue; token ids in, token ids out.

A request waits in the queue until a slot and all pages it can need are free, is prefilled chunk
by chunk, and then decodes with its neighbours in bursts until it stops. Between bursts finished
requests leave and waiting ones enter. Every jitted call has one of a few shapes: prompts are padded
to power-of-two chunk lengths, decode runs on power-of-two numbers of slots.
"""

import dataclasses
import heapq
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.cache import CacheSpec, cache_bytes, init_layer_cache
from lserve_jax.config import ModelConfig
from lserve_jax.decode import Caches, DecodeState, Sample, admit, decode_burst, prefill_chunk
from lserve_jax.llama import Params
from lserve_jax.sampling import SamplingArrays, SamplingMode, SamplingParams, sampling_row
from pallas_kernels.api import Backend, resolve_backend

SMALLEST_CHUNK = 64  # shorter prompts are padded to this
MAX_STOP_IDS = 32  # of one request, end-of-text ids included


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """What one request cost. Times in seconds, sizes in bytes; means are over its decode steps."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    queue_seconds: float = 0.0  # from arrival to the start of its prefill
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0  # from arrival to the first token
    decode_seconds: float = 0.0  # wall time of the bursts it took part in
    decode_steps: int = 0
    selector_runs: int = 0  # steps in which its pages were chosen anew
    bypassed_steps: int = 0  # steps whose history fitted the budget, so that nothing was pruned
    pages_attended_per_step: float = 0.0  # mean over layers and KV heads
    kv_bytes_held: int = 0  # pages with tokens, and ring, at its end
    kv_bytes_read_per_step: float = 0.0  # K and V attended, and statistics read by the selector
    dense_kv_bytes_read_per_step: float = 0.0  # what attending everything would have read


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """New tokens of one request. ``finish_reason`` is set with the last of them."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]  # of each token, under the model's own distribution
    top_logprobs: list[dict[int, float]]  # per token, empty unless asked for
    finish_reason: str | None  # "stop", "length" or None while running
    metrics: RequestMetrics


@dataclass(kw_only=True)
class _Request:
    request_id: str
    prompt: np.ndarray  # [prompt length] int32
    sampling: SamplingParams
    sampling_row: dict[str, np.ndarray]  # its row of SamplingArrays
    arrival: float
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    position_sum: int = 0  # sum over decode steps of tokens in the sequence: the dense cost
    attended: float = 0.0
    statistics_pages: int = 0  # pages scored, summed over selections
    metrics: RequestMetrics = RequestMetrics()


def bucket(n: int, smallest: int, largest: int) -> int:
    """The power of two at or above ``n``, within the two limits."""
    return min(max(smallest, 1 << (n - 1).bit_length()), largest)


class Engine:
    """Runs requests through a fixed number of slots.

    ``params`` and the spec's head counts must agree on the order of heads (retrieval first; see
    ``convert.attention_patterns.permute_heads``).
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
        backend: Backend = "auto",
    ):
        if burst_steps < 1:
            raise ValueError(f"{burst_steps=} must be at least 1")
        self.config, self.params, self.spec = config, params, spec
        self.backend = resolve_backend(backend)
        self.max_model_len = max_model_len
        self.eos_token_ids = tuple(eos_token_ids)
        self.prefill_chunk_size = prefill_chunk_size
        # A whole number of selection intervals, so that every burst begins with a selection.
        self.burst_steps = -(-burst_steps // spec.reuse_interval) * spec.reuse_interval
        self._dtype = dtype
        self.reset()
        sizes = cache_bytes(config, spec, dtype)
        self._page_bytes = (sizes["retrieval"] + sizes["key_stats"]) // spec.num_pages
        self._statistics_bytes = sizes["key_stats"] // spec.num_pages
        self._slot_bytes = sizes["streaming"] // spec.num_slots
        code_bytes = 1 if spec.kv_dtype == "int8" else jnp.dtype(dtype).itemsize
        scale_bytes = 4 if spec.kv_dtype == "int8" else 0
        self._token_bytes = 2 * (config.head_dim * code_bytes + scale_bytes)  # one KV head

    def reset(self) -> None:
        """Drops every request and begins with an empty cache.

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
        self.waiting: deque[_Request] = deque()
        self.running: dict[int, _Request] = {}  # by slot
        self.free_slots = list(range(spec.num_slots))  # a heap: low slots keep the batch small
        self.free_pages = list(range(spec.num_pages))[::-1]

    def _empty_state(self) -> DecodeState:
        S, M = self.spec.num_slots, self.spec.pages_per_sequence

        def zeros() -> jax.Array:  # one buffer a field: donated buffers must not be shared
            return jnp.zeros((S,), jnp.int32)

        return DecodeState(
            token=zeros(),
            position=zeros(),
            active=jnp.zeros((S,), bool),
            generated=zeros(),
            max_tokens=zeros(),
            page_table=jnp.zeros((S, M), jnp.int32),
            tail=zeros(),
            sampling=SamplingArrays.empty(S, MAX_STOP_IDS),
            output_counts=None,
            prompt_mask=None,
        )

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def pages_needed(self, prompt_tokens: int, max_tokens: int) -> int:
        """Pages for every token that is written: all but the last one generated."""
        return -(-(prompt_tokens + max_tokens - 1) // self.spec.page_size)

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
        pages = self.pages_needed(n, sampling.max_tokens)
        if pages > self.spec.num_pages:
            raise ValueError(
                f"the request needs {pages} pages of {self.spec.page_size} tokens, the KV cache "
                f"has {self.spec.num_pages}: give it more memory (kv_cache_bytes) or ask for less"
            )

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        seed: int,
        completion: int = 0,
    ) -> None:
        """Queues a request; ``seed`` is used where ``sampling.seed`` is None.

        ``completion`` numbers requests that sample the same prompt with the same seed: each draws
        from a random stream of its own.

        Raises ``ValueError`` for a duplicate id or a request that could never run.
        """
        ids = {r.request_id for r in self.waiting} | {r.request_id for r in self.running.values()}
        if request_id in ids:
            raise ValueError(f"a request with id {request_id!r} is already in the engine")
        self.check_request(prompt_token_ids, sampling)
        self.waiting.append(
            _Request(
                request_id=request_id,
                prompt=np.asarray(prompt_token_ids, np.int32),
                sampling=sampling,
                sampling_row=sampling_row(
                    sampling,
                    eos_token_ids=self.eos_token_ids,
                    default_seed=seed,
                    completion=completion,
                ),
                arrival=time.perf_counter(),
            )
        )

    def cancel(self, request_id: str) -> None:
        """Ends a request now; its slot and pages are free at once.

        Raises ``ValueError`` if no such request waits or runs.
        """
        for request in self.waiting:
            if request.request_id == request_id:
                self.waiting.remove(request)
                return
        for request in self.running.values():
            if request.request_id == request_id:
                active = self.state.active.at[request.slot].set(False)
                self.state = dataclasses.replace(self.state, active=active)
                self._release(request)
                return
        raise ValueError(f"no request with id {request_id!r} is waiting or running")

    def step(self) -> list[TokenOutput]:
        """Prefills the next waiting request if it fits, else runs one burst of decode steps.

        Returns at most one output a request. First come, first served: a small request does not
        overtake one that waits for pages.
        """
        if self.waiting and self.free_slots:
            request = self.waiting[0]
            needed = self.pages_needed(len(request.prompt), request.sampling.max_tokens)
            if needed <= len(self.free_pages):
                self.waiting.popleft()
                return [self._prefill(request, needed)]
        return self._decode() if self.running else []

    def _release(self, request: _Request) -> None:
        del self.running[request.slot]
        heapq.heappush(self.free_slots, request.slot)
        self.free_pages.extend(request.pages)

    def _prefill(self, request: _Request, num_pages: int) -> TokenOutput:
        started = time.perf_counter()
        request.slot = heapq.heappop(self.free_slots)
        request.pages = [self.free_pages.pop() for _ in range(num_pages)]
        self.running[request.slot] = request
        table = np.zeros((self.spec.pages_per_sequence,), np.int32)
        table[:num_pages] = request.pages
        page_table, total = jnp.asarray(table), len(request.prompt)
        logits = None
        for start in range(0, total, self.prefill_chunk_size):
            chunk = request.prompt[start : start + self.prefill_chunk_size]
            padded = np.zeros(
                (bucket(len(chunk), SMALLEST_CHUNK, self.prefill_chunk_size),), np.int32
            )
            padded[: len(chunk)] = chunk
            logits, self.caches = prefill_chunk(
                self.config,
                self.spec,
                self.params,
                self.caches,
                jnp.asarray(padded),
                page_table,
                jnp.int32(start),
                jnp.int32(len(chunk)),
                jnp.int32(total),
                backend=self.backend,
            )
        assert logits is not None  # prompts are not empty
        prompt_mask = self._count_tokens(request)
        sampling = self.state.sampling.with_row(request.slot, request.sampling_row)
        self.state = dataclasses.replace(self.state, sampling=sampling)
        self.state, self.caches, first = admit(
            self.spec,
            self.caches,
            self.state,
            jnp.int32(request.slot),
            logits,
            jnp.int32(total),
            jnp.int32(request.sampling.max_tokens),
            page_table,
            prompt_mask,
            mode=SamplingMode.of([request.sampling]),
        )
        first = jax.device_get(first)
        now = time.perf_counter()
        request.metrics = dataclasses.replace(
            request.metrics,
            prompt_tokens=total,
            queue_seconds=started - request.arrival,
            prefill_seconds=now - started,
            first_token_seconds=now - request.arrival,
        )
        return self._emit(request, jax.tree.map(lambda x: x[:, None], first))

    def _count_tokens(self, request: _Request) -> jax.Array | None:
        """The prompt mask for penalties, once any request has asked for them; else None."""
        V = self.config.vocab_size
        if self.state.output_counts is None:
            if not request.sampling.uses_penalties:
                return None
            shape = (self.spec.num_slots, V)
            self.state = dataclasses.replace(
                self.state,
                output_counts=jnp.zeros(shape, jnp.int32),
                prompt_mask=jnp.zeros(shape, bool),
            )
        mask = np.zeros((V,), bool)
        mask[request.prompt] = True
        return jnp.asarray(mask)

    def _decode(self) -> list[TokenOutput]:
        started = time.perf_counter()
        requests = sorted(self.running.values(), key=lambda r: r.slot)
        rows = bucket(requests[-1].slot + 1, 1, self.spec.num_slots)
        longest = max(r.sampling.max_tokens - r.metrics.generated_tokens for r in requests)
        interval = self.spec.reuse_interval
        steps = min(self.burst_steps, -(-longest // interval) * interval)
        self.state, self.caches, result = decode_burst(
            self.config,
            self.spec,
            self.params,
            self.caches,
            self.state,
            jnp.int32(steps),
            rows=rows,
            burst=self.burst_steps,
            mode=SamplingMode.of([r.sampling for r in requests]),
            backend=self.backend,
        )
        result = jax.device_get(result)
        seconds = time.perf_counter() - started
        outputs = []
        for request in requests:
            slot, metrics = request.slot, request.metrics
            steps, selections = int(result.steps[slot]), int(result.selections[slot])
            position = metrics.prompt_tokens + metrics.generated_tokens - 1
            request.position_sum += sum(range(position + 1, position + steps + 1))
            request.attended += float(result.attended[slot])
            request.statistics_pages += int(result.scored[slot])
            request.metrics = dataclasses.replace(
                metrics,
                decode_seconds=metrics.decode_seconds + seconds,
                decode_steps=metrics.decode_steps + steps,
                selector_runs=metrics.selector_runs + selections,
                bypassed_steps=metrics.bypassed_steps + int(result.bypassed[slot]),
            )
            samples = jax.tree.map(lambda x, s=slot, n=steps: x[:n, s][None], result.samples)
            outputs.append(self._emit(request, samples))
        return outputs

    def _emit(self, request: _Request, samples: Sample) -> TokenOutput:
        """Hands over new tokens (leaves ``[1, n, ...]``); releases the request if they end it."""
        tokens = [int(t) for t in samples.token[0]]
        metrics = request.metrics
        generated = metrics.generated_tokens + len(tokens)
        finish_reason = None
        if tokens and tokens[-1] in request.sampling_row["stop_token_ids"]:
            finish_reason = "stop"
        elif generated >= request.sampling.max_tokens:
            finish_reason = "length"
        request.metrics = self._with_kv_metrics(
            request, dataclasses.replace(metrics, generated_tokens=generated)
        )
        if finish_reason is not None:
            self._release(request)
        wanted = request.sampling.logprobs or 0
        return TokenOutput(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=[float(x) for x in samples.logprob[0]],
            top_logprobs=[
                dict(zip(ids[:wanted].tolist(), values[:wanted].tolist(), strict=True))
                for ids, values in zip(samples.top_ids[0], samples.top_logprobs[0], strict=True)
            ],
            finish_reason=finish_reason,
            metrics=request.metrics,
        )

    def _with_kv_metrics(self, request: _Request, metrics: RequestMetrics) -> RequestMetrics:
        steps = max(metrics.decode_steps, 1)
        heads = self.config.num_hidden_layers * self.config.num_key_value_heads
        written = metrics.prompt_tokens + metrics.generated_tokens - 1
        pages = -(-written // self.spec.page_size)
        read = request.attended * self._token_bytes
        read += request.statistics_pages * self._statistics_bytes
        dense = request.position_sum * heads * self._token_bytes
        return dataclasses.replace(
            metrics,
            pages_attended_per_step=request.attended / steps / heads / self.spec.page_size,
            kv_bytes_held=pages * self._page_bytes + self._slot_bytes,
            kv_bytes_read_per_step=read / steps,
            dense_kv_bytes_read_per_step=dense / steps,
        )
