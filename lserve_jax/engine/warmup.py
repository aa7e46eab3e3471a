"""Programs that requests will need, compiled before the first one comes.

"auto" is what a short request alone needs: a short prompt, and bursts of one row, greedy and
drawing. "full" is every length of a prompt's chunk, alone, read causally or block-sparsely, and
beside others, and every number of slots, beside these with filters (top_k, top_p, min_p). After
"auto" a GPU's host compiles the rest of "full" while requests run, several programs at the same
time. Where pages go to host memory, both have the programs that move them. What remains compiles
when it is first asked for: rows that read a prefix together, log probabilities, penalties,
restricted tokens. Without a warm-up the engine compiles what its first request needs at the same
time.
"""

import numpy as np

from lserve_jax.engine.calls import Call
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.example_calls import decode_calls, insert_call, prefill_call
from lserve_jax.engine.options import Warmup
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.steps import insert, prefill_chunks
from lserve_jax.sampling_params import SamplingParams

_USUAL = (SamplingParams(temperature=0), SamplingParams())
_FILTERED = SamplingParams(top_p=0.9)


def warmup_calls(engine: Engine, how: Warmup) -> list[Call]:
    """What to compile ahead of time, or to load."""
    if how == "none":
        return []
    sizes = engine.shape_buckets()
    chunks, slots, usual = sizes["chunk_tokens"], sizes["slots"], _USUAL
    if how == "auto":
        chunks, slots = chunks[:1], slots[:1]
    else:
        usual = (*_USUAL, _FILTERED)
    shortest, longest = (engine.spec.is_block_sparse(n) for n in (1, engine.max_model_len))
    kinds = sorted({shortest} if how == "auto" else {shortest, longest})
    runner, scheduler = engine.runner, engine.scheduler
    # Bursts first, which take longest.
    calls = [
        call
        for rows in slots
        for way in usual
        for call in decode_calls(runner, scheduler, rows, way)
    ]
    calls += [prefill_call(runner, n, 1, block_sparse=kind) for kind in kinds for n in chunks]
    calls += [insert_call(runner, sampling, 1) for sampling in usual]
    if how == "full" and not shortest and not engine.deterministic:  # else each runs alone
        together = [(n, r) for n in chunks for r in runner.row_counts(n) if r > 1]
        calls += [prefill_call(runner, n, r, block_sparse=False) for n, r in together]
        calls += [insert_call(runner, s, rows) for rows in {r for _, r in together} for s in usual]
    host = scheduler.prefix_cache.host
    if host is not None and not runner.programs.sharded:  # else XLA says where blocks lie
        for pages in host.sizes:
            for windows in {0, pages if scheduler.prefix_cache.streams else 0}:
                calls += _blocks(runner, pages, windows)
    return calls


def calls_beside(engine: Engine) -> list[Call]:
    """All of "full", to be compiled while requests run.

    Chunks and insertions first: one request needs those of its prompt's length, and a burst of more
    slots only when others have come. Then bursts, those of fewer slots first.
    """
    before = prefill_chunks, insert
    return sorted(warmup_calls(engine, "full"), key=lambda call: call.function not in before)


def _blocks(runner: ModelRunner, pages: int, windows: int) -> list[Call]:
    """Pages that go to host memory, and come back."""
    ids = np.zeros((pages,), np.int32), np.zeros((windows,), np.int32)
    return [runner.read_block_call(*ids), runner.write_block_call(runner.block_shapes(*ids), *ids)]
