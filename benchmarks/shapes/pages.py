"""Pages of random keys and values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.api import KVKind, KVPages, quantize_kv
from pallas_kernels.types import KVScale


def random_pages(
    key: Array, used: Bool[Array, "K N P"], head_dim: int, kind: KVKind | None
) -> KVPages:
    """As ``stored`` has them: NaN but for the tokens ``used``."""

    def tokens(key: Array) -> tuple[Array, KVScale | None]:
        x = jax.random.normal(key, (*used.shape, head_dim), jnp.bfloat16)
        return stored(x, used, kind)

    k_key, v_key = jax.random.split(key)
    (k, k_scale), (v, v_scale) = jax.jit(tokens)(k_key), jax.jit(tokens)(v_key)
    return KVPages(k, v, k_scale, v_scale)


def stored(
    x: Float[Array, "... D"], used: Bool[Array, "..."], kind: KVKind | None
) -> tuple[Array, KVScale | None]:
    """``x`` in codes of ``kind`` with their scale, None: as it is; NaN but for what is ``used``.

    Of int8 and int4 the scale is, of fp8 the codes are as well.
    """
    if kind is None:
        return jnp.where(used[..., None], x, jnp.nan), None
    codes, scale = quantize_kv(x, kind)
    if kind == "fp8":
        codes = jnp.where(used[..., None], codes, jnp.array(jnp.nan, codes.dtype))
    # A word of ones is two NaN.
    nan = -1 if kind == "int4" else jnp.nan
    return codes, jax.tree.map(lambda s: jnp.where(used, s, nan), scale)


def token_bytes(head_dim: int, kind: KVKind | None) -> int:
    """Of a token and head, keys and values with what their codes need."""
    if kind is None:
        return 4 * head_dim
    return head_dim + 16 if kind == "int4" else 2 * head_dim + 8
