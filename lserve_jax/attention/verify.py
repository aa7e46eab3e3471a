"""Verification of drafted tokens: dense attention of several tokens a row, and what it confirms.

In exact mode every head keeps all pages. Sparse steps draft tokens; then one dense pass runs the
last confirmed token and its drafts together, writes their true keys and values over those of the
drafts, and says which drafts dense attention would have produced (speculative decoding: Leviathan
et al., arXiv 2211.17192; self-speculation by sparse attention: MagicDec, arXiv 2408.11049).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lserve_jax.attention.cache import CacheSpec, LayerCache
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Attend
from lserve_jax.model.rope import layer_angles, rotary_angles
from pallas_kernels import api
from pallas_kernels.api import Backend


def verify_attend(
    config: ModelConfig,
    spec: CacheSpec,
    page_table: Int[Array, "B M"],
    position: Int[Array, " B"],
    count: Int[Array, " B"],
    num_tokens: int,
    *,
    backend: Backend,
) -> Attend:
    """``num_tokens`` (T) tokens a row, of which the first ``count`` exist, from ``position`` on.

    Each attends everything before it and itself. Their keys and values are written; statistics are
    not, since some of the tokens may be rejected. In place of a layer's cache the function returns
    the pair of the cache and the rotated keys of its ranked heads, ``[B, T, Kq, D]``.
    """
    B, T, P = position.shape[0], num_tokens, spec.page_size
    place = position[:, None] + jnp.arange(T)[None]  # [B, T]
    flat = place.reshape(-1)
    cos, sin = rotary_angles(config, flat[:, None], flat + 1)  # [B * T, 1, D / 2]
    page = jnp.take_along_axis(page_table, place // P, axis=1, mode="clip")
    page = jnp.where(jnp.arange(T)[None] < count[:, None], page, -1).reshape(-1)
    position = jnp.where(count > 0, position, 0)  # a row of no token stands at -T below
    gap = (T - count)[:, None]
    last, first = (
        jnp.clip(jnp.arange(T)[None] + shift, 0, T - 1)[:, :, None, None] for shift in (-gap, gap)
    )

    def attend(
        layer: int, q: Array, k: Array, v: Array, cache: LayerCache
    ) -> tuple[Array, tuple[LayerCache, Array]]:
        angles = layer_angles(config, layer, cos, sin)
        Kq = spec.heads.num_ranked[layer]
        q, k, v = (x.reshape(B * T, *x.shape[2:]) for x in (q, k, v))
        flat_cos, flat_sin = (x[:, 0] for x in angles)
        keys = api.apply_rotary(k[:, None, :Kq], *angles).reshape(B, T, Kq, config.head_dim)
        q, retrieval, streaming, _ = api.append_kv(
            q,
            k,
            v,
            flat_cos,
            flat_sin,
            cache.retrieval,
            cache.streaming,
            None,
            page,
            jnp.full_like(page, -1),  # no head streams
            flat % P,
            backend=backend,
        )
        # The tokens that exist go last: the op reads up to the last query, and no further.
        q = jnp.take_along_axis(q.reshape(B, T, *q.shape[1:]), last, axis=1)
        out, _ = api.verify_attention(
            q, retrieval, page_table, position + count - T, backend=backend
        )
        out = jnp.take_along_axis(out, first, axis=1)
        cache = dataclasses.replace(cache, retrieval=retrieval, streaming=streaming)
        return out, (cache, keys)

    return attend


def confirm(
    spec: CacheSpec,
    cache: LayerCache,
    keys: Float[Array, "B T Kq D"],
    page_table: Int[Array, "B M"],
    position: Int[Array, " B"],
    confirmed: Int[Array, " B"],
) -> LayerCache:
    """Takes the first ``confirmed`` of the verified tokens' keys into the statistics.

    ``keys`` are those of positions ``position`` on, as ``verify_attend`` returns them. The first
    token of a logical page assigns, others widen, as in ``api.append_kv``.
    """
    stats = cache.key_stats
    if stats is None:
        return cache
    T, g, M = keys.shape[1], stats.shape[2], page_table.shape[1]
    U = spec.page_size // g  # tokens of a logical page
    keys = keys.astype(stats.dtype).transpose(2, 0, 1, 3)  # [Kq, B, T, D]
    place = position[:, None] + jnp.arange(T)[None]
    for i in range((T + U - 2) // U + 1):  # logical pages that T tokens can touch
        number = position // U + i
        inside = (place // U == number[:, None]) & (jnp.arange(T)[None] < confirmed[:, None])
        new_max = jnp.where(inside[None, :, :, None], keys, -jnp.inf).max(axis=2)
        new_min = jnp.where(inside[None, :, :, None], keys, jnp.inf).min(axis=2)
        page = jnp.take_along_axis(page_table, number[:, None] // g, axis=1, mode="clip")[:, 0]
        old = stats[:, page, number % g]  # [Kq, B, 2, D]
        begins = (number * U >= position)[None, :, None]
        widened = jnp.stack(
            [
                jnp.where(begins, new_max, jnp.maximum(old[:, :, 0], new_max)),
                jnp.where(begins, new_min, jnp.minimum(old[:, :, 1], new_min)),
            ],
            axis=2,
        )
        page = jnp.where(inside.any(axis=1) & (number < M * g), page, stats.shape[1])
        stats = stats.at[:, page, number % g].set(widened, mode="drop")  # out of range: dropped
    return dataclasses.replace(cache, key_stats=stats)
