"""Every op refuses shapes and dtypes that contradict each other, and names them."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Struct
from op_examples import (
    ACCEPTED,
    HK,
    KR,
    KS,
    LOGICAL,
    B,
    D,
    H,
    L,
    M,
    N,
    P,
    T,
    bf16,
    evaluate,
    f32,
    flags,
    i32,
    int4_pages,
    int8_pages,
    lists,
    pages,
)

from pallas_kernels import api
from pallas_kernels.api import BlockList, OwnAttention


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("paged_attention", {"q": f32(B, H)}, "q has shape (2, 6), expected [any, any, any]"),
        (
            "paged_attention",
            {"q": f32(B, 7, D)},
            "7 query heads must be a positive multiple of 3 KV heads",
        ),
        (
            "paged_attention",
            {"retrieval_list": lists(1, KR, L)},
            "retrieval_list.page_ids has shape (1, 1, 3), expected at least 2 rows and 1 heads",
        ),
        (
            "paged_attention",
            {"streaming_list": lists(B, KS, L)._replace(start=i32(B, 3))},
            "streaming_list.start has shape (2, 3), expected at least 2 rows and 2 heads",
        ),
        (
            "paged_attention",
            {"streaming_list": lists(B, KS, L)._replace(stop=i32(1, KS))},
            "streaming_list.stop has shape (1, 2), expected at least 2 rows and 2 heads",
        ),
        (
            "paged_attention",
            {"retrieval_list": lists(B, KR, L)._replace(stop=f32(B, KR))},
            "retrieval_list.stop has dtype float32, expected int32",
        ),
        (
            "prefill_attention",
            {"retrieval": pages(2)},
            "retrieval + streaming pools hold (2, 2) KV heads, expected 3",
        ),
        (
            "paged_attention",
            {"streaming": pages(KS, page_size=32)},
            "page sizes differ: retrieval 16, streaming 32",
        ),
        (
            "paged_attention",
            {"retrieval": pages(KR, head_dim=4)},
            "retrieval.k has shape (1, 5, 16, 4), expected [any, any, any, 8]",
        ),
        (
            "paged_attention",
            {"streaming": pages(KS)._replace(v=f32(KS, 4, P, D))},
            "streaming.v has shape (2, 4, 16, 8), expected [2, 5, 16, 8]",
        ),
        (
            "paged_attention",
            {"retrieval": pages(KR)._replace(v=Struct((KR, N, P, D), jnp.bfloat16))},
            "retrieval.v has dtype bfloat16, retrieval.k has float32",
        ),
        (
            "paged_attention",
            {"retrieval": int8_pages(KR)._replace(v_scale=None)},
            "retrieval.v_scale must be an array for int8 pages, got None",
        ),
        (
            "paged_attention",
            {"streaming": pages(KS)._replace(k_scale=f32(KS, N, P))},
            "streaming.k_scale must be None for plain pages, got an array",
        ),
        (
            "paged_attention",
            {"retrieval": int8_pages(KR)._replace(k_scale=f32(KR, N))},
            "retrieval.k_scale has shape (1, 5), expected [1, 5, 16]",
        ),
        (
            "paged_attention",
            {"retrieval": int4_pages(KR)._replace(v_scale=(i32(KR, N, P),))},
            "retrieval.v_scale must be two arrays for int4 pages, got a tuple of 1",
        ),
        (
            "paged_attention",
            {"retrieval": int4_pages(KR)._replace(k_scale=(i32(KR, N, P), i32(KR, N)))},
            "retrieval.k_scale has shape (1, 5), expected [1, 5, 16]",
        ),
        (
            "paged_attention",
            {"retrieval": int4_pages(KR)._replace(k_scale=(f32(KR, N, P),) * 2)},
            "retrieval.k_scale has dtype float32, expected int32",
        ),
        (
            "paged_attention",
            {"retrieval": int8_pages(KR)._replace(k=Struct((KR, N, P, D), jnp.uint8))},
            "retrieval.k has shape (1, 5, 16, 8), expected [any, any, any, 4]",
        ),
        (
            "prefix_attention",
            {"q": f32(B, 2, 7), "pages": int4_pages(KR)},
            "pages pages of 4 bits need an even head_dim, got 7",
        ),
        (
            "append_kv",
            {"retrieval": int4_pages(KR), "key_stats": f32(KR, N, LOGICAL, 2, D // 2)},
            "key_stats has shape (1, 5, 2, 2, 4), expected [any, 5, any, 2, 8]",
        ),
        ("store_kv", {"v": f32(B, H, 4)}, "v has shape (2, 6, 4), expected [2, 6, 8]"),
        ("quantize_kv", {"kind": "int5"}, "kind='int5' is unknown; known: int8, fp8, int4"),
        (
            "quantize_kv",
            {"x": f32(B, H, 7), "kind": "int4"},
            "codes of 4 bits need an even number of channels, got 7",
        ),
        ("prefill_attention", {"q": f32(T, D)}, "q has shape (24, 8), expected [any, any, any]"),
        (
            "prefill_attention",
            {"k": f32(20, HK, D)},
            "k has shape (20, 3, 8), expected [24, any, 8]",
        ),
        (
            "prefill_attention",
            {"v": f32(T, 2, D)},
            "v has shape (24, 2, 8), expected [24, 3, 8]",
        ),
        (
            "prefill_attention",
            {"q": f32(T, 5, D)},
            "5 query heads must be a positive multiple of 3 KV heads",
        ),
        ("prefill_attention", {"page_table": i32(1, M)}, "page_table has shape (1, 4)"),
        (
            "prefill_attention",
            {"streaming_table": i32(3)},
            "streaming_table has shape (3,), expected [4]",
        ),
        (
            "prefill_attention",
            {"page_table": f32(M)},
            "page_table has dtype float32, expected int32",
        ),
        ("prefill_attention", {"start": i32(1)}, "start has shape (1,), expected []"),
        ("prefill_attention", {"length": i32(1)}, "length has shape (1,), expected []"),
        ("prefill_attention", {"length": f32()}, "length has dtype float32, expected int32"),
        ("prefill_attention", {"streaming": pages(1)}, "hold (1, 1) KV heads, expected 3"),
        ("prefill_attention", {"sink": -1}, "sink >= 0 and local >= 1, got sink=-1 local=8"),
        ("prefill_attention", {"local": 0}, "sink >= 0 and local >= 1, got sink=4 local=0"),
        (
            "prefix_attention",
            {"own": OwnAttention(f32(B, 3, D), f32(B, 2), flags(B))},
            "own.out has shape (2, 3, 8), expected [2, 2, 8]",
        ),
        (
            "prefix_attention",
            {"own": OwnAttention(f32(B, 2, D), f32(B, 1), flags(B))},
            "own.lse has shape (2, 1), expected [2, 2]",
        ),
        (
            "prefix_attention",
            {"own": OwnAttention(f32(B, 2, D), f32(B, 2), flags(1))},
            "own.shares has shape (1,), expected [2]",
        ),
        (
            "prefix_attention",
            {"own": OwnAttention(f32(B, 2, D), f32(B, 2), i32(B))},
            "own.shares has dtype int32, expected bool",
        ),
        ("verify_attention", {"q": f32(B, H, D)}, "q has shape (2, 6, 8), expected [any, any"),
        ("verify_attention", {"q": f32(B, 0, 2, D)}, "q has shape (2, 0, 2, 8), needs a token"),
        (
            "verify_attention",
            {"pages": pages(KR, head_dim=4)},
            "pages.k has shape (1, 5, 16, 4), expected [any, any, any, 8]",
        ),
        (
            "verify_attention",
            {"pages": pages(2), "q": f32(B, 3, 3, D)},
            "3 query heads must be a positive multiple of 2 KV heads",
        ),
        ("verify_attention", {"page_table": i32(M)}, "page_table has shape (4,), expected [2, any"),
        ("verify_attention", {"page_table": i32(B, 0)}, "(2, 0), needs an entry"),
        ("verify_attention", {"position": i32(3)}, "position has shape (3,), expected [2]"),
        ("merge_attention", {"outs": f32(2)}, "outs has shape (2,), expected [n, ..., D]"),
        (
            "merge_attention",
            {"lses": f32(3, B, H)},
            "lses has shape (3, 2, 6), expected [2, 2, 6]",
        ),
        ("append_kv", {"q": f32(B, H)}, "q has shape (2, 6)"),
        ("append_kv", {"k": f32(3, HK, D)}, "k has shape (3, 3, 8), expected [2, any, 8]"),
        ("append_kv", {"v": f32(B, HK, 4)}, "v has shape (2, 3, 4), expected [2, 3, 8]"),
        ("append_kv", {"cos": f32(B, D)}, "cos has shape (2, 8), expected [2, 4]"),
        ("append_kv", {"sin": f32(1, 4)}, "sin has shape (1, 4), expected [2, 4]"),
        ("append_kv", {"page": i32(1)}, "page has shape (1,), expected [2]"),
        ("append_kv", {"streaming_page": i32(3)}, "streaming_page has shape (3,), expected [2]"),
        ("append_kv", {"offset": f32(B)}, "offset has dtype float32, expected int32"),
        ("append_kv", {"retrieval": pages(2)}, "hold (2, 2) KV heads, expected 3"),
        (
            "append_kv",
            {"key_stats": f32(KR, 4, LOGICAL, 2, D)},
            "key_stats has shape (1, 4, 2, 2, 8), expected [any, 5, any, 2, 8]",
        ),
        (
            "append_kv",
            {"key_stats": f32(KR + 1, N, LOGICAL, 2, D)},
            "key_stats are of 2 heads, the pool has 1",
        ),
        (
            "append_kv",
            {"key_stats": f32(KR, N, 3, 2, D)},
            "page size 16 must be a multiple of the 3 logical pages it holds",
        ),
        ("append_kv_chunk", {"k": f32(T, D)}, "k has shape (24, 8)"),
        ("append_kv_chunk", {"v": f32(T, 1, D)}, "v has shape (24, 1, 8), expected [24, 3, 8]"),
        (
            "append_kv_chunk",
            {"key_stats": f32(KR, N, 0, 2, D)},
            "page size 16 must be a multiple of the 0 logical pages it holds",
        ),
        ("append_kv_chunk", {"page_table": i32(1, M)}, "page_table has shape (1, 4)"),
        (
            "append_kv_chunk",
            {"streaming_page": i32(M)},
            "streaming_page has shape (4,), expected [24]",
        ),
        ("append_kv_chunk", {"start": i32(1)}, "start has shape (1,), expected []"),
        ("append_kv_chunk", {"length": f32()}, "length has dtype float32, expected int32"),
        ("append_kv_chunk", {"streaming": pages(1)}, "hold (1, 1) KV heads, expected 3"),
        ("paged_attention", {"selected_page_size": 6}, "selected_page_size=6 must divide the"),
        ("paged_attention", {"selected_page_size": 0}, "selected_page_size=0 must divide the"),
        ("page_scores", {"q": f32(B, 2)}, "q has shape (2, 2)"),
        (
            "page_scores",
            {"key_stats": f32(KR, N, 2, 1, D)},
            "key_stats has shape (1, 5, 2, 1, 8), expected [any, any, any, 2, 8]",
        ),
        (
            "page_scores",
            {"key_stats": f32(2, N, 2, 2, D), "q": f32(B, 3, D)},
            "3 query heads must be a positive multiple of 2 KV heads",
        ),
        (
            "page_scores",
            {"q": f32(B, 0, D)},
            "0 query heads must be a positive multiple of 1 KV heads",
        ),
        (
            "page_scores",
            {"page_table": i32(3, M)},
            "page_table has shape (3, 4), expected [2, any]",
        ),
        ("page_scores", {"length": i32(3)}, "length has shape (3,), expected [2]"),
        ("page_scores", {"length": f32(B)}, "length has dtype float32, expected int32"),
        ("page_scores", {"page_size": 15}, "page_size=15 must be a multiple of 2 logical pages"),
        (
            "page_scores",
            {"selected_page_size": 4},
            "selected_page_size=4 must divide page_size=16 and be a multiple of logical_page",
        ),
        ("page_scores", {"selected_page_size": 24}, "selected_page_size=24 must divide page_size"),
        ("page_scores", {"selected_page_size": 0}, "selected_page_size=0 must divide page_size=16"),
        ("page_scores", {"lower_bound_weight": -0.5}, "lower_bound_weight=-0.5 must lie in [0, 1]"),
        ("page_scores", {"lower_bound_weight": 1.5}, "lower_bound_weight=1.5 must lie in [0, 1]"),
        ("select_pages", {"scores": f32(B, M)}, "scores has shape (2, 4)"),
        ("select_pages", {"num_candidates": i32(3)}, "num_candidates has shape (3,), expected [2]"),
        ("select_pages", {"num_candidates": f32(B)}, "num_candidates has dtype float32"),
        ("select_pages", {"wanted": i32(B)}, "wanted has shape (2,), expected [2, 1]"),
        ("select_pages", {"wanted": f32(B, KR)}, "wanted has dtype float32, expected int32"),
        ("select_pages", {"sink_pages": 3}, "got sink_pages=3 num_pages=2"),
        ("select_pages", {"sink_pages": -1}, "got sink_pages=-1 num_pages=2"),
        ("apply_rotary", {"x": f32(B, T, D)}, "x has shape (2, 24, 8)"),
        ("apply_rotary", {"cos": f32(1, T, D)}, "cos has shape (1, 24, 8), expected [any, 24, 4]"),
        ("apply_rotary", {"sin": f32(B, T, 4)}, "sin has shape (2, 24, 4), expected [1, 24, 4]"),
        (
            "apply_rotary",
            {"cos": f32(3, T, 4), "sin": f32(3, T, 4)},
            "cos has 3 rows, expected 1 or 2",
        ),
        ("dequantize_kv", {"scale": f32(B)}, "scale has shape (2,), expected [2, 6]"),
        (
            "dequantize_kv",
            {"codes": f32(B, H, D)},
            "codes has dtype float32, expected int8, float8",
        ),
        (
            "dequantize_kv",
            {"codes": Struct((B, H, D // 2), jnp.uint8)},
            "scale must be two arrays for int4 pages, got an array",
        ),
        ("dequantize_kv", {"scale": bf16(B, H)}, "scale has dtype bfloat16, expected float32"),
        (
            "prefill_attention",
            {"blocks": BlockList(i32(KR, 2, L), i32(KR, 1))},
            "blocks.ids has shape (1, 2, 3), expected [1, 1, any]",
        ),
        (
            "prefill_attention",
            {"blocks": BlockList(i32(KR, 1, L), i32(KR + 1, 1))},
            "blocks.counts has shape (2, 1), expected [1, 1]",
        ),
        (
            "prefill_attention",
            {"blocks": BlockList(f32(KR, 1, L), i32(KR, 1))},
            "blocks.ids has dtype float32, expected int32",
        ),
        (
            "prefill_attention",
            {"blocks": BlockList(i32(KR, 1, 0), i32(KR, 1))},
            "blocks.ids has shape (1, 1, 0), needs an entry",
        ),
        ("merge_attention", {"lses": bf16(2, B, H)}, "lses has dtype bfloat16, expected float32"),
        ("append_kv", {"cos": bf16(B, D // 2)}, "cos has dtype bfloat16, expected float32"),
        ("apply_rotary", {"sin": bf16(1, T, 4)}, "sin has dtype bfloat16, expected float32"),
        (
            "paged_attention",
            {"retrieval": int8_pages(KR)._replace(k_scale=bf16(KR, N, P))},
            "retrieval.k_scale has dtype bfloat16, expected float32",
        ),
        (
            "paged_attention",
            {"streaming_list": lists(B, KS, 0)},
            "streaming_list.page_ids has shape (2, 2, 0), needs an entry",
        ),
        (
            "prefill_attention",
            {"page_table": i32(0), "streaming_table": i32(0)},
            "page_table has shape (0,), needs an entry",
        ),
        (
            "page_scores",
            {"key_stats": f32(KR, N, 0, 2, D)},
            "page_size=16 must be a multiple of 0 logical pages",
        ),
    ],
)
def test_a_contradiction_is_refused_by_name(op: str, change: dict[str, Any], words: str) -> None:
    arguments, _ = ACCEPTED[op]
    assert set(change) <= set(arguments)
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate(op, arguments | change)


@pytest.mark.parametrize(
    ("most_tokens", "words"),
    [
        ((16, 16), "most_tokens=(16, 16) must have an entry for each of the 3 KV heads"),
        ((16, 0, 16), "most_tokens=(16, 0, 16) must be at least 1 each"),
    ],
)
def test_most_tokens_is_refused_by_name(most_tokens: tuple[int, ...], words: str) -> None:
    """Static and no number: not among the arguments above."""
    arguments, _ = ACCEPTED["paged_attention"]
    arguments = {name: x for name, x in arguments.items() if name != "selected_page_size"}
    with pytest.raises(ValueError, match=re.escape(words)):
        jax.eval_shape(partial(api.paged_attention, most_tokens=most_tokens), **arguments)


@pytest.mark.parametrize("op", ["page_scores", "select_pages"])
def test_fewer_heads_than_there_are_is_refused(op: str) -> None:
    arguments, _ = ACCEPTED[op]
    static = {name: x for name, x in arguments.items() if isinstance(x, int | float)}
    arrays = {name: x for name, x in arguments.items() if name not in static}
    call = partial(getattr(api, op), most_heads=0, **static)
    with pytest.raises(ValueError, match="most_heads=0 must be at least the 1 heads that there"):
        jax.eval_shape(call, **arrays)
