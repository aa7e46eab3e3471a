"""Blocks of a tensor's rows, several at a time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from lserve_jax.cores import usable_cores

# Transposing and touching new memory keep a thread busy, so several pay; but each holds a block, in
# float32 where it is rounded, and reading the file has a rate of its own.
_MOST_THREADS = 8


def reading_threads() -> ThreadPoolExecutor:
    """Threads for ``each_block``: NumPy leaves Python's lock while it copies and computes."""
    return ThreadPoolExecutor(min(usable_cores(), _MOST_THREADS), "lserve-reading")


def each_block(
    threads: ThreadPoolExecutor, count: int, size: int, work: Callable[[int, int], None]
) -> None:
    """Calls ``work(start, stop)`` for all of ``count`` rows, ``size`` of them at a time.

    The first block comes alone: it may open a file. What ``work`` raises is raised, for the first
    block that failed. Of JAX's settings that are this thread's own only the device goes along.
    """
    work(0, min(size, count))
    device = jax.config.jax_default_device

    def run(start: int) -> None:
        with jax.default_device(device):
            work(start, min(start + size, count))

    for _ in threads.map(run, range(size, count, size)):
        pass
