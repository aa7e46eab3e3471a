"""Kernels lowered by other processes, since Python's lock lets one process lower one at a time.

Lowering a kernel is half a second of Python, and the programs of a service have hundreds of them.
They are known as soon as programs are traced: each is sent to a process that waits for such, and
what comes back is what ``shared_kernel`` would have made here.

A process has no GPU. Mosaic GPU then lowers for compute capability 9.0, as these kernels need it.
"""

import logging
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import jax

from pallas_kernels.hopper import shared_kernel
from pallas_kernels.hopper.shared_kernel import Lowering

log = logging.getLogger(__name__)

SETTINGS = "jax_enable_x64", "jax_default_matmul_precision"  # of JAX, that a kernel depends on


class Processes:
    """Up to ``count`` of them, begun as kernels come or before.

    See ``pallas_kernels.kernel_lowering``.
    """

    def __init__(self, count: int):
        self._count = count
        self._threads = ThreadPoolExecutor(count, "lserve-lowering")  # each talks to a process
        self._idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self._all: list[subprocess.Popen] = []
        # Without it they stay where nobody closes this: ``subprocess`` keeps what still runs, and
        # with it the pipe whose end would be theirs.
        self._end = weakref.finalize(self, _end, self._all)
        self._begun: dict[Lowering, Future[None]] = {}
        self._said = False

    def start(self) -> None:
        """Begins all of them now: each needs seconds to import what it works with."""
        try:
            for _ in range(self._count):
                self._idle.put(self._new_process())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Ends them."""
        self._threads.shutdown(cancel_futures=True)
        self._end()

    def begin(self, jaxpr: Any) -> list[Future[None]]:
        """Sends away what a traced program needs that was not lowered yet: done when it is."""
        needed = [x for x in lowerings(jaxpr) if not shared_kernel.is_lowered(x)]
        for lowering in needed:
            if lowering not in self._begun:
                self._begun[lowering] = self._threads.submit(self._lower, lowering)
        return [self._begun[lowering] for lowering in needed]

    def _lower(self, lowering: Lowering) -> None:
        try:
            shared_kernel.keep(lowering, self._ask(lowering))
        except (OSError, EOFError, pickle.PickleError) as error:
            # This process does it when it comes to the kernel, and says what is wrong with that.
            self._warn(error)

    def _ask(self, lowering: Lowering) -> dict[str, str]:
        try:
            process = self._idle.get_nowait()
        except Empty:  # threads are as many as processes may be
            process = self._new_process()
        assert process.stdin is not None and process.stdout is not None
        pickle.dump(lowering.as_sent(), process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
        self._idle.put(process)  # unless it failed
        return answer

    def _new_process(self) -> subprocess.Popen:
        process = _process()
        self._all.append(process)
        return process

    def _warn(self, error: Exception) -> None:
        if not self._said:
            log.warning("another process did not lower a kernel: %r", error)
        self._said = True


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
        process.communicate()  # closes the pipes


def lowerings(jaxpr: Any) -> Iterator[Lowering]:
    """Of the kernels that a program calls, each once."""
    seen: set[int] = set()
    found: dict[Lowering, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, tuple | list):
            for each in value:
                visit(each)
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and id(inner) not in seen:
            seen.add(id(inner))
            for equation in inner.eqns:
                if (lowering := shared_kernel.lowering_of(equation)) is not None:
                    found[lowering] = None
                for parameter in equation.params.values():
                    visit(parameter)

    visit(jaxpr)
    yield from found


def _process() -> subprocess.Popen:
    if not sys.executable:
        raise OSError("this Python does not know its own program")
    package = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is for the one who waits
    )
    assert process.stdin is not None
    pickle.dump({name: getattr(jax.config, name) for name in SETTINGS}, process.stdin)
    process.stdin.flush()  # one that nobody sends a kernel ends without a word
    return process


def main() -> None:
    """The other side: lowers what comes on stdin until that ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    for name, value in pickle.load(sys.stdin.buffer).items():
        jax.config.update(name, value)
    while True:
        try:
            parts = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(shared_kernel.lower(Lowering.sent(parts)), answers)
        answers.flush()


if __name__ == "__main__":
    main()
