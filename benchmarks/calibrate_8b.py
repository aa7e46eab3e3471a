"""Time and memory of measuring the heads of a model of Llama-3-8B's geometry, on one GPU.

    python benchmarks/calibrate_8b.py [--heads-per-pass 8 16]

What ``python -m lserve_jax.calibrate --head-shares`` does by its defaults once weights are read:
four sequences of 16,640 tokens, every one of the 256 KV heads cut in two ways. Weights and tokens
are random, so the sensitivities mean nothing. Programs are compiled anew. Writes
``benchmarks/results/calibrate_8b.json``: seconds of each sequence, the first with compiling, and
the most memory in use, weights included.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from llama_8b import CONFIG, random_params
from machine import provenance

from lserve_jax.calibrate import Measurement, measure_heads
from lserve_jax.calibrate.layers import stack_layers
from lserve_jax.calibrate.sensitivity import Measured


@dataclass(frozen=True, kw_only=True)
class Args:
    heads_per_pass: tuple[int, ...] = (8,)
    output: Path = Path(__file__).parent / "results" / "calibrate_8b.json"


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about, rows = provenance(), []
    measurement = Measurement()
    tokens = np.random.default_rng(0).integers(
        0, CONFIG.vocab_size, (2 * measurement.windows, measurement.length), np.int32
    )
    params = random_params(CONFIG)
    params = stack_layers(params)  # under the same name: the layers should not exist twice
    for heads in args.heads_per_pass:
        ends = [time.perf_counter()]

        def on_sequence(_: Measured, ends: list[float] = ends) -> None:
            ends.append(time.perf_counter())

        measure_heads(
            CONFIG,
            params,
            measurement,
            list(tokens),
            heads_per_pass=heads,
            on_sequence=on_sequence,
        )
        row = {
            "heads_per_pass": heads,
            "seconds": np.diff(ends).tolist(),
            # Of the process so far: of the first number of heads it is that number's own.
            "peak_bytes": jax.devices()[0].memory_stats()["peak_bytes_in_use"],
        }
        rows.append(row)
        args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
