"""How long does a long prompt keep a running request waiting for its next tokens?

    python benchmarks/stall.py [--model smollm2-135m-instruct] [--chunk 512] [--prompt-chunks 3]

One request decodes when a prompt of several chunks arrives. A figure is the largest time between
two results of the running request while that prompt is prefilled, beside the median time of a
chunk, both in one run; the first round only compiles. Writes ``benchmarks/results/stall.json``.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from machine import provenance

from lserve_jax import LLM, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "smollm2-135m-instruct"
    chunk: int = 512  # tokens
    prompt_chunks: int = 3
    burst_steps: int = 8
    rounds: int = 4
    output: Path = Path(__file__).parent / "results" / "stall.json"


def measure(llm: LLM, args: Args, seed: int) -> tuple[float, float]:
    """Seconds of one chunk (of a prompt alone), and the running request's longest wait."""
    engine, rng = llm.engine, np.random.default_rng(seed)
    prompt = rng.integers(0, llm.config.vocab_size, args.chunk * args.prompt_chunks)
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    begin = time.perf_counter()
    engine.add_request("alone", prompt, sampling, seed=0)
    list(engine.stream())
    chunk = (time.perf_counter() - begin) / args.prompt_chunks
    steps = args.burst_steps * (args.prompt_chunks + 6)
    running = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    engine.add_request("running", prompt[:16], running, seed=0)
    engine.step()
    engine.add_request("long", prompt, sampling, seed=0)
    times = []
    for new in engine.stream():
        if new.request_id == "running":
            times.append(time.perf_counter())
    return chunk, float(np.diff(times).max())


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    llm = LLM(
        args.model,
        max_num_seqs=2,
        prefill_chunk_size=args.chunk,
        burst_steps=args.burst_steps,
        enable_prefix_caching=False,
        max_model_len=args.chunk * args.prompt_chunks + 256,
    )
    rounds = [measure(llm, args, seed) for seed in range(args.rounds + 1)][1:]
    chunks, waits = zip(*rounds, strict=True)
    result = {
        **provenance(),
        "model": args.model,
        "chunk_tokens": args.chunk,
        "burst_steps": llm.engine.burst_steps,
        "chunk_seconds": chunks,
        "longest_wait_seconds": waits,
        "wait_over_chunk": median(wait / chunk for chunk, wait in rounds),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"a chunk of {args.chunk} tokens takes {median(chunks):.3f} s; the longest wait is "
        f"{median(waits):.3f} s ({min(waits):.3f}-{max(waits):.3f}), "
        f"{result['wait_over_chunk']:.2f} chunks"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
