#!/usr/bin/env bash
# A Mosaic GPU kernel that loads a piece of shared memory whose rows have padding behind them fails to lower.
#
# Seen 2026-11-30 with jax and jaxlib 0.12.0.1 (the CPU wheels alone); the first two cases with 0.11.2, too.
#
# Some numbers behind each row are the usual means against bank conflicts: rows of 64 numbers of 16 bits begin in the same bank,
# rows of 72 do not. The piece of a row that is loaded, 32 numbers here, is a multiple of all that its layout asks for. But where
# the layout of registers is made of tiles, shared memory is tried in tiles as large as the piece, and a length of rows that such
# tiles do not divide is an error there, not a tiling that is left out. No transform was asked for; optimized=False changes nothing. Seen:
#   [64, 64], columns k to k + 32     lowers
#   [64, 72], the same                ValueError: Stride 72 is not divisible by 32 (tile size = 32). Strides: (72, 1), tiling: (64, 32)
#   [64, 96], the same                lowers: padding as long as the piece
#   [64, 72], the same into registers without tiles (WG_STRIDED)    lowers
#
# Why it matters: padding that a tile divides is longer, and often moves rows by whole banks, which is no help. What is left
# are swizzled memory, or loads of one's own (inline_mgpu).

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1

run <<'PY'
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS, PIECE = 64, 32
TILES, PLAIN = plgpu.Layout.WGMMA, plgpu.Layout.WG_STRIDED((ROWS, PIECE), vec_size=2)


def lowers(columns, layout=TILES):
    def kernel(first_gmem, out_gmem, x_smem):
        first = pl.multiple_of(first_gmem[0] * PIECE, PIECE)
        x = plgpu.load(x_smem.at[:, pl.ds(first, PIECE)], layout=layout, optimized=False)
        plgpu.store(out_gmem, x, optimized=False)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((ROWS, PIECE), jnp.bfloat16),
        scratch_types=[plgpu.SMEM((ROWS, columns), jnp.bfloat16)],
    )
    first = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        jax.jit(call).trace(first).lower(lowering_platforms=("cuda",))
    except ValueError as error:
        return f"ValueError: {error}"
    return "lowers"


fails = "ValueError: Stride 72 is not divisible by 32 (tile size = 32). Strides: (72, 1), tiling: (64, 32)"
cases = {
    "rows of 64": (lowers(64), "lowers"),
    "rows of 72": (lowers(72), fails),
    "rows of 96": (lowers(96), "lowers"),
    "rows of 72, no tiles": (lowers(72, PLAIN), "lowers"),
}
for name, (found, _) in cases.items():
    print(f"{name:21} {found}")
if any(found != expected for found, expected in cases.values()):
    sys.exit("Changed: pieces of padded rows are lowered in another way.")
PY
