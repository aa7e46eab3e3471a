"""Compiled programs of a runner: found in memory, read from their files, or compiled.

A jitted function compiles when it meets new shapes, and traces before it in any case: for a large
model that takes longer than to read the finished program from a file. So where files are kept, or
programs were made ahead of time, the runner's calls come here. Elsewhere JAX's own caches do.
"""

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
from tqdm import tqdm

from lserve_jax.cores import usable_cores
from lserve_jax.engine.calls import Call
from lserve_jax.engine.compiling import (
    Lowered,
    Traced,
    begin_kernels,
    compile_anew,
    is_looked_into,
    no_collection,
    thread_settings,
)
from lserve_jax.engine.program_files import ProgramFiles
from pallas_kernels.api import LoweringProcesses

log = logging.getLogger(__name__)

MOST_COMPILING = 16  # programs at a time, each a core's work for XLA
MOST_HELPERS = 8  # threads that read programs, and processes that lower kernels
HELPERS_BESIDE = 2  # such processes while requests run
CORES_BESIDE = 4  # of which one program that compiles while requests run takes one


@dataclass(frozen=True, kw_only=True)
class ProgramTime:
    """How one program came to be, and how long that took."""

    name: str
    source: Literal["compiled", "loaded"]
    seconds: float


class Programs:
    """Programs of one runner. ``files`` keep them between starts; None: nothing is kept.

    Engines of the same ``settings`` will need the same programs, most of the time.

    The jitted functions' own rules hold: what they donate is donated. JAX's settings count as
    they are when a program is first called. ``sharded``: arrays lie on several devices.
    """

    def __init__(self, files: ProgramFiles | None, settings: str = ""):
        self.sharded = False
        self.times: list[ProgramTime] = []
        self._files = files
        self._lock = threading.Lock()
        self._ready: dict[Hashable, Future[Any]] = {}  # by signature
        self._preloaded: dict[str, Future[Any]] = {}  # by key; taken when their call comes
        self._used: list[str] = []  # keys
        self._prepared: set[Hashable] = set()  # signatures, of which some may not be ready yet
        self._unused: dict[Hashable, str | None] = {}  # made beside requests, none of them ran it
        # Named now: JAX's settings may be this thread's own.
        self._list = None if files is None else files.key(settings)
        self._said = False  # that they cannot be kept
        self._processes: LoweringProcesses | None = None  # begun before they are needed

    @property
    def are_kept(self) -> bool:
        """Whether programs come from here; else from JAX's own caches."""
        return (self._files is not None or bool(self._ready)) and not is_looked_into()

    def run(self, call: Call) -> Any:
        """What the call's function returns."""
        self._end_processes()  # they were taken, or nothing is to be compiled ahead
        if not self.are_kept:
            return call.plain()
        return self._get(call)(*call.arrays)

    @contextmanager
    def expect_compiling(self) -> Iterator[None]:
        """Where no program of these settings is known, begins the processes that lower kernels.

        They take as long to be there as weights do to be read. Within, an engine is built; if that
        fails they end.
        """
        if self._files is not None and not self._preloaded:
            self._processes = LoweringProcesses(_at_most(MOST_HELPERS))
            self._processes.start()
        with ExitStack() as failed:
            failed.callback(self._end_processes)
            yield
            failed.pop_all()

    def _take_processes(self) -> LoweringProcesses | None:
        with self._lock:  # the thread of ``preparing`` comes for them, too
            processes, self._processes = self._processes, None
        return processes

    def _end_processes(self) -> None:
        processes = self._take_processes()
        if processes is not None:
            processes.close()

    def preload(self) -> None:
        """Begins to read what the last engine of these settings used, on other threads."""
        if self._files is None or self._list is None:
            return
        files = self._files
        self._preloaded = {key: Future() for key in files.last_used(self._list)}
        waiting = deque(self._preloaded.items())

        def work() -> None:
            # A program that ends does not wait for what is left.
            while threading.main_thread().is_alive():
                try:
                    key, read = waiting.popleft()
                except IndexError:
                    return
                if not read.set_running_or_notify_cancel():
                    continue  # its call came first, and reads it
                start = time.perf_counter()
                try:
                    read.set_result((files.read(key), time.perf_counter() - start))
                except BaseException as error:
                    read.set_exception(error)

        for _ in range(min(len(waiting), _at_most(MOST_HELPERS))):
            threading.Thread(target=work, name="lserve-programs").start()

    def prepare(self, calls: Sequence[Call], *, progress: bool = False) -> None:
        """Loads or compiles the programs of ``calls``, several at the same time.

        ``progress`` shows a bar on stderr.
        """
        missing = self._missing(calls)
        with _bar(missing, progress) as bar:
            self._prepare(missing, bar, threading.Event())

    @contextmanager
    def preparing(self, calls: Sequence[Call], *, progress: bool = False) -> Iterator[None]:
        """Does what ``prepare`` does while the body runs, such as one that reads weights.

        On another thread, unless JAX's settings are this thread's own: then after the body. If the
        body fails nobody waits: of the programs those are finished that are being compiled.
        """
        if not calls or not threading.main_thread().is_alive():
            yield
            return
        missing, settings, stopped = self._missing(calls), thread_settings(), threading.Event()
        bar, thread = _bar(missing, progress), ThreadPoolExecutor(1, "lserve-programs")

        def prepare_alike() -> bool:
            alike = thread_settings() == settings
            if alike:
                self._prepare(missing, bar, stopped)
            return alike

        try:
            alike = thread.submit(prepare_alike)
            yield
            if not alike.result():
                self._prepare(missing, bar, stopped)
        finally:
            stopped.set()
            thread.shutdown(wait=False)
            bar.close()

    def has(self, call: Call) -> bool:
        """Whether its program is in memory or kept in a file; False where JAX keeps them."""
        if not self.are_kept:
            return False
        ready = self._ready.get(call.signature(sharded=self.sharded))
        return ready.done() if ready is not None else self._is_kept(self._key(call))

    def prepare_beside(self, calls: Sequence[Call]) -> None:
        """Loads or compiles the programs of ``calls`` in their order, beside all else.

        Several at the same time, one for four cores; tracing and lowering take turns. Who needs one
        that was taken up waits for it; one that was not is made by whoever comes first. One that
        fails is left to who needs it. It ends with the last program, with this object, when JAX's
        settings change, or with Python: after those that are being made. Where JAX's settings are
        this thread's own it does nothing.
        """
        waiting = deque(call.described() for call in calls)
        settings = thread_settings()
        programs = weakref.ref(self)
        processes = LoweringProcesses(_at_most(HELPERS_BESIDE))
        tracing = threading.Lock()

        def lower(call: Call) -> Lowered:
            # One at a time: it is Python, whose lock the thread needs that drives the device.
            with tracing:
                traced = Traced.of(call)
                kernels = begin_kernels(processes, traced)
            wait(kernels)
            with tracing:
                lowered = traced.lower()
            if thread_settings() != settings:  # and its key says the old ones
                raise CancelledError
            return lowered

        def work() -> None:
            while threading.main_thread().is_alive() and thread_settings() == settings:
                mine = programs()
                if mine is None:
                    return
                try:
                    call = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                mine._make_beside(call, lower)
                del mine

        # An executor's threads would go on: its end is waited for while the main thread is alive.
        count = max(_at_most(MOST_COMPILING) // CORES_BESIDE, 1)
        threads = [threading.Thread(target=work, name="lserve-programs") for _ in range(count)]

        def wait_for_all() -> None:
            for thread in threads:
                thread.join()

        def end() -> None:
            wait_for_all()
            atexit.unregister(wait_for_all)
            processes.close()

        # Python waits for threads, but not after a Ctrl-C meanwhile. Then this does, before JAX,
        # whose own such function is older, takes the backends away for which XLA compiles.
        atexit.register(wait_for_all)
        for thread in (*threads, threading.Thread(target=end, name="lserve-programs")):
            thread.start()

    def _make_beside(self, call: Call, lower: Callable[[Call], Lowered]) -> None:
        signature, key = call.signature(sharded=self.sharded), self._key(call)
        own: Future[Any] = Future()
        with self._lock:
            if signature in self._prepared or self._ready.setdefault(signature, own) is not own:
                return
            self._unused[signature] = key
        try:
            own.set_result(self._make(call, key, lower))
        except BaseException as error:
            del self._ready[signature]
            own.set_result(None)  # who waits makes it, and hears of what is wrong
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, CancelledError):  # the next ones are made all the same
                log.warning("program %s is not made ahead: %r", call.name, error)

    def _missing(self, calls: Sequence[Call]) -> dict[Hashable, Call]:
        """Those that are not ready, by signature. From here on none of them is made beside."""
        found: dict[Hashable, Call] = {}
        for call in calls:
            found.setdefault(call.signature(sharded=self.sharded), call)
        with self._lock:
            missing = {mark: call for mark, call in found.items() if mark not in self._ready}
            self._prepared |= missing.keys()
        return missing

    def _prepare(self, missing: dict[Hashable, Call], bar: tqdm, stopped: threading.Event) -> None:
        if not threading.main_thread().is_alive():
            return  # Python begins no pool any more: each is made where it is called
        processes = self._take_processes()
        if processes is None:
            processes = LoweringProcesses(_at_most(MOST_HELPERS))
        threads = ThreadPoolExecutor(_at_most(MOST_COMPILING), "lserve-programs")
        with threads as pool, closing(processes), no_collection():
            try:
                self._ready |= self._made(missing, pool, processes, bar, stopped)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _made(
        self,
        missing: dict[Hashable, Call],
        pool: ThreadPoolExecutor,
        processes: LoweringProcesses,
        bar: tqdm,
        stopped: threading.Event,
    ) -> dict[Hashable, Future[Any]]:
        """Their programs, finished. Files are read and code is compiled in ``pool``.

        Keys and traces are made here: JAX's settings may be this thread's own. Tracing holds
        Python's lock anyway. While ``processes`` lower the kernels of one, the next are traced.
        Once it is ``stopped`` none is begun.
        """

        def begin(make: Callable[..., Any], *given: Any) -> Future[Any]:
            def unless_stopped() -> Any:
                _raise_if_stopped(stopped)
                return make(*given)

            return pool.submit(unless_stopped)

        keys = {signature: self._key(call) for signature, call in missing.items()}
        made: dict[Hashable, Future[Any]] = {}
        kept = [signature for signature in missing if self._is_kept(keys[signature])]
        for signature in kept:
            made[signature] = begin(self._load, missing[signature], keys[signature])
        waiting: deque[tuple[Hashable, Traced, list[Future[None]]]] = deque()  # for kernels

        def compile_next() -> None:
            signature, traced, kernels = waiting.popleft()
            wait(kernels)
            _raise_if_stopped(stopped)
            call, key = missing[signature], keys[signature]
            made[signature] = begin(self._compile_and_keep, call, key, traced.lower())
            made[signature].add_done_callback(lambda _: bar.update())

        for signature in [signature for signature in missing if signature not in made] + kept:
            if signature in made and made[signature].result() is not None:
                bar.update()
                continue
            _raise_if_stopped(stopped)
            traced = Traced.of(missing[signature])
            waiting.append((signature, traced, processes.begin(traced.traced.jaxpr)))
            while waiting and all(kernel.done() for kernel in waiting[0][2]):
                compile_next()
        while waiting:
            compile_next()
        for future in made.values():
            future.result()
        return made

    def _get(self, call: Call) -> Any:
        signature = call.signature(sharded=self.sharded)
        if (ready := self._ready.get(signature)) is None:
            own: Future[Any] = Future()
            with self._lock:
                ready = self._ready.setdefault(signature, own)
            if ready is own:
                try:
                    own.set_result(self._make(call, self._key(call)))
                except BaseException as error:
                    del self._ready[signature]
                    own.set_exception(error)
        program = ready.result()
        if signature in self._unused:
            with self._lock:  # others look through them
                key = self._unused.pop(signature, None)
            if key is not None:
                self._remember(key)
        return self._get(call) if program is None else program

    def _key(self, call: Call) -> str | None:
        return None if self._files is None else self._files.key(call.description())

    def _is_kept(self, key: str | None) -> bool:
        if self._files is None or key is None:
            return False
        return key in self._preloaded or self._files.has(key)

    def _make(
        self, call: Call, key: str | None, lower: Callable[[Call], Lowered] | None = None
    ) -> Any:
        program = self._load(call, key)
        if program is None:
            lowered = Traced.of(call).lower() if lower is None else lower(call)
            return self._compile_and_keep(call, key, lowered)
        return program

    def _load(self, call: Call, key: str | None) -> Any | None:
        if self._files is None or key is None:
            return None
        start = time.perf_counter()
        preloaded = self._preloaded.pop(key, None)
        if preloaded is None or preloaded.cancel():  # nobody reads it yet
            program = self._files.read(key)
            seconds = time.perf_counter() - start
        else:
            program, seconds = preloaded.result()
        if program is not None:
            self._note(ProgramTime(name=call.name, source="loaded", seconds=seconds))
            self._remember(key)
        return program

    def _compile_and_keep(self, call: Call, key: str | None, lowered: Lowered) -> Any:
        program = self._compile(call, lowered)
        if self._files is not None and key is not None:
            try:
                self._files.write(key, program, call.mesh_devices())
            except (ValueError, NotImplementedError, OSError, jax.errors.JaxRuntimeError) as error:
                self._say_once(error)
            self._remember(key)
        return program

    def _remember(self, key: str) -> None:
        """That it was used, for the next engine's ``preload``."""
        assert self._files is not None and self._list is not None
        with self._lock:  # while it is written, too: the last list is the longest
            if key in self._used or key in self._unused.values():
                return
            self._used.append(key)
            try:
                self._files.write_last_used(self._list, self._used)
            except OSError as error:
                self._say_once(error)

    def _compile(self, call: Call, lowered: Lowered) -> Any:
        start = time.perf_counter()
        program = (
            lowered.lowered.compile() if self._files is None else compile_anew(lowered.lowered)
        )
        seconds = lowered.seconds + time.perf_counter() - start
        self._note(ProgramTime(name=call.name, source="compiled", seconds=seconds))
        return program

    def _note(self, made: ProgramTime) -> None:
        self.times.append(made)
        log.info("program %s %s in %.2f s", made.name, made.source, made.seconds)

    def _say_once(self, error: Exception) -> None:
        said, self._said = self._said, True  # threads may come at the same time
        if not said:
            log.warning("compiled programs are not kept: %s", error)


def _bar(missing: Sized, progress: bool) -> tqdm:
    return tqdm(total=len(missing), desc="programs", unit="program", disable=not progress)


def _raise_if_stopped(stopped: threading.Event) -> None:
    """Raises ``CancelledError`` where nobody waits for programs any more."""
    if stopped.is_set():
        raise CancelledError


def _at_most(count: int) -> int:
    return min(usable_cores(), count)
