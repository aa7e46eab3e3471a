"""NaN in the maximum of an array, which XLA loses on a CPU where the array is large.

Codes of integers have no NaN: their scale has to say it (``findings/jax_cpu_max_loses_nan.sh``).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def largest_magnitude(
    x: Float[Array, "..."], *, axis: int, keepdims: bool = False
) -> Float[Array, "..."]:
    """The largest |x| along an axis, NaN where x has NaN; x is float32.

    Taken of the numbers' bits: without the sign they are in the order of the magnitudes, and those
    of NaN lie above those of infinity. One pass over x, where asking for NaN would be another.

    >>> import jax.numpy as jnp
    >>> largest_magnitude(jnp.array([[1.0, jnp.nan], [-3.0, 2.0]]), axis=1).tolist()
    [nan, 3.0]
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7FFFFFFF)
    return lax.bitcast_convert_type(bits.max(axis=axis, keepdims=keepdims), jnp.float32)


def keep_nan(extreme: Float[Array, "..."], x: Float[Array, "..."], *, axis: int) -> Array:
    """``extreme``, the maximum or minimum of x along an axis, NaN where x has NaN.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, jnp.nan], [1.0, 2.0]])
    >>> keep_nan(jnp.array([1.0, 2.0]), x, axis=1).tolist()
    [nan, 2.0]
    """
    return jnp.where(jnp.isnan(x).any(axis=axis), jnp.nan, extreme)
