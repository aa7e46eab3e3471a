"""Causal attention over whole sequences that has every derivative; plain JAX on every machine.

The loops of ``reference`` run as far as the data says, which reverse mode cannot follow. Here all
bounds are static, and still hardly a key is read that comes after its query. Of n tiles of queries,
tile i sees i + 1 blocks of keys and tile n - 1 - i sees n - i: together n + 1, whatever i is. So
tiles go in such pairs, which are all of one size:

    pair 0    tile 0, block 0       tile 3, blocks 0 1 2 3
    pair 1    tile 1, blocks 0 1    tile 2, blocks 0 1 2

A pair's scores are dropped after use and computed again for a derivative. So memory is O(T).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Queries of a tile and keys of a block: on a CPU the scores of a pair stay in cache.
_MOST_TILE = 128


@jax.jit
def causal_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    B, T, H, D = q.shape
    Hk = k.shape[2]
    # A short sequence is one pair of tiles. T is no int in a program exported for any length.
    tile = min(_MOST_TILE, -(-T // 2)) if isinstance(T, int) else _MOST_TILE
    n = 2 * -(-T // (2 * tile))

    def cut(x: Array) -> Array:  # [B, T, h, D] to [n, B, Hk, h / Hk * tile, D]
        x = jnp.pad(x, ((0, 0), (0, n * tile - T), (0, 0), (0, 0)))
        x = x.reshape(B, n, tile, Hk, -1, D).transpose(1, 0, 3, 4, 2, 5)
        return x.reshape(n, B, Hk, -1, D)

    segments = jnp.pad(segment_ids, ((0, 0), (0, n * tile - T)))  # padding is of no segment
    segments = segments.reshape(B, n, tile).swapaxes(0, 1)
    attend = jax.checkpoint(partial(_attend_pair, cut(q), cut(k), cut(v), segments))
    out, lse = lax.map(attend, jnp.arange(n // 2))  # [n / 2, 2, B, Hk, G * tile, ...]

    def join(x: Array) -> Array:
        x = jnp.concatenate([x[:, 0], x[::-1, 1]])  # the second of a pair counts from the end
        x = x.reshape(n, B, Hk, H // Hk, tile, -1).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(B, n * tile, H, -1)[:, :T]

    return join(out), join(lse)[..., 0]


def _attend_pair(
    q: Float[Array, "n B K Q D"],
    k: Float[Array, "n B K tile D"],
    v: Float[Array, "n B K tile D"],
    segments: Int[Array, "n B tile"],
    i: Int[Array, ""],
) -> tuple[Float[Array, "2 B K Q D"], Float[Array, "2 B K Q"]]:
    """Tiles i and n - 1 - i; rows of a tile are its tokens, for each query head of the group."""
    (n, Q, D), tile = (q.shape[0], *q.shape[3:]), k.shape[3]
    highest = lax.Precision.HIGHEST
    step = jnp.arange(n + 1)
    of_first = step <= i
    query = jnp.where(of_first, i, n - 1 - i)  # [n + 1] tiles
    key = jnp.where(of_first, step, step - i - 1)  # [n + 1] blocks

    place = jnp.arange(tile)[None]
    query_place, key_place = query[:, None] * tile + place, key[:, None] * tile + place
    seen = (key_place[:, None, :] <= query_place[:, :, None])[:, None]  # [n + 1, 1, tile, tile]
    of_key = segments[key][:, :, None, :]
    seen = seen & (of_key == segments[query][:, :, :, None]) & (of_key > 0)
    seen = jnp.tile(seen, (1, 1, Q // tile, 1))[:, :, None]  # [n + 1, B, 1, Q, tile]

    scores = jnp.einsum(
        "nbkqd,nbktd->nbkqt", q[query], k[key], precision=highest, preferred_element_type="float32"
    )
    scores = jnp.where(seen, scores * D**-0.5, -jnp.inf)
    # The greatest score of each row, whose choice has no derivative; 0 where it sees no key.
    own = jnp.stack([of_first, ~of_first])[:, :, None, None, None]  # [2, n + 1, 1, 1, 1]
    peak = lax.stop_gradient(jnp.where(own, scores.max(axis=-1)[None], -jnp.inf).max(axis=1))
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)  # [2, B, K, Q]
    weights = jnp.exp(scores - jnp.where(own[0], peak[:1], peak[1:])[..., None])
    sums = jnp.einsum(
        "nbkqt,nbktd->nbkqd",
        weights.astype(v.dtype),
        v[key],
        precision=highest,
        preferred_element_type="float32",
    )
    total = jnp.where(own, weights.sum(axis=-1)[None], 0.0).sum(axis=1)  # [2, B, K, Q]
    acc = jnp.where(own[..., None], sums[None], 0.0).sum(axis=1)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return (acc / total[..., None]).astype(q.dtype), lse
