"""Packed weights in rows of an output channel, as numbers in bf16 or as codes: Hopper (Mosaic).

For products of so many rows that tensor cores and not memory are what they wait for, as in prefill:
XLA multiplies what this kernel writes, codes of 8 bits where x is rounded to codes, too
(``w8a8.py``).

Index map. Grid: blocks of 64 output channels, a warpgroup each; stretches of K, each of ``steps``
blocks of 128 inputs.

      words    [64 x 128 codes and scales]    a ring of 4 blocks
      numbers  [groups of a block, 64, ..]    two blocks, of which one is on its way to memory

What must move: the words once, and one or two bytes a number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels.hopper import quant_operands as operands
from pallas_kernels.hopper.mosaic import (
    PER_ROW,
    refuse,
    spread_rows,
    store_unoptimised,
    tile_transforms,
)
from pallas_kernels.hopper.shared_kernel import Shapes, call_shared
from pallas_kernels.packed import BITS, INPUTS, ROWS, group_size
from pallas_kernels.types import PackedWeight

_STAGES = 4
_MOST_STEPS = 8  # blocks of a CTA: with more a small matrix has too few CTAs


@jax.jit
def packed_numbers(packed: PackedWeight) -> Float[Array, "out K"]:
    """``dequantize_weight(unpack_weight(packed))`` in bf16, transposed.

    Zero points that have words of their own may round the last bit the other way. Raises
    ``NotImplementedError`` for a GPU that is no Hopper.
    """
    return _written(packed, jnp.bfloat16)


@jax.jit
def packed_codes(packed: PackedWeight) -> Shaped[Array, "out K"]:
    """``unpack_weight(packed).codes``, transposed: of 8 bits, with one scale a channel.

    Raises ``NotImplementedError`` for a GPU that is no Hopper.
    """
    return lax.bitcast_convert_type(_written(packed, jnp.int8), jnp.dtype(packed.codes))


def _written(packed: PackedWeight, dtype: jax.typing.DTypeLike) -> Shaped[Array, "out K"]:
    refuse("packed weights", [])
    K, out = packed.shape
    (written,) = call_shared(
        _make_unpack,
        None,
        (packed,),
        (jax.ShapeDtypeStruct((out, K), dtype),),
        longest=(None,),
        longest_results=(None,),
    )
    return written


def _make_unpack(_: None, results: Shapes) -> Callable[..., Any]:
    return partial(_unpack, results)


def _unpack(results: Shapes, packed: PackedWeight) -> tuple[Array, ...]:
    blocks, depth, rows, _ = packed.words.shape
    out, dtype = packed.shape[1], results[0].dtype
    steps = max(n for n in range(1, _MOST_STEPS + 1) if depth % n == 0)
    stages = min(_STAGES, steps)
    group = group_size(packed)
    parts = 1 if group is None else INPUTS // group  # groups of a block
    inputs, code_rows = INPUTS // parts, 4 * BITS[packed.codes]

    def unpack(packed_gmem, numbers_gmem, words_smem, numbers_smem, ready):
        block, stretch = lax.axis_index("columns"), lax.axis_index("stretch")
        channel_scale = None
        if group is None:
            own = packed_gmem.channel_scale.at[block]
            channel_scale = plgpu.load(own, layout=PER_ROW, optimized=False)

        def fetch(step, slot):
            words = packed_gmem.words.at[block, stretch * steps + step]
            plgpu.copy_gmem_to_smem(words, words_smem.at[slot], ready.at[slot])

        def copy_out(numbers, k):
            """The rows of a block, which in a gated layer are of gate and up by turns."""
            columns = pl.ds(k * inputs, inputs)
            if not packed.paired:
                own = numbers_gmem.at[pl.ds(block * ROWS, ROWS), columns]
                plgpu.copy_smem_to_gmem(numbers, own, commit_group=False)
                return
            for i in range(ROWS // 8):
                first = (i % 2) * (out // 2) + block * (ROWS // 2) + (i // 2) * 8
                own = numbers_gmem.at[pl.ds(first, 8), columns]
                plgpu.copy_smem_to_gmem(numbers.at[pl.ds(8 * i, 8)], own, commit_group=False)

        for step in range(stages):
            fetch(jnp.int32(step), jnp.int32(step))

        def step_body(step, _):
            slot, place = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(2)) * parts
            plgpu.barrier_wait(ready.at[slot])
            here = words_smem.at[slot]
            layout = operands.words_layout(packed.codes)
            words = plgpu.load(here.at[pl.ds(0, code_rows)], layout=layout)
            # What this step overwrites was sent the step before the last.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for part in range(parts):
                if dtype == jnp.int8:
                    store_unoptimised(numbers_smem.at[place + part], operands.code_bytes(words))
                    continue
                scale, offsets, zero = channel_scale, None, None
                if group is not None:
                    scale, offsets, zero = operands.scale_and_zero(here, packed, part, parts)
                how = {"codes": packed.codes, "part": part, "parts": parts}
                y = operands.matrix(words, offsets, **how).astype(jnp.float32)
                if zero is not None:
                    y = y - spread_rows(zero, y)
                numbers_smem[place + part] = (y * spread_rows(scale, y)).astype(dtype)
            plgpu.commit_smem()
            for part in range(parts):
                k = (stretch * steps + step) * parts + part
                copy_out(numbers_smem.at[place + part], k)
            plgpu.commit_smem_to_gmem_group()
            pl.when(step + stages < steps)(lambda: fetch(step + stages, slot))

        lax.fori_loop(0, steps, step_body, None)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        unpack,
        out_type=results,
        grid=(blocks, depth // steps),
        grid_names=("columns", "stretch"),
        scratch_types=[
            plgpu.SMEM((stages, rows, ROWS), jnp.int32),
            plgpu.SMEM(
                (2 * parts, ROWS, inputs),
                dtype,
                transforms=tile_transforms(inputs, dtype),
            ),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        ],
    )(packed)
