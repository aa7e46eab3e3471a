"""What the Mosaic GPU kernels share: layouts, tile transforms, and where they may run."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.device import is_hopper
from pallas_kernels.kv_codes import kv_kind
from pallas_kernels.types import KVPages, PackedWeight

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Stands for "no score yet" where -inf would make exp2(-inf - -inf) a NaN.
LOWEST = -1e30

# Streaming multiprocessors of an H100 or H200 (SXM), for sizing grids.
SM_COUNT = 132
# Shared memory that a kernel's buffers are planned into, of the 227 KB that a CTA can have.
SHARED_BYTES = 220 << 10

# How a warpgroup holds a wgmma accumulator [m, n] in registers, and one value a row or a column of
# it. The transposed layout keeps two neighbours of a *column* in one register, which is what
# storing a 16-bit matrix transposed needs.
MATRIX = plgpu.Layout.WGMMA
MATRIX_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
# A vector of 128 elements, one a thread.
STRIDED = plgpu.Layout.WG_STRIDED((128,), vec_size=1)


def refuse(op: str, reasons: list[str]) -> None:
    """Raises ``NotImplementedError`` if there are reasons why a kernel cannot run, or a GPU is one.

    Without a GPU a kernel can still run under Mosaic GPU's interpreter.
    """
    device = jax.devices()[0]
    if device.platform == "gpu" and not is_hopper(device):
        reasons = [
            *reasons,
            f"the GPU must be of compute capability 9.0 (Hopper), {device.device_kind} has "
            f"{device.compute_capability}",
        ]
    if reasons:
        raise NotImplementedError(
            f"{op} kernel: {'; '.join(reasons)}. backend='reference' has no such limits"
        )


def unsupported(
    head_dim: int, arrays: Mapping[str, Array], pools: Mapping[str, KVPages]
) -> list[str]:
    """Reasons why none of the kernels that read whole pages of prompts can run; by name."""
    reasons = [
        f"{name} must be bfloat16, got {x.dtype}"
        for name, x in arrays.items()
        if x.dtype != jnp.bfloat16
    ]
    reasons += [
        f"{name} must be bfloat16 or codes, got {pool.k.dtype}"
        for name, pool in pools.items()
        if pool.k.dtype != jnp.bfloat16 and kv_kind(pool.k.dtype) is None
    ]
    if head_dim not in (64, 128):
        reasons.append(f"head_dim must be 64 or 128, got {head_dim}")
    page_size = next(iter(pools.values())).k.shape[2]  # of all of them
    if page_size not in (16, 32, 64, 128):
        reasons.append(f"page size must be 16, 32, 64 or 128, got {page_size}")
    return reasons


def unsupported_packed(
    x: Array, packed: PackedWeight, gated: bool = False, residual: Array | None = None
) -> list[str]:
    """Reasons why none of the kernels that multiply packed weights can run."""
    reasons = []
    if x.dtype != jnp.bfloat16:
        reasons.append(f"x must be bfloat16, got {x.dtype}")
    if gated != packed.paired:
        what = "a gated layer needs" if gated else "only a gated layer can have"
        reasons.append(f"{what} weights packed with paired=True")
    if gated and residual is not None:
        reasons.append("a gated layer has no residual")
    return reasons


def tile_transforms(row: int, dtype: jax.typing.DTypeLike) -> tuple[plgpu.Transform, ...]:
    """The shared-memory layout of a tile of ``row`` elements a row that wgmma can read.

    Units of eight rows by one swizzle width of 32, 64 or 128 bytes; the swizzle spreads the rows
    of a unit over the banks.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(128, row * itemsize)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def matmul(
    a,
    b,
    m: int,
    n: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    meanwhile: Callable[[], None] = lambda: None,
):
    """``a @ b`` [m, n] by wgmma, both operands in shared memory; waits for the result.

    ``meanwhile`` runs between.
    """

    def product(accumulator):
        plgpu.wgmma(accumulator, a, b)
        meanwhile()
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC((m, n), dtype))


def add_product(acc, a, b, *, meanwhile: Callable[[], None] = lambda: None) -> Any:
    """``acc + a @ b`` by wgmma, ``a`` in registers and ``b`` in shared memory.

    ``meanwhile`` runs while the tensor cores do. Mosaic GPU's interpreter has no such wgmma; tests
    replace this function there.
    """

    def product(accumulator):
        plgpu.wgmma(accumulator, a, b)
        meanwhile()

    return pl.run_state(product)(plgpu.ACC.init(acc))


def spread_rows(x, like):
    """One value a row, broadcast to the matrix ``like``."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def spread_columns(x, like):
    """One value a column, broadcast to the matrix ``like``."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def full(shape: tuple[int, ...], value: float, layout):
    """A float32 constant in registers; loop carries need their layout from the start."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def cdiv(a, b: int):
    """Ceiling of a / b for a traced int32 ``a`` >= 0."""
    return lax.div(a + (b - 1), jnp.int32(b))


def store_unoptimised(ref, value) -> None:
    """Stores registers in whatever pattern their layout gives: for small or rare stores."""
    if hasattr(plgpu, "store"):  # from JAX 0.12 on a plain store insists on a fast pattern
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
