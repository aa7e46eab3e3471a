"""Times prefill attention over lists of blocks beside causal attention, on one GPU.

    python benchmarks/prefill_blocks.py [--tokens 131072] [--densities 0.5 0.25 0.1]

A chunk at the end of a long prompt, Llama-3-8B's heads: all of them retrieval, and half of them
streaming. A list has the tile's first and last block and random ones between, as many as the
density says. Times are the GPU's own (CUPTI) for all kernels of a call, medians. "Over density" is
the time's share of causal attention's, over the share of the blocks: 1 is a kernel to which lists
cost nothing. Rows "choose" are of ``choose_blocks``, which makes the lists, with the kernel and in
plain XLA: threshold and density cost the same. Writes ``benchmarks/results/prefill_blocks.json``.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import jax
import tyro
from jax.experimental.mosaic.gpu import profiler
from machine import provenance
from shapes.prefill import PrefillShape, prefill_inputs, random_blocks

from pallas_kernels import api
from pallas_kernels.hopper.prefill_attention import prefill_attention


@dataclass(frozen=True, kw_only=True)
class Args:
    tokens: int = 131072  # of the prompt up to the chunk's end
    chunk: int = 8192
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    repeats: int = 10  # at least 2
    output: Path = Path(__file__).parent / "results" / "prefill_blocks.json"


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = provenance()
    rows = result["rows"] = []
    every_head = PrefillShape(
        name="retrieval", tokens=args.chunk, start=args.tokens - args.chunk, retrieval_heads=8
    )
    half = replace(every_head, name="half streaming", retrieval_heads=4, streaming_heads=4)
    for shape in (every_head, half):
        inputs, window = prefill_inputs(shape)
        attend = jax.jit(partial(prefill_attention, **window))
        measure = profiler.measure(attend, iterations=args.repeats)
        causal = None
        for density in (None, *args.densities):
            blocks, share = None, 1.0
            if density is not None:
                blocks = random_blocks(shape, density)
                listed = int(blocks.counts.sum())
                share = listed / (shape.retrieval_heads * int(shape.causal_blocks.sum()))
            _, times = measure(*inputs, blocks=blocks)
            times = [milliseconds * 1e3 for milliseconds in times]
            causal = median(times) if causal is None else causal
            row = {
                "heads": shape.name,
                "chunk": args.chunk,
                "tokens": args.tokens,
                "density": share,
                "us": median(times),
                "fastest_us": min(times),
                "slowest_us": max(times),
                "of_causal": median(times) / causal,
                "over_density": median(times) / causal / share,
            }
            rows.append(row)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(
                f"{shape.name:14s} density {share:5.3f}: {row['us']:8.0f} us "
                f"({row['fastest_us']:.0f}-{row['slowest_us']:.0f}), {row['of_causal']:.3f} of "
                f"causal, {row['over_density']:.2f} over density",
                flush=True,
            )
        q, k, _, pool, _, table, _, start, length = inputs
        heads = shape.retrieval_heads
        group = q.shape[1] // k.shape[1]
        for backend in ("mosaic", "reference"):
            choose = jax.jit(partial(api.choose_blocks, threshold=0.9, backend=backend))
            estimate = profiler.measure(choose, iterations=args.repeats)
            _, times = estimate(q[:, : heads * group], k[:, :heads], pool, table, start, length)
            row = {"heads": shape.name, "backend": backend, "causal_us": causal}
            row["choose_us"] = 1e3 * median(times)
            row["of_causal"] = row["choose_us"] / causal
            rows.append(row)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(
                f"{shape.name:14s} choose, {backend}: {row['choose_us']:.0f} us, "
                f"{row['of_causal']:.3f} of causal"
            )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
