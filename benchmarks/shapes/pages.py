"""Pages of random keys and values."""

import jax
import jax.numpy as jnp

from pallas_kernels.api import KVPages, quantize_kv


def random_pages(key: jax.Array, used: jax.Array, head_dim: int, int8: bool) -> KVPages:
    """NaN (int8: of a NaN scale) but for the tokens ``used`` [K, N, P] bool."""

    def tokens(key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        x = jax.random.normal(key, (*used.shape, head_dim), jnp.bfloat16)
        if not int8:
            return jnp.where(used[..., None], x, jnp.nan), None
        codes, scale = quantize_kv(x)
        return codes, jnp.where(used, scale, jnp.nan)

    k_key, v_key = jax.random.split(key)
    (k, k_scale), (v, v_scale) = jax.jit(tokens)(k_key), jax.jit(tokens)(v_key)
    return KVPages(k, v, k_scale, v_scale)
