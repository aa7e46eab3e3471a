"""Blocks of rows on several threads: all of them once, errors, and the caller's device."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.blocks import each_block, reading_threads
from convert.hf import _OneShard


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


@pytest.fixture
def threads_that_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_that_change_often")
def test_two_files_read_in_turn_by_several_threads(tmp_path: Path) -> None:
    """As a module's codes and scales may lie in two shards, of which one is open at a time."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        save_file({"x": np.full((64, 8), i, np.float32)}, path)
    shards, found = _OneShard(codes=False), np.zeros((2, 1024), np.float32)

    def work(start: int, stop: int) -> None:
        for row in range(start, stop):
            for i, path in enumerate(paths):
                found[i, row] = shards.part(path, "x", row % 64, row % 64 + 1).mean()

    with reading_threads() as threads:
        each_block(threads, 1024, 16, work)
    assert (found == [[0], [1]]).all()


def test_threads_use_the_callers_device() -> None:
    device = jax.devices()[-1]
    found = []

    def work(start: int, stop: int) -> None:
        found.append((jax.config.jax_default_device, jax.numpy.zeros(()).devices()))

    with reading_threads() as threads, jax.default_device(device):
        each_block(threads, 24, 8, work)
    assert found == [(device, {device})] * 3
