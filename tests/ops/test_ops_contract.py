"""What holds for every op: shapes and dtypes of results, refusals, vmap, shard_map, bfloat16."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax import ShapeDtypeStruct as Struct
from numpy.testing import assert_allclose

from pallas_kernels import api
from pallas_kernels.api import KVPages, OwnAttention, PageList

ROOT = Path(__file__).resolve().parents[2]

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


def lists(*shape: int) -> PageList:
    return PageList(i32(*shape), i32(*shape[:-1]), i32(*shape[:-1]))


POOLS = {"retrieval": pages(KR), "streaming": pages(KS)}
LISTS = {"retrieval_list": lists(B, KR, L), "streaming_list": lists(B, 1, L)}
STATS = {"key_stats": f32(KR, N, LOGICAL, 2, D)}

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
        },
        (f32(T, H, D), f32(T, H)),
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
        {"scores": f32(B, KR, M), "num_candidates": i32(B), "num_pages": 2, "sink_pages": 1},
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
    "quantize_kv": ({"x": f32(B, H, D)}, (Struct((B, H, D), jnp.int8), f32(B, H))),
    "dequantize_kv": (
        {"codes": Struct((B, H, D), jnp.int8), "scale": f32(B, H)},
        f32(B, H, D),
    ),
}


def evaluate(op: str, arguments: dict[str, Any]) -> Any:
    """Shapes and dtypes only; nothing is compiled."""
    static = {name: x for name, x in arguments.items() if isinstance(x, int | float)}
    traced = {name: x for name, x in arguments.items() if name not in static}
    return jax.eval_shape(partial(getattr(api, op), **static), **traced)


@pytest.mark.parametrize("op", ACCEPTED)
def test_shapes_and_dtypes_of_results(op: str) -> None:
    arguments, result = ACCEPTED[op]
    assert evaluate(op, arguments) == result


def test_the_table_above_covers_every_op() -> None:
    types = {"Backend", "KVPages", "OwnAttention", "PageList"}
    others = types | {"resolve_backend", "value_checks"}
    assert set(ACCEPTED) | others == set(api.__all__)


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("paged_attention", {"q": f32(B, H)}, "q has shape (2, 6), expected [any, any, any]"),
        (
            "paged_attention",
            {"q": f32(B, 7, D)},
            "7 query heads must be a multiple of 3 KV heads",
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
            "retrieval.v_scale must be given exactly for int8 pages; the pages are int8",
        ),
        (
            "paged_attention",
            {"streaming": pages(KS)._replace(k_scale=f32(KS, N, P))},
            "streaming.k_scale must be given exactly for int8 pages; the pages are float32",
        ),
        (
            "paged_attention",
            {"retrieval": int8_pages(KR)._replace(k_scale=f32(KR, N))},
            "retrieval.k_scale has shape (1, 5), expected [1, 5, 16]",
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
            "5 query heads must be a multiple of 3 KV heads",
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
            "key_stats has shape (1, 4, 2, 2, 8), expected [1, 5, any, 2, 8]",
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
            "3 query heads must be a multiple of 2 KV heads",
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
        ("dequantize_kv", {"codes": f32(B, H, D)}, "codes has dtype float32, expected int8"),
        ("dequantize_kv", {"scale": bf16(B, H)}, "scale has dtype bfloat16, expected float32"),
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


# ------------------------------------------------------------------- transformations and bfloat16

rng = np.random.default_rng(0)


def fill(x: Struct) -> Array:
    """Random keys and values; indices that are valid whatever they index."""
    if x.dtype == jnp.int32:
        return jnp.asarray(rng.integers(0, M, x.shape), jnp.int32)
    return jnp.asarray(rng.standard_normal(x.shape), x.dtype)


def example(op: str) -> dict[str, Any]:
    """The arguments that are traced, with valid values."""
    traced = {
        name: jax.tree.map(fill, x)
        for name, x in ACCEPTED[op][0].items()
        if not isinstance(x, int | float)
    }
    match op:
        case "paged_attention":
            for name in LISTS:
                pages, start, _ = traced[name]
                traced[name] = PageList(pages, start, start + 37)
        case "prefill_attention" | "append_kv_chunk":
            traced |= {"start": jnp.int32(21), "length": jnp.int32(T)}
            if "page_table" in traced:
                traced["page_table"] = jnp.array([3, 0, 4, 1])
            if "streaming_page" in traced:
                traced["streaming_page"] = jnp.where(jnp.arange(T) < T - P, -1, 2)
        case "prefix_attention":
            traced |= {"page_table": jnp.array([3, 0, 4, 1]), "length": jnp.int32(37)}
        case "append_kv":
            traced |= {"page": jnp.array([1, 3]), "streaming_page": jnp.array([4, 0])}
        case "page_scores":
            traced["length"] = jnp.array([64, 40])
        case "select_pages":
            traced["num_candidates"] = jnp.array([4, 3])
    return traced


@functools.cache
def jitted(op: str) -> Callable[[dict[str, Any]], Any]:
    """``op`` of a dict of traced arguments; its static ones as in ``ACCEPTED``."""
    static = {name: x for name, x in ACCEPTED[op][0].items() if isinstance(x, int | float)}
    call = partial(getattr(api, op), **static)
    return jax.jit(lambda arguments: call(**arguments))


@pytest.mark.parametrize("op", ["paged_attention", "merge_attention", "page_scores"])
def test_vmap_over_queries(op: str) -> None:
    """As with several queries over one cache: everything but the first argument is shared."""
    arguments = example(op)
    name = next(iter(arguments))
    batch = jnp.stack([arguments[name], 0.5 * arguments[name][::-1]])
    axes = {key: 0 if key == name else None for key in arguments}
    mapped = jax.jit(jax.vmap(jitted(op), in_axes=(axes,)))(arguments | {name: batch})
    for i in range(2):
        single = jitted(op)(arguments | {name: batch[i]})
        for x, y in zip(jax.tree.leaves(mapped), jax.tree.leaves(single), strict=True):
            assert_allclose(x[i], y, atol=1e-6, rtol=0)


def test_vmap_of_prefill_over_sequences_of_unequal_length() -> None:
    """Each with its own queries, tables, start and length over shared pools."""
    first = example("prefill_attention")
    changed = {
        "q": 0.5 * first["q"],
        "page_table": jnp.array([0, 2, 1, 4]),
        "start": jnp.int32(3),
        "length": jnp.int32(9),
    }
    batch = first | {name: jnp.stack([first[name], x]) for name, x in changed.items()}
    axes = {name: 0 if name in changed else None for name in first}
    mapped = jax.jit(jax.vmap(jitted("prefill_attention"), in_axes=(axes,)))(batch)
    for i, (arguments, length) in enumerate(((first, T), (first | changed, 9))):
        single = jitted("prefill_attention")(arguments)
        for x, y in zip(mapped, single, strict=True):
            assert_allclose(np.asarray(x)[i, :length], np.asarray(y)[:length], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("op", "dtypes"),
    [
        ("paged_attention", "bfloat16 float32"),
        ("prefill_attention", "bfloat16 float32"),
        ("merge_attention", "bfloat16 float32"),
        ("append_kv", "bfloat16 " * 6),
        ("append_kv_chunk", "bfloat16 " * 5),
        ("page_scores", "float32"),
        ("apply_rotary", "bfloat16"),
        ("quantize_kv", "int8 float32"),
    ],
)
def test_bfloat16(op: str, dtypes: str) -> None:
    """Arithmetic stays float32: only arguments are rounded, and results, once."""
    arguments = example(op)
    narrow = arguments | {
        name: jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16), x)
        for name, x in arguments.items()
        if name not in ("cos", "sin", "lses")  # float32 by contract
    }
    wide = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.float32), narrow)
    results, truths = (jax.tree.leaves(jitted(op)(x)) for x in (narrow, wide))
    assert [x.dtype.name for x in results] == dtypes.split()
    for result, truth in zip(results, truths, strict=True):
        # Fused differently, float32 may differ in its last bits and bfloat16 round the other way.
        tolerance = {"rtol": 2**-7} if result.dtype == jnp.bfloat16 else {"atol": 1e-5}
        assert_allclose(np.asarray(result, float), np.asarray(truth, float), **tolerance)


@pytest.mark.parametrize("op", ["append_kv", "append_kv_chunk"])
def test_donated_pools_are_updated_in_place(op: str) -> None:
    """A donation that XLA cannot use would be a warning, hence an error, and leave the buffer."""
    arguments = example(op)
    names = ("retrieval", "streaming", "key_stats")
    jax.jit(getattr(api, op), donate_argnames=names)(**arguments)
    assert all(x.is_deleted() for name in names for x in jax.tree.leaves(arguments[name]))


def test_ops_under_shard_map_equal_the_ops_on_one_device() -> None:
    cache = jax.config.jax_compilation_cache_dir
    command = [sys.executable, "-W", "error", "-m", "tests.sharded_ops", cache]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
