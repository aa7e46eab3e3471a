"""The appending kernels on a Hopper GPU at the shapes of the benchmarks: ``pytest -m gpu``.

Pools and statistics hold NaN where nothing was written before. What a kernel writes may be at most
twice as far from float32 arithmetic as what the reference writes, and nothing else may change.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes.append import (
    APPEND,
    APPEND_CHUNK,
    AppendShape,
    append_chunk_inputs,
    append_inputs,
)

from pallas_kernels import reference
from pallas_kernels.api import dequantize_kv
from pallas_kernels.hopper.kv_append_chunk import append_kv_chunk
from pallas_kernels.hopper.kv_append_token import append_kv
from pallas_kernels.types import KVPages

pytestmark = pytest.mark.gpu


def read(pool: KVPages, part: str) -> np.ndarray:
    """Keys or values in float32; what was never written is NaN."""
    x, scale = getattr(pool, part), getattr(pool, f"{part}_scale")
    return np.asarray(x if scale is None else dequantize_kv(x, scale), np.float32)


def check(written: np.ndarray, expected: np.ndarray, truth: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isnan(written), np.isnan(expected))
    if not np.isnan(expected).all():
        allowed = 2 * np.nanmax(np.abs(expected - truth))
        assert np.nanmax(np.abs(written - truth)) <= allowed


def check_caches(kernel: Callable, plain: Callable, arguments: tuple, pools: slice) -> None:
    """The caches that ``kernel`` and ``plain`` give out; ``pools`` are those in ``arguments``."""
    head_dim = arguments[0].shape[-1]
    retrieval, streaming, stats = jax.jit(kernel)(*arguments)
    expected_retrieval, expected_streaming, expected_stats = plain(*arguments)
    exact = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments
    )
    # Caches in float32: what the op would store if storing lost nothing.
    cleared = (
        KVPages(*(jnp.full((*x.shape[:3], head_dim), jnp.nan) for x in (pool.k, pool.v)))
        for pool in exact[pools][:2]
    )
    exact = (*exact[: pools.start], *cleared, *exact[pools.start + 2 :])
    true_retrieval, true_streaming, true_stats = plain(*exact)
    for part in ("k", "v"):
        check(read(retrieval, part), read(expected_retrieval, part), read(true_retrieval, part))
        check(read(streaming, part), read(expected_streaming, part), read(true_streaming, part))
    check(*(np.asarray(x, np.float32) for x in (stats, expected_stats, true_stats)))


@pytest.mark.parametrize("shape", APPEND, ids=lambda shape: shape.name)
def test_append_kv(shape: AppendShape) -> None:
    fixed, (places,) = append_inputs(shape)
    check_caches(
        lambda *xs: append_kv(*xs)[1:],
        lambda *xs: reference.append_kv(*xs)[1:],
        (*fixed, *places),
        slice(5, 8),
    )
    q, *rest = fixed
    rotated = jax.jit(append_kv)(q, *rest, *places)[0]
    expected = reference.append_kv(q, *rest, *places)[0]
    truth = reference.append_kv(q.astype(jnp.float32), *rest, *places)[0]
    check(*(np.asarray(x, np.float32) for x in (rotated, expected, truth)))


@pytest.mark.parametrize("shape", APPEND_CHUNK, ids=lambda shape: shape.name)
def test_append_kv_chunk(shape: AppendShape) -> None:
    fixed, (places,) = append_chunk_inputs(shape)
    check_caches(append_kv_chunk, reference.append_kv_chunk, (*fixed, *places), slice(2, 5))


@pytest.mark.parametrize(
    "shape", [x for x in APPEND_CHUNK if x.tokens == 1000], ids=lambda shape: shape.name
)
def test_append_kv_chunk_of_several_prompts(shape: AppendShape) -> None:
    """The same tokens on pages of three sequences, in one launch."""
    (k, v, *fixed), places = append_chunk_inputs(shape, calls=3)
    k, v = (jnp.stack([x, 2 * x, -x]) for x in (k, v))
    places = (jnp.stack(each) for each in zip(*places, strict=True))
    check_caches(append_kv_chunk, reference.append_kv_chunk, (k, v, *fixed, *places), slice(2, 5))
