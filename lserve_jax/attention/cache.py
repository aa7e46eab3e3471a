"""The two-way paged KV cache (LServe, system overview) and the addresses in it.

One layer, Kr retrieval and Ks streaming KV heads, S slots (sequences), page size P; of the
retrieval heads the first Kq rank their pages, and the others read all of them:

    retrieval pool   k, v    [Kr, N, P, D]        shared by all slots, page by page
                     stats   [Kq, N, g, 2, D]     kmax and kmin of each of a page's g logical pages

                     page 0    page 1    page 2   ...   page N-1
                    [slot 1 ] [slot 0 ] [ free ]        [slot 1 ]
                         ^---------^---------------------------^---- page_table[slot, position // P]

    streaming pool   k, v    [Ks, Q, P, D]        R pages for every slot, always the same ones

                     slot s:  [sink 0][sink 1] [local a][local b][local c]
                               positions below  position p is in local page
                               sink, kept       (p // P - sink_pages) mod local_pages; the
                               for ever         oldest page is overwritten by the newest

    prefill window   k, v    [Ks, W, P, D]        pages of what streaming heads see while a prompt
                                                  is read: its sinks and a larger local part, and
                                                  those of prompts that others can go on from.

                     page 0    page 1    page 2   ...   page W-1
                    [sink 0 ] [local 7] [ free ]        [sink 1 ]
                         ^---------^---------------------------^---- window_table[position // P]

A page id means the same page in every layer's retrieval pool, so a sequence has one page table;
pool bytes differ between layers because Kr does. So it is with the pages of prefill windows: the
prompts that are being read have a table each of those that their streaming heads can see. K and V
are separate arrays so that updating one never copies the other. Keys are stored rotated, at
absolute positions, so a stale key is recognised by its position. Codes of 8 or 4 bits have scales
per token and head beside them (``pallas_kernels.types.KVPages``).
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lserve_jax.attention.budgets import HeadBudgets
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.model.config import ModelConfig
from pallas_kernels.api import MOST_SELECTED_PAGES, KVKind, KVPages, quantize_kv, store_kv

KVDtype = Literal["auto"] | KVKind
DraftSource = Literal["sparse", "ngram"]
# A head with a share lists at least so many tokens: sinks and the newest tokens alone are most of
# what a short sequence needs, and reading them costs little.
LEAST_SHARE_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class StreamingWindow:
    """Pages that hold a sequence's first ``sink`` and last ``local`` tokens, and no others.

    The sink pages stay; the local pages are a ring, in which the newest overwrites the oldest.
    """

    sink: int  # tokens, a multiple of page_size
    local: int  # tokens, a multiple of page_size; the newest token counts
    page_size: int

    @property
    def sink_pages(self) -> int:
        return self.sink // self.page_size

    @property
    def local_pages(self) -> int:
        """One more than the tokens fill: a window that starts mid-page touches an extra page."""
        return self.local // self.page_size + 1

    @property
    def num_pages(self) -> int:
        return self.sink_pages + self.local_pages

    @property
    def behind_pages(self) -> int:
        """Of what fell out of the window, pages that a prompt in prefill and the prefix tree keep.

        Half a window: prompts that end differently go on from where they part, if that is no
        further from their ends.
        """
        return self.local // self.page_size // 2 + 1

    @property
    def pages_with_behind(self) -> int:
        return self.num_pages + self.behind_pages

    def index(self, page: Int[Array, "..."]) -> Int[Array, "..."]:
        """The window's page (0 .. num_pages-1) for a page number of the sequence."""
        wrapped = self.sink_pages + (page - self.sink_pages) % self.local_pages
        return jnp.where(page < self.sink_pages, page, wrapped)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything static about a cache: sizes, addressing, which pages decode reads.

    Hashable, so that jitted functions take it as a static argument.
    """

    page_size: int
    num_pages: int  # N, of every retrieval pool
    pages_per_sequence: int  # M, width of the page table
    max_num_seqs: int  # S
    num_window_pages: int  # W, of every pool of prefill windows
    heads: HeadBudgets  # retrieval heads of each layer, and what they may read
    kv_dtype: KVDtype
    decode_window: StreamingWindow  # what streaming heads keep while decoding
    prefill_window: StreamingWindow  # what they see while a prompt is prefilled
    # None: decode attends every page (dense). Otherwise how pages are selected.
    sparsity: SparsityConfig | None
    # K: in exact mode up to so many tokens are drafted, and dense attention verifies them. None:
    # there is no verification, and sparse steps decide.
    max_drafts: int | None = None
    # Where drafts come from: sparse steps, or what followed the newest tokens before.
    draft: DraftSource = "sparse"

    @property
    def selected_page_size(self) -> int:
        """U: tokens of a page in decode's lists: a selected page, or a page where none is."""
        if self.sparsity is None:
            return self.page_size
        return self.sparsity.resolved_selected_page_size

    @property
    def selected_pages_per_sequence(self) -> int:
        return self.pages_per_sequence * (self.page_size // self.selected_page_size)

    @property
    def least_wanted(self) -> int:
        """Pages that a head with a share ranks at least, however short the sequence."""
        assert self.sparsity is not None  # else nothing has a share
        return max(
            self.sparsity.forced_sink_pages + 1, LEAST_SHARE_TOKENS // self.selected_page_size - 1
        )

    def most_wanted(self, layer: int) -> tuple[int, ...]:
        """Pages that each ranked head of a layer gets by score in the longest sequence."""
        total, heads = self.selected_pages_per_sequence, self.heads
        if heads.shares is None:
            if heads.token_budget is None:
                return ()
            budget = heads.token_budget // self.selected_page_size
            return (min(budget - 1, total),) * heads.num_ranked[layer]
        most = min(MOST_SELECTED_PAGES, total)
        return tuple(  # rounded as in ``wanted_pages``, which this bounds
            min(max(math.floor(share * total + 0.5) - 1, self.least_wanted), most)
            for share in heads.shares[layer]
        )

    def wanted_pages(self, layer: int, tail: Int[Array, " B"]) -> Int[Array, "B Kq"]:
        """Pages that each ranked head gets by score where so many full pages lie before the tail.

        The rest of its budget is the newest pages. A head with a share gets that of the sequence's
        pages at the selection, the tail's page among them.
        """
        most = jnp.array(self.most_wanted(layer), jnp.int32)[None]
        if self.heads.shares is None:
            return jnp.broadcast_to(most, (tail.shape[0], most.shape[1]))
        shares = jnp.array(self.heads.shares[layer], jnp.float32)[None]
        wanted = jnp.floor(shares * (tail + 1)[:, None].astype(jnp.float32) + 0.5)
        return jnp.clip(wanted.astype(jnp.int32) - 1, self.least_wanted, most)

    def prunes(self, tail: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Whether some head lists less than all of a sequence."""
        heads, nobody = self.heads, jnp.zeros(tail.shape, bool)
        ranking = [layer for layer, count in enumerate(heads.num_ranked) if count]
        if not ranking:
            return nobody
        if heads.shares is None:
            return tail > self.wanted_pages(ranking[0], tail)[:, 0]
        poorest = min(ranking, key=lambda layer: min(heads.shares[layer]))
        return tail > self.wanted_pages(poorest, tail).min(axis=1)

    def tokens_listed(self, length: int) -> float:
        """Tokens that a retrieval head attends in a sequence of ``length``, on average."""
        heads, total, window = self.heads, 0.0, self.decode_window
        for layer, ranked in enumerate(heads.num_ranked):
            total += heads.num_dense[layer] * length
            total += heads.num_windowed[layer] * min(window.sink + window.local, length)
            if heads.shares is None:
                total += ranked * min(heads.token_budget or 0, length)
            else:
                least = min(LEAST_SHARE_TOKENS, length)
                most = MOST_SELECTED_PAGES * self.selected_page_size
                total += sum(min(max(x * length, least), most) for x in heads.shares[layer])
        return total / max(sum(heads.num_retrieval), 1)

    def num_ranked(self, layer: int) -> int:
        """R: the most pages that any ranked head of the layer gets by score."""
        return max(self.most_wanted(layer), default=0)

    @property
    def forced_sink_pages(self) -> int:
        """First listed pages that selection always keeps."""
        if self.sparsity is None:
            return 0
        return min(self.sparsity.forced_sink_pages, self.selected_pages_per_sequence)

    @property
    def lower_bound_weight(self) -> float:
        """Share of the lower bound in a page's score; dense attention scores nothing."""
        return 0.0 if self.sparsity is None else self.sparsity.lower_bound_weight

    @property
    def _tail_pages(self) -> int:
        """From the last token before a selection to the last step that reuses it."""
        return 1 + -(-self.reuse_interval // self.selected_page_size)

    @property
    def window_pages(self) -> tuple[int, int]:
        """Sink and newest pages that a windowed head lists before the tail."""
        sinks, local = self.decode_window.sink, self.decode_window.local
        return sinks // self.selected_page_size, local // self.selected_page_size

    def lists_pages(self, layer: int) -> bool:
        """Whether some head of a layer lists other pages than all of them."""
        return self.heads.num_ranked[layer] + self.heads.num_windowed[layer] > 0

    def num_listed(self, layer: int) -> int:
        """L for retrieval heads: pages listed and those with tokens since the last selection.

        All pages where a head reads everything.
        """
        total = self.selected_pages_per_sequence
        if self.heads.num_dense[layer] or not self.lists_pages(layer):
            return total
        windowed = sum(self.window_pages) if self.heads.num_windowed[layer] else 0
        return min(max(self.num_ranked(layer), windowed) + self._tail_pages, total)

    def most_tokens(self, layer: int, num_streaming: int) -> tuple[int, ...]:
        """Tokens that each KV head of a layer lists at most, in the order of its pools."""
        total = self.selected_pages_per_sequence
        windowed = (sum(self.window_pages),) * self.heads.num_windowed[layer]
        ranked, windowed = (
            tuple(min(most + self._tail_pages, total) for most in listed)
            for listed in (self.most_wanted(layer), windowed)
        )
        pages = (*ranked, *(total,) * self.heads.num_dense[layer], *windowed)
        window = self.decode_window.num_pages * self.page_size
        return (*(n * self.selected_page_size for n in pages), *(window,) * num_streaming)

    def is_block_sparse(self, prompt_length: int) -> bool:
        """Whether retrieval heads read a prompt of so many tokens by blocks that are chosen."""
        if self.sparsity is None or self.sparsity.prefill == "causal":
            return False
        return prompt_length >= self.sparsity.prefill_min_tokens

    @property
    def reuse_interval(self) -> int:
        """Steps from one selection to the next. In exact mode there is one for each draft."""
        if self.max_drafts is not None:
            return max(self.max_drafts, 1)
        return 1 if self.sparsity is None else self.sparsity.reuse_interval

    @property
    def burst_unit(self) -> int:
        """A burst's steps are a multiple of this, so that every burst begins with a selection."""
        return 1 if self.max_drafts is not None else self.reuse_interval

    @property
    def num_streaming_pages(self) -> int:
        """Q: the decode windows of all slots."""
        return self.max_num_seqs * self.decode_window.num_pages


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Cached keys and values of one layer, for all slots."""

    retrieval: KVPages  # [Kr, N, P, D]
    key_stats: Float[Array, "Kq N g 2 D"] | None  # kmax, kmin of ranked heads; None: there are none
    streaming: KVPages  # [Ks, Q, P, D]
    prefill_window: KVPages  # [Ks, W, P, D], in the compute dtype
    # What the last selection lists, as ``retrieval_pages`` numbers it; None: heads list all pages.
    listed: Int[Array, "S Kr L"] | None
    # With a policy of one's own: how many pages each ranked head chose at the last selection.
    counts: Int[Array, "S Kq"] | None = None


def make_spec(
    config: ModelConfig,
    *,
    sparsity: SparsityConfig | None,
    heads: HeadBudgets,
    max_model_len: int,
    max_num_seqs: int,
    num_pages: int,
    max_prefixes: int,
    kv_dtype: KVDtype,
    exact: tuple[int, DraftSource] | None = None,
) -> CacheSpec:
    """Sizes of a cache for sequences of up to ``max_model_len`` tokens.

    ``max_prefixes``: prompts that others can go on from, beside the one that is read, for whose
    windows there is room. ``exact``: most drafts and where they come from, in exact mode.
    """
    max_drafts, draft = (None, "sparse") if exact is None else exact
    page_size = SparsityConfig().page_size if sparsity is None else sparsity.page_size
    pages_per_sequence = -(-max_model_len // page_size)

    def window(sink: int, local: int) -> StreamingWindow:
        # No window needs to be longer than the longest sequence.
        longest = pages_per_sequence * page_size
        return StreamingWindow(
            sink=min(sink, longest), local=min(local, longest), page_size=page_size
        )

    sizes = SparsityConfig() if sparsity is None else sparsity
    prefill_window = window(sizes.prefill_sink, sizes.prefill_local)
    num_window_pages = prefill_window.num_pages
    if max_prefixes:  # a prompt that will be remembered keeps more, and so does the tree of each
        num_window_pages = (1 + max_prefixes) * prefill_window.pages_with_behind
    return CacheSpec(
        page_size=page_size,
        num_pages=num_pages,
        pages_per_sequence=pages_per_sequence,
        max_num_seqs=max_num_seqs,
        num_window_pages=num_window_pages,
        heads=heads,
        kv_dtype=kv_dtype,
        decode_window=window(sizes.decode_sink, sizes.decode_local),
        prefill_window=prefill_window,
        sparsity=sparsity,
        max_drafts=max_drafts,
        draft=draft,
    )


def layer_cache_shapes(config: ModelConfig, spec: CacheSpec, layer: int, dtype) -> LayerCache:
    """The cache of one layer as ``jax.ShapeDtypeStruct`` leaves; ``dtype`` is the compute dtype."""
    D, P = config.head_dim, spec.page_size
    Kr, Kq = spec.heads.num_retrieval[layer], spec.heads.num_ranked[layer]
    Ks = config.num_key_value_heads - Kr
    array: Any = jax.ShapeDtypeStruct

    def pages(heads: int, count: int, stored: Any) -> KVPages:
        return jax.tree.map(lambda x: array((heads, count, P, *x.shape), x.dtype), stored)

    number = array((D,), dtype)
    plain = KVPages(number, number)
    stored = _stored_token(spec, D, dtype)
    key_stats = listed = counts = None
    if spec.lists_pages(layer):
        listed = array((spec.max_num_seqs, Kr, spec.num_listed(layer)), jnp.int32)
    if Kq > 0:
        assert spec.sparsity is not None  # nothing is ranked in dense attention
        g = P // spec.sparsity.logical_page_size
        key_stats = array((Kq, spec.num_pages, g, 2, D), dtype)
        if spec.sparsity.select is not None:
            counts = array((spec.max_num_seqs, Kq), jnp.int32)
    return LayerCache(
        retrieval=pages(Kr, spec.num_pages, stored),
        key_stats=key_stats,
        streaming=pages(Ks, spec.num_streaming_pages, stored),
        prefill_window=pages(Ks, spec.num_window_pages, plain),
        listed=listed,
        counts=counts,
    )


def _stored_token(spec: CacheSpec, head_dim: int, dtype) -> KVPages:
    """What a pool keeps of one token and head, as ``jax.ShapeDtypeStruct`` leaves."""
    number: Any = jax.ShapeDtypeStruct((head_dim,), dtype)
    if spec.kv_dtype == "auto":
        return KVPages(number, number)
    codes, scale = jax.eval_shape(partial(quantize_kv, kind=spec.kv_dtype), number)
    return KVPages(codes, codes, scale, scale)


def token_bytes(spec: CacheSpec, head_dim: int, dtype) -> int:
    """Of K and V of one token and head, with their scales."""
    leaves = jax.tree.leaves(_stored_token(spec, head_dim, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def init_layer_cache(config: ModelConfig, spec: CacheSpec, layer: int, dtype) -> LayerCache:
    """An empty cache of one layer; ``dtype`` is the model's compute dtype."""
    shapes = layer_cache_shapes(config, spec, layer, dtype)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def cache_bytes(config: ModelConfig, spec: CacheSpec, dtype) -> dict[str, int]:
    """Bytes of each part of a cache, all layers together."""
    totals = {"retrieval": 0, "key_stats": 0, "streaming": 0, "prefill_window": 0, "listed": 0}
    for layer in range(config.num_hidden_layers):
        shapes = layer_cache_shapes(config, spec, layer, dtype)
        for part in totals:
            leaves = jax.tree.leaves(getattr(shapes, part))
            totals[part] += sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return totals


@partial(jax.jit, static_argnames=("spec",))
def fill_decode_windows(
    cache: LayerCache,
    spec: CacheSpec,
    slot: Int[Array, " R"],
    length: Int[Array, " R"],
    window_table: Int[Array, "R M"],
) -> LayerCache:
    """At the end of R prompts of ``length`` tokens: keep of their windows what decode will read.

    Whole pages are copied, quantised if the cache holds codes: the sinks, and the newest pages, as
    many as the decode window has. ``window_table`` says where they lie in the prefill window. Pages
    the sequence does not have are dropped, and so are those of a slot that there is not. Jitted, so
    that layers and programs share its traces.
    """
    if cache.prefill_window.k.shape[0] == 0:
        return cache
    window, newest = spec.decode_window, (length[:, None] - 1) // spec.page_size
    sinks = jnp.broadcast_to(jnp.arange(window.sink_pages), (len(slot), window.sink_pages))
    number = jnp.concatenate(
        [sinks, newest - jnp.arange(window.local_pages)[None]], axis=1
    )  # page numbers within the sequence
    is_local = jnp.arange(window.num_pages)[None] >= window.sink_pages
    exists = jnp.where(is_local, number >= window.sink_pages, number <= newest)
    number = jnp.maximum(number, 0)
    source = jnp.take_along_axis(
        window_table, jnp.minimum(number, window_table.shape[1] - 1), axis=1
    ).ravel()
    target = slot[:, None] * window.num_pages + window.index(number)
    # Out of range: dropped.
    target = jnp.where(exists, target, cache.streaming.k.shape[1]).ravel()

    def copy(pool: Array, pages: Array) -> Array:
        return pool.at[:, target].set(pages, mode="drop")

    k, v = cache.prefill_window.k[:, source], cache.prefill_window.v[:, source]  # [Ks, n, P, D]
    streaming = jax.tree.map(copy, cache.streaming, store_kv(k, v, cache.streaming))
    return dataclasses.replace(cache, streaming=streaming)
