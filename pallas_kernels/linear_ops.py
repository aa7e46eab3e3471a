"""Linear layers: which of their implementations runs. ``api`` has the ops beside the others."""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import weights
from pallas_kernels.checks import expect_shape, expect_weight
from pallas_kernels.device import (
    MOST_FUSED_PACKED_ROWS,
    MOST_LINEAR_ROWS,
    MOST_PACKED_ROWS,
    Backend,
    implementation,
    resolve_backend,
)
from pallas_kernels.packed import unpack_weight
from pallas_kernels.types import PackedWeight, W8A8Weight, Weight
from pallas_kernels.w8a8 import W8A8Kind, has_w8a8_codes, plain_w8a8_weight, w8a8_product

# Of [K, out], in any of the forms that layers multiply with.
Matrix = Array | Weight | PackedWeight | W8A8Weight


def _runs_packed(rows: int, backend: Backend) -> bool:
    """Whether a packed matrix is multiplied as it is; else it is unpacked first.

    Not where ``rows`` is no int, in a program exported for any batch.
    """
    return backend == "mosaic" and isinstance(rows, int) and 0 < rows <= MOST_PACKED_ROWS


def _unpacked(packed: PackedWeight, dtype: DTypeLike, backend: Backend) -> Array | Weight:
    """What plain JAX multiplies with rows of ``dtype``: by a kernel bf16 [K, out], else codes."""
    if backend == "mosaic" and dtype == jnp.bfloat16:
        return implementation("packed_numbers", backend)(packed).T
    return unpack_weight(packed)


def _expect_kernel(kernel: Matrix, K: int) -> None:
    if isinstance(kernel, Weight):
        expect_weight("kernel", kernel, K)
    elif isinstance(kernel, W8A8Weight):
        expect_shape("kernel.codes", kernel.codes, (None, K))
        expect_shape("kernel.scale", kernel.scale, (kernel.shape[1],))
    elif not isinstance(kernel, PackedWeight):
        expect_shape("kernel", kernel, (K, None))
    elif kernel.shape[0] != K:
        raise ValueError(f"kernel is packed of shape {kernel.shape}, expected [{K}, any]")


def fused_linear(
    x: Float[Array, "R K"],
    kernel: Float[Array, "K out"] | Weight | PackedWeight | W8A8Weight,
    *,
    bias: Float[Array, " out"] | None = None,
    norm_scale: Float[Array, " K"] | None = None,
    epsilon: float = 0.0,
    square_sums: Array | None = None,
    residual: Float[Array, "R out"] | None = None,
    gated: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Array, "R out"], Array | None]:
    """``residual + gate(norm(x) @ kernel + bias)``, each part if it is given.

    norm is RMSNorm: ``x / sqrt(mean(x^2) + epsilon)``, in x's dtype, times ``norm_scale``. gated:
    SiLU of the first half of the columns times the second half, so that out is half as wide.

    With a residual, also returns what the norm of the next layer needs to know of ``out``, to be
    handed to it as ``square_sums``; None if the kernel did not run.

    The kernels are for decode: they read the weights once, in one or two launches. With more than
    ``MOST_LINEAR_ROWS`` rows XLA's matrix product was measured to be faster, so the reference
    implementation runs whatever the backend. A quantised matrix has kernels if it is packed: with
    more than ``MOST_FUSED_PACKED_ROWS`` rows for the product alone, which reads weights once more
    from the L2 cache for each further 64 or 128 rows; with more than ``MOST_PACKED_ROWS`` it is
    unpacked first, rounded to bf16. A gated layer's is packed ``paired``. With a ``W8A8Weight``
    rows are rounded to its 8 bits, after the norm, and XLA multiplies.

    >>> import jax.numpy as jnp
    >>> out, _ = fused_linear(jnp.ones((1, 4)), jnp.ones((4, 2)), residual=jnp.ones((1, 2)))
    >>> out.tolist()
    [[5.0, 5.0]]
    """
    expect_shape("x", x, (None, None))
    R, K = x.shape
    _expect_kernel(kernel, K)
    width = kernel.shape[1]
    if gated and width % 2:
        raise ValueError(f"a gated kernel needs an even number of columns, got {width}")
    if bias is not None:
        expect_shape("bias", bias, (width,))
    if norm_scale is not None:
        expect_shape("norm_scale", norm_scale, (K,))
    if square_sums is not None and norm_scale is None:
        raise ValueError("square_sums are for a norm, and norm_scale is None")
    if residual is not None:
        expect_shape("residual", residual, (R, width // 2 if gated else width))
    backend = resolve_backend(backend)
    around = bias, norm_scale, square_sums, residual
    how = {"gated": gated, "epsilon": epsilon}
    if isinstance(kernel, PackedWeight):
        if _runs_packed(R, backend):
            name = "packed_linear" if R <= MOST_FUSED_PACKED_ROWS else "packed_rows_linear"
            return implementation(name, backend)(x, kernel, *around, **how)
        kernel, backend = _unpacked(kernel, x.dtype, backend), "reference"
    # In this order: R is no int in a program exported for any batch.
    elif backend == "mosaic" and (isinstance(kernel, Weight | W8A8Weight) or R > MOST_LINEAR_ROWS):
        backend = "reference"
    return implementation("fused_linear", backend)(x, kernel, *around, **how)


def product(
    x: Float[Array, "... K"],
    kernel: Float[Array, "K out"] | Weight | PackedWeight | W8A8Weight,
    *,
    backend: Backend = "auto",
) -> Float[Array, "... out"]:
    """``x @ kernel``, summed and returned in float32.

    Codes are exact in x's dtype, so that a quantised matrix is multiplied as it is and scales are
    applied to sums. Only 4 bits for many rows become a matrix of x's dtype first, and on a Hopper
    GPU any packed matrix for more than ``MOST_PACKED_ROWS``, up to which there is a kernel. With a
    ``W8A8Weight`` rows of x are rounded to its 8 bits, and sums of fp8 products to x's dtype.

    >>> import jax.numpy as jnp
    >>> weight = Weight(jnp.array([[3], [1]], jnp.int8), jnp.array([[0.5]]))
    >>> product(jnp.array([[1.0, 2.0]]), weight).tolist()
    [[2.5]]
    """
    backend = resolve_backend(backend)
    if isinstance(kernel, W8A8Weight):
        _expect_kernel(kernel, x.shape[-1])
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return w8a8_product(rows, kernel).reshape(*x.shape[:-1], kernel.shape[1])
    if not isinstance(kernel, PackedWeight):
        return weights.product(x, kernel)
    K, out = kernel.shape
    expect_shape("x", x, (*x.shape[:-1], K))
    rows = math.prod(x.shape[:-1])
    if not _runs_packed(rows, backend):
        return weights.product(x, _unpacked(kernel, x.dtype, backend))
    name = "packed_product" if rows <= MOST_FUSED_PACKED_ROWS else "packed_rows_product"
    y = implementation(name, backend)(x.reshape(rows, K), kernel)
    return y.reshape(*x.shape[:-1], out)


def w8a8_weight(
    kernel: Float[Array, "K out"] | Weight | PackedWeight,
    *,
    kind: W8A8Kind,
    backend: Backend = "auto",
) -> W8A8Weight:
    """A matrix for ``w8a8_product``; ``kind`` is "int8" or "fp8".

    Codes of that kind with one scale for each output channel are taken as they are, in another
    order; all else is rounded to the nearest, a quantised matrix from the numbers that it stands
    for. There is a kernel for codes that are packed. Raises ``ValueError`` for an unknown kind.

    >>> import jax.numpy as jnp
    >>> weight = w8a8_weight(jnp.array([[1.0], [-2.54]]), kind="int8")
    >>> weight.codes.tolist(), round(float(weight.scale[0]), 4)
    ([[50, -127]], 0.02)
    """
    backend = resolve_backend(backend)
    if isinstance(kernel, PackedWeight) and has_w8a8_codes(kernel, kind) and backend == "mosaic":
        codes = implementation("packed_codes", backend)(kernel)
        return W8A8Weight(codes, unpack_weight(kernel).scale[0])
    return plain_w8a8_weight(kernel, kind=kind)
