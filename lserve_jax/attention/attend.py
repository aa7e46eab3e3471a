"""The attention functions that are passed to the model as ``attend`` (see ``llama.py``).

Each factory computes the rotary angles once, for all layers, and returns the function that every
layer calls:

    causal_attend   whole sequences, no cache: training-like use, scoring, calibration
    prefill_attend  one chunk of each of a few prompts, their histories in the paged cache
    decode_attend   one token for every slot of the batch, over page lists
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lserve_jax.attention.cache import CacheSpec, LayerCache
from lserve_jax.attention.selection import (
    all_pages,
    choose_pages,
    retrieval_pages,
    retrieval_stop,
    window_list,
)
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Attend
from lserve_jax.model.rope import layer_angles, rotary_angles
from pallas_kernels import api
from pallas_kernels.api import Backend, KVPages, OwnAttention, PageList


def causal_attend(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    *,
    lengths: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Attend:
    """Plain causal attention over whole sequences; differentiable; the caches stay ``None``.

    ``positions`` turn queries and keys; who sees whom follows from the order of the tokens and
    from ``segment_ids`` (``api.causal_attention``). ``lengths`` is the length of each token's
    sequence (``rotary_angles``); None: a row is one sequence, which ends at its last position.

    Raises ``ValueError`` for rows longer than the model's sliding window.
    """
    T = positions.shape[1]
    if config.sliding_window is not None and config.sliding_window < T:
        raise ValueError(
            f"sequences of {T} tokens exceed the model's sliding_window={config.sliding_window}, "
            "and sliding-window attention is not supported"
        )
    if lengths is None:
        lengths = positions.max(axis=1) + 1
    cos, sin = rotary_angles(config, positions, lengths)

    def attend(layer: int, q: Array, k: Array, v: Array, cache: None) -> tuple[Array, None]:
        angles = layer_angles(config, layer, cos, sin)
        q, k = api.apply_rotary(q, *angles), api.apply_rotary(k, *angles)
        out, _ = api.causal_attention(q, k, v, segment_ids)
        return out, None

    return attend


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """Where chunks of R prompts, one of each, stand and lie."""

    page_table: Int[Array, "R M"]  # of each prompt
    window_table: Int[Array, "R M"]  # of its prefill window; -1: not kept
    start: Int[Array, " R"]  # position of the chunk's first token
    length: Int[Array, " R"]  # tokens of the chunk, padding left out; 0: there is no prompt
    prompt_length: Int[Array, " R"]  # tokens of the whole prompt
    whole_from: Int[Array, " R"]  # from this position on block-sparse tiles attend everything


def alike_layers(config: ModelConfig, spec: CacheSpec) -> list[int]:
    """For each layer the first one that attention over the paged cache treats like it.

    A policy of one's own is told a layer's number, so no layer is like another then.
    """
    layers = range(config.num_hidden_layers)
    if spec.sparsity is not None and spec.sparsity.select is not None:
        return list(layers)
    kinds = [(spec.heads.first_like(layer), layer in config.nope_layers) for layer in layers]
    return [kinds.index(kind) for kind in kinds]


# Tokens at the end of a prompt that is read block-sparsely whose queries attend everything, as far
# as its last chunk holds them: they say what is asked, and a tile's few queries that choose blocks
# may not be those that ask. Chunks before the last are so as in longer prompts.
WHOLE_TAIL = api.TILE_QUERIES


def prefill_attend(
    config: ModelConfig,
    spec: CacheSpec,
    rows: ChunkRows,
    chunk_size: int,
    *,
    block_sparse: bool = False,
    backend: Backend,
) -> Attend:
    """One chunk of each of R prompts: positions ``start`` to ``start + length - 1``.

    Retrieval heads attend causally, if ``block_sparse`` only the blocks of keys that each tile of
    queries chooses, but for dense heads and from ``whole_from`` on; streaming heads attend through
    the lambda mask of the prefill window. The chunk's K and V are written after they were attended,
    unquantised, by the chunk itself; later chunks and decode read them back from the cache.

    ``window_table`` has the window's pages, -1 for pages of the prompt that are not kept. Since all
    windows are read first, a page that a chunk moves out of sight may be one that is written.

    A row knows nothing of the others, so that its numbers are those that it has alone.

    If ``block_sparse``, what stands for a layer's cache behind it is a pair: the cache, and how
    many blocks its tiles attended, summed over retrieval KV heads.
    """
    window = spec.prefill_window
    position = rows.start[:, None] + jnp.arange(chunk_size)[None]
    # XLA would work them out in every layer anew, inside of the rotation.
    cos, sin = jax.lax.optimization_barrier(rotary_angles(config, position, rows.prompt_length))
    number = jnp.minimum(position // spec.page_size, spec.pages_per_sequence - 1)
    window_page = jnp.take_along_axis(rows.window_table, number, axis=1)
    window_table = jnp.maximum(rows.window_table, 0)

    def attend(
        layer: int, q: Array, k: Array, v: Array, cache: LayerCache
    ) -> tuple[Array, LayerCache | tuple[LayerCache, Array]]:
        angles = layer_angles(config, layer, cos, sin)
        q, k = api.apply_rotary(q, *angles), api.apply_rotary(k, *angles)
        Kr = cache.retrieval.k.shape[0]

        attended, blocks = jnp.int32(0), None
        if block_sparse and Kr > 0:
            chosen = [
                api.choose_blocks(
                    q[row, :, : Kr * config.group_size],
                    k[row, :, :Kr],
                    cache.retrieval,
                    rows.page_table[row],
                    rows.start[row],
                    rows.length[row],
                    **chosen_by(spec),
                    whole_from=rows.whole_from[row],
                    dense_heads=spec.heads.num_dense[layer],
                    most_heads=max(spec.heads.num_retrieval),
                    backend=backend,
                )
                for row in range(q.shape[0])
            ]
            blocks = jax.tree.map(lambda *each: jnp.stack(each), *chosen)
            attended = blocks.counts.sum()
        out, _ = api.prefill_attention(
            q,
            k,
            v,
            cache.retrieval,
            cache.prefill_window,
            rows.page_table,
            window_table,
            rows.start,
            rows.length,
            sink=window.sink,
            local=window.local,
            blocks=blocks,
            backend=backend,
        )
        # The pools are written after they were read. Without this order XLA copies them whole.
        out, retrieval, kept_window = jax.lax.optimization_barrier(
            (out, cache.retrieval, cache.prefill_window)
        )
        retrieval, kept_window, key_stats = api.append_kv_chunk(
            k,
            v,
            retrieval,
            kept_window,
            cache.key_stats,
            rows.page_table,
            window_page,
            rows.start,
            rows.length,
            backend=backend,
        )
        cache = dataclasses.replace(
            cache, retrieval=retrieval, prefill_window=kept_window, key_stats=key_stats
        )
        return out, (cache, attended) if block_sparse else cache

    return attend


class ChosenBy(TypedDict, total=False):
    """One of the two."""

    threshold: float
    density: float


def chosen_by(spec: CacheSpec) -> ChosenBy:
    """How many blocks ``api.choose_blocks`` is to take."""
    assert spec.sparsity is not None  # else nothing is block-sparse
    if spec.sparsity.prefill_density is not None:
        return {"density": spec.sparsity.prefill_density}
    return {"threshold": spec.sparsity.prefill_threshold}


def causal_blocks(start: int, length: int) -> int:
    """Blocks that the tiles of a chunk see, one retrieval head's: what ``block_sparse`` chooses
    from."""
    history, tiles = -(-start // api.BLOCK_KEYS), -(-length // api.TILE_QUERIES)
    return tiles * history + tiles * (tiles + 1) // 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PrefixGroups:
    """Which rows of a batch read their prefix together (RelayAttention); X groups of rows."""

    # On the host, where they are put together, these are NumPy arrays.
    page_table: Int[Array | np.ndarray, "X M"]  # of each group's prefix
    length: Int[Array | np.ndarray, " X"]  # tokens of it, whole pages; 0: there is no such group
    group: Int[
        Array | np.ndarray, " B"
    ]  # group of each row; -1: it reads all of its tokens by itself

    def private_start(self) -> Int[Array, " B"]:
        """The position at which each row's own part begins."""
        return jnp.where(self.group >= 0, self.length[jnp.maximum(self.group, 0)], 0)


def decode_attend(
    config: ModelConfig,
    spec: CacheSpec,
    page_table: Int[Array, "B M"],
    groups: PrefixGroups | None,
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
    tail: Int[Array, " B"],
    *,
    select: bool,
    backend: Backend,
) -> tuple[Attend, Int[Array, " B"]]:
    """One token for each of the first B slots, row b in slot b at ``position[b]``.

    With ``select`` every ranked head ranks its pages anew; without, it reuses the list kept in the
    cache. ``tail`` is ``first_tail_page`` at that selection.

    Under ``groups`` the retrieval heads of a row attend its group's prefix together with the rest
    of the group. What remains is a sequence of its own that begins after the prefix: its pages are
    ranked, and its budget spent, as if the prefix were not there, and ``page_table`` and ``tail``
    begin with its first page.

    In exact mode the tokens are drafts: statistics are of verified tokens only, and stay as they
    are.

    Also returns the number of tokens that each row attends, summed over layers and KV heads, the
    prefix included.
    """
    B, P, drafting = position.shape[0], spec.page_size, spec.max_drafts is not None
    slot = jnp.arange(B)
    cos, sin = (x[:, 0] for x in rotary_angles(config, position[:, None], position + 1))
    private_start = jnp.zeros_like(position) if groups is None else groups.private_start()
    own = position - private_start  # position in the part that the page table covers
    page = jnp.take_along_axis(page_table, own[:, None] // P, axis=1)[:, 0]
    page = jnp.where(active, page, -1)
    streaming_page = slot * spec.decode_window.num_pages + spec.decode_window.index(position // P)
    streaming_page = jnp.where(active, streaming_page, -1)
    start = jnp.zeros((B, 1), jnp.int32)
    local = window_list(spec, slot, position, active)
    everything = all_pages(spec, page_table)
    like = [spec.heads.first_like(layer) for layer in range(config.num_hidden_layers)]
    stop_of = {layer: retrieval_stop(spec, layer, tail, own, active) for layer in sorted(set(like))}
    stops = [stop_of[layer] for layer in like]  # traced once for layers that are alike
    num_retrieval = sum(spec.heads.num_retrieval)
    num_streaming = config.num_hidden_layers * config.num_key_value_heads - num_retrieval
    # What heads chose by a policy of one's own is known only once they have.
    own_select = None if spec.sparsity is None else spec.sparsity.select
    attended = jnp.zeros_like(position)
    if own_select is None:
        attended = sum(stop.sum(axis=1) for stop in stops)
    attended += num_streaming * (local.stop - local.start)[:, 0]
    attended += num_retrieval * jnp.where(active, private_start, 0)

    def attend(
        layer: int, q: Array, k: Array, v: Array, cache: LayerCache
    ) -> tuple[Array, LayerCache]:
        Kr = cache.retrieval.k.shape[0]
        key_stats = cache.key_stats
        q, retrieval, streaming, widened = api.append_kv(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            *layer_angles(config, layer, cos, sin),
            cache.retrieval,
            cache.streaming,
            None if drafting else key_stats,
            page,
            streaming_page,
            position % P,
            backend=backend,
        )
        key_stats = key_stats if drafting else widened
        retrieval_queries = q[:, : Kr * config.group_size]
        listed, counts, stop = cache.listed, cache.counts, stops[layer]
        if select and listed is not None:
            chosen = selected = None
            if key_stats is not None:
                scores = api.page_scores(
                    q[:, : key_stats.shape[0] * config.group_size],
                    key_stats,
                    page_table,
                    own + 1,
                    page_size=P,
                    selected_page_size=spec.selected_page_size,
                    lower_bound_weight=spec.lower_bound_weight,
                    most_heads=max(spec.heads.num_ranked),
                    backend=backend,
                )
                if own_select is None:
                    selected = api.select_pages(
                        scores,
                        tail,
                        spec.wanted_pages(layer, tail),
                        num_pages=spec.num_ranked(layer),
                        sink_pages=spec.forced_sink_pages,
                        most_heads=max(spec.heads.num_ranked),
                        backend=backend,
                    )
                else:
                    queries = q[:, : key_stats.shape[0] * config.group_size]
                    length = jnp.where(active, own + 1, 0)
                    chosen, selected = choose_pages(
                        spec,
                        layer,
                        own_select,
                        queries,
                        scores,
                        key_stats,
                        page_table,
                        length,
                        tail,
                    )
                    counts = None if counts is None else counts.at[:B].set(chosen)
            pages = retrieval_pages(spec, layer, selected, tail, page_table, chosen)
            listed = listed.at[:B].set(pages)
        if counts is not None:
            stop = retrieval_stop(spec, layer, tail, own, active, counts[:B])
        pages = everything if listed is None else listed
        out, lse = api.paged_attention(
            q,
            retrieval,
            streaming,
            PageList(pages, start, stop),
            local,
            selected_page_size=spec.selected_page_size,
            most_tokens=spec.most_tokens(layer, config.num_key_value_heads - Kr),
            backend=backend,
        )
        if groups is not None and Kr > 0:
            Hr = Kr * config.group_size
            joined = _join_prefixes(
                groups, retrieval_queries, retrieval, out[:, :Hr], lse[:, :Hr], backend
            )
            out = jnp.concatenate([joined, out[:, Hr:]], axis=1)
        cache = dataclasses.replace(
            cache,
            retrieval=retrieval,
            streaming=streaming,
            key_stats=key_stats,
            listed=listed,
            counts=counts,
        )
        return out[:, None], cache

    return attend, attended


def attended_by_choice(
    spec: CacheSpec,
    caches: Sequence[LayerCache],
    tail: Int[Array, " B"],
    own: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Int[Array, " B"]:
    """What ``decode_attend`` could not count of a step: tokens of retrieval heads, where a policy
    of one's own chooses their pages. ``caches`` are those after the step."""
    stops = [
        retrieval_stop(
            spec, layer, tail, own, active, None if c.counts is None else c.counts[: len(tail)]
        )
        for layer, c in enumerate(caches)
    ]
    return sum((stop.sum(axis=1) for stop in stops), jnp.zeros_like(tail))


def _join_prefixes(
    groups: PrefixGroups,
    q: Float[Array, "B Hr D"],
    pages: KVPages,
    out: Float[Array, "B Hr D"],
    lse: Float[Array, "B Hr"],
    backend: Backend,
) -> Float[Array, "B Hr D"]:
    """Attention over a row's own part joined with that over the prefix of its group.

    All rows attend every group's prefix, and only those of the group keep the result: as long as
    reading the prefix takes longer than the arithmetic, the others' share costs nothing.
    """
    for i in range(groups.length.shape[0]):
        own = OwnAttention(out, lse, groups.group == i)
        out, lse = api.prefix_attention(
            q, pages, groups.page_table[i], groups.length[i], own, backend=backend
        )
    return out
