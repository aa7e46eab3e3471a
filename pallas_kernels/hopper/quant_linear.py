"""A linear layer for a few rows with quantised weights, and what is around it: Hopper (Mosaic).

What ``fused_linear`` is for bf16, for codes of 4 or 8 bits. Weights are operand A of mma.sync, from
registers, where codes become bf16 exactly; x^T is operand B, from shared memory.

Index map. Grid: tiles of W blocks of 64 output channels, a warpgroup each; splits of K, S of them;
N = 8, of which a call may have fewer. More rows: ``quant_rows.py``.

      words  [blocks, K / 128, ..]   a ring of ``stages`` steps of ``blocks`` blocks a warpgroup
      x      [N, K / S] bf16         normed, once a CTA: it waits for nothing but the first weights
      acc    [64, N]            +=   scale * ((codes - zero) @ x), group by group

Zero points that have words of their own are multiplied with the sum of x instead.

What must move: the words, once. Everything about them is asked for before the kernel ahead has
ended (programmatic dependent launch), x after that.

A small layer has too few blocks to fill the GPU: its K is split. The splits of a block are a
cluster, whose first CTA gets the others' sums and adds them, or a second kernel adds them. What
follows on the sum (bias, gate, residual, squares for the next norm) is done by who has it.
Roundings to bf16 are where unfused layers have them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import clusters
from pallas_kernels.hopper import quant_operands as operands
from pallas_kernels.hopper.linear_tiles import (
    COLUMNS,
    first_square_sums,
    inverse_rms,
    square_sums_type,
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
    unsupported_packed,
)
from pallas_kernels.hopper.quant_finish import finish
from pallas_kernels.hopper.quant_plan import Config, N, choose_config
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared
from pallas_kernels.packed import BITS, INPUTS, ROWS, group_size
from pallas_kernels.types import PackedWeight


def _refuse_unsupported(x: Array, packed: PackedWeight, *around: Any) -> None:
    reasons = unsupported_packed(x, packed, *around)
    if len(x) > N:
        reasons.append(f"at most {N} rows, got {len(x)}")
    refuse("packed weights", reasons)


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

    bf16 but for the weights, up to 8 rows. Raises ``NotImplementedError`` for anything else.
    """
    _refuse_unsupported(x, packed, gated, residual)
    summed = packed.shape[0] // COLUMNS
    if norm_scale is None:
        square_sums = None
    elif square_sums is None:
        square_sums, summed = first_square_sums(x, N), 1
    config = choose_config(packed, len(x)) if config is None else config
    settings = _Settings(config, gated, epsilon, summed)
    return _run(settings, x, packed, (norm_scale, square_sums), (bias, residual), x.dtype)


@partial(jax.jit, static_argnames=("config",))
def packed_product(
    x: Float[Array, "B K"], packed: PackedWeight, *, config: Config | None = None
) -> Float[Array, "B out"]:
    """``pallas_kernels.api.product``: as the sums are, in float32."""
    _refuse_unsupported(x, packed)
    config = choose_config(packed, len(x)) if config is None else config
    return _run(_Settings(config), x, packed, (None, None), (None, None), jnp.float32)[0]


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    config: Config
    gated: bool = False
    epsilon: float = 0.0
    summed: int = 0  # rows of square_sums that count
    finishes: bool = True  # whether the first kernel does what follows on the sums


def _run(
    settings: _Settings,
    x: Float[Array, "B K"],
    packed: PackedWeight,
    norm: tuple[Array | None, Array | None],  # scale, square_sums
    after: tuple[Array | None, Array | None],  # bias, residual
    dtype: jax.typing.DTypeLike,
) -> tuple[Array, Array | None]:
    B, blocks, config, residual = len(x), packed.words.shape[0], settings.config, after[1]
    width = packed.shape[1] // (2 if settings.gated else 1)
    results = [jax.ShapeDtypeStruct((B, width), dtype)]
    if residual is not None:
        results.append(square_sums_type(width, N))

    # Sums over the rows of a tile take shared memory that warpgroups do not have for themselves.
    crowded = config.warpgroups > 1 and residual is not None
    multiplied = x, packed, *norm
    if config.cluster or (config.splits == 1 and not crowded):
        made = _call(_make_multiply, settings, (*multiplied, *after), results)
    else:
        split = settings._replace(finishes=False)
        parts_type = jax.ShapeDtypeStruct((config.splits, blocks * ROWS, N), jnp.float32)
        (parts,) = _call(_make_multiply, split, (*multiplied, None, None), [parts_type])
        made = _call(_make_add, settings, (parts, *after), results)
    out, *sums = made
    return out, sums[0] if sums else None


def _call(
    make: Callable[[_Settings, Shapes], Callable[..., Any]],
    settings: _Settings,
    operands: tuple[Any, ...],
    results: list[jax.ShapeDtypeStruct],
) -> tuple[Array, ...]:
    """A kernel, lowered once for layers and programs of equal shapes."""
    return call_shared(
        make,
        settings,
        operands,
        tuple(results),
        longest=(None,) * len(operands),
        longest_results=(None,) * len(results),
    )


def _make_add(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    """The second kernel: adds the splits."""
    splits = settings.config.splits

    def add(parts_gmem, bias_gmem, residual_gmem, *outputs):
        plgpu.griddepcontrol_launch_dependents()
        plgpu.griddepcontrol_wait()
        block = lax.axis_index("columns")
        own = pl.ds(block * ROWS, ROWS)
        parts = [
            plgpu.load(parts_gmem.at[s, own], layout=MATRIX, optimized=False) for s in range(splits)
        ]
        total = sum(parts[1:], parts[0])
        finish(total, block, bias_gmem, residual_gmem, outputs, settings.gated)

    def call(parts, *after):
        return plgpu.kernel(
            add,
            out_type=results,
            grid=(parts.shape[1] // ROWS,),
            grid_names=("columns",),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(parts, *after)

    return call


def _make_multiply(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    return partial(_multiply, settings, results)


def _multiply(
    settings: _Settings,
    results: Shapes,
    x: Float[Array, "B K"],
    packed: PackedWeight,
    norm_scale: Float[Array, " K"] | None,
    square_sums: Float[Array, "tiles N"] | None,
    *after: Array | None,  # bias, residual
) -> tuple[Array, ...]:
    """The first kernel. Its sums are finished, or go out as they are."""
    K, (blocks, _, rows, _) = packed.shape[0], packed.words.shape
    config, B = settings.config, x.shape[0]
    W, S = config.warpgroups, config.splits
    length = K // S  # of x in a CTA
    steps = length // INPUTS // config.blocks
    if blocks % W or steps * config.blocks * INPUTS * S != K:
        raise ValueError(f"{config} does not divide {blocks} tiles and {K} inputs")
    if config.cluster and S > 8:
        raise ValueError(f"{config} has {S} splits, a cluster has at most 8 CTAs")
    stages = min(config.stages, steps)
    group = group_size(packed)
    parts = 1 if group is None else INPUTS // group  # groups of a block
    with_totals = packed.zeros == "word"
    code_rows = 4 * BITS[packed.codes]
    pieces = _pieces(length, B, W)
    piece = length // pieces
    flat = operands.row_layout(piece)

    def multiply(
        x_gmem,  # [B, K]
        packed_gmem,  # words [blocks, K / 128, rows, 64], channel_scale [blocks, 64]
        norm_gmem,  # [K]
        sums_gmem,  # [tiles, rows]
        bias_gmem,  # [out]
        residual_gmem,  # [B, width]
        *refs,
    ):
        (
            *outputs,  # parts [S, out, rows], or those of ``finish``
            x_smem,  # [N, 4, length / 4 and padding], pairs of inputs by turns
            totals_smem,  # [groups of the split, N]
            rms_smem,  # [W, N]
            words_smem,  # [W * stages, config.blocks, rows, 64]
            parts_smem,  # [S, W, 64, N] of a cluster, in its first CTA
            x_ready,  # barrier of all warpgroups
            ready,  # [W * stages] barriers
        ) = refs
        wg, tile, split = (lax.axis_index(name) for name in ("wg", "columns", "split"))
        block, ring = tile * W + wg, wg * stages

        def fetch(step, slot):
            k = pl.ds((split * steps + step) * config.blocks, config.blocks)
            plgpu.copy_gmem_to_smem(
                packed_gmem.words.at[block, k], words_smem.at[ring + slot], ready.at[ring + slot]
            )

        def meet():
            plgpu.barrier_arrive(x_ready)
            plgpu.barrier_wait(x_ready)

        plgpu.griddepcontrol_launch_dependents()
        for step in range(stages):
            fetch(jnp.int32(step), jnp.int32(step))
        plgpu.griddepcontrol_wait()

        if sums_gmem is not None:
            summed, epsilon = settings.summed, settings.epsilon
            rms = inverse_rms(sums_gmem, summed, K, epsilon, layout=operands.EACH_WARP)
            store_unoptimised(rms_smem.at[wg], rms)
            plgpu.commit_smem()  # before other threads of the warpgroup read it

        def copy_piece(i, _):
            """A piece of a row of x, normed: warpgroups take them in turn."""
            row, at = lax.div(i, jnp.int32(pieces)), lax.rem(i, jnp.int32(pieces)) * piece
            k = pl.ds(split * length + at, piece)
            x = plgpu.load(x_gmem.at[row, k], layout=flat, optimized=False)
            if norm_gmem is not None:
                x = (x.astype(jnp.float32) * rms_smem[wg, row]).astype(jnp.bfloat16)
                scale = plgpu.load(norm_gmem.at[k], layout=flat, optimized=False)
                x = (x.astype(jnp.float32) * scale.astype(jnp.float32)).astype(jnp.bfloat16)
            own = x_smem.at[row, :, pl.ds(lax.div(at, jnp.int32(4)), piece // 4)]
            operands.store_planes(own, x)

        _in_turn(B * pieces, wg, W, copy_piece)
        meet()

        def load_x(k):
            return operands.load_planes(x_smem.at[:, :, pl.ds(k * (INPUTS // 4), INPUTS // 4)])

        if with_totals:

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
                    scale = offsets = zero = None
                    if group is not None:
                        scale, offsets, zero = operands.scale_and_zero(here, packed, part, parts)
                    how = {"codes": packed.codes, "part": part, "parts": parts}
                    y = operands.multiply(words, x, offsets, **how)
                    if zero is not None:
                        totals = plgpu.load(totals_smem.at[k * parts + part], layout=PER_COLUMN)
                        y = y - spread_rows(zero, y) * spread_columns(totals, y)
                    acc = acc + (y if scale is None else y * spread_rows(scale, y))
            pl.when(step + stages < steps)(lambda: fetch(step + stages, slot))
            return acc

        acc = lax.fori_loop(0, steps, step_body, full((ROWS, N), 0.0, MATRIX))
        if group is None:
            scale = plgpu.load(packed_gmem.channel_scale.at[block], layout=PER_ROW, optimized=False)
            acc = acc * spread_rows(scale, acc)
        if config.cluster:
            clusters.store_in_first(parts_smem.at[split, wg], acc)
            clusters.meet()

            @pl.when(split == 0)
            def add_up_splits():
                parts = [clusters.load_stored(parts_smem.at[s, wg]) for s in range(S)]
                total, own = sum(parts[1:], parts[0]), parts_smem.at[0, wg]
                finish(total, block, bias_gmem, residual_gmem, outputs, settings.gated, own)

        elif settings.finishes:
            finish(acc, block, bias_gmem, residual_gmem, outputs, settings.gated)
        else:
            store_unoptimised(outputs[0].at[split, pl.ds(block * ROWS, ROWS)], acc)

    totals = length // group if group is not None and with_totals else 1
    return plgpu.kernel(
        multiply,
        out_type=results,
        **_axes(config, blocks // W),
        num_threads=W,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((N, 4, length // 4 + operands.PLANE_PADDING), x.dtype),
            plgpu.SMEM((totals, N), jnp.float32),
            plgpu.SMEM((W, N), jnp.float32),
            plgpu.SMEM((W * stages, config.blocks, rows, ROWS), jnp.int32),
            plgpu.SMEM((S, W, ROWS, N) if config.cluster else (1,), jnp.float32),
            plgpu.Barrier(num_arrivals=W, num_barriers=1),
            plgpu.Barrier(num_arrivals=1, num_barriers=W * stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, packed, norm_scale, square_sums, *after)


def _axes(config: Config, columns: int) -> dict[str, Any]:
    """Of the CTAs. Those of a cluster are its splits."""
    if config.cluster:
        cluster = {"cluster": (config.splits,), "cluster_names": ("split",)}
        return {"grid": (columns,), "grid_names": ("columns",), **cluster}
    return {"grid": (columns, config.splits), "grid_names": ("columns", "split")}


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
