"""How much sampled queries attend to each block of keys, in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.kv_codes import values
from pallas_kernels.types import BLOCK_KEYS, KVPages

_MOST_SCORES = 1 << 24  # at a time: bounds memory to 64 MiB


def block_scores(
    queries: Float[Array, "K R D"],
    last: Int[Array, " R"],
    keys: Float[Array, "T K D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    *,
    most_heads: int | None = None,
) -> Float[Array, "K R N"]:
    """Logarithm of the sum of exponentials of the scores with each block's keys, float32.

    Blocks are those of the history, as many as ``page_table`` can hold, of which each query sees
    what lies before ``start``, then those of the chunk's ``keys``, of which it sees those up to
    ``last``: -1 for none. -inf where it sees no key of a block.
    """
    del most_heads  # for kernels
    (K, R, _), T = queries.shape, keys.shape[0]
    most = max(_MOST_SCORES // (K * R) // BLOCK_KEYS, 1) * BLOCK_KEYS
    history = _history_scores(queries, pages, page_table, start, most)
    tiles = -(-T // BLOCK_KEYS)
    span = min(most, tiles * BLOCK_KEYS)
    spans = -(-tiles * BLOCK_KEYS // span)
    keys = jnp.pad(keys, ((0, spans * span - T), (0, 0), (0, 0)))
    keys = keys.reshape(spans, span, K, -1).swapaxes(1, 2)

    def of_span(args: tuple[Array, Array]) -> Array:
        index, of_chunk = args
        seen = index * span + jnp.arange(span)[None] <= last[:, None]
        return _scores(queries, of_chunk, seen[None])

    chunk = jnp.moveaxis(lax.map(of_span, (jnp.arange(spans), keys)), 0, 2)
    return jnp.concatenate([history, chunk.reshape(K, R, -1)[..., :tiles]], axis=-1)


def _scores(
    queries: Float[Array, "K R D"], keys: Float[Array, "K n D"], seen: Bool[Array, "1 #R n"]
) -> Float[Array, "K R n/128"]:
    scores = jnp.einsum("krd,knd->krn", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * queries.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.logsumexp(scores.reshape(*scores.shape[:2], -1, BLOCK_KEYS), axis=-1)


def _history_scores(
    queries: Float[Array, "K R D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    start: Int[Array, ""],
    most: int,
) -> Float[Array, "K R N"]:
    """Of all blocks that the table can hold, of ``most`` keys at a time."""
    (K, R, D), P = queries.shape, pages.k.shape[2]
    blocks = -(-page_table.shape[0] * P // BLOCK_KEYS)
    span = min(most, blocks * BLOCK_KEYS)
    spans, per_span = -(-blocks * BLOCK_KEYS // span), span // BLOCK_KEYS
    table = jnp.pad(page_table, (0, spans * span // P - page_table.shape[0]))

    def step(i: Array, found: Array) -> Array:
        ids = lax.dynamic_slice_in_dim(table, i * (span // P), span // P)
        keys = values(*jax.tree.map(lambda x: x[:, ids], (pages.k, pages.k_scale)))
        seen = i * span + jnp.arange(span) < start
        keys = keys.astype(queries.dtype).reshape(K, span, D)
        scores = _scores(queries, keys, seen[None, None])
        return lax.dynamic_update_slice_in_dim(found, scores, i * per_span, axis=2)

    # Made from the queries: under shard_map it varies over the mesh axes that they vary over.
    nothing = jnp.full_like(queries[..., :1], -jnp.inf, jnp.float32)
    nothing = jnp.broadcast_to(nothing, (K, R, spans * per_span))
    found = lax.fori_loop(0, (start + span - 1) // span, step, nothing)
    return found[..., :blocks]
