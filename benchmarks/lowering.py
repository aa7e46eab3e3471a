"""Seconds of Python before XLA compiles a jitted step: tracing, and lowering with all kernels.

    python benchmarks/lowering.py [--cases dense lserve] [--rows 1 8 32]

Needs no GPU and no weights: arguments are shapes. ``dense``, ``lserve`` and ``shares`` are a burst
of decode steps with Llama-3-8B's geometry as ``benchmarks/decode.py`` runs it, lowered for CUDA
with the kernels for Hopper GPUs; ``prefill`` is a chunk of 8192 tokens of the same. ``cpu`` is what
the default model needs on a CPU for the first tokens: a chunk of 64 tokens and a burst, dense.
``warmup`` are all programs of a full warm-up of ``lserve``, up to 32 rows: its rows are sums by
kind, with the seconds of kernels apart, which a warm-up gives to other processes, and without
Python's collector, which it turns off.

Each row runs in a process of its own, so that none profits from another's caches; its seconds are
CPU time, which other programs on the machine change little. *Kernels* are the different Mosaic
kernels of the module, *calls* how often it names one. Writes ``benchmarks/results/lowering.json``.
"""

import dataclasses
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import tyro
from llama_8b import CONFIG, LSERVE, few_heads_matter
from machine import provenance
from training import CONFIG as SMOLLM2

from lserve_jax.attention.attend import ChunkRows
from lserve_jax.attention.cache import CacheSpec, init_layer_cache, make_spec
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.buckets import SMALLEST_CHUNK, buckets, row_counts
from lserve_jax.engine.head_policy import head_policy
from lserve_jax.engine.sampling import SamplingMode
from lserve_jax.engine.state import DecodeState, DecodeTables, Program, SlotStarts
from lserve_jax.engine.steps import decode_burst, insert, prefill_chunks
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import abstract_params
from pallas_kernels.hopper import shared_kernel
from pallas_kernels.hopper.lower_elsewhere import lowerings

Case = Literal["dense", "lserve", "shares", "prefill", "cpu", "warmup"]
GREEDY = SamplingMode(greedy_only=True, filters=False)
MODES = GREEDY, SamplingMode(greedy_only=False, filters=False), SamplingMode(filters=True)


@dataclass(frozen=True, kw_only=True)
class Args:
    cases: tuple[Case, ...] = get_args(Case)
    rows: tuple[int, ...] = (1, 8, 32)
    """Rows of a burst of 64 steps; the other cases have their own."""
    output: Path = Path(__file__).parent / "results" / "lowering.json"


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def spec_of(config: ModelConfig, sparsity: SparsityConfig | None, rows: int) -> CacheSpec:
    length = min(config.max_position_embeddings, 131072 + 1024)
    spec = make_spec(
        config,
        sparsity=sparsity,
        heads=head_policy(config, sparsity).budgets,
        max_model_len=length,
        max_num_seqs=rows,
        num_pages=1,
        max_prefixes=8,
        kv_dtype="auto",
    )
    return dataclasses.replace(spec, num_pages=rows * spec.pages_per_sequence)


def traced_burst(
    program: Program, rows: int, steps: int, dtype, mode: SamplingMode = GREEDY
) -> jax.stages.Traced:
    state = jax.eval_shape(lambda: DecodeState.empty(program.spec))
    tables = DecodeTables(
        page_table=array(rows, program.spec.pages_per_sequence),
        groups=None,
    )
    return decode_burst.trace(
        program,
        abstract_params(program.config, dtype),
        abstract_caches(program, dtype),
        state,
        tables,
        array(steps, rows),
        array(),
        mode=mode,
    )


def traced_chunk(program: Program, tokens: int, dtype, rows: int = 1) -> jax.stages.Traced:
    return prefill_chunks.trace(
        program,
        abstract_params(program.config, dtype),
        abstract_caches(program, dtype),
        array(rows, tokens),
        ChunkRows(
            page_table=array(rows, program.spec.pages_per_sequence),
            window_table=array(rows, program.spec.pages_per_sequence),
            start=array(rows),
            length=array(rows),
            prompt_length=array(rows),
            whole_from=array(rows),
        ),
        None,
        top=0,
    )


def traced_insertion(program: Program, rows: int, dtype, mode: SamplingMode) -> jax.stages.Traced:
    start = SlotStarts(
        slot=array(rows),
        prompt_length=array(rows),
        max_tokens=array(rows),
        forced=array(rows),
        window_table=array(rows, program.spec.pages_per_sequence),
        prompt_mask=None,
        history=None,
    )
    logits = array(rows, program.config.vocab_size, dtype=jnp.float32)
    state = jax.eval_shape(lambda: DecodeState.empty(program.spec))
    return insert.trace(program, abstract_caches(program, dtype), state, logits, start, mode=mode)


def abstract_caches(program: Program, dtype) -> list:
    config, spec = program.config, program.spec
    return jax.eval_shape(
        lambda: [init_layer_cache(config, spec, i, dtype) for i in range(config.num_hidden_layers)]
    )


def measure(case: Case, rows: int) -> list[dict[str, Any]]:
    if case == "cpu":
        program = Program(config=SMOLLM2, spec=spec_of(SMOLLM2, None, 8), backend="reference")
        return [
            timed(lambda: traced_chunk(program, 64, jnp.float32), "cpu", case="cpu, chunk"),
            timed(lambda: traced_burst(program, rows, 16, jnp.float32), "cpu", case="cpu, burst"),
        ]
    with tempfile.TemporaryDirectory() as directory:
        sparsity = few_heads_matter(Path(directory)) if case == "shares" else LSERVE
        rows = 32 if case == "warmup" else rows
        spec = spec_of(CONFIG, None if case == "dense" else sparsity, rows)
    program = Program(config=CONFIG, spec=spec, backend="mosaic")
    if case == "warmup":
        return warmup_seconds(program, 8192, jnp.bfloat16)
    if case == "prefill":
        return [timed(lambda: traced_chunk(program, 8192, jnp.bfloat16), "cuda", case=case)]
    what = {"case": case, "rows": rows}
    return [timed(lambda: traced_burst(program, rows, 64, jnp.bfloat16), "cuda", **what)]


def warmup_seconds(program: Program, chunk: int, dtype) -> list[dict[str, Any]]:
    """Of the programs that ``lserve_jax.engine.warmup`` names, a row a kind."""
    slots = program.spec.max_num_seqs
    chunks = [(size, 1) for size in buckets(SMALLEST_CHUNK, chunk)]
    parameters = sum(x.size for x in jax.tree.leaves(abstract_params(program.config)))
    how = {"most_tokens": chunk, "parameters": parameters}
    joined = [
        (size, rows) for size, _ in chunks for rows in row_counts(size, slots, **how) if rows > 1
    ]
    starts = sorted({1, *(rows for _, rows in joined)})
    kinds = {
        "chunks": [partial(traced_chunk, program, n, dtype, rows) for n, rows in chunks + joined],
        "insertions": [
            partial(traced_insertion, program, rows, dtype, mode)
            for rows in starts
            for mode in MODES
        ],
        "bursts": [
            partial(traced_burst, program, rows, 64, dtype, mode)
            for rows in buckets(1, slots)
            for mode in MODES
        ],
    }
    gc.disable()
    return [{"case": "warmup", "kind": kind, **sums(kinds[kind])} for kind in kinds]


def sums(traces: list[Callable[[], jax.stages.Traced]]) -> dict[str, Any]:
    seconds, kernels = [0.0] * 3, 0
    for trace in traces:
        times = [time.process_time()]
        traced = trace()
        times.append(time.process_time())
        for lowering in lowerings(traced.jaxpr):
            if not shared_kernel.is_lowered(lowering):
                shared_kernel.keep(lowering, shared_kernel.lower(lowering))
                kernels += 1
        times.append(time.process_time())
        traced.lower(lowering_platforms=("cuda",))
        times.append(time.process_time())
        own = (end - begin for begin, end in pairwise(times))
        seconds = [x + y for x, y in zip(seconds, own, strict=True)]
    names = "trace_seconds", "kernel_seconds", "lower_seconds"
    of_names = {name: round(x, 2) for name, x in zip(names, seconds, strict=True)}
    return {"programs": len(traces), **of_names, "kernels": kernels}


def timed(trace, platform: str, **what: Any) -> dict[str, Any]:
    begin = time.process_time()
    traced = trace()
    middle = time.process_time()
    lowered = traced.lower(lowering_platforms=(platform,))
    end = time.process_time()
    text = lowered.as_text()
    kernels = re.findall(r'@mosaic_gpu_v2.*?module = "(.*?)"', text)
    return {
        **what,
        "trace_seconds": round(middle - begin, 2),
        "lower_seconds": round(end - middle, 2),
        "kernels": len(set(kernels)),
        "calls": len(kernels),
        "megabytes": round(len(text) / 1e6, 1),
    }


def main(args: Args) -> None:
    about, results = provenance(), []
    for case in args.cases:
        for rows in args.rows if case in ("dense", "lserve", "shares") else (1,):
            command = [sys.executable, __file__, case, str(rows)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for result in json.loads(done.stdout):
                results.append(result)
                print(result, flush=True)
    args.output.write_text(json.dumps({**about, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in get_args(Case):
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main(tyro.cli(Args, description=__doc__))
