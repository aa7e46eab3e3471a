"""What both linear layers of decode share: rows as columns of a tile, and the norm between layers.

Both multiply with the weights as operand A, so that a tile [C, N] has output channels as its rows,
and the rows of x as its columns; N is their number rounded up to 8. What is in columns beyond them
means nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper.mosaic import MATRIX, full, spread_rows

COLUMNS = 64  # output channels that a sum of squares is over


def gather_columns(load: Callable, rows: int, shape: tuple[int, int], layout=MATRIX):
    """[C, N] float32 whose column b is ``load(b)`` [C], for ``rows`` rows; else zero."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    matrix = full(shape, 0.0, layout)
    for row in range(rows):
        matrix = jnp.where(column == row, spread_rows(load(row), matrix), matrix)
    return matrix


def store_columns(store: Callable, y, rows: int, layout=MATRIX) -> None:
    """``store(b, column)`` for column b of ``y`` [C, N], of ``rows`` rows."""
    column = plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=layout)
    for row in range(rows):
        # The only element that counts in a sum over columns: a column without a gather.
        store(row, jnp.where(column == row, y, 0.0).sum(axis=1))


def first_square_sums(x: Float[Array, "B K"], N: int) -> Float[Array, "64 N"]:
    """For an x that no layer made: the whole sum in row 0."""
    x = x.astype(jnp.float32)
    sums = (x * x).sum(axis=1)
    return jnp.zeros((64, N), jnp.float32).at[0, : len(sums)].set(sums)


def square_sums_type(width: int, N: int) -> jax.ShapeDtypeStruct:
    """A row for each 64 output channels, as many as a warpgroup loads at once."""
    return jax.ShapeDtypeStruct((64 * pl.cdiv(width // COLUMNS, 64), N), jnp.float32)


def inverse_rms(sums_gmem, summed: int, K: int, epsilon: float, layout=MATRIX):
    """[N] float32, from the first ``summed`` rows of ``sums_gmem`` [tiles, N]."""
    sums = plgpu.load(sums_gmem, layout=layout, optimized=False)
    tile = plgpu.broadcasted_iota(jnp.int32, sums_gmem.shape, 0, layout=layout)
    sums = jnp.where(tile < summed, sums, 0.0)
    return lax.rsqrt(sums.sum(axis=0) * (1.0 / K) + epsilon)
