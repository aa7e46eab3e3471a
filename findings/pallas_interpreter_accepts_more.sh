#!/usr/bin/env bash
# A Pallas kernel for Mosaic GPU that passes in interpret mode need not lower; a machine without a GPU can tell.
#
# Seen 2026-11-27 with jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5 (the CPU wheels alone).
#
# Interpret mode evaluates the kernel's arithmetic with XLA on the CPU, so it takes what XLA takes. The lowering
# for the GPU knows fewer, and says so before any GPU is needed: jit(f).trace(x).lower(lowering_platforms=("cuda",)).
# Seen, for one kernel that loads a float32 tile by TMA, applies f and stores it:
#   f             interpret mode    lowering for cuda
#   jnp.exp       right             lowers
#   jax.nn.silu   right             lowers
#   jnp.floor     right             NotImplementedError: Unimplemented primitive ... floor
#   jnp.isfinite  right             NotImplementedError: Unimplemented primitive ... is_finite
#   softplus      right             NotImplementedError: Unimplemented primitive ... log1p
#   x % 2         right             TypeError about FragmentedArray
#
# Why it matters: tests that run kernels in interpret mode are green for code that no GPU will ever run. Lowering each
# kernel for cuda in the same tests costs under a second and needs no driver, plugin or CUDA.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5

run <<'PY'
import sys
import jax, jax.numpy as jnp
import jax.experimental.pallas.mosaic_gpu as plgpu

TILE = jax.ShapeDtypeStruct((128, 64), jnp.float32)
SMEM = plgpu.SMEM(TILE.shape, TILE.dtype)


def kernel(f):
    def body(x, out, x_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(x, x_smem, barrier)
        plgpu.barrier_wait(barrier)
        out_smem[...] = f(x_smem[...])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out)
        plgpu.wait_smem_to_gmem(0)

    return jax.jit(plgpu.kernel(body, out_type=TILE, scratch_types=[SMEM, SMEM, plgpu.Barrier()]))


x = jnp.linspace(-3, 3, 128 * 64, dtype=jnp.float32).reshape(TILE.shape)
both = {"exp": jnp.exp, "silu": jax.nn.silu}
interpreter_only = {"floor": jnp.floor, "isfinite": lambda v: jnp.where(jnp.isfinite(v), v, 0),
                    "softplus": jax.nn.softplus, "remainder": lambda v: v % 2}
for name, f in (both | interpreter_only).items():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        if not jnp.allclose(kernel(f)(x), f(x), rtol=1e-5, atol=1e-5):
            sys.exit(f"Changed: interpret mode no longer computes {name} rightly.")
    try:
        kernel(f).trace(TILE).lower(lowering_platforms=("cuda",))
        answer = "lowers"
    except Exception as error:
        answer = f"{type(error).__name__}: {str(error)[:70]}"
    print(f"{name:10} right in interpret mode, for cuda: {answer}")
    if (answer == "lowers") != (name in both):
        sys.exit(f"Changed: the lowering for cuda treats {name} differently now.")
PY
