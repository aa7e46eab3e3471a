#!/usr/bin/env bash
# A Mosaic GPU kernel whose accumulator begins with a value fails to lower where an operand is indexed by a constant.
#
# Seen 2026-11-30 with jax and jaxlib 0.12.0.1 (the CPU wheels alone), and with 0.11.2.
#
# plgpu.ACC.init(acc) with pl.run_state is how a product is added to an accumulator that a loop carries. The operand in shared
# memory enters run_state with the indices by which it was cut. A traced index is given back as it came; a constant (a Python
# int, or one that JAX has made a literal) is given back as a number where the lowering takes only values of the program. Seen:
#   b.at[i, i - i]            lowers
#   b.at[i, 0]                AssertionError: Shaped arrays must be represented by ir.Values, got: TypedInt(0, dtype=int32)
#   b.at[i, jnp.int32(0)]     the same, got: 0
#   b.at[i, 0] into plgpu.ACC(shape), which begins with zeros    lowers
#
# Why it matters: the message names neither index nor operand, and the trace points at the loop around them.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1

run <<'PY'
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = (64, 64)
ROWS = plgpu.Layout.WGMMA


def lowers(cut, zeros=False):
    def kernel(a_gmem, out_gmem, b_smem):
        a = plgpu.load(a_gmem, layout=ROWS, optimized=False)

        def step(i, acc):
            b = cut(b_smem, i)

            def product(total):
                plgpu.wgmma(total, a, b)
                return total[...] if zeros else None

            if zeros:
                return acc + pl.run_scoped(product, plgpu.ACC(TILE))
            return pl.run_state(product)(plgpu.ACC.init(acc))

        acc = plgpu.layout_cast(jnp.zeros(TILE, jnp.float32), ROWS)
        out_gmem[...] = lax.fori_loop(0, 2, step, acc)

    tiles = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(TILE, jnp.float32),
        scratch_types=[plgpu.SMEM((2, 1, *TILE), jnp.bfloat16, transforms=tiles)],
    )
    a = jax.ShapeDtypeStruct(TILE, jnp.bfloat16)
    try:
        jax.jit(call).trace(a).lower(lowering_platforms=("cuda",))
    except AssertionError as error:
        return f"AssertionError: {error}"
    return "lowers"


fails = "AssertionError: Shaped arrays must be represented by ir.Values, got: "
cases = {
    "b.at[i, i - i]": (lowers(lambda b, i: b.at[i, i - i]), "lowers"),
    "b.at[i, 0]": (lowers(lambda b, i: b.at[i, 0]), f"{fails}TypedInt(0, dtype=int32)"),
    "b.at[i, jnp.int32(0)]": (lowers(lambda b, i: b.at[i, jnp.int32(0)]), f"{fails}0"),
    "b.at[i, 0], from zeros": (lowers(lambda b, i: b.at[i, 0], zeros=True), "lowers"),
}
for name, (found, _) in cases.items():
    print(f"{name:23} {found}")
if any(found != expected for found, expected in cases.values()):
    sys.exit("Changed: constants in run_state are lowered in another way.")
PY
