"""Calls like those that requests will make, by which their programs are compiled before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.engine.calls import Call
from lserve_jax.engine.inputs import Chunk, Start
from lserve_jax.engine.request import Request
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.sampling import SamplingMode, sampling_row
from lserve_jax.engine.scheduler import Scheduler
from lserve_jax.sampling_params import SamplingParams


def prefill_call(runner: ModelRunner, size: int, rows: int, *, block_sparse: bool) -> Call:
    """A chunk of ``size`` tokens in each of ``rows`` rows."""
    chunk = Chunk(
        tokens=np.zeros((size,), np.int32),
        page_table=np.zeros((runner.spec.pages_per_sequence,), np.int32),
        window_table=np.zeros((runner.spec.pages_per_sequence,), np.int32),
        start=0,
        prompt_length=size,
        block_sparse=block_sparse,
    )
    return runner.prefill_call([chunk] * rows, rows)


def insert_call(runner: ModelRunner, sampling: SamplingParams, rows: int) -> Call:
    """Slots for as many prompts."""
    start = Start(
        slot=0,
        prompt=np.zeros((1,), np.int32),
        sampling=sampling,
        sampling_row=sampling_row(sampling, eos_token_ids=(), default_seed=0),
        forced=-1,
        window_table=np.zeros((runner.spec.pages_per_sequence,), np.int32),
        rules=None,
    )
    logits = jax.ShapeDtypeStruct((rows, runner.config.vocab_size), jnp.float32)
    return runner.insert_call(logits, [start] * rows)


def decode_calls(
    runner: ModelRunner, scheduler: Scheduler, rows: int, sampling: SamplingParams
) -> list[Call]:
    """One burst of whole length; in exact mode that without drafts too."""
    inputs = scheduler.burst_inputs(scheduler.burst_steps, rows, None, None)
    inputs = dataclasses.replace(inputs, mode=SamplingMode.of([sampling]))
    if runner.spec.max_drafts is None:
        return [runner.decode_call(inputs)]
    return [
        runner.decode_call(dataclasses.replace(inputs, drafts=np.full((rows,), drafts, np.int32)))
        for drafts in (0, 1)
    ]


def first_calls(
    runner: ModelRunner, scheduler: Scheduler, request: Request, rows: int | None
) -> list[Call]:
    """What an engine's first request needs for sure; bursts if they will have ``rows`` rows.

    Empty if it asks for something rare, whose programs look otherwise. In exact mode a burst with
    drafts and one without: whether it drafts is decided when it comes.
    """
    sampling = request.sampling
    judged = sampling.prompt_logprobs is not None
    if judged or sampling.uses_penalties or request.rules is not None:
        return []
    left, chunk = len(request.prompt) - request.prefilled, runner.chunk_size
    sizes = {runner.padded(tokens) for tokens in (left, left % chunk) if tokens > 0}
    calls = [prefill_call(runner, size, 1, block_sparse=request.block_sparse) for size in sizes]
    if sampling.max_tokens > 0:
        calls.append(insert_call(runner, sampling, 1))
    if sampling.max_tokens > 1 and rows is not None:
        calls += decode_calls(runner, scheduler, rows, sampling)
    return calls
