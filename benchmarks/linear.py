"""The linear layers of Llama-3-8B at a few rows, bf16 beside quantised weights, on one GPU.

    python benchmarks/linear.py [--kinds bf16 int8 int4] [--rows 1 8]

"kernel" is the time of a layer's product by the GPU's own counters (CUPTI), over matrices that
together exceed the L2 cache, each after a kernel of XLA's; where K is split, a second kernel adds
the parts ("add", which begins before the first has ended). "step" is the wall time of all 32 layers
and ``lm_head`` one after the other, as a decode step has them but for attention, inside one jit:
with launches, norms, gates and residuals. int4 has groups of 128. Writes
``benchmarks/results/linear.json``.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from kernels import COPY_RATE, L2_BYTES, kernel_times
from machine import provenance
from shapes.linear import LINEAR, Kind, LinearShape, kernel_weight, linear_layer

from pallas_kernels import api

ROUNDS = 5  # steps inside a jit


@dataclass(frozen=True, kw_only=True)
class Args:
    kinds: tuple[Kind, ...] = ("bf16", "int8", "int4")
    rows: tuple[int, ...] = (1, 8)
    output: Path = Path(__file__).parent / "results" / "linear.json"


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)


def time_layer(shape: LinearShape, kind: Kind, rows: int) -> dict[str, object]:
    """Microseconds of one layer, kernels only."""
    first = kernel_weight(shape, kind, 0)
    moved = sum(x.nbytes for x in jax.tree.leaves(first))
    calls = max(2, min(16, 1 + 2 * L2_BYTES // moved))
    weights = [first, *(kernel_weight(shape, kind, seed) for seed in range(1, calls))]

    def run(x, residual, weights):
        for weight in weights:
            y = linear_layer(shape, x, weight, residual)
            x = x.at[0, 0].add(y[0, 0].astype(x.dtype) * jnp.bfloat16(1e-30))
        return x

    args = normal(rows, shape.K), normal(rows, shape.out), weights
    kernels = kernel_times(run, *args, calls=calls)
    # bf16 with many rows, and logits, are XLA's.
    ours = {name: t for name, t in kernels.items() if "multiply" in name or "add_mosaic" in name}
    product = sum(t for name, t in ours.items() if "multiply" in name) or max(kernels.values())
    return {
        "op": "layer",
        "shape": shape.name,
        "kind": kind,
        "rows": rows,
        "us": product,
        "kernels_us": kernels,
        "bytes": moved,
        "share_of_copy_rate": moved / product / COPY_RATE * 1e6,
    }


def time_step(kind: Kind, batch_sizes: tuple[int, ...]) -> list[dict[str, object]]:
    """Milliseconds of all layers."""
    made = {
        shape.name: [kernel_weight(shape, kind, seed) for seed in range(shape.layers)]
        for shape in LINEAR
    }
    moved = sum(x.nbytes for x in jax.tree.leaves(made))

    def step(x, weights):
        ones, sums = jnp.ones((4096,), x.dtype), None
        norm = {"norm_scale": ones, "epsilon": 1e-5}
        for qkv, o, gate_up, down in zip(
            *(weights[name] for name in ("qkv", "o", "gate_up", "down")), strict=True
        ):
            y, _ = api.fused_linear(x, qkv, square_sums=sums, **norm)
            x, sums = api.fused_linear(y[:, :4096], o, residual=x)
            y, _ = api.fused_linear(x, gate_up, square_sums=sums, gated=True, **norm)
            x, sums = api.fused_linear(y, down, residual=x)
        return api.product(x, weights["lm_head"][0])[:, :4096].astype(x.dtype)

    run = jax.jit(lambda x, weights: lax.fori_loop(0, ROUNDS, lambda _, x: step(x, weights), x))
    rows = []
    for batch in batch_sizes:
        x, times = normal(batch, 4096), []
        jax.block_until_ready(run(x, made))
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(run(x, made))
            times.append((time.perf_counter() - begin) / ROUNDS * 1e3)
        milliseconds = float(np.median(times))
        rows.append(
            {
                "op": "step",
                "kind": kind,
                "rows": batch,
                "ms": milliseconds,
                "fastest": min(times),
                "slowest": max(times),
                "bytes": moved,
                "share_of_copy_rate": moved / milliseconds / COPY_RATE * 1e3,
            }
        )
    return rows


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about, rows = provenance(), []

    def keep(row: dict[str, object]) -> None:
        rows.append(row)
        args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        what = f"{row['op']:6s}{row.get('shape', ''):8s} {row['kind']:5s} {row['rows']:2d} rows "
        took = f"{row['ms']:8.3f} ms" if "ms" in row else f"{row['us']:8.2f} us"
        names = {name[:24]: round(t, 2) for name, t in row.get("kernels_us", {}).items()}
        print(f"{what} {took} {row['share_of_copy_rate']:5.0%} {names}", flush=True)

    for kind in args.kinds:
        for row in time_step(kind, args.rows):
            keep(row)
    for batch in args.rows:
        for shape in LINEAR:
            for kind in args.kinds:
                keep(time_layer(shape, kind, batch))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
