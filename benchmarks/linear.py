"""The linear layers of Llama-3-8B at a few rows, bf16 beside quantised weights, on one GPU.

    python benchmarks/linear.py [--rows 1 8] [--kinds bf16 int8 int4] [--ways kernel unpacked w8a8]

"kernel" is the time of a layer's product by the GPU's own counters (CUPTI), over matrices that
together exceed the L2 cache, each after a kernel of XLA's; where K is split, a second kernel may
add the parts ("add", which begins before the first has ended). "step" is the wall time of all 32
layers and ``lm_head`` one after the other, as a decode step has them but for attention, inside one
jit that is compiled as a burst is: with launches, norms, gates and residuals. int4 has groups of
128. The way "unpacked" is what quantised weights go with more rows than the kernel is for: unpacked
first, multiplied by XLA. The way "w8a8" is that of ``prefill_dtype`` of the weights' own kind:
codes written in rows, x rounded, both multiplied. There a layer's time is that of all its kernels,
compiled by XLA's defaults; of what follows on sums only a change of their type is in it, since none
but one number is asked for. Writes
``benchmarks/results/linear.json``.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from kernels import COPY_RATE, L2_BYTES, kernel_times
from machine import provenance
from shapes.linear import LINEAR, Kind, LinearShape, kernel_weight, linear_layer

from lserve_jax.engine.steps import BURST_OPTIONS
from pallas_kernels import api, linear_ops

ROUNDS = 5  # steps inside a jit
Way = Literal["kernel", "unpacked", "w8a8"]


@dataclass(frozen=True, kw_only=True)
class Args:
    kinds: tuple[Kind, ...] = ("bf16", "int8", "int4")
    rows: tuple[int, ...] = (1, 8)
    ways: tuple[Way, ...] = ("kernel",)  # of quantised weights; bf16 has one
    levels: tuple[Literal["step", "layer"], ...] = ("step", "layer")
    layers: int = 32  # of a step; fewer compile faster
    output: Path = Path(__file__).parent / "results" / "linear.json"


def going(way: Way) -> contextlib.AbstractContextManager[object]:
    """Packed matrices go that way, whatever the number of rows."""
    if way != "unpacked":
        return contextlib.nullcontext()
    return mock.patch.object(linear_ops, "MOST_PACKED_ROWS", 0)


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)


def time_layer(shape: LinearShape, kind: Kind, rows: int, way: Way) -> dict[str, object]:
    """Microseconds of one layer, kernels only."""
    first = kernel_weight(shape, kind, 0)
    moved = sum(x.nbytes for x in jax.tree.leaves(first))
    calls = max(2, min(16, 1 + 2 * L2_BYTES // moved))
    weights = [first, *(kernel_weight(shape, kind, seed) for seed in range(1, calls))]

    def run(x, residual, weights):
        for weight in weights:
            if way == "w8a8":
                weight = api.w8a8_weight(weight, kind=kind)
            with going(way):
                y = linear_layer(shape, x, weight, residual)
            x = x.at[0, 0].add(y[0, 0].astype(x.dtype) * jnp.bfloat16(1e-30))
        return x

    args = normal(rows, shape.K), normal(rows, shape.out), weights
    kernels = kernel_times(run, *args, calls=calls)
    # bf16 with many rows, and logits, are XLA's.
    ours = {name: t for name, t in kernels.items() if "multiply" in name or "add_mosaic" in name}
    took = sum(t for name, t in ours.items() if "multiply" in name) or max(kernels.values())
    if way != "kernel":
        took = sum(kernels.values())
    return {
        "op": "layer",
        "shape": shape.name,
        "kind": kind,
        "way": way,
        "rows": rows,
        "us": took,
        "kernels_us": kernels,
        "bytes": moved,
        "share_of_copy_rate": moved / took / COPY_RATE * 1e6,
    }


def time_step(
    kind: Kind, batch_sizes: tuple[int, ...], ways: tuple[Way, ...], layers: int
) -> Iterator[dict[str, object]]:
    """Milliseconds of all layers."""
    made = {
        shape.name: [kernel_weight(shape, kind, seed) for seed in range(min(layers, shape.layers))]
        for shape in LINEAR
    }
    moved = sum(x.nbytes for x in jax.tree.leaves(made))

    def step(x, weights):
        ones, sums = jnp.ones((4096,), x.dtype), None
        norm = {"norm_scale": ones, "epsilon": 1e-5}
        linear = api.fused_linear
        for qkv, o, gate_up, down in zip(
            *(weights[name] for name in ("qkv", "o", "gate_up", "down")), strict=True
        ):
            y, _ = linear(x, qkv, square_sums=sums, **norm)
            x, sums = linear(y[:, :4096], o, residual=x)
            y, _ = linear(x, gate_up, square_sums=sums, gated=True, **norm)
            x, sums = linear(y, down, residual=x)
        return api.product(x, weights["lm_head"][0])[:, :4096].astype(x.dtype)

    @partial(jax.jit, static_argnames="way", compiler_options=BURST_OPTIONS)
    def run(x, weights, way):
        with going(way):
            return lax.fori_loop(0, ROUNDS, lambda _, x: step(x, weights), x)

    for batch, way in product(batch_sizes, ways):
        x, times = normal(batch, 4096), []
        jax.block_until_ready(run(x, made, way))
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(run(x, made, way))
            times.append((time.perf_counter() - begin) / ROUNDS * 1e3)
        milliseconds = float(np.median(times))
        yield {
            "op": "step",
            "kind": kind,
            "way": way,
            "rows": batch,
            "layers": layers,
            "ms": milliseconds,
            "fastest": min(times),
            "slowest": max(times),
            "bytes": moved,
            "share_of_copy_rate": moved / milliseconds / COPY_RATE * 1e3,
        }


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about, rows = provenance(), []

    def keep(row: dict[str, object]) -> None:
        rows.append(row)
        args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        what = f"{row['op']:6s}{row.get('shape', ''):8s} {row['kind']:5s} {row['way']:8s} "
        what += f"{row['rows']:3d} rows "
        took = f"{row['ms']:8.3f} ms" if "ms" in row else f"{row['us']:8.2f} us"
        names = {name[:24]: round(t, 2) for name, t in row.get("kernels_us", {}).items()}
        print(f"{what} {took} {row['share_of_copy_rate']:5.0%} {names}", flush=True)

    def ways(kind: Kind) -> tuple[Way, ...]:
        if kind == "bf16":
            return ("kernel",)
        return tuple(way for way in args.ways if kind != "int4" or way != "w8a8")

    if "step" in args.levels:
        for kind in args.kinds:
            for row in time_step(kind, args.rows, ways(kind), args.layers):
                keep(row)
    if "layer" in args.levels:
        for batch, shape, kind in product(args.rows, LINEAR, args.kinds):
            for way in ways(kind):
                keep(time_layer(shape, kind, batch, way))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
