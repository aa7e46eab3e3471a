"""Programs that requests will need, compiled before the first one comes.

"auto" is what any request needs: a short prompt, and bursts of one row, greedy and drawing. "full"
is every length of a prompt's chunk, alone, read causally or block-sparsely, and beside others, and
every number of slots, beside these with filters (top_k, top_p, min_p). Where pages go to host
memory, both have the programs that move them. What remains compiles when it is first asked for:
rows that read a prefix together, log probabilities, penalties, restricted tokens.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from lserve_jax.engine.engine import Engine
from lserve_jax.engine.inputs import Chunk, Start
from lserve_jax.engine.programs import Call
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.sampling import SamplingMode, sampling_row
from lserve_jax.sampling_params import SamplingParams

Warmup = Literal["none", "auto", "full"]
_USUAL = (SamplingParams(temperature=0), SamplingParams())
_FILTERED = SamplingParams(top_p=0.9)


def warm_up(engine: Engine, how: Warmup, *, progress: bool = False) -> None:
    """Compiles ahead of time, or loads; nothing runs. ``progress`` shows a bar on stderr."""
    if how == "none":
        return
    sizes = engine.shape_buckets()
    chunks, slots, usual = sizes["chunk_tokens"], sizes["slots"], _USUAL
    if how == "auto":
        chunks, slots = chunks[:1], slots[:1]
    else:
        usual = (*_USUAL, _FILTERED)
    shortest, longest = (engine.spec.is_block_sparse(n) for n in (1, engine.max_model_len))
    kinds = sorted({shortest} if how == "auto" else {shortest, longest})
    calls = [_prefill(engine, size, 1, kind) for kind in kinds for size in chunks]
    calls += [_insert(engine, sampling, 1) for sampling in usual]
    if how == "full" and not shortest:  # who is read block-sparsely runs alone
        rows_for = engine.runner.rows_for
        together = {size: rows_for(size) for size in sizes["joined_tokens"]}
        calls += [_prefill(engine, size, rows, False) for size, rows in together.items()]
        calls += [_insert(engine, s, rows) for rows in set(together.values()) for s in usual]
    calls += [
        call for rows in slots for sampling in usual for call in _decode(engine, rows, sampling)
    ]
    host = engine.scheduler.prefix_cache.host
    if host is not None and not engine.runner.programs.sharded:  # else XLA says where blocks lie
        for pages in host.sizes:
            for windows in {0, pages if engine.scheduler.prefix_cache.streams else 0}:
                calls += _blocks(engine.runner, pages, windows)
    engine.runner.programs.prepare(calls, progress=progress)


def _prefill(engine: Engine, size: int, rows: int, block_sparse: bool) -> Call:
    chunk = Chunk(
        tokens=np.zeros((size,), np.int32),
        page_table=np.zeros((engine.spec.pages_per_sequence,), np.int32),
        window_table=np.zeros((engine.spec.pages_per_sequence,), np.int32),
        start=0,
        prompt_length=size,
        block_sparse=block_sparse,
    )
    return engine.runner.prefill_call([chunk] * rows, rows)


def _insert(engine: Engine, sampling: SamplingParams, rows: int) -> Call:
    start = Start(
        slot=0,
        prompt=np.zeros((1,), np.int32),
        sampling=sampling,
        sampling_row=sampling_row(sampling, eos_token_ids=engine.eos_token_ids, default_seed=0),
        forced=-1,
        window_table=np.zeros((engine.spec.pages_per_sequence,), np.int32),
        rules=None,
    )
    logits = jnp.zeros((rows, engine.config.vocab_size), jnp.float32)
    return engine.runner.insert_call(logits, [start] * rows)


def _blocks(runner: ModelRunner, pages: int, windows: int) -> list[Call]:
    """Pages that go to host memory, and come back."""
    ids = np.zeros((pages,), np.int32), np.zeros((windows,), np.int32)
    return [runner.read_block_call(*ids), runner.write_block_call(runner.empty_block(*ids), *ids)]


def _decode(engine: Engine, rows: int, sampling: SamplingParams) -> list[Call]:
    """One burst; in exact mode that without drafts too."""
    inputs = engine.scheduler.burst_inputs(engine.burst_steps, rows, None, None)
    inputs = dataclasses.replace(inputs, mode=SamplingMode.of([sampling]))
    if engine.spec.max_drafts is None:
        return [engine.runner.decode_call(inputs)]
    return [
        engine.runner.decode_call(
            dataclasses.replace(inputs, drafts=np.full((rows,), drafts, np.int32))
        )
        for drafts in (0, 1)
    ]
