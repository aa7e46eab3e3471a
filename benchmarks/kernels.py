"""Times the kernels on one GPU beside JAX's own paths, and writes a dated JSON file.

    python benchmarks/kernels.py [--output benchmarks/results]

Times are what the GPU's own counters (CUPTI) give for each kernel, medians over page lists that
share no page and together exceed the L2 cache, so that every call reads device memory. Share is of
the rate a large device copy reaches. "step" is the wall time of a call in a chain of dependent
calls inside one jit, less that of an empty chain: it includes launches, and its lists stay in L2.
tokamax has rows too if it is installed.
"""

import argparse
import dataclasses
import importlib.util
import json
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import profiler
from machine import provenance
from shapes.append import (
    APPEND,
    APPEND_CHUNK,
    AppendShape,
    append_chunk_inputs,
    append_inputs,
)
from shapes.decode import DECODE, DecodeShape, decode_inputs
from shapes.prefill import LONG_PREFILL, PrefillShape, prefill_inputs
from shapes.prefix import PREFIX, PREFIX_KINDS, PrefixShape, prefix_inputs
from shapes.selection import SELECTION, SelectionShape, selection_inputs
from shapes.verify import VERIFY, VerifyShape, verify_inputs

from pallas_kernels import reference
from pallas_kernels.api import OwnAttention
from pallas_kernels.hopper.decode_attention import choose_config, paged_attention
from pallas_kernels.hopper.kv_append_chunk import append_kv_chunk
from pallas_kernels.hopper.kv_append_token import append_kv
from pallas_kernels.hopper.page_scores import page_scores
from pallas_kernels.hopper.page_selection import select_pages
from pallas_kernels.hopper.prefill_attention import prefill_attention
from pallas_kernels.hopper.prefix_attention import prefix_attention
from pallas_kernels.hopper.verify_attention import verify_attention
from pallas_kernels.kv_codes import float_pages

COPY_RATE = 4.3e12  # bytes a second, read and written, of a large device-to-device copy
MATMUL_RATE = 723e12  # operations a second of XLA's bf16 product of two 8192 x 8192 matrices
L2_BYTES = 50 << 20
CHAIN = 100


def kernel_times(f: Callable, *args: object, calls: int, runs: int = 1) -> dict[str, float]:
    """Microseconds a call of each kernel of ``jit(f)``, which makes ``calls`` calls in each run."""
    measure = profiler.measure(jax.jit(f), aggregate=False)
    by_name = defaultdict(list)
    for _ in range(runs):
        for name, milliseconds in measure(*args)[1]:
            by_name[name].append(milliseconds * 1e3)
    calls *= runs
    # Kernels that run less than once a call belong to the loop over calls.
    return {
        name: float(np.median(times)) * (len(times) // calls)
        for name, times in by_name.items()
        if len(times) >= calls
    }


def chain_time(f: Callable, q: jax.Array, *args: object) -> float:
    """Microseconds a step of a chain of ``CHAIN`` dependent calls."""
    run = jax.jit(lambda q, *args: lax.fori_loop(0, CHAIN, lambda _, q: f(q, *args), q))
    jax.block_until_ready(run(q, *args))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(run(q, *args))
        times.append((time.perf_counter() - begin) / CHAIN * 1e6)
    return float(np.median(times))


def time_decode(shape: DecodeShape, *, dealt: bool = True) -> dict[str, object]:
    """``dealt``: the splits are dealt out by what each head's list attends, not by its width."""
    lists = max(2, min(16, 1 + 2 * L2_BYTES // shape.bytes_moved))
    q, retrieval, streaming, page_lists = decode_inputs(shape, lists=lists)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *page_lists)
    most_tokens = shape.most_tokens if dealt else None

    def attend(q, retrieval, streaming, page_lists):
        return paged_attention(q, retrieval, streaming, *page_lists, most_tokens=most_tokens)[0]

    def all_lists(q, retrieval, streaming, stacked):
        return lax.map(lambda page_lists: attend(q, retrieval, streaming, page_lists), stacked)

    times = kernel_times(all_lists, q, retrieval, streaming, stacked, calls=lists)
    kernels = {name: t for name, t in times.items() if "split" in name}
    step = chain_time(attend, q, retrieval, streaming, page_lists[0])
    empty = chain_time(lambda q: q * jnp.bfloat16(0.5), q)
    total = sum(kernels.values())
    return {
        "op": "paged_attention" if dealt else "paged_attention, not dealt",
        "shape": shape.name,
        "config": str(choose_config(shape.rows, shape.most_tokens, retrieval.k.dtype)),
        "kernels_us": kernels,
        "us": total,
        "step_us": step - empty,
        "bytes": shape.bytes_moved,
        "share_of_copy_rate": shape.bytes_moved / total / COPY_RATE * 1e6,
    }


def time_verify(shape: VerifyShape) -> dict[str, object]:
    calls = max(2, min(16, 1 + 2 * L2_BYTES // shape.bytes_moved))
    q, pages, tables, position = verify_inputs(shape, calls=calls)

    def all_tables(q, pages, tables, position):
        return lax.map(lambda table: verify_attention(q, pages, table, position)[0], tables)

    times = kernel_times(all_tables, q, pages, tables, position, calls=calls)
    kernels = {name: t for name, t in times.items() if "split" in name}
    step = chain_time(lambda q, *args: verify_attention(q, *args)[0], q, pages, tables[0], position)
    empty = chain_time(lambda q: q * jnp.bfloat16(0.5), q)
    total = sum(kernels.values())
    return {
        "op": "verify_attention",
        "shape": shape.name,
        "kernels_us": kernels,
        "us": total,
        "step_us": step - empty,
        "bytes": shape.bytes_moved,
        "share_of_copy_rate": shape.bytes_moved / total / COPY_RATE * 1e6,
    }


def time_append(shape: AppendShape) -> dict[str, object]:
    """``append_kv`` or ``append_kv_chunk``, and the reference path beside it.

    Both carry the caches through a loop, whose counter, 1 us, counts for the reference. A chunk's
    time leaves out what XLA computes once for all layers, 3 us.
    """
    if shape.tokens == 1:
        calls, ops = 20, (append_kv, reference.append_kv)
        (q, k, v, cos, sin, *caches), places = append_inputs(shape, calls=calls)
        tokens = q, k, v, cos, sin
    else:
        calls, ops = 2 if shape.tokens > 8192 else 4, (append_kv_chunk, reference.append_kv_chunk)
        (k, v, *caches), places = append_chunk_inputs(shape, calls=calls)
        tokens = k, v
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *places)

    def times(op: Callable) -> dict[str, float]:
        def all_calls(tokens, caches, stacked):
            def step(carry, places):
                first, caches = carry
                *rotated, retrieval, streaming, stats = op(first, *tokens[1:], *caches, *places)
                return (rotated[0] if rotated else first, (retrieval, streaming, stats)), None

            return lax.scan(step, (tokens[0], caches), stacked)[0]

        return kernel_times(all_calls, tokens, tuple(caches), stacked, calls=calls)

    kernel, plain = map(times, ops)
    ours = {name: t for name, t in kernel.items() if "append" in name}
    total = sum(ours.values())
    return {
        "op": "append_kv" if shape.tokens == 1 else "append_kv_chunk",
        "shape": shape.name,
        "kernels_us": ours,
        "us": total,
        "reference_us": sum(plain.values()),
        "reference_kernels_us": plain,
        "bytes": shape.bytes_moved,
        "share_of_copy_rate": shape.bytes_moved / total / COPY_RATE * 1e6,
    }


def time_selection(shape: SelectionShape, op: str, how: Literal["kernel", "XLA"]) -> dict:
    """Scoring or selecting; XLA gathers and multiplies, or sorts (loop steps of 1 us included)."""
    calls = max(2, min(16, 1 + 2 * L2_BYTES // shape.bytes_moved))
    q, stats, tables, length = selection_inputs(shape, calls=calls)
    if op == "page_scores":
        score = partial(
            page_scores if how == "kernel" else reference.page_scores,
            page_size=shape.page_size,
            selected_page_size=shape.selected_page_size,
            lower_bound_weight=0.5,
            most_heads=shape.most_heads,
        )
        moved, flops = shape.bytes_moved, shape.flops

        def run(q, stats, tables, length):
            return lax.map(lambda table: score(q, stats, table, length), tables)

        times = kernel_times(run, q, stats, tables, length, calls=calls)
    else:
        select = partial(
            select_pages if how == "kernel" else reference.select_pages,
            num_pages=shape.selected,
            sink_pages=1,
            most_heads=shape.most_heads,
        )
        wanted = jnp.full((shape.rows, shape.retrieval_heads), shape.selected)
        wanted = wanted.at[:, ::2].set(shape.selected // shape.uneven)
        moved, flops = shape.score_bytes, 0
        size = calls, shape.rows, shape.retrieval_heads, shape.candidates
        scores = 70.0 + 8.0 * jax.random.normal(jax.random.key(1), size)  # as of random pages

        def run(scores, candidates):
            return lax.map(lambda x: select(x, candidates, wanted), scores)

        times = kernel_times(run, scores, length // shape.selected_page_size, calls=calls)
    kernels = {name: t for name, t in times.items() if how == "XLA" or "mosaic" in name}
    total = sum(kernels.values())
    return {
        "op": op if how == "kernel" else f"{op}, XLA",
        "shape": shape.name,
        "kernels_us": kernels,
        "us": total,
        "bytes": moved,
        "flops": flops,
        "share_of_copy_rate": moved / total / COPY_RATE * 1e6,
    }


def _time_products(
    op: str, shape: PrefillShape | PrefixShape, f: Callable, *args: object, calls: int = 1
) -> dict[str, object]:
    """A row for a kernel that multiplies matrices: medians of three runs of ``f``."""
    kernels = kernel_times(f, *args, calls=calls, runs=3)
    total = sum(kernels.values())
    return {
        "op": op,
        "shape": shape.name,
        "kernels_us": kernels,
        "us": total,
        "bytes": shape.bytes_moved,
        "flops": shape.flops,
        "tflops": shape.flops / total / 1e6,
        "share_of_copy_rate": shape.bytes_moved / total / COPY_RATE * 1e6,
        "share_of_matmul_rate": shape.flops / total / MATMUL_RATE * 1e6,
    }


def time_prefill(shape: PrefillShape) -> dict[str, object]:
    args, window = prefill_inputs(shape)
    return _time_products("prefill_attention", shape, partial(prefill_attention, **window), *args)


def time_cudnn_prefill(shape: PrefillShape) -> dict[str, object]:
    """Causal attention by cuDNN, the best stock path, over contiguous keys: no history."""
    (q, k, v, *_), _ = prefill_inputs(shape)

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    return _time_products("cuDNN causal", shape, attend, *(x[None] for x in (q, k, v)))


def time_tokamax_prefill(shape: PrefillShape) -> dict[str, object]:
    """The same by tokamax's Mosaic GPU kernel, at the tile sizes that its heuristics choose."""
    import tokamax

    (q, k, v, *_), _ = prefill_inputs(shape)
    attend = partial(tokamax.dot_product_attention, is_causal=True, implementation="mosaic")
    return _time_products("tokamax causal", shape, attend, *(x[None] for x in (q, k, v)))


def time_prefix(shape: PrefixShape) -> dict[str, object]:
    """All rows over one prefix, merging of the splits included."""
    return _time_products("prefix_attention", shape, prefix_attention, *prefix_inputs(shape))


def time_prefix_kinds(shape: PrefixShape, *, copied: bool = False) -> dict[str, object]:
    """As ``time_prefix``, from memory: prefixes of their own for several calls.

    ``copied``: codes become bf16 by XLA first. All kernels of a call count, and so does the loop
    over calls, 1 to 2 us.
    """
    calls = max(2, min(16, 1 + 2 * L2_BYTES // shape.bytes_moved))
    all_tokens = dataclasses.replace(shape, tokens=calls * shape.tokens)
    q, pages, table, _ = prefix_inputs(all_tokens)

    def attend(q, pages, table):
        if copied:
            pages, table = float_pages(pages, table, q.dtype)
        return prefix_attention(q, pages, table, jnp.int32(shape.tokens))[0]

    def all_tables(q, pages, tables):
        return lax.map(lambda table: attend(q, pages, table), tables)

    op = "prefix, copied first" if copied else "prefix_attention"
    args = q, pages, table.reshape(calls, -1)
    return _time_products(op, shape, all_tables, *args, calls=calls)


def time_relay(shape: PrefixShape, private: int = 256) -> dict[str, object]:
    """Attention of a shared prefix, of each row's own ``private`` tokens, and their merging."""
    q, pages, table, length = prefix_inputs(shape)
    own = DecodeShape(
        name=shape.name,
        rows=shape.rows,
        retrieval_heads=shape.heads,
        retrieval_pages=private // shape.page_size,
        group=shape.group,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
    )
    _, retrieval, streaming, (lists,) = decode_inputs(own)

    def attend(q, pages, table, length, retrieval, streaming, lists):
        own = paged_attention(q, retrieval, streaming, *lists)
        shares = jnp.ones((len(q),), bool)
        return prefix_attention(q, pages, table, length, OwnAttention(*own, shares))

    args = q, pages, table, length, retrieval, streaming, lists
    kernels = kernel_times(attend, *args, calls=1, runs=3)
    total, moved = sum(kernels.values()), shape.bytes_moved + own.bytes_moved
    return {
        "op": "relay",
        "shape": f"{shape.name}, {private} private",
        "kernels_us": kernels,
        "us": total,
        "bytes": moved,
        "flops": shape.flops,
        "tflops": shape.flops / total / 1e6,
        "share_of_copy_rate": moved / total / COPY_RATE * 1e6,
    }


def time_cudnn(tokens: int, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> dict:
    """Dense attention over contiguous keys by cuDNN, the best stock path for one query."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, n, h, head_dim), jnp.bfloat16)
        for key, n, h in zip(keys, (1, tokens, tokens), (heads, kv_heads, kv_heads), strict=True)
    )

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    kernels = kernel_times(attend, q, k, v, calls=1)
    total, moved = sum(kernels.values()), 4 * tokens * kv_heads * head_dim
    return {
        "op": "jax.nn.dot_product_attention(implementation='cudnn')",
        "shape": f"dense {tokens // 1024}K",
        "kernels_us": kernels,
        "us": total,
        "bytes": moved,
        "share_of_copy_rate": moved / total / COPY_RATE * 1e6,
    }


def kind(row: partial[dict[str, object]]) -> str:
    """What a row times, as ``--only`` names it."""
    return row.func.__name__.removeprefix("time_")


def measurements() -> list[partial[dict[str, object]]]:
    """The rows in the order in which they are made, decode first."""
    rows = [partial(time_decode, shape) for shape in DECODE]
    rows += [partial(time_decode, shape, dealt=False) for shape in DECODE if shape.dense_heads]
    rows += [partial(time_verify, shape) for shape in VERIFY]
    rows += [partial(time_cudnn, tokens) for tokens in (131072, 524288)]
    rows += [
        partial(time_selection, shape, op, how)
        for shape in SELECTION
        for op in ("page_scores", "select_pages")
        for how in ("kernel", "XLA")
    ]
    rows += [partial(time_relay, shape) for shape in PREFIX if shape.head_dim == 128]
    rows += [partial(time_prefill, shape) for shape in LONG_PREFILL]
    causal = [shape for shape in LONG_PREFILL if shape.start == 0 and shape.streaming_heads == 0]
    rows += [partial(time_cudnn_prefill, shape) for shape in causal]
    if importlib.util.find_spec("tokamax") is not None:  # a peer, no dependency
        rows += [partial(time_tokamax_prefill, shape) for shape in causal]
    rows += [partial(time_prefix, shape) for shape in PREFIX]
    for shape in PREFIX_KINDS:
        rows.append(partial(time_prefix_kinds, shape))
        if shape.kind in ("int8", "int4"):  # a copy of fp8 moves what one of int8 does
            rows.append(partial(time_prefix_kinds, shape, copied=True))
    rows += [partial(time_append, shape) for shape in (*APPEND, *APPEND_CHUNK)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(set(map(kind, measurements()))), help="their rows alone"
    )
    args = parser.parse_args()
    wanted = [row for row in measurements() if args.only is None or kind(row) in args.only]
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = provenance()
    rows = result["rows"] = []
    for measure in wanted:
        row = measure()
        rows.append(row)
        products = f"{row['tflops']:4.0f} TFLOP/s  " if "tflops" in row else ""
        print(
            f"{row['op']:20.20s} {row['shape']:38s} {row['us']:8.2f} us "
            f"{row['share_of_copy_rate']:5.0%}  step {row.get('step_us', float('nan')):8.2f} us  "
            f"{products}{ {name[:16]: round(t, 2) for name, t in row['kernels_us'].items()} }",
            flush=True,
        )
        # After every row: a run that is cut short keeps what it has.
        (output / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
