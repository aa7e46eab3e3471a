"""A linear layer for a few rows, with its norm, bias, gate or residual: Hopper (Mosaic GPU).

One decode step multiplies a handful of rows by every weight of the model, so a linear layer is as
fast as its weights are read. XLA reads them as fast, but spends further launches on the norm
before, the gate and the residual after, and on sums of split products; this kernel is one launch.

Index map. Grid: tiles of C = 64 output columns, one warpgroup each, over all of K:

      x [B, K]          ->  x^T tile [T, N]    rows as N = 8 or 16 *columns* (wgmma's M is 64)
      kernel [K, out]   ->  W tile [T, C]      T rows at a time, ``stages`` tiles in flight
      acc [C, N]        +=  W^T [C, T] @ x^T [T, N]
      gated: the CTA of gate columns c also takes the up columns out / 2 + c

What must move: every weight once, K * out * 2 bytes. x is read from L2 by every CTA.

A norm between two layers needs the sum of squares of the whole row, which the CTAs of the layer
before have in pieces: each writes the sum over its own columns, ``square_sums`` [tiles, N], and
every CTA of the next layer adds them up. Roundings to bf16 are where unfused layers have them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper.linear_tiles import (
    COLUMNS,
    first_square_sums,
    gather_columns,
    inverse_rms,
    square_sums_type,
    store_columns,
)
from pallas_kernels.hopper.mosaic import (
    MATRIX,
    MATRIX_TRANSPOSED,
    PER_ROW,
    SM_COUNT,
    full,
    matmul,
    refuse,
    spread_columns,
    spread_rows,
    store_unoptimised,
    tile_transforms,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call; ``choose_config`` gives a good one."""

    tile: int  # T, rows of the kernel a step: a divisor of K, a multiple of 64, at most 256
    stages: int  # tiles in flight a CTA


def choose_config(rows: int, K: int, out_tiles: int, gated: bool) -> Config:
    """The configuration for ``rows`` rows of ``K``; ``out_tiles`` CTAs share the GPU."""
    # Steps of 32 KB: longer ones leave too few stages, shorter ones wait for wgmma too often.
    sizes = (128, 64) if gated else (256, 192, 128, 64)
    tile = next(size for size in sizes if K % size == 0)
    step_bytes = tile * 2 * (COLUMNS * (2 if gated else 1) + rows)
    # 4.3 TB/s take about 4 MB in flight, whatever the number of CTAs: 192 KB an SM if every SM
    # has at most one, else 96 KB so that two fit.
    in_flight = (192 if out_tiles <= SM_COUNT else 96) << 10
    return Config(tile=tile, stages=max(2, min(in_flight // step_bytes, K // tile)))


def _refuse_unsupported(x: Array, kernel: Array, gated: bool) -> None:
    K, out = kernel.shape
    width = 2 * COLUMNS if gated else COLUMNS
    reasons = []
    if x.shape[0] > 16:
        reasons.append(f"at most 16 rows, got {x.shape[0]}")
    for name, y in (("x", x), ("the kernel", kernel)):
        if y.dtype != jnp.bfloat16:
            reasons.append(f"{name} must be bfloat16, got {y.dtype}")
    if K % 64 or out % width:
        reasons.append(f"input and output sizes must be multiples of 64 and {width}, got {K, out}")
    refuse("fused_linear", reasons)


@partial(jax.jit, static_argnames=("gated", "epsilon", "config"))
def fused_linear(
    x: Float[Array, "B K"],
    kernel: Float[Array, "K out"],
    bias: Float[Array, " out"] | None,
    norm_scale: Float[Array, " K"] | None,
    square_sums: Float[Array, "tiles N"] | None,
    residual: Float[Array, "B out"] | None,
    *,
    gated: bool,
    epsilon: float,
    config: Config | None = None,
) -> tuple[Float[Array, "B out"], Float[Array, "tiles N"] | None]:
    """``pallas_kernels.api.fused_linear`` on a Hopper GPU (or under the interpreter).

    bf16 throughout; K and the width of the output multiples of 64. Raises ``NotImplementedError``
    for anything else.
    """
    _refuse_unsupported(x, kernel, gated)
    B, K = x.shape
    width = kernel.shape[1] // (2 if gated else 1)
    N = 8 * pl.cdiv(B, 8)
    if config is None:
        config = choose_config(B, K, width // COLUMNS, gated)
    summed = K // COLUMNS  # rows of square_sums that count
    if norm_scale is None:
        square_sums = None
    elif square_sums is None:
        square_sums, summed = first_square_sums(x, N), 1
    results = [jax.ShapeDtypeStruct((B, width), x.dtype)]
    if residual is not None:
        results.append(square_sums_type(width, N))
    operands = x, kernel, bias, norm_scale, square_sums, residual
    present = bias is not None, norm_scale is not None, residual is not None
    out, *sums = call_shared(
        _make_kernel,
        _Settings(config, B, K, width, gated, epsilon, summed, *present),
        operands,
        tuple(results),
        longest=(None,) * len(operands),
        longest_results=(None,) * len(results),
    )
    return out, sums[0] if sums else None


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    config: Config
    rows: int  # B
    inputs: int  # K
    width: int  # of the output
    gated: bool
    epsilon: float
    summed: int  # rows of square_sums that count
    has_bias: bool
    has_norm: bool
    has_residual: bool


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    config, B, K, width, gated, epsilon, summed, has_bias, has_norm, has_residual = settings
    N = 8 * pl.cdiv(B, 8)
    T, stages, steps = config.tile, config.stages, K // config.tile
    halves = 2 if gated else 1
    dtype = results[0].dtype

    def multiply(x_gmem, kernel_gmem, *refs):  # [B, K], [K, out]
        refs = list(refs)
        bias_gmem = refs.pop(0) if has_bias else None  # [out]
        scale_gmem = refs.pop(0) if has_norm else None  # [K]
        sums_gmem = refs.pop(0) if has_norm else None  # [tiles, N] float32
        residual_gmem = refs.pop(0) if has_residual else None  # [B, out]
        out_gmem = refs.pop(0)  # [B, width]
        out_sums_gmem = refs.pop(0) if has_residual else None  # [tiles, N] float32
        (
            kernel_smem,  # [stages, halves, T, C]
            rows_smem,  # [stages, B, T], x as it is
            x_smem,  # [N, T], what wgmma reads
            ready,  # [stages] barriers
            *scale_smem,  # [stages, T] if there is a norm
        ) = refs
        c = lax.axis_index("columns")

        def fetch(step):
            stage = lax.rem(step, jnp.int32(stages))
            k = pl.ds(step * T, T)
            for half in range(halves):
                columns = pl.ds(half * width + c * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(
                    kernel_gmem.at[k, columns], kernel_smem.at[stage, half], ready.at[stage]
                )
            for row in range(B):
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[row, k], rows_smem.at[stage, row], ready.at[stage]
                )
            if scale_gmem is not None:
                plgpu.copy_gmem_to_smem(scale_gmem.at[k], scale_smem[0].at[stage], ready.at[stage])

        for step in range(min(stages, steps)):
            fetch(jnp.int32(step))

        scales = None
        if sums_gmem is not None:
            scales = inverse_rms(sums_gmem, summed, K, epsilon)

        def multiply_tile(step, accs):
            stage = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[stage])

            def load_row(row):
                return plgpu.load(rows_smem.at[stage, row], layout=PER_ROW).astype(jnp.float32)

            x = gather_columns(load_row, B, (T, N))
            if scales is not None:
                x = (x * spread_columns(scales, x)).astype(jnp.bfloat16).astype(jnp.float32)
                scale = plgpu.load(scale_smem[0].at[stage], layout=PER_ROW).astype(jnp.float32)
                x = x * spread_rows(scale, x)
            x_smem.transpose((1, 0))[...] = plgpu.layout_cast(
                x.astype(jnp.bfloat16), MATRIX_TRANSPOSED
            )
            plgpu.commit_smem()
            accs = tuple(
                acc
                + matmul(
                    kernel_smem.at[stage, half].transpose((1, 0)),
                    x_smem.transpose((1, 0)),
                    COLUMNS,
                    N,
                )
                for half, acc in enumerate(accs)
            )
            pl.when(step + stages < steps)(lambda: fetch(step + stages))
            return accs

        accs = lax.fori_loop(0, steps, multiply_tile, (full((COLUMNS, N), 0.0, MATRIX),) * halves)

        def rounded(half):
            """[C, N] in float32, rounded to bf16 as a layer of its own would be."""
            y = accs[half].astype(jnp.bfloat16).astype(jnp.float32)
            if bias_gmem is not None:
                columns = pl.ds(half * width + c * COLUMNS, COLUMNS)
                bias = plgpu.load(bias_gmem.at[columns], layout=PER_ROW, optimized=False)
                y = y + spread_rows(bias.astype(jnp.float32), y)
                y = y.astype(jnp.bfloat16).astype(jnp.float32)
            return y

        y, own = rounded(0), pl.ds(c * COLUMNS, COLUMNS)
        if gated:
            y = y / (1.0 + jnp.exp(-y)) * rounded(1)
        if residual_gmem is not None:

            def load_residual(row):
                own_row = residual_gmem.at[row, own]
                return plgpu.load(own_row, layout=PER_ROW, optimized=False).astype(jnp.float32)

            y = y + gather_columns(load_residual, B, (COLUMNS, N))
        y = y.astype(jnp.bfloat16).astype(jnp.float32)
        if out_sums_gmem is not None:
            store_unoptimised(out_sums_gmem.at[c], (y * y).sum(axis=0))

        def store(row, column):
            store_unoptimised(out_gmem.at[row, own], column.astype(dtype))

        store_columns(store, y, B)

    kernel_tile = plgpu.SMEM(
        (stages, halves, T, COLUMNS),
        dtype,
        transforms=tile_transforms(COLUMNS, dtype),
    )
    scratch = [
        kernel_tile,
        plgpu.SMEM((stages, B, T), dtype),
        plgpu.SMEM((N, T), dtype, transforms=tile_transforms(T, dtype)),
        plgpu.Barrier(num_arrivals=halves + B + has_norm, num_barriers=stages),
    ]
    if has_norm:
        scratch.append(plgpu.SMEM((stages, T), dtype))
    run = plgpu.kernel(
        multiply,
        out_type=results,
        grid=(width // COLUMNS,),
        grid_names=("columns",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return lambda *operands: run(*(x for x in operands if x is not None))
