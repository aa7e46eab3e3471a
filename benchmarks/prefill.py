"""Time to first token of the engine with Llama-3-8B's geometry, dense beside lserve, on one GPU.

    python benchmarks/prefill.py [--prompts 16384 131072] [--densities 0.5 0.25 0.1] [--repeats 2]

The engine is the real one: weights are random bf16, a prompt is random tokens, computed in chunks
through the paged cache. A figure is the median wall time from the arrival of the request to its
first token; the first prompt of each engine only compiles. Operator rates are those of
``benchmarks/kernels.py``. Writes ``benchmarks/results/prefill.json``.

Beside causal prefill, retrieval heads of lserve attend blocks that they choose: with random weights
no threshold means anything, so how many is set (``prefill_density``); the estimate runs as ever.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from llama_8b import CONFIG, LSERVE, options, random_params
from machine import provenance

from lserve_jax.engine.build import build_engine
from lserve_jax.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Args:
    prompts: tuple[int, ...] = (16384, 65536, 131072)  # tokens
    attention: tuple[str, ...] = ("dense", "lserve")
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)  # of lserve with block-sparse prefill
    chunk: int = 8192
    repeats: int = 2
    output: Path = Path(__file__).parent / "results" / "prefill.json"


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about = provenance()
    params, rows = random_params(CONFIG), []
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    rng = np.random.default_rng(0)
    settings = [(name, LSERVE if name == "lserve" else None) for name in args.attention]
    for density in args.densities:
        sparsity = dataclasses.replace(
            LSERVE, prefill="block_sparse", prefill_density=density, prefill_min_tokens=1
        )
        settings.append((f"lserve, {density} of blocks", sparsity))
    for name, sparsity in settings:
        engine = build_engine(
            CONFIG,
            params,
            options(
                sparsity,
                max_num_seqs=1,
                max_model_len=max(args.prompts) + 64,
                max_prefixes=0,
                prefill_chunk_size=args.chunk,
            ),
        )
        begin = time.perf_counter()
        engine.add_request("warm", np.ones((2 * args.chunk,), np.int32), sampling, seed=0)
        list(engine.stream())
        print(f"{name}: compiled in {time.perf_counter() - begin:.0f} s", flush=True)
        for tokens in args.prompts:
            times, density = [], 1.0
            for repeat in range(args.repeats):
                prompt = rng.integers(0, CONFIG.vocab_size, tokens)
                engine.add_request(f"{tokens}-{repeat}", prompt, sampling, seed=0)
                (output,) = engine.stream()
                times.append(output.metrics.first_token_seconds)
                density = output.metrics.prefill_density
            row = {
                "attention": name,
                "tokens": tokens,
                "chunk": args.chunk,
                "seconds": median(times),
                "fastest": min(times),
                "slowest": max(times),
                "density": density,  # that there was: some blocks are always attended
            }
            rows.append(row)
            args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            print(
                f"{name:22s} {tokens:7d} tokens: first token after {row['seconds']:.3f} s "
                f"({row['fastest']:.3f}-{row['slowest']:.3f}), density {density:.3f}",
                flush=True,
            )
        del engine  # the memory of its cache is needed


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
