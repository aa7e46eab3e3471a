"""One new token a row into its pages, in place, and rotary embedding, Hopper (Mosaic GPU).

Decode, ``append_kv``. The grid is (row b, part), one warpgroup a CTA. A part is a few heads of one
kind; a warp holds a head, a lane two (D = 64: one) channels of its lower half and as many of its
upper, so that rotation and the scale of a head, or those of its halves, need no other warp:

      part      |  retrieval KV heads  |  streaming KV heads  |      query heads      |
                | rotate k, write k, v |  rotate k, write k,  |        rotate         |
                | widen kmax and kmin  |          v           |                       |
                | of ranked heads      |                      |                       |

      pool.k[h, page[b], offset[b]] = k        key_stats[h, page[b], offset[b] // L]  (L = P / g)

      place [B, 8]  |  page  |  page of the ring  |  offset  |  Kr  |  Kq  |  0  |  0  |  0  |

What must move: a few KB. It is bound by latency: the launch, the place, the old statistics that it
points to, the stores. How a layer splits its heads is read with the page ids, 32 bytes of one trip
to memory: so layers share the kernel, and no read is in front of that trip. XLA makes the places,
once a step for each split that there is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper.kv_append import (
    append_in_place,
    load_unoptimised,
    quantize,
    row_per_warp,
    unsupported,
)
from pallas_kernels.hopper.mosaic import refuse, spread_columns, store_unoptimised
from pallas_kernels.hopper.shared_kernel import Shapes
from pallas_kernels.kv_codes import kv_kind
from pallas_kernels.types import KVPages


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call of ``append_kv``: heads a CTA. ``choose_config`` gives a good one."""

    query_heads: int  # divides H
    kv_heads: int  # divides Kq, Kr and Ks: only with 1 layers of all splits share a kernel

    def __post_init__(self) -> None:
        for name in ("query_heads", "kv_heads"):
            if getattr(self, name) not in (1, 2, 4):
                raise ValueError(f"{name} must be 1, 2 or 4, got {getattr(self, name)}")


def choose_config(query_heads: int, ranked: int, retrieval: int, streaming: int) -> Config:
    """The configuration for one row's query heads and KV heads; ranked are retrieval heads."""

    def most(count: int) -> int:
        # A head a warp. Fewer leave warps that repeat another's work, which costs no time.
        return next(n for n in (4, 2, 1) if count % n == 0)

    of_one_kind = min(retrieval, streaming) == 0 and ranked in (0, retrieval)
    kv_heads = most(retrieval + streaming) if of_one_kind else 1
    return Config(query_heads=most(query_heads), kv_heads=kv_heads)


@partial(jax.jit, static_argnames=("config",))
def append_kv(
    q: Float[Array, "B H D"],
    k: Float[Array, "B Hk D"],
    v: Float[Array, "B Hk D"],
    cos: Float[Array, "B D/2"],
    sin: Float[Array, "B D/2"],
    retrieval: KVPages,
    streaming: KVPages,
    key_stats: Float[Array, "Kq N g 2 D"] | None,
    page: Int[Array, " B"],
    streaming_page: Int[Array, " B"],
    offset: Int[Array, " B"],
    *,
    config: Config | None = None,
) -> tuple[Float[Array, "B H D"], KVPages, KVPages, Float[Array, "Kq N g 2 D"] | None]:
    """``pallas_kernels.api.append_kv`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    q, k, v bf16, pages bf16 or codes, statistics bf16 or float32; D 64 or 128. Shapes are those the
    api has checked. Raises ``NotImplementedError`` for anything else.
    """
    refuse("append_kv", unsupported((q, k, v), retrieval, streaming, key_stats))
    B, H, D = q.shape
    Kr, Ks = retrieval.k.shape[0], streaming.k.shape[0]
    Kq = 0 if key_stats is None else key_stats.shape[0]
    if config is None:
        config = choose_config(H, Kq, Kr, Ks)
    # Slices of one projection, as a model has them, XLA joins for nothing. Each as an input of its
    # own would be a launch that copies it, if there is more than one row.
    vectors = jnp.concatenate([x[:, None] for x in (q, k, v)], axis=2)[:, 0]
    split = jnp.broadcast_to(jnp.array([Kr, Kq, 0, 0, 0], jnp.int32), (B, 5))
    places = jnp.concatenate([jnp.stack([page, streaming_page, offset], axis=1), split], axis=1)
    return append_in_place(
        _make_kernel,
        _Settings(config, B, H, Kr + Ks, D),
        (vectors, cos, sin, places),
        (retrieval, streaming, key_stats),
        out=(jax.ShapeDtypeStruct((B, H, D), q.dtype),),
        most_heads=Kr + Ks,
    )


class _Settings(NamedTuple):
    """What a kernel is lowered for, beside the shapes of its arrays."""

    config: Config
    rows: int  # B
    query_heads: int  # H
    heads: int  # Hk
    head_dim: int  # D


def _make_kernel(settings: _Settings, results: Shapes) -> Callable[..., Any]:
    config, B, H, Hk, D = settings
    query_heads, kv_heads = config.query_heads, config.kv_heads  # of a part
    kv_parts = Hk // kv_heads

    def append_token(
        vectors_gmem,  # [B, H + 2 * Hk, D] bf16: q, k, v
        cos_gmem,  # [B, D / 2] float32
        sin_gmem,  # [B, D / 2] float32
        places_gmem,  # [B, 8] int32: page, page of the ring, offset, Kr, Kq
        retrieval_gmem,  # KVPages of Kr heads, updated
        streaming_gmem,  # KVPages of Ks heads, updated
        stats_gmem,  # [Kq, N, g, 2, D], updated
        rotated_gmem,  # [B, H, D] bf16, output
    ):
        b, part = lax.axis_index("row"), lax.axis_index("part")

        def load(head, heads: int) -> list:
            return _load_halves(vectors_gmem, b, head, heads)

        def rotated(head, heads: int) -> list:
            return _rotate(load(head, heads), _load_angles(cos_gmem, sin_gmem, b, heads))

        @pl.when(part < kv_parts)
        def _():
            head = part * kv_heads
            # No load depends on where the heads go: all wait together.
            page, ring_page, offset, first_streaming, ranked = (places_gmem[b, i] for i in range(5))
            keys, values = rotated(H + head, kv_heads), load(H + Hk + head, kv_heads)

            def append(pool, page, stats, pool_head):
                """Writes the heads as heads ``pool_head`` on of a pool."""
                place = _Place(pl.ds(pool_head, kv_heads), page, offset)

                # A page outside the pool is written nowhere, as in the reference.
                @pl.when((page >= 0) & (page < pool.k.shape[1]))
                def _():
                    if stats is not None:
                        pl.when(pool_head < ranked)(
                            lambda: _widen_statistics(stats, place, keys, pool.k.shape[2])
                        )
                    _write(pool.k, pool.k_scale, place, keys)
                    _write(pool.v, pool.v_scale, place, values)

            @pl.when(head < first_streaming)
            def _():
                if retrieval_gmem is not None:
                    append(retrieval_gmem, page, stats_gmem, head)

            @pl.when(head >= first_streaming)
            def _():
                if streaming_gmem is not None:
                    append(streaming_gmem, ring_page, None, head - first_streaming)

        @pl.when(part >= kv_parts)
        def _():
            head = (part - kv_parts) * query_heads
            for half, channels in zip(rotated(head, query_heads), _halves(D), strict=True):
                store_unoptimised(rotated_gmem.at[b, pl.ds(head, query_heads), channels], half)

    return plgpu.kernel(
        append_token,
        out_type=results[0],
        grid=(B, kv_parts + H // query_heads),
        grid_names=("row", "part"),
        # No warp reads what another writes, or if it does (fewer heads than warps), both write the
        # same, whether the other has written before or not.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )


class _Place(NamedTuple):
    """Where the token's heads go in a pool."""

    heads: Any  # a slice of the pool's heads
    page: Any  # physical page id
    offset: Any  # of the token in the page


def _halves(head_dim: int) -> tuple[pl.Slice, pl.Slice]:
    """The lower and the upper channels of a head, which rotation pairs."""
    half = head_dim // 2
    return pl.ds(0, half), pl.ds(half, half)


def _load_halves(vectors_gmem, b, head, heads: int) -> list:
    """Two matrices [heads, D / 2], float32, of heads ``head`` on of row b."""
    D = vectors_gmem.shape[2]
    layout = row_per_warp(heads, D // 2)
    halves = [vectors_gmem.at[b, pl.ds(head, heads), channels] for channels in _halves(D)]
    return [load_unoptimised(x, layout).astype(jnp.float32) for x in halves]


def _load_angles(cos_gmem, sin_gmem, b, heads: int) -> list:
    """cos and sin [D / 2] of row b, in the layout for a matrix of ``heads`` rows."""
    layout = row_per_warp(heads, cos_gmem.shape[1]).reduce(0)
    return [load_unoptimised(x.at[b], layout) for x in (cos_gmem, sin_gmem)]


def _rotate(halves: list, angles: list) -> list:
    """Two matrices [heads, D / 2], bf16."""
    (low, high), (cos, sin) = halves, (spread_columns(x, halves[0]) for x in angles)
    rotated = low * cos - high * sin, high * cos + low * sin
    return [x.astype(jnp.bfloat16) for x in rotated]


def _write(pages, scales, place: _Place, halves: list) -> None:
    """Keys or values into ``pages``, in the form in which these and their ``scales`` have them."""
    kind, stored = kv_kind(pages.dtype), halves
    if kind is not None:
        stored, scale = quantize(halves, kind)
        jax.tree.map(lambda to, x: store_unoptimised(to.at[*place], x), scales, scale)
    size = pages.shape[3] // len(stored)
    for i, x in enumerate(stored):
        to = pages.at[*place, pl.ds(i * size, size)]
        store_unoptimised(to, x.astype(pages.dtype))


def _widen_statistics(stats, place: _Place, keys: list, page_size: int) -> None:
    """Of the logical page that the token belongs to; ``stats`` [Kq, N, g, 2, D]."""
    size = jnp.int32(page_size // stats.shape[2])
    logical_page = place.heads, place.page, lax.div(place.offset, size)
    first = lax.rem(place.offset, size) == 0
    extremes = [  # kmax and kmin of either half: destination, how to widen it, and with what
        (stats.at[*logical_page, i, channels], extreme, x.astype(stats.dtype))
        for i, extreme in enumerate((jnp.maximum, jnp.minimum))
        for x, channels in zip(keys, _halves(stats.shape[4]), strict=True)
    ]

    @pl.when(first)  # what the logical page held belongs to somebody else
    def _():
        for to, _, x in extremes:
            store_unoptimised(to, x)

    @pl.when(~first)
    def _():
        layout = row_per_warp(place.heads.size, stats.shape[4] // 2)
        old = [load_unoptimised(to, layout) for to, _, _ in extremes]  # they wait together
        for (to, extreme, x), was in zip(extremes, old, strict=True):
            store_unoptimised(to, extreme(was, x))
