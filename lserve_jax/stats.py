"""What a generation cost, in words: speed, compile time, memory, and what sparse attention read."""

import resource
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import jax
import jax.monitoring

from lserve_jax.metrics import RequestMetrics


class CompileClock:
    """Context manager that counts the seconds in which JAX traces and compiles.

    Reading compiled code from the persistent cache counts too.
    """

    def __init__(self):
        self._spans: list[tuple[float, float, str]] = []  # start, end, name of the function

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
        # A span is reported when it ends, so those inside it came before: count them once.
        while self._spans and self._spans[-1][0] >= start_time:
            self._spans.pop()
        self._spans.append((start_time, end_time, str(kwargs.get("fun_name"))))

    def seconds(self, function: str = "") -> float:
        """Seconds so far, of all functions or of those whose name contains ``function``."""
        return sum(end - start for start, end, name in self._spans if function in name)


def summary(
    metrics: RequestMetrics, memory_plan: Mapping[str, int], clock: CompileClock, sparse: bool
) -> list[str]:
    """Lines that say what one request cost; ``memory_plan`` is ``LLM.memory_plan()``.

    Compilation that fell into the request is taken out of its speeds and shown by itself.
    """
    decode_compile = clock.seconds("decode_burst")
    prefill = metrics.prefill_seconds - (clock.seconds() - decode_compile)
    decode = metrics.decode_seconds - decode_compile
    parameters = memory_plan["parameters"]
    kv_cache = sum(memory_plan.values()) - parameters
    lines = [
        f"prefill   {_speed(metrics.prompt_tokens, prefill)}",
        f"decode    {_speed(metrics.generated_tokens - 1, decode)}",
        f"compile   {clock.seconds():.2f} s",
        f"memory    {_size(parameters)} parameters, {_size(kv_cache)} KV cache, {_peak_memory()}",
    ]
    if sparse:
        bypassed = metrics.bypassed_steps / max(metrics.decode_steps, 1)
        lines += [
            f"pages     {metrics.pages_attended_per_step:.1f} read a step (mean over layers and KV "
            f"heads), {metrics.selector_runs} selections, {bypassed:.0%} of steps read everything",
            f"KV bytes  {_size(metrics.kv_bytes_held)} held, "
            f"{_size(metrics.kv_bytes_read_per_step)} read a step, "
            f"{_size(metrics.dense_kv_bytes_read_per_step)} if attention were dense",
        ]
    return lines


def _speed(tokens: int, seconds: float) -> str:
    if seconds <= 0:  # nearly all of it was compilation, whose clock is another
        return f"{tokens} tokens, too short to time"
    return f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _peak_memory() -> str:
    device = jax.local_devices()[0].memory_stats()  # None on the CPU
    if device is not None:
        return f"{_size(device['peak_bytes_in_use'])} peak on the device"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return f"{_size(peak * unit)} peak of the process"
