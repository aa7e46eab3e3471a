"""Joins the splits of decode attention, the second kernel of a call (see ``decode_attention``)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper.decode_tiles import query_tile_start
from pallas_kernels.hopper.mosaic import (
    LN_2,
    LOWEST,
    MATRIX,
    MATRIX_TRANSPOSED,
    PER_COLUMN,
    cdiv,
    full,
    spread_columns,
    store_unoptimised,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    rows: int  # B
    heads: int  # K
    group: int  # G
    head_dim: int  # D
    columns: int  # N
    parts_at_once: int
    splits: int | None  # of each head, None where heads differ


def combine_parts(
    parts: Float[Array, "B S D N"],
    lses: Float[Array, "B S N"],
    table: Int[Array, "S columns"] | None,
    heads: int,
    splits: int | None,
    G: int,
    dtype: jax.typing.DTypeLike,
    parts_at_once: int,
) -> tuple[Float[Array, "BH D"], Float[Array, "B K N"]]:
    """Joins the splits as ``merge_attention`` does: out in ``dtype``, lse float32.

    ``lses`` are base 2, -inf for a split without tiles, whose part may hold anything; the lse
    returned is natural and keeps the query tile's N columns. ``splits`` are those of each of the
    KV heads; where they differ ``table`` has them, see ``split_table``. G is the number of query
    heads of a KV head, ``parts_at_once`` how many parts a CTA loads together.

    Index map: grid (row b, KV head k, half d of the head dimension), 64 channels a CTA.
    """
    B, _, D, N = parts.shape
    settings = _Settings(B, heads, G, D, N, parts_at_once, splits)
    operands = parts, lses, table
    shapes = ((B * heads * G, D), dtype), ((B, heads, N), jnp.float32)
    out, lse = call_shared(
        _make_kernel,
        settings,
        operands,
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        longest=(None,) * 3,
        longest_results=(None,) * 2,
    )
    return out, lse


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    B, K, G, D, N, at_once, splits = settings
    H, dtype = B * K * G, results[0].dtype

    def combine_splits(
        parts_gmem,  # [B, S, D, N] float32
        lses_gmem,  # [B, S, N] float32
        table_gmem,  # [S, columns] int32, see ``split_table``; None if ``splits`` are known
        out_gmem,  # [B * H, D]
        lse_gmem,  # [B, K, N] float32
        out_smem,  # [N, 64]
    ):
        b, k, d = (lax.axis_index(name) for name in ("row", "head", "half"))
        channels = pl.ds(d * 64, 64)
        if splits is None:
            columns = table_gmem.shape[1]
            first, count = table_gmem[k, columns - 2], table_gmem[k, columns - 1]
        else:
            first, count = k * splits, splits

        def join(step, carry):
            acc, peak, total = carry  # [64, N], [N], [N]
            # No load depends on another or on how many splits had work: all wait together.
            index = [step * at_once + j for j in range(at_once)]
            inside = [first + jnp.minimum(i, count - 1) for i in index]
            lse = [
                plgpu.load(lses_gmem.at[b, i], layout=PER_COLUMN, optimized=False) for i in inside
            ]
            part = [
                plgpu.load(parts_gmem.at[b, i, channels], layout=MATRIX, optimized=False)
                for i in inside
            ]
            if splits is None or splits % at_once:  # the last step repeats the last split
                lse = [
                    x + jnp.where(i < count, 0.0, -jnp.inf) for x, i in zip(lse, index, strict=True)
                ]
            new_peak = peak
            for x in lse:
                new_peak = jnp.maximum(new_peak, x)
            decay = jnp.exp2(peak - new_peak)
            acc, total = acc * spread_columns(decay, acc), total * decay
            for x, values in zip(lse, part, strict=True):
                weight = jnp.exp2(x - new_peak)
                total += weight
                spread = spread_columns(weight, acc)
                # A split without tiles has written no part: what is there may be NaN.
                acc += jnp.where(spread > 0.0, values * spread, 0.0)
            return acc, new_peak, total

        acc, peak, total = lax.fori_loop(
            0,
            cdiv(count, at_once) if splits is None else pl.cdiv(splits, at_once),
            join,
            (
                full((64, N), 0.0, MATRIX),
                full((N,), LOWEST, PER_COLUMN),
                full((N,), 0.0, PER_COLUMN),
            ),
        )
        empty = total == 0.0
        inverse = jnp.where(empty, 0.0, 1.0 / total)
        out = (acc * spread_columns(inverse, acc)).astype(dtype)  # [64, N]
        store_unoptimised(out_smem.transpose((1, 0)), plgpu.layout_cast(out, MATRIX_TRANSPOSED))
        plgpu.commit_smem()

        @pl.when(d == 0)
        def _():
            lse = (peak + jnp.log2(total)) * LN_2
            store_unoptimised(lse_gmem.at[b, k], jnp.where(empty, -jnp.inf, lse))

        own = (b * K + k) * G
        shift = own - query_tile_start(b * K + k, G, N, max(H, N))
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(shift, G)], out_gmem.at[pl.ds(own, G), channels])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        combine_splits,
        out_type=results,
        grid=(B, K, D // 64),
        grid_names=("row", "head", "half"),
        scratch_types=[plgpu.SMEM((N, 64), dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
