"""What a generation cost, in words: speed, compile time, memory, and what sparse attention read."""

import resource
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import jax
import jax.monitoring

from lserve_jax.attention.cache import CacheSpec
from lserve_jax.engine.metrics import EngineMetrics, RequestMetrics
from lserve_jax.engine.programs import ProgramTime
from lserve_jax.tokenizer import Tokenizer


@dataclass(kw_only=True)
class BatchTimes:
    """How long a batch took, all in seconds, and what its requests say of themselves."""

    total: float = 0.0
    queue: list[float] = field(default_factory=list)  # of each request, before its prefill
    first_token: list[float] = field(default_factory=list)  # TTFT of each request
    per_token: list[float] = field(default_factory=list)  # TPOT of each with two tokens or more
    pages: list[float] = field(default_factory=list)  # that each attended a step
    relay_reasons: Counter[str] = field(default_factory=Counter)  # for the last burst of each
    # In exact mode.
    drafted: int = 0
    confirmed: int = 0
    verifications: int = 0
    verified_steps: int = 0  # tokens that verifications gave
    draft_reasons: Counter[str] = field(default_factory=Counter)  # as those of relay

    def add(self, metrics: RequestMetrics) -> None:
        """Takes up a finished request."""
        self.queue.append(metrics.queue_seconds)
        self.first_token.append(metrics.first_token_seconds)
        if metrics.generated_tokens > 1:
            self.per_token.append(metrics.seconds_per_output_token)
            self.pages.append(metrics.pages_attended_per_step)
            self.relay_reasons[metrics.relay_reason] += 1
        if metrics.verifications:
            self.drafted += metrics.drafted_tokens
            self.confirmed += metrics.confirmed_tokens
            self.verifications += metrics.verifications
            self.verified_steps += metrics.decode_steps
            self.draft_reasons[metrics.draft_reason] += 1


class CompileClock:
    """Context manager that counts the seconds in which JAX traces and compiles.

    Reading compiled code from the persistent cache counts too.
    """

    def __init__(self):
        self._spans: list[tuple[float, float]] = []  # start, end

    def __enter__(self) -> Self:
        jax.monitoring.register_event_time_span_listener(self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._listen)

    def _listen(self, event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        self._spans.append((start_time, end_time))

    def seconds(self) -> float:
        """Seconds so far; those of several at the same time, or within another's, count once."""
        covered, until = 0.0, float("-inf")
        for start, end in sorted(self._spans):
            covered += max(end - max(start, until), 0.0)
            until = max(until, end)
        return covered


def request_summary(metrics: RequestMetrics, clock: CompileClock, sparse: bool) -> list[str]:
    """Lines that say what one request cost.

    The prefill has no speed if anything was compiled meanwhile, be it a small function beside
    programs that are loaded: some of it is computed beside that. Compilation falls before the first
    token, which is fetched when the first burst is on its way, but for exact mode's first burst
    without drafts: decode has a speed that includes it.
    """
    prefill = _speed(metrics.prompt_tokens, metrics.prefill_seconds)
    if clock.seconds() > 0:
        prefill = f"{metrics.prompt_tokens} tokens in {metrics.prefill_seconds:.2f} s, speed "
        prefill += "unknown: compiled or loaded meanwhile"
    lines = [
        f"prefill   {prefill}",
        f"decode    {_speed(metrics.generated_tokens - 1, metrics.decode_seconds)}",
        f"compile   {clock.seconds():.2f} s",
    ]
    if sparse:
        pages = (
            f"pages     {metrics.pages_attended_per_step:.1f} read a step, of --page-size tokens "
            "each (mean over layers and KV heads)"
        )
        if metrics.selector_runs:  # none where drafts are looked up
            bypassed = metrics.bypassed_steps / max(metrics.decode_steps, 1)
            pages += f", {metrics.selector_runs} selections, "
            pages += f"in {bypassed:.0%} of steps selection left nothing out"
        lines += [
            pages,
            f"KV bytes  {_size(metrics.kv_bytes_held)} held, "
            f"{_size(metrics.kv_bytes_read_per_step)} read a step, statistics included, "
            f"{_share(metrics):.1%} of the {_size(metrics.dense_kv_bytes_read_per_step)} of dense "
            "attention",
        ]
        if metrics.prefill_density < 1:
            lines.append(
                f"blocks    {metrics.prefill_density:.0%} of those that retrieval heads would "
                "have attended causally while the prompt was read"
            )
        if metrics.verifications:  # in exact mode
            drafts = _drafts(metrics.drafted_tokens, metrics.confirmed_tokens)
            lines.append(
                f"drafts    {drafts}, {metrics.tokens_per_verification:.1f} tokens a "
                f"verification; last burst: {metrics.draft_reason}"
            )
    return lines


def batch_summary(metrics: EngineMetrics, times: BatchTimes, clock: CompileClock) -> list[str]:
    """Lines that say what a batch cost; its speed includes compilation."""
    lines = [
        f"requests  {metrics.finished} finished, {metrics.preemptions} preemptions",
        f"prompts   {metrics.prompt_tokens} tokens run, {metrics.prefix_tokens} remembered",
        f"answers   {_speed(metrics.generated_tokens, times.total)}",
    ]
    if times.first_token:
        latency = f"{statistics.median(times.queue):.3f} s in the queue, "
        latency += f"{statistics.median(times.first_token):.3f} s to the first token"
        if times.per_token:
            latency += f", {1000 * statistics.median(times.per_token):.1f} ms a token after it"
        lines.append(f"latency   {latency} (medians)")
    if times.pages:
        lines.append(
            f"pages     {statistics.median(times.pages):.1f} read a step, of --page-size tokens "
            "each (mean over layers and KV heads, median over requests), "
            f"{metrics.selector_runs} selections"
        )
    if metrics.causal_prefill_blocks:
        density = metrics.prefill_blocks / metrics.causal_prefill_blocks
        lines.append(
            f"blocks    {density:.0%} of those that retrieval heads would have attended causally "
            "while long prompts were read"
        )
    if times.verifications:
        rate = times.verified_steps / times.verifications
        lines.append(
            f"drafts    {_drafts(times.drafted, times.confirmed)}, {rate:.1f} tokens a "
            f"verification; last bursts: {_most_common(times.draft_reasons)}"
        )
    reasons = _most_common(times.relay_reasons)
    return [
        *lines,
        f"relay     {metrics.relay_bursts} bursts read a beginning together"
        + (f"; requests: {reasons}" if reasons else ""),
        f"compile   {clock.seconds():.2f} s",
    ]


def program_summary(times: Sequence[ProgramTime]) -> list[str]:
    """A line that says what became of the engine's programs; none where JAX alone compiled them.

    Seconds are summed over threads: what was read while the weights were costs no time but that of
    another core.
    """
    parts = []
    for source in ("loaded", "compiled"):
        seconds = [made.seconds for made in times if made.source == source]
        if seconds:
            parts.append(f"{len(seconds)} {source} in {sum(seconds):.2f} s")
    return [f"programs  {', '.join(parts)}, summed over threads"] if parts else []


def end_summary(eos_token_ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """A line that says which tokens end every answer: the model's own, with their text."""
    if not eos_token_ids:
        return "ends at   no token of the model's own"
    names = []
    for token in eos_token_ids:
        text = None if tokenizer is None else tokenizer.backend.id_to_token(token)
        names.append(str(token) if text is None else f"{token} ({text})")
    return f"ends at   {', '.join(names)}"


def memory_summary(memory_plan: Mapping[str, int], spec: CacheSpec) -> list[str]:
    """Lines that say where memory went; ``memory_plan`` is ``LLM.memory_plan()``."""
    parameters = memory_plan["parameters"]
    kv_cache = sum(memory_plan.values()) - parameters
    pages = memory_plan["retrieval"] + memory_plan["key_stats"]
    return [
        f"memory    {_size(parameters)} parameters, {_size(kv_cache)} KV cache, {_peak_memory()}",
        f"KV cache  {spec.num_pages} pages of {spec.page_size} tokens {_size(pages)}, windows "
        f"{_size(memory_plan['streaming'])}, prefill window {_size(memory_plan['prefill_window'])}",
    ]


def _drafts(drafted: int, confirmed: int) -> str:
    return f"{drafted}, {confirmed / drafted:.0%} confirmed" if drafted else "none"


def _most_common(reasons: Counter[str]) -> str:
    return "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3))


def _speed(tokens: int, seconds: float) -> str:
    if seconds <= 0:  # a single token has no decode
        return f"{tokens} tokens, too short to time"
    return f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s"


def _share(metrics: RequestMetrics) -> float:
    """What a step read, as a share of what dense attention reads."""
    return metrics.kv_bytes_read_per_step / max(metrics.dense_kv_bytes_read_per_step, 1.0)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _peak_memory() -> str:
    device = jax.local_devices()[0].memory_stats()  # None on the CPU
    if device is not None:
        return f"{_size(device['peak_bytes_in_use'])} peak on the device"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return f"{_size(peak * unit)} peak of the process"
