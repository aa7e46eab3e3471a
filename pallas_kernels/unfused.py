"""A linear layer around any product: what comes before it and behind, in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def unfused_layer(
    multiply: Callable[[Array], Array],
    x: Float[Array, "R K"],
    bias: Float[Array, " out"] | None,
    norm_scale: Float[Array, " K"] | None,
    residual: Float[Array, "R out"] | None,
    *,
    gated: bool,
    epsilon: float,
) -> Float[Array, "R out"]:
    """``pallas_kernels.api.fused_linear`` where ``multiply(x)`` [R, out], in x's dtype, multiplies.

    Roundings to x's dtype are where layers of their own have them.
    """
    if norm_scale is not None:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        x = (x32 * lax.rsqrt(mean_square + epsilon)).astype(x.dtype) * norm_scale[None]
    y = multiply(x)
    if bias is not None:
        y = y + bias[None]
    if gated:
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    return y if residual is None else residual + y
