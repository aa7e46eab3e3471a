"""From page scores to the page lists that decode attention reads (LServe, decoding stage).

A ranked head reads its best pages, as many as its budget says, chosen at a selection and reused
until the next one, and the *tail*: every page that holds tokens written since just before that
selection. So no token can fall between a reused list and the newest page. A dense head reads all
pages, a streaming head its window.

Page numbers count a sequence's pages from 0; physical ids index a pool. A page here is what decode
lists, U tokens (``CacheSpec.selected_page_size``): where that is less than the cache's page of P,
both pools count as pools of P / U times as many pages, without a copy:

    cache   page 0                    page 1                    page 2
    lists   | 0  | 1  | 2  | 3  |     | 4  | 5  | 6  | 7  |     | 8  | 9  | 10 | 11 |
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lserve_jax.attention.cache import CacheSpec
from lserve_jax.attention.policy import Candidates, Select
from pallas_kernels import api
from pallas_kernels.api import PageList


def first_tail_page(position: Int[Array, " B"], page_size: int) -> Int[Array, " B"]:
    """The page of the newest history token when the token at ``position`` selects.

    Not the page of ``position`` itself: when that token opens a new page, the full page before
    it must still be attended whatever its score.
    """
    return jnp.maximum(position - 1, 0) // page_size


def all_pages(spec: CacheSpec, page_table: Int[Array, "B M"]) -> Int[Array, "B 1 L"]:
    """Every page of a sequence in order, as listed pages: what dense heads read."""
    cut = spec.page_size // spec.selected_page_size
    pages = page_table[:, :, None] * cut + jnp.arange(cut)[None, None]
    return pages.reshape(page_table.shape[0], 1, -1).astype(jnp.int32)


def choose_pages(
    spec: CacheSpec,
    layer: int,
    select: Select,
    q: Float[Array, "B Hq D"],
    scores: Float[Array, "B Kq N"],
    key_stats: Float[Array, "Kq pool g 2 D"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
    tail: Int[Array, " B"],
) -> tuple[Int[Array, "B Kq"], Int[Array, "B Kq R"]]:
    """How many pages each ranked head gets by a policy of one's own, and which.

    Under ``value_checks`` what is out of range is reported; else counts and pages are clamped.
    Raises ``ValueError`` for other shapes or dtypes than those of ``Select``.
    """
    B, Kq, N = scores.shape
    most = min(spec.num_ranked(layer), N)
    stats = key_stats[:, page_table]  # [Kq, B, M, g, 2, D]
    _, _, M, g, _, D = stats.shape
    counts, pages = select(
        Candidates(
            layer=layer,
            most=most,
            query=q,
            scores=scores,
            key_stats=stats.swapaxes(0, 1).reshape(B, Kq, N, M * g // N, 2, D),
            length=length,
            candidates=tail,
            wanted=spec.wanted_pages(layer, tail),
        )
    )
    counts, pages = jnp.asarray(counts), jnp.asarray(pages)
    whole = jnp.issubdtype(counts.dtype, jnp.integer) and jnp.issubdtype(pages.dtype, jnp.integer)
    if counts.shape != (B, Kq) or pages.shape[:-1] != (B, Kq) or not whole:
        raise ValueError(
            f"select must return integers [{B}, {Kq}] and [{B}, {Kq}, n], got "
            f"{counts.dtype} {counts.shape} and {pages.dtype} {pages.shape}"
        )
    if pages.shape[-1] > most:
        raise ValueError(f"select returns {pages.shape[-1]} pages a head, it may get {most}")
    counts, pages = counts.astype(jnp.int32), pages.astype(jnp.int32)
    api.check_selection(counts, pages, tail)
    counts = jnp.clip(counts, 0, jnp.minimum(tail[:, None], pages.shape[-1]))
    return counts, jnp.clip(pages, 0, jnp.maximum(tail[:, None, None] - 1, 0))


def retrieval_pages(
    spec: CacheSpec,
    layer: int,
    selected: Int[Array, "B Kq R"] | None,
    tail: Int[Array, " B"],
    page_table: Int[Array, "B M"],
    counts: Int[Array, "B Kq"] | None = None,
) -> Int[Array, "B Kr L"]:
    """Physical ids of what each head lists, then of the tail as far as reuse can let it grow.

    ``selected`` has each ranked head's ``counts`` first, None: its ``spec.wanted_pages``; no head
    ranks where it is None itself. Behind
    the ranked heads dense heads list all pages in order, and windowed heads sinks and newest pages.
    ``page_table`` has the cache's pages; selected, ``tail`` and what is returned are listed pages.
    Made once a selection: until the next one only the number of attended tokens grows.
    """
    heads, L = spec.heads, spec.num_listed(layer)
    everything = all_pages(spec, page_table)
    B, tail = len(tail), tail[:, None, None]
    entry = jnp.arange(L)[None, None]

    def listed(chosen: Array, count: Array) -> Int[Array, "B K L"]:
        """The pages ``chosen``, ``count`` [B, K, 1] of them, then the tail."""
        chosen = chosen[:, :, :L]
        chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, L - chosen.shape[2])))
        number = jnp.where(entry < count, chosen, tail + entry - count)
        # Entries past the sequence's end name some valid page; they are not attended.
        number = jnp.clip(number, 0, spec.selected_pages_per_sequence - 1)
        return jnp.take_along_axis(everything, number, axis=2, mode="clip")

    pages = [jnp.broadcast_to(everything[:, :, :L], (B, heads.num_dense[layer], L))]
    if selected is not None:
        wanted = spec.wanted_pages(layer, tail[:, 0, 0]) if counts is None else counts
        pages.insert(0, listed(selected, jnp.minimum(tail, wanted[:, :, None])))
    if heads.num_windowed[layer]:
        sinks, local = spec.window_pages
        place = jnp.arange(sinks + local)[None, None]
        newest = jnp.where(place < sinks, place, tail - sinks - local + place)
        window = jnp.where(tail > sinks + local, newest, place)
        window = listed(window, jnp.minimum(tail, sinks + local))
        pages.append(jnp.broadcast_to(window, (B, heads.num_windowed[layer], L)))
    return jnp.concatenate(pages, axis=1)


def chosen_pages(
    spec: CacheSpec, layer: int, listed: Int[Array, "B Kr L"], tail: Int[Array, " B"]
) -> Int[Array, "B Kq R"]:
    """Of the lists that ``retrieval_pages`` made, what ranked heads have before their tail.

    Each head's R = ``spec.num_ranked`` are the physical ids that it chose, then -1.
    """
    Kq, R = spec.heads.num_ranked[layer], spec.num_ranked(layer)
    count = jnp.minimum(tail[:, None], spec.wanted_pages(layer, tail))[:, :, None]
    return jnp.where(jnp.arange(R)[None, None] < count, listed[:, :Kq, :R], -1)


def retrieval_stop(
    spec: CacheSpec,
    layer: int,
    tail: Int[Array, " B"],
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
    counts: Int[Array, "B Kq"] | None = None,
) -> Int[Array, "B Kr"]:
    """Tokens that a layer's retrieval heads attend: pages listed and the tail up to ``position``.

    ``tail`` is ``first_tail_page`` at the last selection, ``counts`` as in ``retrieval_pages``. All
    listed pages but the newest are full, so the attended places of the list are contiguous. Dense
    heads attend everything up to ``position``.
    """
    heads, U = spec.heads, spec.selected_page_size
    tail, position = tail[:, None], position[:, None]
    windowed = jnp.full((1, heads.num_windowed[layer]), sum(spec.window_pages))
    chosen = spec.wanted_pages(layer, tail[:, 0]) if counts is None else counts
    ranked, windowed = (
        (jnp.minimum(tail, listed) + position // U - tail) * U + position % U + 1
        for listed in (chosen, windowed)
    )
    dense = jnp.broadcast_to(position + 1, (len(position), heads.num_dense[layer]))
    stop = jnp.concatenate([ranked, dense, windowed], axis=1)
    return jnp.where(active[:, None], stop, 0).astype(jnp.int32)


def window_list(
    spec: CacheSpec,
    slot: Int[Array, " B"],
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> PageList:
    """Sink and local pages of each slot: positions below ``sink`` or above ``position - local``.

    One list, shared by all streaming heads.

    The oldest local page is usually visible only from some token on, so it comes first and
    ``start`` skips its beginning; sinks and the other local pages follow, the newest last.
    """
    window, P, sinks = spec.decode_window, spec.page_size, spec.decode_window.sink_pages
    newest = position // P
    first_visible = jnp.maximum(position - window.local + 1, 0)
    oldest = jnp.maximum(first_visible // P, sinks)
    num_local = jnp.maximum(newest - oldest + 1, 0)
    num_sinks = jnp.minimum(sinks, newest + 1)
    entry = jnp.arange(window.num_pages)[None]  # [1, R]

    def column(x: Array) -> Array:
        return x[:, None]  # [B, 1]

    local = column(oldest) + entry - column(num_sinks)  # sinks first, then local pages
    sinks_first = jnp.where(entry < column(num_sinks), entry, local)
    rotated = jnp.where(entry == 0, column(oldest), entry - 1)  # oldest local, then sinks
    oldest_first = jnp.where(entry <= column(num_sinks), rotated, local)
    number = jnp.where(column(num_local > 1), oldest_first, sinks_first)
    count = num_sinks + num_local
    number = jnp.where(entry < column(count), number, 0)
    pages = column(slot) * window.num_pages + window.index(number)
    # With a single local page the window starts at its edge (local >= P), so nothing is skipped.
    start = jnp.where(num_local > 1, jnp.maximum(first_visible - oldest * P, 0), 0)
    stop = (count - 1) * P + position % P + 1
    start, stop = jnp.where(active, start, 0), jnp.where(active, stop, 0)
    cut = P // spec.selected_page_size
    pages = (pages[:, :, None] * cut + jnp.arange(cut)[None, None]).reshape(len(pages), -1)
    return PageList(pages[:, None].astype(jnp.int32), column(start), column(stop))
