"""GET /metrics: what Prometheus reads. Names and buckets are vLLM's, after ``lserve:``.

What the engine counts is read when somebody asks, without waiting for its thread; what a request
cost is taken once, when its last token has come. Both are an app's own: nothing is global.
"""

import time
from collections import Counter as Tally
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from lserve_jax.engine.engine import Engine
from lserve_jax.engine.metrics import EngineMetrics
from lserve_jax.outputs import CompletionOutput, TextDelta

_PREFIX = "lserve:"
_LABEL = "model_name"

# Seconds.
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)

# What is read of the engine: (name, what it is, value).
type _Reading = tuple[str, str, Callable[[EngineMetrics], float]]
_GAUGES: tuple[_Reading, ...] = (
    ("num_requests_running", "Completions that run.", lambda m: m.running),
    ("num_requests_waiting", "Completions that wait for a slot or for pages.", lambda m: m.waiting),
    (
        "kv_cache_usage_perc",
        "Share of the KV cache's pages that are in use; 1 is all.",
        lambda m: 1 - m.free_pages / m.num_pages,
    ),
    ("num_pages", "Pages of the KV cache.", lambda m: m.num_pages),
    (
        "num_pages_free",
        "Pages that nobody uses, those of remembered prompts included.",
        lambda m: m.free_pages,
    ),
    ("num_pages_cached", "Of these, pages of remembered prompts.", lambda m: m.cached_pages),
    (
        "num_pages_on_host",
        "Pages of remembered prompts in host memory.",
        lambda m: m.host_pages,
    ),
    (
        "prefix_cache_device_bytes",
        "Bytes of remembered prompts in the KV cache.",
        lambda m: m.cached_bytes,
    ),
    (
        "prefix_cache_host_bytes",
        "Bytes of remembered prompts in host memory.",
        lambda m: m.host_bytes,
    ),
    ("num_pages_pinned", "Pages that registered prefixes hold.", lambda m: m.pinned_pages),
)
_COUNTERS: tuple[_Reading, ...] = (
    (
        "prompt_tokens",
        "Tokens of prompts and prefixes, computed or remembered.",
        lambda m: m.prompt_tokens + m.prefix_tokens,
    ),
    ("generation_tokens", "Generated tokens.", lambda m: m.generated_tokens),
    (
        "prefix_cache_queries",
        "Tokens of prompts that were looked for among remembered ones.",
        lambda m: m.prefix_queries,
    ),
    ("prefix_cache_hits", "Tokens of these that were there.", lambda m: m.prefix_tokens),
    (
        "prefix_cache_evicted_pages",
        "Pages of remembered prompts that others were given.",
        lambda m: m.evicted_pages,
    ),
    (
        "prefix_cache_evicted_window_pages",
        "Pages of their prefill windows that others were given.",
        lambda m: m.evicted_windows,
    ),
    (
        "prefill_blocks",
        "Blocks of keys that retrieval heads attended in prompts read block-sparsely.",
        lambda m: m.prefill_blocks,
    ),
    (
        "prefill_blocks_causal",
        "Blocks that they would have attended causally.",
        lambda m: m.causal_prefill_blocks,
    ),
    ("num_preemptions", "Completions that gave their pages to others.", lambda m: m.preemptions),
    ("engine_steps", "Steps of the engine.", lambda m: m.steps),
    ("relay_bursts", "Bursts in which a beginning was read together.", lambda m: m.relay_bursts),
    ("compilations", "Shapes that jitted functions were compiled for.", lambda m: m.compilations),
)


class Metrics:
    """What is counted of one engine and its requests; ``model_name`` is the label of all of it."""

    def __init__(self, engine: Engine, model_name: str):
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._ended: Tally[str] = Tally()  # completions by finish_reason
        self.registry.register(_EngineCollector(engine, model_name, self._ended))

        histogram, counter = self._histogram, self._counter
        self._first_token = histogram(
            "time_to_first_token_seconds", "From arrival to first token.", _FIRST_TOKEN_BUCKETS
        )
        self._between = histogram(
            "inter_token_latency_seconds",
            "Between two outputs of a completion; an output is the tokens of a burst.",
            _TOKEN_BUCKETS,
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean between two tokens of a completion.",
            _TOKEN_BUCKETS,
        )
        self._end_to_end = histogram(
            "e2e_request_latency_seconds", "From arrival to last token.", _REQUEST_BUCKETS
        )
        self._queue = histogram(
            "request_queue_time_seconds", "From arrival to prefill.", _REQUEST_BUCKETS
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "From prefill to first token.", _REQUEST_BUCKETS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "From first to last token.", _REQUEST_BUCKETS
        )
        lengths = _one_two_five(engine.max_model_len)
        self._prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", lengths)
        self._generation_tokens = histogram(
            "request_generation_tokens", "Tokens of a completion.", lengths
        )
        self._drafts = counter("spec_decode_num_drafts", "Verifications in exact mode.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted_tokens = counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens that dense attention confirmed."
        )
        self._decode_steps = counter("decode_steps", "Decode steps, summed over completions.")
        self._relay_steps = counter(
            "relay_steps", "Decode steps that read a beginning together with other completions."
        )
        self._bytes_read = counter("kv_read_bytes", "Keys, values and statistics that were read.")
        self._dense_bytes = counter(
            "dense_kv_read_bytes", "Keys and values that dense attention would have read."
        )
        self._refused = counter("num_requests_refused", "Requests answered 429: the queue is full.")

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(_PREFIX + name, what, [_LABEL], buckets=buckets, registry=self.registry)
        return made.labels(self._model_name)

    def _counter(self, name: str, what: str) -> Counter:
        made = Counter(_PREFIX + name, what, [_LABEL], registry=self.registry)
        return made.labels(self._model_name)

    async def watched(
        self, stream: AsyncIterable[tuple[int, TextDelta]]
    ) -> AsyncGenerator[tuple[int, TextDelta]]:
        """``stream`` as it is; what has come of it is counted."""
        newest: dict[tuple[int, int], float] = {}
        async for position, delta in stream:
            if delta.token_ids:
                now, completion = time.perf_counter(), (position, delta.index)
                if completion in newest:
                    self._between.observe(now - newest[completion])
                newest[completion] = now
            if delta.output is not None:
                for output in delta.output.outputs:
                    self._count(output)
            yield position, delta

    def refused(self) -> None:
        """A request found the queue full."""
        self._refused.inc()

    def _count(self, output: CompletionOutput) -> None:
        self._ended[output.finish_reason] += 1
        metrics = output.metrics
        self._prompt_tokens.observe(metrics.prompt_tokens)
        self._generation_tokens.observe(metrics.generated_tokens)
        self._queue.observe(metrics.queue_seconds)
        if metrics.generated_tokens:
            self._prefill.observe(metrics.prefill_seconds)
            self._first_token.observe(metrics.first_token_seconds)
            self._decode.observe(metrics.decode_seconds)
            self._end_to_end.observe(metrics.first_token_seconds + metrics.decode_seconds)
        if metrics.generated_tokens > 1:
            self._per_token.observe(metrics.seconds_per_output_token)
        self._drafts.inc(metrics.verifications)
        self._draft_tokens.inc(metrics.drafted_tokens)
        self._accepted_tokens.inc(metrics.confirmed_tokens)
        steps = metrics.decode_steps
        self._decode_steps.inc(steps)
        self._relay_steps.inc(metrics.relay_steps)
        self._bytes_read.inc(metrics.kv_bytes_read_per_step * steps)
        self._dense_bytes.inc(metrics.dense_kv_bytes_read_per_step * steps)


class _EngineCollector(Collector):
    """Reads the engine when it is asked."""

    def __init__(self, engine: Engine, model_name: str, ended: Tally[str]):
        self._engine, self._labels, self._ended = engine, [model_name], ended

    def collect(self) -> Iterator[Metric]:
        now = self._engine.metrics()
        for name, what, value in _GAUGES:
            gauge = GaugeMetricFamily(_PREFIX + name, what, labels=[_LABEL])
            gauge.add_metric(self._labels, value(now))
            yield gauge
        for name, what, value in _COUNTERS:
            counter = CounterMetricFamily(_PREFIX + name, what, labels=[_LABEL])
            counter.add_metric(self._labels, value(now))
            yield counter
        ended = CounterMetricFamily(
            f"{_PREFIX}request_success",
            "Completions that ended, by why; abort: the client has gone.",
            labels=[_LABEL, "finished_reason"],
        )
        reasons = ("stop", "length", "deadline", "error")
        for reason, count in (*((r, self._ended[r]) for r in reasons), ("abort", now.cancelled)):
            ended.add_metric([*self._labels, reason], count)
        yield ended


def _one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20 and so on up to ``most``."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [step for step in steps if step <= most]


async def metrics(request: Request) -> Response:
    """All of it, as text, or as OpenMetrics where that is asked for."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(
        encode(request.app.state.service.metrics.registry), headers={"Content-Type": media_type}
    )
