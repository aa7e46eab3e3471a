"""Products of 8 bits on both sides: rows are rounded as they come, as matrices were before.

Each row of x has a scale of its own, the largest of its magnitudes over the largest code, and each
output channel of the matrix too; both are applied to sums, which int8 has exactly in int32. XLA
multiplies, with the tensor cores' instructions for 8 bits where matrices lie ``[out, K]``: from
``[K, out]`` it would make a copy in each call.

No derivative: rounding has none.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from pallas_kernels.packed import unpack_weight
from pallas_kernels.types import PackedWeight, W8A8Weight, Weight
from pallas_kernels.weights import dequantize_weight, nearest_codes, quantize_weight

W8A8Kind = Literal["int8", "fp8"]
W8A8_KINDS: tuple[W8A8Kind, ...] = get_args(W8A8Kind)
_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


def has_w8a8_codes(kernel: Array | Weight | PackedWeight, kind: W8A8Kind) -> bool:
    """Whether a matrix has codes of that kind with one scale for each output channel.

    Raises ``ValueError`` for an unknown kind.

    >>> import jax.numpy as jnp
    >>> weight = quantize_weight(jnp.ones((64, 8)), kind="int8")
    >>> has_w8a8_codes(weight, "int8"), has_w8a8_codes(weight, "fp8")
    (True, False)
    """
    if kind not in W8A8_KINDS:
        raise ValueError(f"{kind=} is unknown; known: {', '.join(W8A8_KINDS)}")
    if isinstance(kernel, Weight):
        plain = kernel.zero is None and kernel.scale.shape[0] == 1
        return plain and kernel.codes.dtype == _DTYPES[kind]
    if isinstance(kernel, PackedWeight):
        return kernel.channel_scale is not None and kernel.codes == _DTYPES[kind]
    return False


@partial(jax.jit, static_argnames=("kind",))
def plain_w8a8_weight(
    kernel: Float[Array, "K out"] | Weight | PackedWeight, *, kind: W8A8Kind
) -> W8A8Weight:
    """What the op ``w8a8_weight`` says, in plain JAX."""
    taken = has_w8a8_codes(kernel, kind)
    if isinstance(kernel, PackedWeight):
        kernel = unpack_weight(kernel)
    if not taken:
        numbers = dequantize_weight(kernel) if isinstance(kernel, Weight) else kernel
        kernel = quantize_weight(numbers, kind=kind)
    assert isinstance(kernel, Weight)  # rounded, or it was one
    # Written in that order: with columns of codes XLA's product is many times slower on a CPU. On a
    # GPU the barrier keeps XLA from taking the constraint for a view of what is there
    # (findings/xla_gpu_layout_constraint_undone.sh).
    codes = lax.optimization_barrier(with_layout_constraint(kernel.codes.T, Layout((0, 1))))
    return W8A8Weight(codes, kernel.scale[0])


def w8a8_product(x: Float[Array, "rows K"], kernel: W8A8Weight) -> Float[Array, "rows out"]:
    """``x @ kernel`` with rows of x rounded to the type of the codes, float32.

    Sums of fp8 products are rounded to x's dtype before they are scaled.
    """
    dtype = kernel.codes.dtype
    codes, scale = nearest_codes(x.astype(jnp.float32), dtype, axis=1)
    sums = lax.dot_general(
        codes,
        kernel.codes,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.int32 if dtype == jnp.int8 else x.dtype,
    )
    return sums.astype(jnp.float32) * scale * kernel.scale[None]
