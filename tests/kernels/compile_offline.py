"""Compiles kernels for an H200 on a machine without a GPU; prints ptxas's report of each.

A program of its own, because the choice of platform is fixed when JAX starts and ptxas reports to
standard output:  JAX_PLATFORMS=cpu MOSAIC_GPU_DUMP_PTXAS=1 python compile_offline.py
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.hopper.block_scores import block_scores
from pallas_kernels.hopper.decode_attention import paged_attention
from pallas_kernels.hopper.fused_linear import fused_linear
from pallas_kernels.hopper.kv_append_chunk import append_kv_chunk
from pallas_kernels.hopper.kv_append_token import append_kv
from pallas_kernels.hopper.page_scores import page_scores
from pallas_kernels.hopper.page_selection import select_pages
from pallas_kernels.hopper.prefill_attention import prefill_attention
from pallas_kernels.hopper.prefix_attention import prefix_attention
from pallas_kernels.hopper.quant_linear import packed_linear, packed_product
from pallas_kernels.hopper.quant_rows import packed_rows
from pallas_kernels.hopper.quant_unpack import packed_codes, packed_numbers
from pallas_kernels.hopper.verify_attention import verify_attention
from pallas_kernels.kv_codes import quantize
from pallas_kernels.packed import BITS
from pallas_kernels.types import (
    TILE_QUERIES,
    BlockList,
    KVPages,
    OwnAttention,
    PackedWeight,
    PageList,
)


def decode_arguments(
    rows=1,
    retrieval=1,
    streaming=1,
    group=4,
    head_dim=128,
    page_size=64,
    width=64,
    pages=256,
    int8=False,
    kind=None,
):
    heads = retrieval + streaming
    array = jax.ShapeDtypeStruct
    kind = "int8" if int8 else kind

    def pool(heads: int) -> KVPages:
        numbers = array((heads, pages, page_size, head_dim), jnp.bfloat16)
        if kind is None:
            return KVPages(numbers, numbers)
        codes, scale = jax.eval_shape(partial(quantize, kind=kind), numbers)
        return KVPages(codes, codes, scale, scale)

    bounds = array((rows, 1), jnp.int32)
    selected = PageList(array((rows, max(retrieval, 1), width), jnp.int32), bounds, bounds)
    ring = PageList(array((rows, 1, 7), jnp.int32), bounds, bounds)
    q = array((rows, heads * group, head_dim), jnp.bfloat16)
    return q, pool(retrieval), pool(streaming), selected, ring


CASES = {
    "bf16": {},
    "bf16, small pages, D 64": {"page_size": 16, "head_dim": 64, "group": 3, "streaming": 0},
    "bf16, group 16, pages of 128": {"page_size": 128, "group": 16},
    "int8": {"int8": True, "width": 2048},
    "int8, D 64, pages of 32": {"int8": True, "page_size": 32, "head_dim": 64},
    "int8, group 16, pages of 16": {"int8": True, "page_size": 16, "group": 16},
    "fp8, pages of 16": {"kind": "fp8", "page_size": 16},
    "fp8, D 64, group 16": {"kind": "fp8", "head_dim": 64, "group": 16},
    "int4": {"kind": "int4", "width": 2048, "streaming": 0},
    "int4, D 64, pages of 32": {"kind": "int4", "page_size": 32, "head_dim": 64},
    "int4, group 16, pages of 16": {"kind": "int4", "page_size": 16, "group": 16},
}
# Ranked heads, one that reads everything, and a streaming head.
MOST_TOKENS = (1024,) * 7 + (4096, 320)


def verify_arguments(tokens=5, rows=1, heads=2, group=4, width=64, **case):
    q, pages, *_ = decode_arguments(rows=rows, retrieval=heads, streaming=0, group=group, **case)
    array = jax.ShapeDtypeStruct
    q = array((rows, tokens, heads * group, q.shape[-1]), jnp.bfloat16)
    return q, pages, array((rows, width), jnp.int32), array((rows,), jnp.int32)


VERIFY_CASES = {
    "verify, 1 token": {"tokens": 1},
    "verify, 3 tokens, D 64, group 3": {"tokens": 3, "group": 3, "head_dim": 64, "page_size": 16},
    "verify, 9 tokens": {"tokens": 9},
    "verify, 16 tokens": {"tokens": 16},
    "verify, 5 tokens, int8": {"int8": True},
    "verify, 4 tokens, group 8, int8, pages of 16": {
        "tokens": 4,
        "group": 8,
        "page_size": 16,
        "int8": True,
    },
    "verify, 5 tokens, group 8, fp8, pages of 16": {
        "tokens": 5,
        "group": 8,
        "page_size": 16,
        "kind": "fp8",
    },
    "verify, 3 tokens, group 8, int4, pages of 16": {
        "tokens": 3,
        "group": 8,
        "page_size": 16,
        "kind": "int4",
    },
}


def append_arguments(rows=2, tokens=None, prompts=(), logical_page_size=16, ranked=None, **case):
    """What both appending ops take, the caches first: then what they need besides. ``prompts``:
    how many there are chunks of, if several."""
    q, retrieval, streaming, *lists = decode_arguments(rows=rows, pages=1 << 15, **case)
    array, heads = jax.ShapeDtypeStruct, (retrieval.k.shape[0], streaming.k.shape[0])
    _, pages, page_size = retrieval.k.shape[:3]
    head_dim = q.shape[-1]
    g = page_size // logical_page_size
    ranked = heads[0] if ranked is None else ranked
    caches = retrieval, streaming, array((ranked, pages, g, 2, head_dim), jnp.bfloat16)
    size = (rows,) if tokens is None else (*prompts, tokens)
    kv = array((*size, sum(heads), head_dim), jnp.bfloat16)
    if tokens is not None:
        number = array(prompts, jnp.int32)
        ids = array((*prompts, 64), jnp.int32), array((*prompts, tokens), jnp.int32)
        return caches, (kv, kv), (*ids, number, number)
    angle, ids = array((rows, head_dim // 2), jnp.float32), array((rows,), jnp.int32)
    return caches, (q, kv, kv, angle, angle), (ids, ids, ids), lists


def decode_steps(caches, tokens, places, lists):
    """Appends and attends quarters of pages, ten times over."""
    q, *rest = tokens

    def step(_, carry):
        q, caches = carry
        q, *caches = append_kv(q, *rest, *caches, *places)
        return paged_attention(q, *caches[:2], *lists, selected_page_size=16)[0], tuple(caches)

    return lax.fori_loop(0, 10, step, (q, caches))


def token_steps(caches, tokens, places, lists):
    """Appends ten tokens."""
    return lax.fori_loop(
        0, 10, lambda _, caches: tuple(append_kv(*tokens, *caches, *places)[1:]), caches
    )


def prefill_steps(caches, tokens, places):
    """Appends ten chunks."""
    table, streaming_page, start, length = places

    def step(i, caches):
        places = table, streaming_page, start + i * length, length
        return tuple(append_kv_chunk(*tokens, *caches, *places))

    return lax.fori_loop(0, 10, step, caches)


APPEND_CASES = {
    "append, bf16": (decode_steps, {"retrieval": 4, "streaming": 4}),
    "append, int8, D 64": (
        decode_steps,
        {"retrieval": 2, "streaming": 1, "head_dim": 64, "page_size": 16, "int8": True},
    ),
    "append, fp8": (token_steps, {"kind": "fp8"}),
    "append, int4, D 64": (token_steps, {"kind": "int4", "head_dim": 64, "page_size": 16}),
    "append, one of two heads ranked": (decode_steps, {"retrieval": 2, "ranked": 1}),
    "append chunk, bf16": (prefill_steps, {"tokens": 512}),
    "append chunk, one of two heads ranked": (
        prefill_steps,
        {"tokens": 512, "retrieval": 2, "ranked": 1},
    ),
    "append chunk, int8": (prefill_steps, {"tokens": 512, "int8": True, "page_size": 128}),
    "append chunk, fp8": (prefill_steps, {"tokens": 512, "kind": "fp8"}),
    "append chunk, int4": (prefill_steps, {"tokens": 512, "kind": "int4"}),
    "append chunk, 8 prompts": (
        prefill_steps,
        {"tokens": 64, "prompts": (8,), "head_dim": 64, "streaming": 0},
    ),
    "append chunk, D 64, retrieval only": (
        prefill_steps,
        {"tokens": 500, "head_dim": 64, "page_size": 16, "logical_page_size": 8, "streaming": 0},
    ),
}


def selection_arguments(width=2048, heads=1, group=4, head_dim=128, logical_pages=4):
    array = jax.ShapeDtypeStruct
    q = array((1, heads * group, head_dim), jnp.bfloat16)
    stats = array((heads, 4096, logical_pages, 2, head_dim), jnp.bfloat16)
    return q, stats, array((1, width), jnp.int32), array((1,), jnp.int32)


def select(q, stats, table, length, *, page_size=128, selected_page_size=128, num_pages=63):
    scores = page_scores(
        q,
        stats,
        table,
        length,
        page_size=page_size,
        selected_page_size=selected_page_size,
        lower_bound_weight=0.5,
    )
    candidates, wanted = length // selected_page_size, jnp.full(scores.shape[:2], num_pages)
    return select_pages(scores, candidates, wanted, num_pages=num_pages, sink_pages=1)


SELECTION_CASES = {
    "selection, 2048 pages": ({}, {}),
    "selection, a quarter page each of 2048": ({}, {"selected_page_size": 32, "num_pages": 255}),
    "selection, 8192 pages, D 64": ({"width": 8192, "head_dim": 64, "group": 3}, {}),
    "selection, 511 of 32768 pages, group 16": (
        {"width": 32768, "group": 16, "logical_pages": 1},
        {"num_pages": 511},
    ),
    "selection, 4096 of 32768 pages": (
        {"width": 32768, "heads": 4, "logical_pages": 1},
        {"num_pages": 4096},
    ),
    "selection, 300 pages of 8, D 64": (
        {"width": 300, "head_dim": 64, "logical_pages": 8},
        {"num_pages": 20},
    ),
}


def prefill_arguments(
    tokens=1024,
    retrieval=1,
    streaming=1,
    group=4,
    head_dim=128,
    page_size=64,
    int8=False,
    listed=None,
    rows=(),
):
    """``listed``: most blocks that a tile lists; None: no lists. ``rows``: prompts, if several."""
    case = {"head_dim": head_dim, "page_size": page_size}
    _, full, *_ = decode_arguments(retrieval=retrieval, int8=int8, **case)
    _, _, ring, *_ = decode_arguments(streaming=streaming, **case)
    array = jax.ShapeDtypeStruct
    heads = retrieval + streaming
    q, k = (array((*rows, tokens, n, head_dim), jnp.bfloat16) for n in (heads * group, heads))
    table, scalar = array((*rows, 64), jnp.int32), array(rows, jnp.int32)
    blocks = None
    if listed is not None:
        shape = (retrieval, -(-tokens // TILE_QUERIES), listed)
        blocks = BlockList(array(shape, jnp.int32), array(shape[:2], jnp.int32))
    return q, k, k, full, ring, table, table, scalar, scalar, blocks


def prefill(*arguments):
    *arguments, blocks = arguments
    return prefill_attention(*arguments, blocks=blocks, sink=128, local=256)


PREFILL_CASES = {
    "prefill": {},
    "prefill, dense, 64 tokens": {"tokens": 64, "streaming": 0},
    "prefill, streaming, pages of 128": {"retrieval": 0, "page_size": 128},
    "prefill, int8, pages of 16": {"int8": True, "page_size": 16},
    "prefill, 4 retrieval and 4 streaming heads": {"retrieval": 4, "streaming": 4},
    "prefill, D 64, group 3, pages of 16": {"head_dim": 64, "group": 3, "page_size": 16},
    "prefill, 8 prompts, D 64, group 3": {
        **{"rows": (8,), "tokens": 128, "head_dim": 64, "group": 3, "streaming": 0}
    },
    "prefill of lists": {"listed": 100},
    "prefill of lists, pages of 32": {"listed": 100, "page_size": 32},
    "prefill of lists, dense, pages of 16": {"listed": 100, "page_size": 16, "streaming": 0},
    "prefill of lists, D 64, pages of 16": {"listed": 100, "head_dim": 64, "page_size": 16},
}


def prefix_arguments(rows=128, heads=8, group=4, **case):
    head_dim = case.get("head_dim", 128)
    _, pages, *_ = decode_arguments(retrieval=heads, **case)
    q = jax.ShapeDtypeStruct((rows, heads * group, head_dim), jnp.bfloat16)
    integers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((512,), ()))
    lse = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    own = OwnAttention(q, lse, jax.ShapeDtypeStruct((rows,), jnp.bool_))
    return q, pages, *integers, own


def score_arguments(rows=512, heads=2, head_dim=128, page_size=64):
    _, pages, *_ = decode_arguments(retrieval=heads, head_dim=head_dim, page_size=page_size)
    array = jax.ShapeDtypeStruct
    queries = array((heads, rows, head_dim), jnp.bfloat16)
    keys = array((8192, heads, head_dim), jnp.bfloat16)
    last, table, start = (array(shape, jnp.int32) for shape in ((rows,), (2048,), ()))
    return queries, last, keys, pages, table, start


SCORE_CASES = {
    "block scores": {},
    "block scores, D 64, pages of 16": {"head_dim": 64, "page_size": 16, "rows": 24},
}

PREFIX_CASES = {
    "prefix": {},
    "prefix, D 64, group 3, pages of 16": {"head_dim": 64, "group": 3, "page_size": 16, "rows": 5},
    "prefix, int8": {"kind": "int8"},
    "prefix, int8, D 64, pages of 128": {"kind": "int8", "head_dim": 64, "page_size": 128},
    "prefix, fp8, pages of 16": {"kind": "fp8", "page_size": 16},
    "prefix, fp8, D 64, pages of 32": {"kind": "fp8", "head_dim": 64, "page_size": 32},
    "prefix, int4, pages of 32": {"kind": "int4", "page_size": 32},
    "prefix, int4, D 64, pages of 16": {"kind": "int4", "head_dim": 64, "page_size": 16},
}


def linear_arguments(rows=1, K=4096, out=4096, norm=False, residual=False, gated=False):
    """Positional arguments of ``fused_linear``: what is absent is None."""
    array, width = jax.ShapeDtypeStruct, out // 2 if gated else out
    return (
        array((rows, K), jnp.bfloat16),
        array((K, out), jnp.bfloat16),
        None,
        array((K,), jnp.bfloat16) if norm else None,
        array((64, 8 * -(-rows // 8)), jnp.float32) if norm else None,
        array((rows, width), jnp.bfloat16) if residual else None,
    )


LINEAR_CASES = {
    "linear, norm": {"norm": True, "out": 6144},
    "linear, residual, 4 rows": {"residual": True, "K": 14336, "rows": 4},
    "linear, SmolLM2, 16 rows, residual": {"residual": True, "K": 576, "out": 576, "rows": 16},
}
GATED_CASES = {"linear, gated": {"norm": True, "out": 28672, "gated": True}}


def packed_weight(
    codes: str, K: int, out: int, group: int | None, paired: bool, zeros: str
) -> PackedWeight:
    array = jax.ShapeDtypeStruct
    behind = 0 if group is None else 128 // group * (2 if zeros == "word" else 1)
    return PackedWeight(
        words=array((out // 64, K // 128, 4 * BITS[codes] + behind, 64), jnp.int32),
        channel_scale=array((out // 64, 64), jnp.float32) if group is None else None,
        codes=codes,
        groups=1 if group is None else K // group,
        zeros=zeros,
        paired=paired,
    )


def packed_arguments(codes="int8", group=None, gated=False, zeros="none", **case):
    x, kernel, *around = linear_arguments(gated=gated, **case)
    return x, packed_weight(codes, *kernel.shape, group, gated, zeros), *around


INT4 = {"codes": "uint4", "group": 128, "zeros": "byte"}
GGUF = {"codes": "uint4", "group": 32, "zeros": "word"}
PACKED_CASES = {
    "int8 linear, norm, a cluster": {"norm": True, "out": 6144},
    "int8 linear, residual, a cluster": {"residual": True},
    "int8 linear, residual, 8 rows": {"residual": True, "K": 14336, "rows": 8},
    "fp8 linear, residual, 8 rows": {"codes": "float8_e4m3fn", "residual": True, "rows": 8},
    "int4 linear, norm, a cluster": INT4 | {"norm": True, "out": 6144},
    "int4 linear, residual, a cluster, 8 rows": INT4 | {"residual": True, "rows": 8},
    "int4 linear, residual, 8 rows": INT4 | {"residual": True, "K": 14336, "rows": 8},
    "int4 linear, SmolLM2 from GGUF": GGUF | {"K": 1536, "out": 576},
}
WIDE = {"norm": True, "out": 28672, "gated": True}
GATED_PACKED_CASES = {
    "int8 linear, gated, 8 rows": WIDE | {"rows": 8},
    "int4 linear, gated": INT4 | WIDE,
    "int4 linear, gated, groups of 32, 8 rows": INT4 | WIDE | {"group": 32, "rows": 8},
    "int4 linear, gated, from GGUF, 8 rows": GGUF | WIDE | {"rows": 8},
    "int4 linear, gated, groups of 64, 8 rows": INT4 | WIDE | {"group": 64, "rows": 8},
}
FP8_BLOCKS = {"codes": "float8_e4m3fn", "group": 128}
Q8_0 = {"codes": "int8", "group": 32}
ROWS_CASES = {
    "int8 rows, 16": {"rows": 16},
    "int8 rows, 32": {"K": 14336, "rows": 32},
    "int8 rows, 128": {"out": 28672, "rows": 128},
    "int8 rows from GGUF, 64": Q8_0 | {"out": 28672, "rows": 64},
    "fp8 rows, 64": {"codes": "float8_e4m3fn", "rows": 64},
    "fp8 rows in blocks, 128": FP8_BLOCKS | {"out": 28672, "rows": 128},
    "int4 rows, 16": INT4 | {"out": 6144, "rows": 16},
    "int4 rows, 32": INT4 | {"out": 28672, "rows": 32},
    "int4 rows, 64": INT4 | {"K": 14336, "rows": 64},
    "int4 rows, several tiles": INT4 | {"out": 28672, "rows": 300},
    "int4 rows in groups of 64, 32": INT4 | {"out": 28672, "group": 64, "rows": 32},
    "int4 rows from GGUF, 32": GGUF | {"out": 28672, "rows": 32},
    "int4 rows from GGUF, 64": GGUF | {"out": 6144, "rows": 64},
    "int4 rows of SmolLM2 from GGUF, 64": GGUF | {"K": 1536, "out": 576, "rows": 64},
}


GATED_ROWS_CASES = {
    "int8 rows, gated, 32": WIDE | {"rows": 32},
    "int4 rows, gated, 32": INT4 | WIDE | {"rows": 32},
    "int4 rows, gated, 128": INT4 | WIDE | {"rows": 128},
    "int4 rows, gated, from GGUF, 64": GGUF | WIDE | {"rows": 64},
}
NUMBERS_CASES = {
    "int8 numbers": {},
    "int4 numbers": INT4 | {"K": 14336},
    "int4 numbers, gated": INT4 | WIDE,
    "int4 numbers of SmolLM2 from GGUF": GGUF | {"K": 1536, "out": 576},
    "fp8 numbers in blocks": FP8_BLOCKS,
    "int8 numbers from GGUF": Q8_0 | {"out": 28672},
}
CODES_CASES = {
    "int8 codes": {"K": 14336},
    "fp8 codes, gated": WIDE | {"codes": "float8_e4m3fn"},
}


def rows_arguments(**case):
    return packed_arguments(**case)[:2]


def numbers_arguments(**case):
    return packed_arguments(**case)[1:2]


def lm_head_arguments(**case):
    return packed_arguments(out=128256, **case)[:2]


LM_HEAD_CASES = {
    "int8 lm_head, 8 rows": {"rows": 8},
    "int4 lm_head": INT4,
}


def main() -> None:
    target = Path(__file__).with_name("h200_target.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def placed(arguments):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
        )

    for name, (steps, case) in APPEND_CASES.items():
        arguments = placed(append_arguments(**case))
        print(f"CASE {name}", flush=True)
        memory = jax.jit(steps, donate_argnums=0).lower(*arguments).compile().memory_analysis()
        caches = [x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0])]
        print(f"caches {sum(caches)} bytes, updated in place {memory.alias_size_in_bytes}")
        print(f"smallest cache {min(x for x in caches if x)} bytes", end=", ")
        print(f"temporary {memory.temp_size_in_bytes}", flush=True)
    linear, packed = (partial(op, epsilon=1e-5) for op in (fused_linear, packed_linear))
    families = [
        (paged_attention, decode_arguments, CASES),
        (verify_attention, verify_arguments, VERIFY_CASES),
        (prefill, prefill_arguments, PREFILL_CASES),
        (partial(block_scores, most_heads=8), score_arguments, SCORE_CASES),
        (prefix_attention, prefix_arguments, PREFIX_CASES),
        (partial(linear, gated=False), linear_arguments, LINEAR_CASES),
        (partial(linear, gated=True), linear_arguments, GATED_CASES),
        (partial(packed, gated=False), packed_arguments, PACKED_CASES),
        (partial(packed, gated=True), packed_arguments, GATED_PACKED_CASES),
        (packed_product, lm_head_arguments, LM_HEAD_CASES),
        (partial(packed_rows, dtype=jnp.bfloat16), rows_arguments, ROWS_CASES),
        (partial(packed_rows, dtype=jnp.bfloat16, gated=True), rows_arguments, GATED_ROWS_CASES),
        (packed_numbers, numbers_arguments, NUMBERS_CASES),
        (packed_codes, numbers_arguments, CODES_CASES),
    ]
    compilations = [
        (name, op, build(**case)) for op, build, cases in families for name, case in cases.items()
    ]
    dealt = partial(paged_attention, most_tokens=MOST_TOKENS)
    compilations.append(("heads of three kinds", dealt, decode_arguments(retrieval=8)))
    compilations += [
        (name, partial(select, **how), selection_arguments(**case))
        for name, (case, how) in SELECTION_CASES.items()
    ]
    for name, op, arguments in compilations:
        print(f"CASE {name}", flush=True)
        jax.jit(op).lower(*placed(arguments)).compile()


if __name__ == "__main__":
    main()
