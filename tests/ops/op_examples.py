"""Arguments of every op: their shapes and dtypes, and values that are valid.

For the tests of what holds for every op.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax import ShapeDtypeStruct as Struct

from pallas_kernels import api
from pallas_kernels.api import BlockList, KVPages, OwnAttention, PackedWeight, PageList, Weight

B, T, H, HK, D = 2, 24, 6, 3, 8
KR, KS, N, P, M, L, LOGICAL = 1, 2, 5, 16, 4, 3, 2


def f32(*shape: int) -> Struct:
    return Struct(shape, jnp.float32)


def bf16(*shape: int) -> Struct:
    return Struct(shape, jnp.bfloat16)


def i32(*shape: int) -> Struct:
    return Struct(shape, jnp.int32)


def flags(*shape: int) -> Struct:
    return Struct(shape, jnp.bool_)


def pages(heads: int, page_size: int = P, head_dim: int = D) -> KVPages:
    return KVPages(*[f32(heads, N, page_size, head_dim)] * 2)


def int8_pages(heads: int) -> KVPages:
    return KVPages(*[Struct((heads, N, P, D), jnp.int8)] * 2, *[f32(heads, N, P)] * 2)


def int4_pages(heads: int) -> KVPages:
    words = (i32(heads, N, P), i32(heads, N, P))
    return KVPages(*[Struct((heads, N, P, D // 2), jnp.uint8)] * 2, words, words)


def lists(*shape: int) -> PageList:
    return PageList(i32(*shape), i32(*shape[:-1]), i32(*shape[:-1]))


POOLS = {"retrieval": pages(KR), "streaming": pages(KS)}
LISTS = {"retrieval_list": lists(B, KR, L), "streaming_list": lists(B, 1, L)}
STATS = {"key_stats": f32(KR, N, LOGICAL, 2, D)}

INT8_WEIGHT = Weight(Struct((64, 10), jnp.int8), f32(1, 10))
TABLE = Weight(Struct((64, 10), jnp.int8), f32(64, 1))
WHOLE_BLOCK = Weight(Struct((128, 64), jnp.int8), f32(1, 64))
PACKED_BLOCK = PackedWeight(
    words=i32(1, 1, 32, 64),
    channel_scale=f32(1, 64),
    codes="int8",
    groups=1,
    zeros="none",
    paired=False,
)

# Arguments that every op accepts, and the shapes and dtypes that it returns for them.
ACCEPTED: dict[str, tuple[dict[str, Any], Any]] = {
    "paged_attention": (
        {"q": f32(B, H, D), **POOLS, **LISTS, "selected_page_size": P},
        (f32(B, H, D), f32(B, H)),
    ),
    "prefill_attention": (
        {
            "q": f32(T, H, D),
            "k": f32(T, HK, D),
            "v": f32(T, HK, D),
            **POOLS,
            "page_table": i32(M),
            "streaming_table": i32(M),
            "start": i32(),
            "length": i32(),
            "sink": 4,
            "local": 8,
            "blocks": BlockList(i32(KR, 1, L), i32(KR, 1)),
        },
        (f32(T, H, D), f32(T, H)),
    ),
    "choose_blocks": (
        {
            "q": f32(T, 2, D),
            "k": f32(T, KR, D),
            "pages": pages(KR),
            "page_table": i32(M),
            "start": i32(),
            "length": i32(),
            "threshold": 0.9,
        },
        BlockList(i32(KR, 1, 2), i32(KR, 1)),
    ),
    "prefix_attention": (
        {
            "q": f32(B, 2, D),
            "pages": pages(KR),
            "page_table": i32(M),
            "length": i32(),
            "own": OwnAttention(f32(B, 2, D), f32(B, 2), flags(B)),
        },
        (f32(B, 2, D), f32(B, 2)),
    ),
    "verify_attention": (
        {
            "q": f32(B, 3, 2, D),
            "pages": pages(KR),
            "page_table": i32(B, M),
            "position": i32(B),
        },
        (f32(B, 3, 2, D), f32(B, 3, 2)),
    ),
    "causal_attention": (
        {
            "q": f32(B, T, H, D),
            "k": f32(B, T, HK, D),
            "v": f32(B, T, HK, D),
            "segment_ids": i32(B, T),
        },
        (f32(B, T, H, D), f32(B, T, H)),
    ),
    "merge_attention": (
        {"outs": f32(2, B, H, D), "lses": f32(2, B, H)},
        (f32(B, H, D), f32(B, H)),
    ),
    "append_kv": (
        {
            "q": f32(B, H, D),
            "k": f32(B, HK, D),
            "v": f32(B, HK, D),
            "cos": f32(B, D // 2),
            "sin": f32(B, D // 2),
            **POOLS,
            **STATS,
            "page": i32(B),
            "streaming_page": i32(B),
            "offset": i32(B),
        },
        (f32(B, H, D), pages(KR), pages(KS), f32(KR, N, LOGICAL, 2, D)),
    ),
    "append_kv_chunk": (
        {
            "k": f32(T, HK, D),
            "v": f32(T, HK, D),
            **POOLS,
            **STATS,
            "page_table": i32(M),
            "streaming_page": i32(T),
            "start": i32(),
            "length": i32(),
        },
        (pages(KR), pages(KS), f32(KR, N, LOGICAL, 2, D)),
    ),
    "page_scores": (
        {
            "q": f32(B, 2, D),
            **STATS,
            "page_table": i32(B, M),
            "length": i32(B),
            "page_size": P,
            "selected_page_size": P // LOGICAL,
            "lower_bound_weight": 0.5,
        },
        f32(B, KR, M * LOGICAL),
    ),
    "select_pages": (
        {
            "scores": f32(B, KR, M),
            "num_candidates": i32(B),
            "wanted": i32(B, KR),
            "num_pages": 2,
            "sink_pages": 1,
        },
        i32(B, KR, 2),
    ),
    "fused_linear": (
        {
            "x": f32(B, D),
            "kernel": f32(D, 2 * T),
            "bias": f32(2 * T),
            "norm_scale": f32(D),
            "residual": f32(B, T),
            "epsilon": 1e-5,
            "gated": True,
        },
        (f32(B, T), None),
    ),
    "apply_rotary": (
        {"x": f32(B, T, H, D), "cos": f32(1, T, D // 2), "sin": f32(1, T, D // 2)},
        f32(B, T, H, D),
    ),
    "store_kv": (
        {"k": f32(B, H, D), "v": f32(B, H, D), "pages": int8_pages(HK)},
        KVPages(*[Struct((B, H, D), jnp.int8)] * 2, *[f32(B, H)] * 2),
    ),
    "quantize_kv": ({"x": f32(B, H, D), "kind": "int8"}, (Struct((B, H, D), jnp.int8), f32(B, H))),
    "product": ({"x": f32(B, 64), "kernel": INT8_WEIGHT}, f32(B, 10)),
    "w8a8_weight": (
        {"kernel": f32(64, 10), "kind": "int8"},
        api.W8A8Weight(Struct((10, 64), jnp.int8), f32(10)),
    ),
    "quantize_weight": ({"kernel": f32(64, 10), "kind": "int8"}, INT8_WEIGHT),
    "pack_weight": ({"weight": WHOLE_BLOCK}, PACKED_BLOCK),
    "unpack_weight": ({"packed": PACKED_BLOCK}, WHOLE_BLOCK),
    "look_up": ({"table": TABLE, "ids": i32(B, T), "dtype": "bfloat16"}, bf16(B, T, 10)),
    "dequantize_weight": ({"weight": INT8_WEIGHT}, f32(64, 10)),
    "dequantize_kv": (
        {"codes": Struct((B, H, D), jnp.int8), "scale": f32(B, H)},
        f32(B, H, D),
    ),
}


def evaluate(op: str, arguments: dict[str, Any]) -> Any:
    """Shapes and dtypes only; nothing is compiled."""
    static = {name: x for name, x in arguments.items() if isinstance(x, int | float | str)}
    traced = {name: x for name, x in arguments.items() if name not in static}
    return jax.eval_shape(functools.partial(getattr(api, op), **static), **traced)


def fill(x: Struct, rng: np.random.Generator) -> Array:
    """Random keys and values; indices that are valid whatever they index."""
    if x.dtype == jnp.int32:
        return jnp.asarray(rng.integers(0, M, x.shape), jnp.int32)
    return jnp.asarray(rng.standard_normal(x.shape), x.dtype)


def example(op: str) -> dict[str, Any]:
    """The arguments that are traced, with valid values: the same whatever ran before."""
    rng = np.random.default_rng(list(op.encode()))
    traced = {
        name: jax.tree.map(functools.partial(fill, rng=rng), x)
        for name, x in ACCEPTED[op][0].items()
        if not isinstance(x, int | float | str)
    }
    match op:
        case "paged_attention":
            for name in LISTS:
                pages, start, _ = traced[name]
                traced[name] = PageList(pages, start, start + 37)
        case "prefill_attention" | "append_kv_chunk" | "choose_blocks":
            traced |= {"start": jnp.int32(21), "length": jnp.int32(T)}
            if "blocks" in traced:  # the history and the chunk; the third is not listed
                traced["blocks"] = BlockList(jnp.array([[[0, 1, 7]]]), jnp.array([[2]]))
            if "page_table" in traced:
                traced["page_table"] = jnp.array([3, 0, 4, 1])
            if "streaming_page" in traced:
                traced["streaming_page"] = jnp.where(jnp.arange(T) < T - P, -1, 2)
        case "prefix_attention":
            traced |= {"page_table": jnp.array([3, 0, 4, 1]), "length": jnp.int32(37)}
        case "verify_attention":
            traced |= {"position": jnp.array([-1, 37])}
        case "append_kv":
            traced |= {"page": jnp.array([1, 3]), "streaming_page": jnp.array([4, 0])}
        case "page_scores":
            traced["length"] = jnp.array([64, 40])
        case "select_pages":
            traced |= {"num_candidates": jnp.array([4, 3]), "wanted": jnp.array([[2], [1]])}
    return traced


@functools.cache
def jitted(op: str) -> Callable[[dict[str, Any]], Any]:
    """``op`` of a dict of traced arguments; its static ones as in ``ACCEPTED``."""
    static = {name: x for name, x in ACCEPTED[op][0].items() if isinstance(x, int | float | str)}
    call = functools.partial(getattr(api, op), **static)
    return jax.jit(lambda arguments: call(**arguments))
