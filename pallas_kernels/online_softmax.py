"""The online softmax of FlashAttention in plain jnp, over blocks of keys; float32."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Softmax(NamedTuple):
    """State of an online softmax over keys, for any leading axes and Q query rows."""

    peak: Float[Array, "... Q"]  # largest score so far, -inf before the first key
    total: Float[Array, "... Q"]  # sum of exp(score - peak)
    acc: Float[Array, "... Q D"]  # sum of exp(score - peak) * v


def softmax_queries(q: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """What the other functions take as ``q``: float32, with the scale of the scores."""
    return q.astype(jnp.float32) * q.shape[-1] ** -0.5


def softmax_start(q: Float[Array, "... Q D"]) -> Softmax:
    # Made from q, so that under shard_map the state varies over the mesh axes that q varies over.
    return Softmax(jnp.full_like(q[..., 0], -jnp.inf), jnp.zeros_like(q[..., 0]), jnp.zeros_like(q))


def softmax_step(
    state: Softmax,
    q: Float[Array, "... Q D"],
    k: Float[Array, "... T D"],
    v: Float[Array, "... T D"],
    visible: Array | None,  # bool, broadcastable to [..., Q, T]; None: every query sees every key
) -> Softmax:
    scores = jnp.einsum("...qd,...td->...qt", q, k, precision=lax.Precision.HIGHEST)
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
        # A weight of zero does not silence the NaN of a hidden token; a value of zero does.
        v = jnp.where(jnp.any(visible, axis=-2)[..., None], v, 0.0)
    peak = jnp.maximum(state.peak, scores.max(axis=-1))
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)  # rows that have seen no key yet
    decay = jnp.exp(state.peak - shift)
    weights = jnp.exp(scores - shift[..., None])
    new = jnp.einsum("...qt,...td->...qd", weights, v, precision=lax.Precision.HIGHEST)
    return Softmax(
        peak, state.total * decay + weights.sum(axis=-1), state.acc * decay[..., None] + new
    )


def softmax_finish(state: Softmax) -> tuple[Array, Array]:
    """(out, lse); a row that saw no key gives out 0 and lse -inf."""
    empty = state.total == 0.0
    total = jnp.where(empty, 1.0, state.total)
    lse = jnp.where(empty, -jnp.inf, state.peak + jnp.log(total))
    return state.acc / total[..., None], lse
