"""What follows on the sums of a linear layer with quantised weights."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import quant_operands as operands
from pallas_kernels.hopper.linear_tiles import gather_columns, store_columns
from pallas_kernels.hopper.mosaic import MATRIX, PER_ROW, spread_rows, store_unoptimised
from pallas_kernels.packed import ROWS


def finish(
    y, block, bias_gmem, residual_gmem, outputs: Sequence[Any], gated: bool, own_smem=None
) -> None:
    """What follows on the sums y [64, N] of a block: bias [out], residual [B, width], or None.

    Squares are summed over rows in memory that is one for the CTA, or in ``own_smem`` [64, N] of
    the warpgroup.
    """
    out_gmem, *out_sums = outputs  # [B, width], [tiles, rows]
    (B, width), dtype = out_gmem.shape, out_gmem.dtype
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
            own_row = residual_gmem.at[row, own]
            return plgpu.load(own_row, layout=PER_ROW, optimized=False).astype(jnp.float32)

        y = y + gather_columns(load_residual, B, y.shape)
    y = rounded(y)
    for sums_gmem in out_sums:
        squares = y * y
        if own_smem is not None:
            # What was read there before is in registers: Pallas lets the warps of a warpgroup meet
            # before a store.
            store_unoptimised(own_smem, squares)
            plgpu.commit_smem()
            squares = plgpu.load(own_smem, layout=operands.EACH_WARP, optimized=False)
        store_unoptimised(sums_gmem.at[block], squares.sum(axis=0))

    def store(row, column):
        store_unoptimised(out_gmem.at[row, own], column.astype(dtype))

    store_columns(store, y, B, layout)
