"""Time to first token of the engine with Llama-3-8B's geometry, dense beside lserve, on one GPU.

    python benchmarks/prefill.py [--prompts 16384 131072] [--densities 0.5 0.25 0.1] [--repeats 2]
                                 [--prefill-dtypes bf16 fp8 int8]

The engine is the real one: weights are random bf16, a prompt is random tokens, computed in chunks
through the paged cache. A figure is the median wall time from the arrival of the request to its
first token; the first prompt of each engine only compiles. Operator rates are those of
``benchmarks/kernels.py``. Writes ``benchmarks/results/prefill.json``.

Every setting runs with each type of products. Before them the products of a chunk are timed by
themselves, by the GPU's own counters (CUPTI): the largest kernel of a layer's product, which is the
product, and all of them, with those that round and scale; then all that a layer has but attention.

Beside causal prefill, retrieval heads of lserve attend blocks that they choose: with random weights
no threshold means anything, so how many is set (``prefill_density``); the estimate runs as ever.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental.mosaic.gpu import profiler
from llama_8b import CONFIG, LSERVE, options, random_params
from machine import provenance
from shapes.linear import LINEAR, random_matrix

from lserve_jax.engine.build import build_engine
from lserve_jax.engine.steps import CHUNK_OPTIONS
from lserve_jax.sampling_params import SamplingParams
from pallas_kernels import api

ProductType = Literal["bf16", "fp8", "int8"]


@dataclass(frozen=True, kw_only=True)
class Args:
    prompts: tuple[int, ...] = (16384, 65536, 131072)  # tokens
    attention: tuple[str, ...] = ("dense", "lserve")
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)  # of lserve with block-sparse prefill
    prefill_dtypes: tuple[ProductType, ...] = ("bf16",)
    chunk: int = 8192
    repeats: int = 2
    output: Path = Path(__file__).parent / "results" / "prefill.json"


def kernel_milliseconds(f: Callable, *args: object) -> list[tuple[float, float]]:
    """Of ten calls, compiled as a chunk of a prompt is: the largest kernel, and all of them."""
    run = jax.jit(f, compiler_options=CHUNK_OPTIONS)
    _, calls = profiler.measure(run, aggregate=False, iterations=10)(*args)
    times = [[milliseconds for _, milliseconds in kernels] for kernels in calls]
    return [(max(kernels), sum(kernels)) for kernels in times]


def time_products(dtype: ProductType, tokens: int) -> list[dict[str, object]]:
    """The layers' products with so many rows, then all that a layer has but attention."""

    def made(K: int, out: int) -> jax.Array | api.W8A8Weight:
        matrix = random_matrix(jnp.int32(0), K=K, out=out)
        return matrix if dtype == "bf16" else api.w8a8_weight(matrix, kind=dtype)

    def layer(x, weights):
        norm = {"norm_scale": jnp.ones((CONFIG.hidden_size,), x.dtype), "epsilon": 1e-5}
        y, _ = api.fused_linear(x, weights["qkv"], **norm)
        x, _ = api.fused_linear(y[:, : CONFIG.hidden_size], weights["o"], residual=x)
        y, _ = api.fused_linear(x, weights["gate_up"], gated=True, **norm)
        return api.fused_linear(y, weights["down"], residual=x)[0]

    shapes = [shape for shape in LINEAR if shape.around != "logits"]
    weights = {shape.name: made(shape.K, shape.out) for shape in shapes}
    rows = []
    for shape in [*shapes, None]:
        wanted = shapes if shape is None else [shape]
        K = wanted[0].K
        x = jax.random.normal(jax.random.key(1), (tokens, K), jnp.bfloat16)
        if shape is None:
            times = kernel_milliseconds(layer, x, weights)
        else:
            times = kernel_milliseconds(api.fused_linear, x, weights[shape.name])
        product, whole = (median(column) for column in zip(*times, strict=True))
        operations = sum(2 * tokens * each.K * each.out for each in wanted)
        row = {
            "shape": "layer" if shape is None else shape.name,
            "dtype": dtype,
            "tokens": tokens,
            "product_ms": None if shape is None else product,
            "ms": whole,
            "product_tflops": None if shape is None else operations / product / 1e9,
            "tflops": operations / whole / 1e9,
        }
        rows.append(row)
        rate = "" if shape is None else f"product {row['product_tflops']:6.0f} TFLOP/s, "
        print(f"{row['shape']:8s} {dtype:5s} {rate}all {row['ms']:.3f} ms", flush=True)
    return rows


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    products = [row for dtype in args.prefill_dtypes for row in time_products(dtype, args.chunk)]
    about = {**provenance(), "products": products}
    params, rows = random_params(CONFIG), []
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    rng = np.random.default_rng(0)
    settings = [(name, LSERVE if name == "lserve" else None) for name in args.attention]
    for density in args.densities:
        sparsity = dataclasses.replace(
            LSERVE, prefill="block_sparse", prefill_density=density, prefill_min_tokens=1
        )
        settings.append((f"lserve, {density} of blocks", sparsity))
    for (attention, sparsity), dtype in itertools.product(settings, args.prefill_dtypes):
        name = attention if dtype == "bf16" else f"{attention}, {dtype} products"
        engine = build_engine(
            CONFIG,
            params,
            options(
                sparsity,
                max_num_seqs=1,
                max_model_len=max(args.prompts) + 64,
                max_prefixes=0,
                prefill_chunk_size=args.chunk,
                prefill_dtype=None if dtype == "bf16" else dtype,
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
                "products": dtype,
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
                f"{name:36s} {tokens:7d} tokens: first token after {row['seconds']:.3f} s "
                f"({row['fastest']:.3f}-{row['slowest']:.3f}), density {density:.3f}",
                flush=True,
            )
        del engine  # the memory of its cache is needed


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
