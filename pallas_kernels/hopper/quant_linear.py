"""A linear layer for a few rows with quantised weights, and what is around it: Hopper (Mosaic).

What ``fused_linear`` is for bf16, for codes of 4 or 8 bits. Weights are operand A of mma.sync, from
registers, where codes become bf16 exactly; x^T is operand B, from shared memory.

Index map. Grid: tiles of W blocks of 64 output channels, a warpgroup each; splits of K, S of them.

      words  [blocks, K / 128, ..]   a ring of ``stages`` steps of ``steps_of`` blocks a warpgroup
      x      [N, K / S] bf16         normed, once a CTA: it waits for nothing but the first weights
      acc    [64, N]            +=   scale * (codes @ x - zero * (sum of x)), group by group

What must move: the words, once. Everything about them is asked for before the kernel ahead has
ended (programmatic dependent launch), x after that.

A small layer has too few blocks to fill the GPU: its K is split, and a second kernel adds the
splits. What follows on the sum (bias, gate, residual, squares for the next norm) is done by the
kernel that has it. Roundings to bf16 are where unfused layers have them.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.device import MOST_PACKED_ROWS
from pallas_kernels.hopper import quant_operands as operands
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
    PER_COLUMN,
    PER_ROW,
    full,
    refuse,
    spread_columns,
    spread_rows,
    store_unoptimised,
)
from pallas_kernels.hopper.quant_plan import Config, choose_config
from pallas_kernels.packed import BITS, INPUTS, ROWS, group_size
from pallas_kernels.types import PackedWeight


def _refuse_unsupported(
    x: Array, packed: PackedWeight, gated: bool, residual: Array | None
) -> None:
    reasons = []
    if x.shape[0] > MOST_PACKED_ROWS:
        reasons.append(f"at most {MOST_PACKED_ROWS} rows, got {x.shape[0]}")
    if x.dtype != jnp.bfloat16:
        reasons.append(f"x must be bfloat16, got {x.dtype}")
    if gated != packed.paired:
        reasons.append(f"gated={gated} needs weights packed with paired={gated}")
    if gated and residual is not None:
        reasons.append("a gated layer has no residual")
    refuse("packed_linear", reasons)


@partial(jax.jit, static_argnames=("gated", "epsilon", "config"))
def packed_linear(
    x: Float[Array, "B K"],
    packed: PackedWeight,
    bias: Float[Array, " out"] | None,
    norm_scale: Float[Array, " K"] | None,
    square_sums: Float[Array, "tiles N"] | None,
    residual: Float[Array, "B out"] | None,
    *,
    gated: bool,
    epsilon: float,
    config: Config | None = None,
) -> tuple[Float[Array, "B out"], Float[Array, "tiles N"] | None]:
    """``pallas_kernels.api.fused_linear`` of packed weights on a Hopper GPU.

    bf16 but for the weights; at most 32 rows. Raises ``NotImplementedError`` for anything else.
    """
    _refuse_unsupported(x, packed, gated, residual)
    around = _Around(bias, norm_scale, square_sums, residual, gated=gated, epsilon=epsilon)
    return _run(x, packed, around, x.dtype, config)


@partial(jax.jit, static_argnames=("config",))
def packed_product(
    x: Float[Array, "B K"], packed: PackedWeight, *, config: Config | None = None
) -> Float[Array, "B out"]:
    """``pallas_kernels.api.product``: as the sums are, in float32."""
    _refuse_unsupported(x, packed, False, None)
    return _run(x, packed, _Around(), jnp.float32, config)[0]


@dataclass(frozen=True)
class _Around:
    """What is fused around the product; see ``packed_linear``."""

    bias: Array | None = None
    norm_scale: Array | None = None
    square_sums: Array | None = None
    residual: Array | None = None
    gated: bool = False
    epsilon: float = 0.0


def _run(
    x: Float[Array, "B K"], packed: PackedWeight, around: _Around, dtype, config: Config | None
) -> tuple[Array, Array | None]:
    B = x.shape[0]
    N = 8 * pl.cdiv(B, 8)
    blocks = packed.words.shape[0]
    config = choose_config(packed, B) if config is None else config
    after = [y for y in (around.bias, around.residual) if y is not None]
    width = packed.shape[1] // (2 if around.gated else 1)
    result = [jax.ShapeDtypeStruct((B, width), dtype)]
    if around.residual is not None:
        result.append(square_sums_type(width, N))

    def finish(y, block, refs) -> None:
        _finish(y, block, list(refs), around, B, width)

    # Sums over the rows of a tile take shared memory that warpgroups do not have for themselves.
    crowded = config.warpgroups > 1 and around.residual is not None
    if config.splits == 1 and not crowded:
        made = _multiply(x, packed, around, config, result, after, finish)
    else:
        parts_type = jax.ShapeDtypeStruct((config.splits, blocks * ROWS, N), jnp.float32)
        (parts,) = _multiply(x, packed, around, config, [parts_type], [], None)

        def add(parts_gmem, *refs):
            plgpu.griddepcontrol_launch_dependents()
            plgpu.griddepcontrol_wait()
            block = lax.axis_index("columns")
            own = pl.ds(block * ROWS, ROWS)
            splits = [
                plgpu.load(parts_gmem.at[s, own], layout=MATRIX, optimized=False)
                for s in range(config.splits)
            ]
            finish(sum(splits[1:], splits[0]), block, refs)

        made = plgpu.kernel(
            add,
            out_type=tuple(result),
            grid=(blocks,),
            grid_names=("columns",),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(parts, *after)
    out, *sums = made
    return out, sums[0] if sums else None


def _multiply(
    x: Float[Array, "B K"],
    packed: PackedWeight,
    around: _Around,
    config: Config,
    result: list[jax.ShapeDtypeStruct],
    after: list[Array],
    finish,
) -> list[Array]:
    """The first kernel. Its sums go to ``finish``, with ``after`` and outputs, or as they are."""
    (B, K), (blocks, _, rows, _) = x.shape, packed.words.shape
    N, W, S = 8 * pl.cdiv(B, 8), config.warpgroups, config.splits
    length = K // S  # of x in a CTA
    steps = length // INPUTS // config.blocks
    if blocks % W or steps * config.blocks * INPUTS * S != K:
        raise ValueError(f"{config} does not divide {blocks} tiles and {K} inputs")
    stages = min(config.stages, steps)
    group = group_size(packed)
    parts = 1 if group is None else INPUTS // group  # groups of a block
    offset = operands.CODE_OFFSET[packed.codes] if group is not None else 0
    with_zeros = packed.zeros != "none"
    code_rows = 4 * BITS[packed.codes]
    norm_scale, square_sums, summed = around.norm_scale, around.square_sums, K // COLUMNS
    if norm_scale is not None and square_sums is None:
        square_sums, summed = first_square_sums(x, N), 1
    pieces = _pieces(length, B, W)
    piece = length // pieces
    flat = operands.row_layout(piece)

    def multiply(x_gmem, words_gmem, *refs):  # [B, K / 32, 32], [blocks, K / 128, rows, 64]
        refs = list(refs)
        scale_gmem = refs.pop(0) if group is None else None  # [blocks, 64]
        norm_gmem = refs.pop(0) if norm_scale is not None else None  # [K / 32, 32]
        sums_gmem = refs.pop(0) if norm_scale is not None else None  # [tiles, N]
        (
            x_smem,  # [length / 32, N, 32]
            totals_smem,  # [groups of the split, N]
            rms_smem,  # [W, N]
            words_smem,  # [W * stages, config.blocks, rows, 64]
            x_ready,  # barrier of all warpgroups
            ready,  # [W * stages] barriers
        ) = refs[-6:]
        wg, tile, split = (lax.axis_index(name) for name in ("wg", "columns", "split"))
        block, ring = tile * W + wg, wg * stages

        def fetch(step, slot):
            k = pl.ds((split * steps + step) * config.blocks, config.blocks)
            plgpu.copy_gmem_to_smem(
                words_gmem.at[block, k], words_smem.at[ring + slot], ready.at[ring + slot]
            )

        def meet():
            plgpu.barrier_arrive(x_ready)
            plgpu.barrier_wait(x_ready)

        plgpu.griddepcontrol_launch_dependents()
        for step in range(stages):
            fetch(jnp.int32(step), jnp.int32(step))
        plgpu.griddepcontrol_wait()

        if sums_gmem is not None:
            rms = inverse_rms(sums_gmem, summed, K, around.epsilon, layout=operands.EACH_WARP)
            store_unoptimised(rms_smem.at[wg], rms)
            plgpu.commit_smem()  # before other threads of the warpgroup read it

        def copy_piece(i, _):
            """A piece of a row of x, normed: warpgroups take them in turn."""
            row, at = lax.div(i, jnp.int32(pieces)), lax.rem(i, jnp.int32(pieces)) * (piece // 32)
            k = pl.ds(split * (length // 32) + at, piece // 32)
            x = plgpu.load(x_gmem.at[row, k], layout=flat, optimized=False)
            if norm_gmem is not None:
                x = (x.astype(jnp.float32) * rms_smem[wg, row]).astype(jnp.bfloat16)
                scale = plgpu.load(norm_gmem.at[k], layout=flat, optimized=False)
                x = (x.astype(jnp.float32) * scale.astype(jnp.float32)).astype(jnp.bfloat16)
            x_smem[pl.ds(at, piece // 32), row] = x

        _in_turn(B * pieces, wg, W, copy_piece)
        meet()

        def load_x(k):
            own = x_smem.at[pl.ds(k * (INPUTS // 32), INPUTS // 32)]
            return plgpu.load(own, layout=operands.X_TILE, optimized=False)

        if with_zeros:

            def add_up(k, _):
                x = load_x(k)
                for part in range(parts):
                    totals = operands.row_totals(x, part=part, parts=parts)
                    store_unoptimised(totals_smem.at[k * parts + part], totals)

            _in_turn(length // INPUTS, wg, W, add_up)
            meet()

        def step_body(step, acc):
            slot = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[ring + slot])
            for i in range(config.blocks):
                k = step * config.blocks + i
                here = words_smem.at[ring + slot, i]
                layout = operands.words_layout(packed.codes)
                words = plgpu.load(here.at[pl.ds(0, code_rows)], layout=layout)
                x = load_x(k)
                for part in range(parts):
                    y = operands.multiply(words, x, codes=packed.codes, part=part, parts=parts)
                    if group is None:
                        acc = acc + y
                        continue
                    scale, zero = _scale_and_zero(here, packed, part, parts)
                    if zero is not None:
                        totals = plgpu.load(totals_smem.at[k * parts + part], layout=PER_COLUMN)
                        y = y - spread_rows(zero - offset, y) * spread_columns(totals, y)
                    acc = acc + y * spread_rows(scale, y)
            pl.when(step + stages < steps)(lambda: fetch(step + stages, slot))
            return acc

        acc = lax.fori_loop(0, steps, step_body, full((ROWS, N), 0.0, MATRIX))
        if scale_gmem is not None:
            scale = plgpu.load(scale_gmem.at[block], layout=PER_ROW, optimized=False)
            acc = acc * spread_rows(scale, acc)
        if finish is None:
            store_unoptimised(refs[0].at[split, pl.ds(block * ROWS, ROWS)], acc)
        else:
            finish(acc, block, refs[:-6])

    before = [packed.channel_scale]
    if norm_scale is not None:
        before += [norm_scale.reshape(-1, 32), square_sums]
    totals = length // group if group is not None and with_zeros else 1
    return plgpu.kernel(
        multiply,
        out_type=tuple(result),
        grid=(blocks // W, S),
        grid_names=("columns", "split"),
        num_threads=W,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((length // 32, N, 32), x.dtype),
            plgpu.SMEM((totals, N), jnp.float32),
            plgpu.SMEM((W, N), jnp.float32),
            plgpu.SMEM((W * stages, config.blocks, rows, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=W, num_barriers=1),
            plgpu.Barrier(num_arrivals=1, num_barriers=W * stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x.reshape(B, -1, 32), packed.words, *(y for y in before if y is not None), *after)


def _pieces(length: int, rows: int, warpgroups: int) -> int:
    """Equal pieces of a row's ``length``, of 128 or more, so that every warpgroup has one."""
    units = length // 128
    enough = (n for n in range(1, units + 1) if units % n == 0 and n * rows >= warpgroups)
    return next(enough, units)


def _in_turn(count: int, wg, warpgroups: int, body) -> None:
    """``body(i, None)`` for each i below ``count``: warpgroup ``wg`` takes every W-th."""

    def turn(n, _):
        i = n * warpgroups + wg
        if count % warpgroups:
            pl.when(i < count)(lambda: body(i, None))
        else:
            body(i, None)

    lax.fori_loop(0, pl.cdiv(count, warpgroups), turn, None)


def _scale_and_zero(here, packed: PackedWeight, part: int, parts: int):
    """[64] float32 each, of a group of the block ``here`` [rows, 64]; no zero: None."""
    first = 4 * BITS[packed.codes]
    word = plgpu.load(here.at[first + part], layout=PER_ROW)
    if packed.zeros == "byte":
        scale = lax.bitcast_convert_type(word & -256, jnp.float32)
        return scale, (word & 0xFF).astype(jnp.float32)
    scale = lax.bitcast_convert_type(word, jnp.float32)
    if packed.zeros == "none":
        return scale, None
    zero = plgpu.load(here.at[first + parts + part], layout=PER_ROW)
    return scale, lax.bitcast_convert_type(zero, jnp.float32)


def _finish(y, block, refs: list, around: _Around, rows: int, width: int) -> None:
    """What follows on the sums y [64, N] of a block; refs: bias, residual, outputs."""
    bias_gmem = refs.pop(0) if around.bias is not None else None  # [out]
    residual_gmem = refs.pop(0) if around.residual is not None else None  # [B, width]
    out_gmem, *out_sums = refs  # [B, width], [tiles, N]
    layout, channels, halves = MATRIX, ROWS, (y,)
    if around.gated:
        layout, channels = operands.HALF, ROWS // 2
        halves = operands.split_pairs(y)

    def rounded(y):
        if out_gmem.dtype == jnp.float32:
            return y
        return y.astype(out_gmem.dtype).astype(jnp.float32)

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

        y = y + gather_columns(load_residual, rows, y.shape)
    y = rounded(y)
    for sums_gmem in out_sums:
        store_unoptimised(sums_gmem.at[block], (y * y).sum(axis=0))
    store_columns(out_gmem, y, rows, own, layout)
