"""Products of quantised weights with more than a few rows: Hopper (Mosaic GPU).

``quant_linear.py`` is for a few rows, which each warp of a block's four reads by itself: with 32 of
them it was slower than bf16 weights. Here wgmma reads x from shared memory, once for
all warps. Codes are its operand A there as here, from registers, where they become bf16 exactly.

Index map. Grid: tiles of W blocks of 64 output channels, a warpgroup each; splits of K, S of them;
tiles of N rows, 16 to 128.

      words  [blocks, K / 128, ..]   a ring of ``stages`` steps of ``blocks`` blocks a warpgroup
      x      [N, 128]                a ring as long, for all warpgroups of the CTA
      acc    [64, N]            +=   scale * ((codes - zero) @ x^T), group by group
      sums   [S, N, out]             float32 where they are added up, else x's dtype; half as wide
                                     of a gated layer whose K is not split

What must move: the words, once; x once a CTA and the sums, from and to L2. Tiles of rows are the
grid's fastest axis: they run next to each other, so that all but one of them find the words in L2.

XLA makes x what the kernel reads: rows padded to tiles, and where zero points have words of their
own the sums of x by group. It does what follows, too: adds the splits, channels in their order, and
what is around a layer. Both are done along with the norm before and the residual behind, in loops
that XLA has anyway for more than a few rows. But gate and up of a channel are in one thread, which
multiplies them where K is not split. Words are asked for before the kernel ahead has ended
(programmatic dependent launch) where that one lets go early, as gate and up do ahead of down.
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

from pallas_kernels.hopper import quant_operands as operands
from pallas_kernels.hopper.mosaic import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    SHARED_BYTES,
    SM_COUNT,
    add_product,
    full,
    refuse,
    spread_columns,
    spread_rows,
    tile_transforms,
    unsupported_packed,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared
from pallas_kernels.packed import BITS, INPUTS, ROWS, group_size
from pallas_kernels.types import PackedWeight
from pallas_kernels.unfused import unfused_layer

_TILES = (16, 32, 64, 128)  # N
# Microseconds until a CTA has its first words; bytes a microsecond that an SM reads, and that all
# write to L2 or read from there.
_BEGIN, _SM_RATE, _L2_RATE = 2.0, 4.3e6 / SM_COUNT, 5e6


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call; ``choose_config`` gives a good one."""

    warpgroups: int  # a CTA; each has 64 output channels
    splits: int  # of K, a CTA each
    stages: int  # steps in flight
    blocks: int  # of 128 inputs a step


def tile_rows(packed: PackedWeight, rows: int) -> int:
    """N, rows of a tile."""
    # Scales of several groups a block, beside two matrices of 128 columns, do not fit a thread.
    tiles = _TILES if group_size(packed) in (None, INPUTS) else _TILES[:-1]
    return next((n for n in tiles if rows <= n), tiles[-1])


def choose_config(packed: PackedWeight, rows: int) -> Config:
    """The configuration for ``rows`` rows: that of one tile of them, whatever their number."""
    N, bits = tile_rows(packed, rows), BITS[packed.codes]
    (K, out), tiles = packed.shape, packed.words.shape[0]
    blocks = 2 if bits == 4 and K // INPUTS % 2 == 0 else 1
    steps = K // INPUTS // blocks

    def microseconds(cut: tuple[int, int]) -> float:
        """By what one H200 showed (docs/kernels.md); good for comparing."""
        warpgroups, splits = cut
        ctas = tiles // warpgroups * splits
        of_cta = _BEGIN + K * out * bits / 8 / ctas / _SM_RATE
        # Warps hide each other's waits, the more so the longer they multiply.
        hidden = {4: 1.0, 3: 1.03, 2: 1.07 if N < 64 else 1.22, 1: 1.5}[warpgroups]
        sums = splits * 2 * 4 * N * out / _L2_RATE
        return pl.cdiv(ctas, SM_COUNT) * of_cta * hidden + sums

    # A thread's registers: with scales by group it holds two matrices of sums.
    most = 2 if N >= 64 and group_size(packed) is not None else 4
    warpgroups, splits = min(
        (
            (warpgroups, splits)
            for warpgroups in range(1, most + 1)
            for splits in range(1, min(steps, 8) + 1)
            if tiles % warpgroups == 0 and steps % splits == 0
        ),
        key=microseconds,
    )
    sums = 16 * N if packed.zeros == "word" else 0
    stage = blocks * (4 * ROWS * packed.words.shape[2] * warpgroups + 2 * N * INPUTS + sums)
    stages = max(2, min(SHARED_BYTES // stage, 4))
    return Config(warpgroups=warpgroups, splits=splits, stages=stages, blocks=blocks)


@partial(jax.jit, static_argnames=("gated", "epsilon"))
def packed_rows_linear(
    x: Float[Array, "B K"],
    packed: PackedWeight,
    bias: Float[Array, " out"] | None,
    norm_scale: Float[Array, " K"] | None,
    square_sums: Array | None,
    residual: Float[Array, "B out"] | None,
    *,
    gated: bool,
    epsilon: float,
) -> tuple[Float[Array, "B out"], None]:
    """``pallas_kernels.api.fused_linear`` of packed weights on a Hopper GPU: XLA around a product.

    bf16 but for the weights. Raises ``NotImplementedError`` for anything else.
    """
    del square_sums  # x says it all
    refuse("packed weights", unsupported_packed(x, packed, gated, residual))

    config = choose_config(packed, len(x))
    in_kernel = gated and bias is None and config.splits == 1

    def multiply(y: Float[Array, "B K"]) -> Float[Array, "B out"]:
        # A norm's scale in float32 makes y float32.
        how = {"dtype": x.dtype, "gated": in_kernel, "config": config}
        return packed_rows(y.astype(x.dtype), packed, **how)

    around, gated = (bias, norm_scale, residual), gated and not in_kernel
    return unfused_layer(multiply, x, *around, gated=gated, epsilon=epsilon), None


def packed_rows_product(x: Float[Array, "B K"], packed: PackedWeight) -> Float[Array, "B out"]:
    """``pallas_kernels.api.product``: as the sums are, in float32."""
    refuse("packed weights", unsupported_packed(x, packed))
    return packed_rows(x, packed, dtype=jnp.float32)


@partial(jax.jit, static_argnames=("dtype", "gated", "config"))
def packed_rows(
    x: Float[Array, "B K"],
    packed: PackedWeight,
    *,
    dtype: jax.typing.DTypeLike,
    gated: bool = False,
    config: Config | None = None,
) -> Float[Array, "B out"]:
    """``x @ packed``, summed in float32, in ``dtype``; x bf16, one row or more.

    ``gated``: SiLU of the first half of the columns, in ``dtype``, times the second half. Raises
    ``ValueError`` for that where the matrix is not paired or its K is split.
    """
    (B, K), out = x.shape, packed.shape[1]
    config = choose_config(packed, B) if config is None else config
    if gated and not (packed.paired and config.splits == 1):
        raise ValueError(f"no gate with {packed.paired=} and splits={config.splits}")
    N, group = tile_rows(packed, B), group_size(packed)
    padded = N * pl.cdiv(B, N)
    x = jnp.pad(x, ((0, padded - B), (0, 0)))
    totals = None
    if group is not None and packed.zeros == "word":
        totals = x.astype(jnp.float32).reshape(padded, K // group, group).sum(axis=2).T
    sums_type = jnp.float32 if config.splits > 1 else dtype
    width = out // 2 if gated else out
    (sums,) = call_shared(
        _make_kernel,
        _Settings(config, N, gated),
        (x, packed, totals),
        (jax.ShapeDtypeStruct((config.splits, padded, width), sums_type),),
        longest=(None,) * 3,
        longest_results=(None,),
    )
    y = sums.sum(axis=0)[:B] if config.splits > 1 else sums[0, :B]
    if packed.paired and not gated:  # gate and up by turns, 8 channels each
        y = y.reshape(B, -1, 2, 8).swapaxes(1, 2).reshape(B, out)
    return y.astype(dtype)


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    config: Config
    tile_rows: int  # N
    gated: bool


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    return partial(_multiply, settings, results)


class _Rings(NamedTuple):
    """Shared memory."""

    words: Any  # [W * stages, blocks, rows, 64]
    x: Any  # [stages * groups of a step, N, inputs of a group]
    totals: Any  # [stages, groups of a step or 2, N]; [1] where there are none
    words_ready: Any  # [W * stages] barriers
    x_ready: Any  # [stages] barriers
    x_used: Any  # [stages] barriers, of all warpgroups


def _multiply(
    settings: _Settings,
    results: Shapes,
    x: Float[Array, "rows K"],
    packed: PackedWeight,
    totals: Float[Array, "K/group rows"] | None,
) -> tuple[Array, ...]:
    config, N, gated = settings
    W, S, stages, each = config.warpgroups, config.splits, config.stages, config.blocks
    (padded, K), (blocks, _, rows, _) = x.shape, packed.words.shape
    steps = K // INPUTS // each // S
    stages = min(stages, steps)
    if blocks % W or steps * each * INPUTS * S != K:
        raise ValueError(f"{config} does not divide {blocks} tiles and {K} inputs")
    group = group_size(packed)
    parts = 1 if group is None else INPUTS // group  # groups of a block
    inputs, groups = INPUTS // parts, each * parts  # of a group, and groups of a step
    code_rows = 4 * BITS[packed.codes]

    def multiply(
        x_gmem,  # [padded, K]
        packed_gmem,  # words [blocks, K / 128, rows, 64], channel_scale [blocks, 64]
        totals_gmem,  # [K / group, padded] float32
        sums_gmem,  # [S, padded, out], output
        rings,
    ):
        wg, tile, split = (lax.axis_index(name) for name in ("wg", "columns", "split"))
        block, ring = tile * W + wg, wg * stages
        own_rows = pl.ds(lax.axis_index("rows") * N if padded > N else 0, N)

        def fetch_words(step, slot):
            k = pl.ds((split * steps + step) * each, each)
            slot = ring + slot
            plgpu.copy_gmem_to_smem(
                packed_gmem.words.at[block, k], rings.words.at[slot], rings.words_ready.at[slot]
            )

        def fetch_x(step, slot):
            first, ready = (split * steps + step) * groups, rings.x_ready.at[slot]
            for i in range(groups):
                k = pl.ds((first + i) * inputs, inputs)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[own_rows, k], rings.x.at[slot * groups + i], ready
                )
            if totals_gmem is not None:
                own = totals_gmem.at[pl.ds(first, groups), own_rows]
                plgpu.copy_gmem_to_smem(own, rings.totals.at[slot, pl.ds(0, groups)], ready)

        plgpu.griddepcontrol_launch_dependents()
        for step in range(stages):
            fetch_words(jnp.int32(step), jnp.int32(step))
        plgpu.griddepcontrol_wait()
        for step in range(stages):
            pl.when(wg == 0)(lambda step=step: fetch_x(jnp.int32(step), jnp.int32(step)))

        def multiply_step(step, acc):
            slot = lax.rem(step, jnp.int32(stages))

            # A step late, when the others have used it, too.
            @pl.when((wg == 0) & (step > 0) & (step - 1 + stages < steps))
            def _():
                before = lax.rem(step - 1, jnp.int32(stages))
                plgpu.barrier_wait(rings.x_used.at[before])
                fetch_x(step - 1 + stages, before)

            plgpu.barrier_wait(rings.words_ready.at[ring + slot])
            plgpu.barrier_wait(rings.x_ready.at[slot])
            for i in range(each):
                here = rings.words.at[ring + slot, i]
                layout = operands.words_layout(packed.codes)
                words = plgpu.load(here.at[pl.ds(0, code_rows)], layout=layout)
                for part in range(parts):
                    scale = offsets = zero = None
                    if group is not None:
                        scale, offsets, zero = operands.scale_and_zero(here, packed, part, parts)
                    how = {"codes": packed.codes, "part": part, "parts": parts}
                    codes = operands.matrix(words, offsets, **how)
                    number = i * parts + part
                    # One index, which is traced: a constant one does not lower where a product is
                    # added (findings/mosaic_gpu_literal_index_in_run_state.sh).
                    x = rings.x.at[slot * groups + number].transpose((1, 0))
                    if scale is None:
                        acc = add_product(acc, codes, x)
                        continue
                    totals = None
                    if zero is not None:
                        totals = plgpu.load(rings.totals.at[slot, number], layout=PER_COLUMN)
                    y = add_product(full((ROWS, N), 0.0, MATRIX), codes, x)
                    if zero is not None:
                        y = y - spread_rows(zero, y) * spread_columns(totals, y)
                    acc = acc + y * spread_rows(scale, y)

            @pl.when(step + stages < steps)  # else nothing more comes into the slot
            def _():
                plgpu.barrier_arrive(rings.x_used.at[slot])
                fetch_words(step + stages, slot)

            return acc

        acc = lax.fori_loop(0, steps, multiply_step, full((ROWS, N), 0.0, MATRIX))
        if group is None:
            scale = plgpu.load(packed_gmem.channel_scale.at[block], layout=PER_ROW, optimized=False)
            acc = acc * spread_rows(scale, acc)
        channels = ROWS
        if gated:
            dtype, channels = sums_gmem.dtype, ROWS // 2
            gate, up = (y.astype(dtype).astype(jnp.float32) for y in operands.split_pairs(acc))
            acc = gate / (1.0 + jnp.exp(-gate)) * up
        own = sums_gmem.at[split, own_rows, pl.ds(block * channels, channels)]
        operands.store_transposed(own, acc.astype(sums_gmem.dtype))

    rings = _Rings(
        words=plgpu.SMEM((W * stages, each, rows, ROWS), jnp.int32),
        x=plgpu.SMEM(
            (stages * groups, N, inputs), x.dtype, transforms=tile_transforms(inputs, x.dtype)
        ),
        # A copy begins at a multiple of 128 bytes: two rows of 16 numbers.
        totals=plgpu.SMEM((1,) if totals is None else (stages, max(groups, 2), N), jnp.float32),
        words_ready=plgpu.Barrier(num_arrivals=1, num_barriers=W * stages),
        x_ready=plgpu.Barrier(num_arrivals=groups + (totals is not None), num_barriers=stages),
        x_used=plgpu.Barrier(num_arrivals=W, num_barriers=stages),
    )
    return plgpu.kernel(
        multiply,
        out_type=results,
        grid=(blocks // W, S, padded // N),
        grid_names=("columns", "split", "rows"),
        num_threads=W,
        thread_name="wg",
        scratch_types=[rings],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, packed, totals)
