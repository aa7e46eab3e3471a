"""NaN in the maximum of an array, which XLA loses on a CPU where the array is large."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def keep_nan(
    extreme: Float[Array, "..."], x: Float[Array, "..."], *, axis: int, keepdims: bool = False
) -> Float[Array, "..."]:
    """``extreme``, the maximum or minimum of x along an axis, NaN where x has NaN.

    Codes of integers have no NaN: their scale has to say it. See
    ``findings/jax_cpu_max_loses_nan.sh``.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, jnp.nan], [1.0, 2.0]])
    >>> keep_nan(jnp.array([1.0, 2.0]), x, axis=1).tolist()
    [nan, 2.0]
    """
    return jnp.where(jnp.isnan(x).any(axis=axis, keepdims=keepdims), jnp.nan, extreme)
