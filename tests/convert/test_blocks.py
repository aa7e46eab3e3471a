"""Blocks of rows on several threads: all of them once, errors, and the caller's device."""

import threading

import jax
import numpy as np
import pytest

from convert.blocks import each_block, reading_threads


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_every_row_comes_once(count: int) -> None:
    seen = np.zeros(count, np.int32)

    def work(start: int, stop: int) -> None:
        seen[start:stop] += 1

    with reading_threads() as threads:
        each_block(threads, count, 8, work)
    assert (seen == 1).all()


def test_the_first_block_comes_alone_and_here() -> None:
    running: list[threading.Thread] = []

    def work(start: int, stop: int) -> None:
        if start == 0:
            assert not running
        running.append(threading.current_thread())

    with reading_threads() as threads:
        each_block(threads, 64, 8, work)
    assert running[0] is threading.current_thread()
    assert threading.current_thread() not in running[1:]


def test_the_first_block_that_fails_says_why() -> None:
    def work(start: int, stop: int) -> None:
        if start >= 16:
            raise ValueError(f"rows from {start} on")

    with reading_threads() as threads, pytest.raises(ValueError, match="rows from 16 on"):
        each_block(threads, 64, 8, work)


def test_threads_use_the_callers_device() -> None:
    device = jax.devices()[-1]
    found = []

    def work(start: int, stop: int) -> None:
        found.append((jax.config.jax_default_device, jax.numpy.zeros(()).devices()))

    with reading_threads() as threads, jax.default_device(device):
        each_block(threads, 24, 8, work)
    assert found == [(device, {device})] * 3
