"""Parameter-holding layers of the model, and the two ways in which a decoder layer uses them.

Flax's own layers promote dtypes implicitly; these never do, so that a bf16/f32 slip is an
error at its line under strict promotion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import api
from pallas_kernels.api import Backend


class Linear(nnx.Module):
    """Parameters of ``x @ kernel (+ bias)``. ``kernel`` is ``[in, out]``, ``bias`` is ``[out]``.

    The value of ``kernel`` may be an ``api.Weight``, a quantised matrix, or one that is packed.
    """

    def __init__(self, in_size: int, out_size: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (in_size, out_size), jnp.float32)
        self.kernel = nnx.Param((kernel * in_size**-0.5).astype(dtype))
        self.bias = nnx.Param(jnp.zeros((out_size,), dtype)) if bias else None


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis; statistics in float32, result in ``x``'s dtype."""

    def __init__(self, size: int, *, epsilon: float, dtype):
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        return normed * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))


class Stream(NamedTuple):
    """The residual stream between two layers."""

    value: Float[Array, "B T E"]
    # What the kernel that made ``value`` already knows of the norm to come; see ``fused_linear``.
    square_sums: Array | None = None


def normed_linear(
    x: Stream, norm: RMSNorm, linear: Linear, *, gated: bool = False, backend: Backend
) -> Float[Array, "B T O"]:
    """``linear(norm(x))``; gated: the first half of it through SiLU, times the second half."""
    B, T, E = x.value.shape
    out, _ = api.fused_linear(
        x.value.reshape(B * T, E),
        linear.kernel.get_value(),
        bias=None if linear.bias is None else linear.bias[...],
        norm_scale=norm.scale[...],
        epsilon=norm.epsilon,
        square_sums=x.square_sums,
        gated=gated,
        backend=backend,
    )
    return out.reshape(B, T, -1)


def add_linear(
    x: Stream, update: Float[Array, "B T I"], linear: Linear, *, backend: Backend
) -> Stream:
    """``x + linear(update)``."""
    B, T, E = x.value.shape
    out, square_sums = api.fused_linear(
        update.reshape(B * T, -1),
        linear.kernel.get_value(),
        bias=None if linear.bias is None else linear.bias[...],
        residual=x.value.reshape(B * T, E),
        backend=backend,
    )
    return Stream(out.reshape(B, T, E), square_sums)
