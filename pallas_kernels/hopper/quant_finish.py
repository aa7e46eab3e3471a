"""What follows on the sums of a linear layer with quantised weights, and the rows that it has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import quant_operands as operands
from pallas_kernels.hopper.linear_tiles import gather_columns, store_columns
from pallas_kernels.hopper.mosaic import MATRIX, PER_ROW, spread_rows, store_unoptimised
from pallas_kernels.hopper.quant_plan import tile_rows
from pallas_kernels.packed import ROWS


@dataclass(frozen=True)
class RowTiles:
    """Tiles of the rows of x. The last one may have fewer of them than the others."""

    rows: int  # of x, B

    @property
    def size(self) -> int:
        """N: rows of a tile in memory, some of which it may not have."""
        return tile_rows(self.rows)

    @property
    def count(self) -> int:
        return pl.cdiv(self.rows, self.size)

    @property
    def padded(self) -> int:
        """Rows of all tiles in memory."""
        return self.count * self.size

    @property
    def held(self) -> int:
        """Rows that a tile has at most."""
        return min(self.rows, self.size)

    def first(self):
        """The row of x that is the first of this CTA's tile."""
        return lax.axis_index("rows") * self.size if self.count > 1 else 0

    def columns(self):
        """The tile in arrays whose columns are the rows of all tiles."""
        return pl.ds(self.first(), self.size)

    def at(self, row):
        """Where a row of the tile is read: any row will do for one that the tile does not have."""
        return jnp.minimum(self.first() + row, self.rows - 1) if self.count > 1 else row

    def store(self, row: int, store: Callable[[Any], None]) -> None:
        """``store(i)`` if the tile has that row: it is row i of x."""
        i = self.first() + row
        if row < self.rows - (self.count - 1) * self.size:
            store(i)
        else:
            pl.when(i < self.rows)(lambda: store(i))


def finish(
    y, block, bias_gmem, residual_gmem, outputs: Sequence[Any], gated: bool, own_smem=None
) -> None:
    """What follows on the sums y [64, N] of a block: bias [out], residual [B, width], or None.

    Squares are summed over rows in memory that is one for the CTA, or in ``own_smem`` [64, N] of
    the warpgroup.
    """
    out_gmem, *out_sums = outputs  # [B, width], [tiles, rows]
    (B, width), dtype = out_gmem.shape, out_gmem.dtype
    tiles = RowTiles(B)
    layout, channels, halves = MATRIX, ROWS, (y,)
    if gated:
        layout, channels = operands.HALF, ROWS // 2
        halves = operands.split_pairs(y)

    def rounded(y):
        return y if dtype == jnp.float32 else y.astype(dtype).astype(jnp.float32)

    def with_bias(half, y):
        y = rounded(y)
        if bias_gmem is not None:
            own = bias_gmem.at[pl.ds(half * width + block * channels, channels)]
            bias = plgpu.load(own, layout=layout.reduce(1), optimized=False)
            y = rounded(y + spread_rows(bias.astype(jnp.float32), y))
        return y

    y, *up = (with_bias(half, y) for half, y in enumerate(halves))
    if up:
        y = y / (1.0 + jnp.exp(-y)) * up[0]
    own = pl.ds(block * channels, channels)
    if residual_gmem is not None:

        def load_residual(row):
            own_row = residual_gmem.at[tiles.at(row), own]
            return plgpu.load(own_row, layout=PER_ROW, optimized=False).astype(jnp.float32)

        y = y + gather_columns(load_residual, tiles.held, y.shape)
    y = rounded(y)
    for sums_gmem in out_sums:
        squares = y * y
        if own_smem is not None:
            # What was read there before is in registers: Pallas lets the warps of a warpgroup meet
            # before a store.
            store_unoptimised(own_smem, squares)
            plgpu.commit_smem()
            squares = plgpu.load(own_smem, layout=operands.EACH_WARP, optimized=False)
        store_unoptimised(sums_gmem.at[block, tiles.columns()], squares.sum(axis=0))

    def store(row, column):
        tiles.store(row, lambda i: store_unoptimised(out_gmem.at[i, own], column.astype(dtype)))

    store_columns(store, y, tiles.held, layout)
