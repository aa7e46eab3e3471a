"""What the two appending kernels share: new keys and values go into their pages in place.

The pools and the statistics go into a kernel as references and come out as the same buffers: when
the caller donates them, or carries them through a loop, XLA copies none of them.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.hopper.mosaic import spread_rows
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared
from pallas_kernels.kv_codes import (
    CODE_TYPES,
    LARGEST,
    SMALLEST,
    STEPS,
    KVKind,
    kv_kind,
    range_word,
    word_values,
)
from pallas_kernels.types import KVPages, KVScale


def unsupported(
    tokens: tuple[Array, ...], retrieval: KVPages, streaming: KVPages, key_stats: Array | None
) -> list[str]:
    """Reasons why neither kernel can run."""
    head_dim, dtypes = tokens[0].shape[-1], {str(x.dtype) for x in tokens}
    reasons = []
    if dtypes != {"bfloat16"}:
        reasons.append(f"queries, keys and values must be bfloat16, got {sorted(dtypes)}")
    for name, pool in (("retrieval", retrieval), ("streaming", streaming)):
        if pool.k.dtype != jnp.bfloat16 and kv_kind(pool.k.dtype) is None:
            reasons.append(f"{name} pages must be bfloat16 or codes, got {pool.k.dtype}")
    if key_stats is not None and key_stats.dtype not in (jnp.bfloat16, jnp.float32):
        reasons.append(f"key statistics must be bfloat16 or float32, got {key_stats.dtype}")
    if head_dim not in (64, 128):
        reasons.append(f"head_dim must be 64 or 128, got {head_dim}")
    return reasons


def append_in_place(
    make: Callable[[Any, Shapes], Callable[..., Any]],
    settings: Hashable,
    inputs: tuple[Any, ...],
    caches: tuple[KVPages, KVPages, Array | None],
    *,
    out: Shapes = (),
    most_heads: int | None = None,
) -> tuple[Any, ...]:
    """Calls a kernel with ``inputs`` and with references to both pools and to the statistics.

    ``make(settings, out)`` makes it; programs share what it was lowered to (see ``shared_kernel``),
    for pools of up to ``most_heads`` heads, of which the inputs tell how many there are, or if that
    is None for pools as they are. Returns what the kernel gives out, of the shapes ``out``, and
    what the references hold then. There are no references to arrays without elements: None stands
    for an empty pool and for statistics of no heads.
    """
    held = [None if any(x.shape[0] == 0 for x in jax.tree.leaves(x)) else x for x in caches]
    leaves, tree = jax.tree.flatten(held)
    new = call_shared(
        _make_in_place,
        (make, settings, len(out)),
        (*inputs, *held),
        (*out, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)),
        longest=(*(None,) * len(inputs), *(most_heads,) * len(held)),
        longest_results=(*(None,) * len(out), *(most_heads,) * len(leaves)),
    )
    kept = jax.tree.unflatten(tree, new[len(out) :])
    kept = [was if now is None else now for was, now in zip(caches, kept, strict=True)]
    return *new[: len(out)], *kept


def _make_in_place(settings: tuple[Any, Any, int], results: Shapes) -> Callable[..., Any]:
    make, inner, count = settings
    kernel = make(inner, results[:count])

    def call(*operands) -> tuple:
        *inputs, retrieval, streaming, key_stats = operands
        refs = jax.tree.map(jax.new_ref, (retrieval, streaming, key_stats))
        return kernel(*inputs, *refs), jax.tree.map(jax.freeze, refs)

    return call


def row_per_warp(rows: int, columns: int):
    """Registers of a matrix whose row i is in warp i % 4, neighbouring channels in one lane.

    A matrix of one or two rows is held by four or two warps each.
    """
    across = (-3,) if rows > 1 else ()
    repeated = (plgpu.Replicated(4 // rows),) if rows < 4 else ()
    tiling = plgpu.Tiling(((min(rows, 4), columns), (columns // 32,)))
    return plgpu.Layout.TILED(tiling, across + repeated, (-2,), -1)


def load_unoptimised(ref, layout) -> Array:
    """Each warp reads its rows from end to end, which needs no proof of an optimal pattern."""
    return plgpu.load(ref, layout=layout, optimized=False)


def quantize(parts: list, kind: KVKind) -> tuple[list, KVScale]:
    """Codes and scales of a vector a row, whose channels are those of all ``parts`` [rows, ...].

    As ``kv_codes.quantize``; two parts give one matrix of codes of 4 bits, as int32. A GPU's
    reciprocals are off by an ulp or two, so that a number next to halfway between two codes may
    get the other one there.
    """
    parts = [x.astype(jnp.float32) for x in parts]
    if kind == "int4":
        (low, low_word), (high, high_word) = map(_quantize_half, parts)
        return [low | high << 4], (low_word, high_word)
    peaks = [jnp.abs(x).max(axis=1) for x in parts]
    scale = jnp.maximum(functools.reduce(jnp.maximum, peaks), SMALLEST) * (1 / LARGEST[kind])
    codes = [x * spread_rows(1 / scale, x) for x in parts]
    if kind == "int8":
        codes = [jnp.round(x) for x in codes]
    return [x.astype(CODE_TYPES[kind]) for x in codes], scale


def _quantize_half(x) -> tuple[Array, Array]:
    """Codes of 4 bits as int32, and words."""
    word = range_word(x.min(axis=1), x.max(axis=1))
    step, lowest = word_values(word)
    codes = jnp.round((x - spread_rows(lowest, x)) * spread_rows(1 / step, x))
    return jnp.clip(codes, 0.0, STEPS).astype(jnp.int32), word
