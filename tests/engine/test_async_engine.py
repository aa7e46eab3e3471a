"""One thread that steps the engine, asked by event loops: who hears of what."""

import asyncio
import queue
import threading

import pytest
from tiny_llm import tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams, async_engine
from lserve_jax.async_engine import AsyncEngine, EngineClosed, EngineFailed

PROMPTS = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [9] * 40}]
SHORT = SamplingParams(temperature=0, max_tokens=6)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    config = tiny_config(layers=1, kv_heads=1)
    return LLM((config, tiny_params(config)), max_num_seqs=4, burst_steps=2)


def on(llm, program):
    async def run():
        async with AsyncEngine(llm.text_engine) as engine:
            return await program(engine)

    return asyncio.run(run())


async def collect(stream):
    outputs = {}
    async for position, delta in stream:
        if delta.output is not None:
            outputs[position] = delta.output.outputs[0].token_ids
    return [outputs[i] for i in sorted(outputs)]


def test_requests_together_and_apart_say_what_generate_says(llm):
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SHORT)]

    async def program(engine):
        async def one(prompt):
            async with await engine.submit([(prompt, SHORT)]) as stream:
                return (await collect(stream))[0]

        apart = await asyncio.gather(*map(one, PROMPTS))
        async with await engine.submit([(prompt, SHORT) for prompt in PROMPTS]) as stream:
            return apart, await collect(stream)

    apart, together = on(llm, program)
    assert apart == together == expected


class Arrivals:
    """A queue in which nothing lies: what is put into it comes only while somebody waits."""

    def __init__(self):
        self.coming, self.waits = [], []

    def put(self, call):
        self.coming.append(call)

    def empty(self):
        return True

    def get(self, timeout=None):
        self.waits.append(timeout)
        if not self.coming:
            raise queue.Empty
        return self.coming.pop(0)


@pytest.mark.parametrize(("coming", "waits"), [(1, 2), (3, 4), (6, 4)])
def test_an_idle_engine_begins_with_all_who_come_together(llm, coming, waits):
    async def run():
        engine = AsyncEngine(llm.text_engine)
        engine._open, engine._calls = True, Arrivals()
        asked = [asyncio.ensure_future(engine.submit([(PROMPTS[0], SHORT)])) for _ in range(coming)]
        await asyncio.sleep(0)  # all have asked
        engine._answer()
        running = len(llm.engine.unfinished)
        llm.text_engine.abandon()
        for task in asked:
            task.cancel()
        return running, engine._calls.waits

    running, waited = asyncio.run(run())
    assert running == min(coming, 4)  # it has four slots: who comes later waits in any case
    assert len(waited) == waits
    assert waited[0] is None and all(0 <= t <= async_engine._QUIET for t in waited[1:])


def test_leaving_a_stream_cancels_all_of_it(llm):
    async def program(engine):
        before = llm.engine.metrics().cancelled
        async with await engine.submit([(prompt, LONG) for prompt in PROMPTS]) as stream:
            await anext(stream)
        ends = sorted([(i, d.token_ids, d.finish_reason) async for i, d in stream])
        assert ends == [(0, [], "cancelled"), (1, [], "cancelled")]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return await engine.call(
            lambda: (llm.engine.has_unfinished_requests, llm.engine.metrics().cancelled - before)
        )

    assert on(llm, program) == (False, 2)


def test_who_waits_for_a_stream_that_another_task_cancels_hears_of_its_end(llm):
    async def program(engine):
        stream = await engine.submit([(prompt, LONG) for prompt in PROMPTS])
        waiting = asyncio.ensure_future(collect(stream))
        await asyncio.sleep(0)  # it waits
        stream.cancel()
        stream.cancel()  # once more changes nothing
        ends = await waiting
        assert [len(tokens) < LONG.max_tokens for tokens in ends] == [True, True]
        return await engine.call(lambda: llm.engine.has_unfinished_requests)

    assert on(llm, program) is False


def test_any_number_of_threads_with_loops_of_their_own(llm):
    """Requests of eight threads, some of which leave early: the others notice nothing."""
    prompts = [{"prompt_token_ids": [3 + i] * (5 + i)} for i in range(8)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, SHORT)]
    engine = AsyncEngine(llm.text_engine)
    engine.start()
    results: dict[int, list] = {}

    async def ask(number):
        if number % 3 == 0:
            async with await engine.submit([(prompts[number], LONG)]) as left:
                await anext(left)
        results[number] = await collect(await engine.submit([(prompts[number], SHORT)]))

    threads = [threading.Thread(target=lambda i=i: asyncio.run(ask(i))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(engine.close())
    assert results == {i: [tokens] for i, tokens in enumerate(expected)}


def test_a_caller_that_is_cancelled_while_it_submits_leaves_nothing(llm):
    async def program(engine):
        hold, held = threading.Event(), threading.Event()
        # The thread is busy: the submission waits behind this.
        busy = asyncio.ensure_future(engine.call(lambda: (held.set(), hold.wait())))
        await asyncio.to_thread(held.wait)
        asking = asyncio.ensure_future(engine.submit([(PROMPTS[0], LONG)]))
        await asyncio.sleep(0)  # it has asked
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        hold.set()
        await busy
        return await engine.call(lambda: bool(llm.engine.unfinished))

    # What it left is cancelled by a call behind the answer: both are through when this returns.
    async def program_and_after(engine):
        await program(engine)
        await asyncio.sleep(0)
        await engine.call(lambda: None)
        return await engine.call(lambda: bool(llm.engine.unfinished))

    assert on(llm, program_and_after) is False


def test_refused_requests_queue_nothing_and_errors_reach_who_asked(llm):
    async def program(engine):
        too_long = ({"prompt_token_ids": [1]}, SamplingParams(max_tokens=5000))
        with pytest.raises(ValueError, match="max_model_len"):
            await engine.submit([(PROMPTS[0], SHORT), too_long])
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda: 1 / 0)
        return await engine.call(lambda: llm.engine.has_unfinished_requests)

    assert on(llm, program) is False


def test_a_failed_step_is_told_to_all_and_the_next_request_runs(llm, monkeypatch):
    step = llm.engine.step

    def failing():
        monkeypatch.setattr(llm.engine, "step", step)
        raise RuntimeError("broken")

    async def program(engine):
        monkeypatch.setattr(llm.engine, "step", failing)
        requests = [(prompt, SHORT) for prompt in PROMPTS]
        stream = await engine.submit(requests)
        with pytest.raises(EngineFailed, match="broken"):
            await collect(stream)
        return await collect(await engine.submit(requests))

    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SHORT)]
    assert on(llm, program) == expected


def test_closing_loses_what_runs_and_refuses_what_comes(llm):
    async def run():
        engine = AsyncEngine(llm.text_engine)
        with pytest.raises(EngineClosed):
            await engine.submit([(PROMPTS[0], SHORT)])
        await engine.close()  # it never began
        engine.start()
        stream = await engine.submit([(PROMPTS[0], LONG)])
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineClosed):
            await collect(stream)
        with pytest.raises(EngineClosed):
            await engine.call(lambda: None)
        stream.cancel()
        await engine.close()
        assert not engine.is_open

    asyncio.run(run())
    assert not llm.engine.has_unfinished_requests


def test_two_loops_share_an_engine_and_one_that_ends_leaves_nothing(llm):
    engine = AsyncEngine(llm.text_engine)
    engine.start()

    async def whole():
        return await collect(await engine.submit([(PROMPTS[0], SHORT)]))

    async def left():
        stream = await engine.submit([(PROMPTS[1], LONG)])
        await anext(stream)  # and the loop ends without leaving the stream

    results = []
    other = threading.Thread(target=lambda: results.append(asyncio.run(whole())))
    other.start()
    asyncio.run(left())
    other.join()
    expected = [output.outputs[0].token_ids for output in [asyncio.run(_alone(engine))]]
    assert results == [expected]

    async def idle():
        while await engine.call(lambda: llm.engine.has_unfinished_requests):
            await asyncio.sleep(0.01)
        await engine.close()

    asyncio.run(idle())


async def _alone(engine):
    async for _, delta in await engine.submit([(PROMPTS[0], SHORT)]):
        if delta.output is not None:
            return delta.output
