"""How one program comes to be: a call is traced, lowered and compiled.

Which, when, on which thread and where they are kept is up to ``programs.py``.
"""

import gc
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from lserve_jax.engine.calls import Call
from pallas_kernels.api import LoweringProcesses

log = logging.getLogger(__name__)


def thread_settings() -> tuple[Any, ...]:
    """JAX's settings as this thread has them. Contexts that users make of their own are no part.

    Nor is whether JAX's cache is on, which ``_JaxCacheOff`` changes for all threads.
    """
    values = {k: v for k, v in jax.config.values.items() if k != "jax_enable_compilation_cache"}
    return values, jax.sharding.get_abstract_mesh()


@contextmanager
def no_collection() -> Iterator[None]:
    """Python looks for no cycles: traces stay, and it would go through all of them ever again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class Lowered:
    """A program for XLA."""

    lowered: Any
    seconds: float  # that tracing and lowering took


@dataclass(frozen=True)
class Traced:
    """A program as a jaxpr."""

    traced: Any
    seconds: float

    @classmethod
    def of(cls, call: Call) -> "Traced":
        start = time.perf_counter()
        traced = call.function.trace(*call.args, **call.static)
        return cls(traced, time.perf_counter() - start)

    def lower(self) -> Lowered:
        start = time.perf_counter()
        lowered = self.traced.lower()
        return Lowered(lowered, self.seconds + time.perf_counter() - start)


def begin_kernels(processes: LoweringProcesses, traced: Traced) -> list[Future[None]]:
    """What to wait for before a program that is made beside is lowered."""
    try:
        return processes.begin(traced.traced.jaxpr)
    except RuntimeError as error:
        # Python ends: then nothing can be begun, already while its main thread counts as alive.
        log.info("kernels are lowered by no other process: %s", error)
        return []


class _JaxCacheOff:
    """While any thread is inside, JAX neither reads nor writes its own cache of compiled code."""

    def __init__(self) -> None:
        self._lock, self._inside, self._was = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._was = jax.config.jax_enable_compilation_cache
                self._switch(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._switch(self._was)

    def _switch(self, on: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()  # JAX looks at the setting once, until this


_jax_cache_off = _JaxCacheOff()


def compile_anew(lowered: Any) -> Any:
    """Neither from JAX's cache on disk nor from memory, which may have it from there.

    Code for a CPU that came out of that cache can be serialised, but what is read back then lacks
    functions (``findings/jax_cpu_cached_executable.sh``).
    """
    with _jax_cache_off:
        # The default; but with an option JAX takes what it compiled with that one only.
        return lowered.compile(compiler_options={"xla_embed_ir_in_executable": False})


def is_looked_into() -> bool:
    """Whether JAX is to run functions step by step, if only to name the one that made a NaN."""
    config = jax.config
    return config.jax_debug_nans or config.jax_debug_infs or config.jax_disable_jit
