"""Seconds of Python before XLA compiles a jitted step: tracing, and lowering with all kernels.

    python benchmarks/lowering.py [--cases dense lserve] [--rows 1 8 32]

Needs no GPU and no weights: arguments are shapes. ``dense``, ``lserve`` and ``shares`` are a burst
of decode steps with Llama-3-8B's geometry as ``benchmarks/decode.py`` runs it, lowered for CUDA
with the kernels for Hopper GPUs; ``prefill`` is a chunk of 8192 tokens of the same. ``cpu`` is what
the default model needs on a CPU for the first tokens: a chunk of 64 tokens and a burst, dense.

Each row runs in a process of its own, so that none profits from another's caches; its seconds are
CPU time, which other programs on the machine change little. *Kernels* are the different Mosaic
kernels of the module, *calls* how often it names one. Writes ``benchmarks/results/lowering.json``.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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
from lserve_jax.engine.head_policy import head_policy
from lserve_jax.engine.sampling import SamplingMode
from lserve_jax.engine.state import DecodeState, DecodeTables, Program
from lserve_jax.engine.steps import decode_burst, prefill_chunks
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import abstract_params

Case = Literal["dense", "lserve", "shares", "prefill", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Args:
    cases: tuple[Case, ...] = get_args(Case)
    rows: tuple[int, ...] = (1, 8, 32)
    """Rows of a burst of 64 steps; ``prefill`` and ``cpu`` have one."""
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


def traced_burst(program: Program, rows: int, steps: int, dtype) -> jax.stages.Traced:
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
        mode=SamplingMode(greedy_only=True, filters=False),
    )


def traced_chunk(program: Program, tokens: int, dtype) -> jax.stages.Traced:
    return prefill_chunks.trace(
        program,
        abstract_params(program.config, dtype),
        abstract_caches(program, dtype),
        array(1, tokens),
        ChunkRows(
            page_table=array(1, program.spec.pages_per_sequence),
            window_table=array(1, program.spec.pages_per_sequence),
            start=array(1),
            length=array(1),
            prompt_length=array(1),
        ),
        None,
        top=0,
    )


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
        spec = spec_of(CONFIG, None if case == "dense" else sparsity, rows)
    program = Program(config=CONFIG, spec=spec, backend="mosaic")
    if case == "prefill":
        return [timed(lambda: traced_chunk(program, 8192, jnp.bfloat16), "cuda", case=case)]
    what = {"case": case, "rows": rows}
    return [timed(lambda: traced_burst(program, rows, 64, jnp.bfloat16), "cuda", **what)]


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
