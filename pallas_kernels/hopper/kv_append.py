"""What the two appending kernels share: new keys and values go into their pages in place.

The pools and the statistics go into a kernel as references and come out as the same buffers: when
the caller donates them, or carries them through a loop, XLA copies none of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.hopper.mosaic import spread_rows
from pallas_kernels.types import KVPages


def unsupported(
    tokens: tuple[Array, ...], retrieval: KVPages, streaming: KVPages, key_stats: Array | None
) -> list[str]:
    """Reasons why neither kernel can run."""
    head_dim, dtypes = tokens[0].shape[-1], {str(x.dtype) for x in tokens}
    reasons = []
    if dtypes != {"bfloat16"}:
        reasons.append(f"queries, keys and values must be bfloat16, got {sorted(dtypes)}")
    for name, pool in (("retrieval", retrieval), ("streaming", streaming)):
        if pool.k.dtype not in (jnp.bfloat16, jnp.int8):
            reasons.append(f"{name} pages must be bfloat16 or int8, got {pool.k.dtype}")
    if key_stats is not None and key_stats.dtype not in (jnp.bfloat16, jnp.float32):
        reasons.append(f"key statistics must be bfloat16 or float32, got {key_stats.dtype}")
    if head_dim not in (64, 128):
        reasons.append(f"head_dim must be 64 or 128, got {head_dim}")
    return reasons


def call_in_place(
    kernel: Callable, inputs: tuple[Any, ...], retrieval: KVPages, streaming: KVPages, key_stats
) -> tuple[Any, KVPages, KVPages, Array | None]:
    """Calls ``kernel`` with ``inputs`` and with references to both pools and to the statistics.

    Returns what it gives out, and what the references hold then. There are no references to arrays
    without elements: None stands for an empty pool and for statistics of no heads.
    """

    def refer(cache):
        empty = any(x.shape[0] == 0 for x in jax.tree.leaves(cache))
        return None if empty else jax.tree.map(jax.new_ref, cache)

    def content(cache, ref):
        return cache if ref is None else jax.tree.map(jax.freeze, ref)

    caches = retrieval, streaming, key_stats
    refs = [refer(cache) for cache in caches]
    out = kernel(*inputs, *refs)
    return out, *(content(cache, ref) for cache, ref in zip(caches, refs, strict=True))


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


def quantize(largest, x):
    """int8 codes of ``x`` given the largest |x| of each row, and the scale of each row."""
    largest = jnp.maximum(largest, 1e-6)
    return jnp.round(x * spread_rows(127.0 / largest, x)).astype(jnp.int8), largest / 127.0
