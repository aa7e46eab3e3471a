"""Milliseconds a token of the engine with Llama-3-8B's geometry, dense beside lserve, on one GPU.

``lserve`` is LServe's own policy; ``shares`` adds three heads that read everything
(``few_heads_matter``).

    python benchmarks/decode.py [--contexts 16384 131072 524288] [--batches 1 8]
                                [--weights bf16 int8 int4]

The engine is the real one and its weights are random, in bf16 or quantised from that (int4 in
groups of 128, the output layer in int8). Prompts are not computed: their pages hold random keys and
values (``benchmarks/prefill.py`` times prompts). A figure is the median wall time of a burst of 64
steps over its steps, with the fastest and the slowest burst; the host's work goes on behind the
burst before. Writes ``benchmarks/results/decode.json``.
"""

import gc
import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import tyro
from llama_8b import (
    CONFIG,
    LSERVE,
    NO_CHUNKS,
    UncomputedPrompts,
    burst_seconds,
    few_heads_matter,
    options,
    random_params,
)
from machine import provenance

from lserve_jax.engine.build import build_engine

BURST = 64


@dataclass(frozen=True, kw_only=True)
class Args:
    contexts: tuple[int, ...] = (16384, 65536, 131072, 262144, 524288)
    batches: tuple[int, ...] = (1, 8)
    attention: tuple[str, ...] = ("dense", "lserve", "shares")
    weights: tuple[Literal["bf16", "int8", "int4", "fp8"], ...] = ("bf16",)
    bursts: int = 5  # timed ones
    # All of these must fit the cache: batch x context tokens of 131072 bytes, half of it in lserve.
    cache_bytes: int = 90 << 30
    output: Path = Path(__file__).parent / "results" / "decode.json"


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about = provenance()
    params, rows = random_params(CONFIG), []
    for name in args.attention:
        directory = Path(tempfile.mkdtemp())
        sparsity = {"dense": None, "lserve": LSERVE, "shares": few_heads_matter(directory)}[name]
        token_bytes = 131072 if sparsity is None else 74000
        for weights, batch in itertools.product(args.weights, args.batches):
            label = name if weights == "bf16" else f"{name}, {weights}"
            contexts = [n for n in args.contexts if n * batch * token_bytes <= args.cache_bytes]
            if not contexts:
                continue
            longest = max(contexts) + BURST * (args.bursts + 3) + 64
            begin = time.perf_counter()
            engine = build_engine(
                CONFIG,
                params,
                options(
                    sparsity,
                    max_num_seqs=batch,
                    max_model_len=longest,
                    max_prefixes=0,
                    kv_cache_bytes=args.cache_bytes,
                    burst_steps=BURST,
                    weights=None if weights == "bf16" else weights,
                    weight_group=128,
                    prefill_chunk_size=NO_CHUNKS,
                ),
                runner_class=UncomputedPrompts,
            )
            engine.runner.wait()
            print(f"{label}, batch {batch}: cache filled in {time.perf_counter() - begin:.0f} s")
            for context in contexts:
                begin = time.perf_counter()
                prompts = [np.zeros((context,), np.int32)] * batch
                seconds = burst_seconds(engine, prompts, args.bursts)
                times = [1e3 * t / BURST for t in seconds]
                row = {
                    "attention": label,
                    "batch": batch,
                    "context": context,
                    "ms_per_step": median(times),
                    "fastest": min(times),
                    "slowest": max(times),
                }
                rows.append(row)
                args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
                print(
                    f"{label:13s} batch {batch} context {context:7d}  {row['ms_per_step']:7.3f} ms "
                    f"({row['fastest']:.3f}-{row['slowest']:.3f})  "
                    f"[{time.perf_counter() - begin:.0f} s]",
                    flush=True,
                )
            del engine  # the memory of its cache is needed, and it holds itself
            gc.collect()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
