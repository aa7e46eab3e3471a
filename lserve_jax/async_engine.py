"""Requests of text from any number of callers, over one thread that steps the engine.

    async with AsyncEngine(text_engine) as engine:
        request = ("The sea is", SamplingParams(max_tokens=16))
        async with await engine.submit([request]) as stream:
            async for _, delta in stream:
                print(delta.text, end="")

The event loop never waits for the device: what it asks goes into a queue, which the thread empties
between two steps, and what comes of a step goes back to the loop in one call.

    loop     | submit | submit |  deltas  | cancel |   deltas   |
    thread       step        | step        |      step     | step ...
"""

import asyncio
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from lserve_jax.memory import memory_errors
from lserve_jax.outputs import TextDelta
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.text_engine import CheckedPrompt, Prompt, TextEngine

# Seconds. While the first request's burst runs, those who come just behind it would wait, and the
# burst takes hardly longer for all of them. So an idle engine begins when nobody came for so long:
_QUIET = 0.003
_LONGEST_WAIT = 0.05


class EngineClosed(RuntimeError):
    """The engine was closed while a request ran, or before it came."""


class EngineFailed(RuntimeError):
    """A step failed, and with it every request that ran; the engine goes on with new ones."""


class RequestStream:
    """What comes of requests that were submitted together: (position among them, delta).

    Iterate it once, ``async for``; leave the block early and what is not through is cancelled. The
    last delta of each completion has a ``finish_reason``, the last of each request its ``output``.

    Raises ``EngineFailed`` or ``EngineClosed`` from the iteration if the requests were lost.
    """

    def __init__(
        self, engine: "AsyncEngine", request_ids: Sequence[str], loop: asyncio.AbstractEventLoop
    ):
        self._engine, self._loop = engine, loop
        self._position = {request_id: i for i, request_id in enumerate(request_ids)}
        self._unfinished = set(request_ids)
        self._cancelled = False
        self._news: asyncio.Queue[TextDelta | Exception] = asyncio.Queue()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TextDelta]:
        while self._unfinished:
            new = await self._news.get()
            if isinstance(new, Exception):
                self._unfinished.clear()
                raise new
            if new.output is not None:
                self._unfinished.remove(new.request_id)
            if new.finish_reason is not None or not self._cancelled:
                return self._position[new.request_id], new
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the requests, at the end of the step that runs.

        Nothing more comes of them but the last delta of each completion, whose ``finish_reason`` is
        "cancelled" if it was not through: who waits for it hears of the end. From the stream's own
        event loop only.
        """
        if self._unfinished and not self._cancelled:
            self._cancelled = True
            self._engine._forget(self, tuple(self._unfinished))


class AsyncEngine:
    """One thread over ``text``, which nobody else may use from then on.

    Its methods may be called from any event loop, and from several.
    """

    def __init__(self, text: TextEngine):
        self.text = text
        self._calls: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lserve-engine", daemon=True)
        # Guards that nothing is asked of a thread that has ended: nobody would answer.
        self._door = threading.Lock()
        self._open = False
        # Only the thread reads or writes these.
        self._streams: dict[str, RequestStream] = {}
        self._ending = False

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> None:
        """Begins to step; once."""
        self._open = True
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread after the step that runs; requests that are not through are lost."""
        if self._thread.ident is None:
            return
        with contextlib.suppress(EngineClosed):
            await self.call(self._end)
        await asyncio.to_thread(self._thread.join)

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return self._open

    async def submit(
        self,
        requests: Sequence[tuple[Prompt | CheckedPrompt, SamplingParams]],
        *,
        deadline: float | None = None,
        record_reads: bool = False,
    ) -> RequestStream:
        """Queues requests, all or none, as ``TextEngine.submit`` does; its errors are raised here.

        A long text is best tokenised by the caller: here the engine would wait for it.

        Raises ``EngineClosed`` before ``start`` and after ``close``.
        """
        loop = asyncio.get_running_loop()

        def add() -> RequestStream:
            request_ids: list[str] = []
            try:
                for prompt, sampling in requests:
                    request_ids.append(
                        self.text.submit(
                            prompt, sampling, deadline=deadline, record_reads=record_reads
                        )
                    )
            except BaseException:
                self.text.abandon(request_ids)
                raise
            stream = RequestStream(self, request_ids, loop)
            self._streams.update(dict.fromkeys(request_ids, stream))
            return stream

        asked = self._ask(add)
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:  # the caller has gone: so have its requests
            asked.add_done_callback(_cancel_result)
            raise

    async def call[T](self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` on the engine's thread, between two steps.

        Raises what it raises, and ``EngineClosed`` before ``start`` and after ``close``.
        """
        return await self._ask(functools.partial(function, *args))

    def _ask[T](self, function: Callable[[], T]) -> "asyncio.Future[T]":
        call = _Call(function, asyncio.get_running_loop())
        with self._door:
            if self._open:
                self._calls.put(call)
            else:
                call.future.set_exception(EngineClosed("the engine is closed"))
        return call.future

    def _forget(self, stream: RequestStream, request_ids: Sequence[str]) -> None:
        with self._door:
            if self._open:  # else they are gone already
                self._calls.put(_Call(lambda: self._cancel(request_ids), stream._loop))

    # On the thread.

    def _run(self) -> None:
        try:
            while not self._ending:
                self._answer()
                if not self._ending and self.text.has_unfinished_requests:
                    self._step()
        finally:  # also where it could not be repaired after a failure
            with self._door:
                self._open = False
            closed = EngineClosed("the engine was closed before the request had finished")
            self._tell_streams(closed)
            while not self._calls.empty():
                self._calls.get().refuse(closed)

    def _answer(self) -> None:
        """Does what was asked; waits for it where there is nothing to step."""
        if not self.text.has_unfinished_requests:
            self._calls.get().run()
            self._gather()
        while not self._ending and not self._calls.empty():
            self._calls.get().run()

    def _gather(self) -> None:
        """Takes who comes together with the first, until all slots are taken."""
        engine, until = self.text.engine, time.monotonic() + _LONGEST_WAIT
        with contextlib.suppress(queue.Empty):
            while 0 < len(engine.unfinished) < engine.spec.max_num_seqs and not self._ending:
                left = until - time.monotonic()
                self._calls.get(timeout=max(0, min(_QUIET, left))).run()

    def _step(self) -> None:
        try:
            with memory_errors():
                deltas = self.text.step()
        except Exception as error:  # whatever it is: those who wait must hear of it
            failed = EngineFailed(f"the engine failed: {error}")
            failed.__cause__ = error
            self._tell_streams(failed)
            self.text.abandon()
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, TextDelta]]] = {}
        for delta in deltas:
            stream = self._streams[delta.request_id]
            by_loop.setdefault(stream._loop, []).append((stream, delta))
            if delta.output is not None:
                del self._streams[delta.request_id]
        for loop, news in by_loop.items():
            if not _tell(loop, _deliver, news):  # its loop was closed: nobody listens
                self._cancel({delta.request_id for _, delta in news})

    def _cancel(self, request_ids: Iterable[str]) -> None:
        """Of requests that are not through; the next step brings their ends."""
        for request_id in request_ids:
            if request_id in self._streams:
                self.text.cancel(request_id)

    def _tell_streams(self, error: Exception) -> None:
        """All requests are lost."""
        streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            _tell(stream._loop, stream._news.put_nowait, error)

    def _end(self) -> None:
        self._ending = True
        self.text.abandon()


class _Call[T]:
    """A function that is to run on the engine's thread, and where its result goes."""

    def __init__(self, function: Callable[[], T], loop: asyncio.AbstractEventLoop):
        self._function, self._loop = function, loop
        self.future: asyncio.Future[T] = loop.create_future()

    def run(self) -> None:
        try:
            with memory_errors():
                result = self._function()
        except Exception as error:  # the caller's, who waits for it
            self.refuse(error)
        else:
            _tell(self._loop, _settle, self.future, result, None)

    def refuse(self, error: Exception) -> None:
        _tell(self._loop, _settle, self.future, None, error)


def _settle[T](future: "asyncio.Future[T]", result: T, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
        future.exception()  # seen: who does not wait for it does not want to know


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> bool:
    """Calls a function on a loop; False if that has been closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True


def _deliver(news: list[tuple[RequestStream, TextDelta]]) -> None:
    for stream, delta in news:
        stream._news.put_nowait(delta)


def _cancel_result(future: "asyncio.Future[RequestStream]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()
