"""Public ops: shape contracts, checked before tracing goes further.

Letters (docs/glossary.md): B rows, T tokens of a chunk, H query heads, Hk KV heads, Kr retrieval
and Ks streaming KV heads (Kr + Ks = Hk; heads are ordered retrieval first), Kq of the Kr ranked by
page (the first ones), D head_dim, N pages in a pool, P page_size, M pages a sequence can have, g
logical pages a page, L list entries.

A *page table* maps a sequence's page numbers (token position // P) to physical page ids of a
pool. A *selected page* is what selection takes or leaves as a whole: a page, or a part of one. All
functions are pure and work under ``jit``, ``vmap`` and ``shard_map`` (shard over KV heads or rows;
a shard orders its own heads retrieval first, too; the kernels of the append ops need
``check_vma=False`` there). Either class of heads may be empty (Kr = 0 or Ks = 0). lse is the
natural logarithm of the sum of exponentials of scaled scores, float32.

Derivatives: ``causal_attention``, ``append_kv``, ``append_kv_chunk``, ``apply_rotary``,
``merge_attention``, ``fused_linear`` and ``product`` have every one; ``paged_attention``,
``prefill_attention``, ``prefix_attention`` and ``verify_attention`` only those of forward mode
(``jax.jvp``), and raise ``NotImplementedError`` in reverse mode; page selection has none, and
neither have products with a ``W8A8Weight``. All that is said of the "reference" backend: kernels
have no derivative.

Every op raises ``ValueError`` when shapes or dtypes contradict each other, naming both. Values that
contradict the contract (page ids outside the pool, a table too short for a length) leave the result
undefined, though reads stay inside the pools; ``value_checks`` has them reported.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_choice import choose_blocks
from pallas_kernels.checks import (
    check_blocks,
    check_list,
    check_range,
    check_selection,
    check_table,
    check_targets,
    expect_blocks,
    expect_chunks,
    expect_dtype,
    expect_groups,
    expect_int32,
    expect_list,
    expect_most_tokens,
    expect_own,
    expect_pages,
    expect_pools,
    expect_shape,
    expect_stats,
    expect_table,
    value_checks,
)
from pallas_kernels.device import (
    MOST_FUSED_PACKED_ROWS,
    MOST_LINEAR_ROWS,
    MOST_PACKED_ROWS,
    MOST_SELECTED_PAGES,
    Backend,
    has_fp8,
    implementation,
    resolve_backend,
)
from pallas_kernels.forward_mode import forward_only
from pallas_kernels.kernel_lowering import LoweringProcesses
from pallas_kernels.kv_codes import KV_KINDS, KVKind
from pallas_kernels.linear_ops import fused_linear, product, w8a8_weight
from pallas_kernels.packed import cannot_pack, pack_weight, packed_shape, unpack_weight
from pallas_kernels.plain_ops import (
    apply_rotary,
    causal_attention,
    dequantize_kv,
    merge_attention,
    quantize_kv,
    store_kv,
)
from pallas_kernels.selection_ops import page_scores, select_pages
from pallas_kernels.types import (
    BLOCK_KEYS,
    TILE_QUERIES,
    BlockList,
    KVPages,
    OwnAttention,
    PackedWeight,
    PageList,
    W8A8Weight,
    Weight,
)
from pallas_kernels.w8a8 import W8A8_KINDS, W8A8Kind, has_w8a8_codes
from pallas_kernels.weights import (
    WEIGHT_GROUPS,
    WEIGHT_KINDS,
    WeightKind,
    dequantize_weight,
    look_up,
    quantize_weight,
)

__all__ = [
    "BLOCK_KEYS",
    "KV_KINDS",
    "MOST_FUSED_PACKED_ROWS",
    "MOST_LINEAR_ROWS",
    "MOST_PACKED_ROWS",
    "MOST_SELECTED_PAGES",
    "TILE_QUERIES",
    "W8A8_KINDS",
    "WEIGHT_GROUPS",
    "WEIGHT_KINDS",
    "Backend",
    "BlockList",
    "KVKind",
    "KVPages",
    "LoweringProcesses",
    "OwnAttention",
    "PackedWeight",
    "PageList",
    "W8A8Kind",
    "W8A8Weight",
    "Weight",
    "WeightKind",
    "append_kv",
    "append_kv_chunk",
    "apply_rotary",
    "cannot_pack",
    "causal_attention",
    "check_range",
    "check_selection",
    "choose_blocks",
    "dequantize_kv",
    "dequantize_weight",
    "fused_linear",
    "has_fp8",
    "has_w8a8_codes",
    "look_up",
    "merge_attention",
    "pack_weight",
    "packed_shape",
    "page_scores",
    "paged_attention",
    "prefill_attention",
    "prefix_attention",
    "product",
    "quantize_kv",
    "quantize_weight",
    "resolve_backend",
    "select_pages",
    "store_kv",
    "unpack_weight",
    "value_checks",
    "verify_attention",
    "w8a8_weight",
]


def paged_attention(
    q: Float[Array, "B H D"],
    retrieval: KVPages,
    streaming: KVPages,
    retrieval_list: PageList,
    streaming_list: PageList,
    *,
    selected_page_size: int | None = None,
    most_tokens: tuple[int, ...] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """One query token a row attends the listed pages (LServe, unified attention).

    A retrieval head lists selected pages, a streaming head its sink and local pages; the op does
    not know the difference beyond which pool a head's pages are in. Query head h reads KV head
    h // G. A row that attends nothing gives out 0, lse -inf. Lists may have more rows than q, which
    are ignored (so that a part of a batch can use the lists of all).

    Lists may name parts of pages: then ``selected_page_size`` is less than P, and page p of a pool
    counts as n = P // selected_page_size selected pages, n * p to n * p + n - 1. Raises
    ``ValueError`` if it does not divide P.

    ``most_tokens`` says how many tokens the list of each KV head attends at most, retrieval heads
    first; None means what its list can hold. The result does not depend on it: the kernel deals
    out the GPU's multiprocessors to the heads in proportion to it.

    Returns (out in q's dtype, lse float32).

    >>> import jax.numpy as jnp
    >>> pool = lambda heads: KVPages(jnp.ones((heads, 4, 16, 8)), jnp.ones((heads, 4, 16, 8)))
    >>> lists = PageList(jnp.array([[[2, 0]]]), jnp.array([[0]]), jnp.array([[20]]))
    >>> out, lse = paged_attention(jnp.ones((1, 4, 8)), pool(1), pool(1), lists, lists)
    >>> out.shape, lse.shape
    ((1, 4, 8), (1, 4))
    """
    expect_shape("q", q, (None, None, None))
    B, H, D = q.shape
    Kr, Ks = retrieval.k.shape[0], streaming.k.shape[0]
    expect_groups(H, Kr + Ks)
    expect_pools(retrieval, streaming, Kr + Ks, D)
    expect_list("retrieval_list", retrieval_list, B, Kr)
    expect_list("streaming_list", streaming_list, B, Ks)
    page_size = retrieval.k.shape[2]
    if selected_page_size is None:
        selected_page_size = page_size
    if selected_page_size < 1 or page_size % selected_page_size:
        raise ValueError(f"{selected_page_size=} must divide the pages' {page_size} tokens")
    check_list("retrieval_list", retrieval_list, B, retrieval, selected_page_size)
    check_list("streaming_list", streaming_list, B, streaming, selected_page_size)
    expect_most_tokens(most_tokens, Kr + Ks)
    lists = retrieval_list, streaming_list
    how = {"selected_page_size": selected_page_size, "most_tokens": most_tokens}
    attend = implementation("paged_attention", backend)
    return forward_only("paged_attention", attend(q, retrieval, streaming, *lists, **how))


def verify_attention(
    q: Float[Array, "B T H D"],
    pages: KVPages,
    page_table: Int[Array, "B M"],
    position: Int[Array, " B"],
    *,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """A few query tokens a row attend all of their sequence (speculative decoding, verification).

    Query t of row b stands at ``position[b] + t`` and attends every position up to its own, through
    the row's page table; ``pages`` is a pool with G query heads for each of its KV heads. Keys and
    values up to position ``position + T - 1`` are in their pages: append them first. A query whose
    own position is negative attends nothing and gives out 0, lse -inf, so that a row of fewer
    queries has them last, and one of none the position -T. K and V are read once for all T as long
    as T * G <= 64, of int8 pages 32.

    Returns (out in q's dtype, lse float32).

    >>> import jax.numpy as jnp
    >>> pool = KVPages(jnp.ones((1, 4, 16, 8)), jnp.ones((1, 4, 16, 8)))
    >>> args = pool, jnp.array([[2, 0]]), jnp.array([0])
    >>> out, lse = verify_attention(jnp.zeros((1, 3, 2, 8)), *args)
    >>> out.shape, jnp.exp(lse[0, :, 0]).round().tolist()  # keys that each token attends
    ((1, 3, 2, 8), [1.0, 2.0, 3.0])
    """
    expect_shape("q", q, (None, None, None, None))
    B, T, H, D = q.shape
    if T == 0:
        raise ValueError(f"q has shape {q.shape}, needs a token")
    expect_pages("pages", pages, D)
    expect_groups(H, pages.k.shape[0])
    expect_table("page_table", page_table, B)
    expect_int32((B,), position=position)
    check_table("page_table", page_table, pages, jnp.maximum(position + T, 0))
    attend = implementation("verify_attention", backend)
    return forward_only("verify_attention", attend(q, pages, page_table, position))


def prefill_attention(
    q: Float[Array, "*R T H D"],
    k: Float[Array, "*R T Hk D"],
    v: Float[Array, "*R T Hk D"],
    retrieval: KVPages,
    streaming: KVPages,
    page_table: Int[Array, "*R M"],
    streaming_table: Int[Array, "*R M"],
    start: Int[Array, "*R"],
    length: Int[Array, "*R"],
    *,
    sink: int,
    local: int,
    blocks: BlockList | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "*R T H D"], Float[Array, "*R T H"]]:
    """A chunk of a sequence, or of each of R, attends its cached history and itself (LServe,
    prefilling stage).

    Query t stands at position ``start + t``; q and k are already rotated. The history (positions
    below ``start``) is read from pages through the tables, the chunk's own keys from ``k``/``v``;
    nothing is written. Retrieval heads are causal; with ``blocks`` they see of that only the blocks
    of keys that a query's tile lists, and no others are read. A query whose tile lists none that it
    sees gives out 0, lse -inf. A streaming head at position i sees position
    j <= i if ``j < sink`` or ``j > i - local``, token-exact; its table may point to pages that
    have been overwritten, as long as those hold no position visible to the chunk.

    Only the first ``length`` tokens of the chunk exist; outputs of the others are unspecified.
    Chunks of several sequences know nothing of each other: each has the numbers that it has alone.
    Memory is O(T), never T x T.

    Returns (out in q's dtype, lse float32).

    >>> import jax.numpy as jnp
    >>> pool = lambda heads: KVPages(jnp.ones((heads, 4, 16, 8)), jnp.ones((heads, 4, 16, 8)))
    >>> x, table = jnp.ones((32, 2, 8)), jnp.arange(4)
    >>> out, lse = prefill_attention(
    ...     x, x, x, pool(1), pool(1), table, table, jnp.int32(16), jnp.int32(30), sink=4, local=8
    ... )
    >>> out.shape, lse.shape
    ((32, 2, 8), (32, 2))

    The 16 keys of the history are block 0, those of the chunk block 1, which alone is listed:

    >>> blocks = BlockList(ids=jnp.array([[[1]]]), counts=jnp.array([[1]]))
    >>> out, lse = prefill_attention(
    ...     0 * x, x, x, pool(1), pool(1), table, table, jnp.int32(16), jnp.int32(30), sink=4,
    ...     local=8, blocks=blocks
    ... )
    >>> jnp.exp(lse[:3]).round().tolist()  # keys that each query attends
    [[1.0, 12.0], [2.0, 12.0], [3.0, 12.0]]
    """
    rows = expect_chunks("q", q)
    T, H, D = q.shape[-3:]
    expect_shape("k", k, (*rows, T, None, D))
    expect_shape("v", v, k.shape)
    expect_groups(H, k.shape[-2])
    expect_pools(retrieval, streaming, k.shape[-2], D)
    expect_table("page_table", page_table, *rows)
    expect_int32(page_table.shape, streaming_table=streaming_table)
    expect_int32(rows, start=start, length=length)
    if sink < 0 or local < 1:
        raise ValueError(f"need sink >= 0 and local >= 1, got {sink=} {local=}")
    if blocks is not None:
        expect_blocks(blocks, rows, retrieval.k.shape[0], T)
    check_range("length", length, T)
    check_table("page_table", page_table, retrieval, start)
    check_table("streaming_table", streaming_table, streaming, start)
    if blocks is not None:
        check_blocks(blocks, start, length)
    args = q, k, v, retrieval, streaming, page_table, streaming_table, start, length
    attend = implementation("prefill_attention", backend)
    results = attend(*args, sink=sink, local=local, blocks=blocks)
    return forward_only("prefill_attention", results)


def prefix_attention(
    q: Float[Array, "B H D"],
    pages: KVPages,
    page_table: Int[Array, " M"],
    length: Int[Array, ""],
    own: OwnAttention | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B H D"], Float[Array, "B H"]]:
    """One query token a row attends the first ``length`` tokens of one prefix that all rows share
    (RelayAttention, system attention): no row sees a mask, so the prefix is read once for all.

    ``pages`` is a pool with G query heads for each of its KV heads, ``page_table`` names the pages
    of the prefix in it. A length of 0 gives out 0, lse -inf.

    ``own`` is attention over each row's own tokens. With it the result is that over both, joined
    as by ``merge_attention`` (relay fusion), for the rows that share the prefix, and ``own`` for
    the others.

    Returns (out in q's dtype, lse float32).

    >>> import jax.numpy as jnp
    >>> pool = KVPages(jnp.ones((1, 4, 16, 8)), jnp.ones((1, 4, 16, 8)))
    >>> out, lse = prefix_attention(jnp.ones((3, 2, 8)), pool, jnp.array([2, 0]), jnp.int32(20))
    >>> out.shape, lse.shape
    ((3, 2, 8), (3, 2))
    """
    expect_shape("q", q, (None, None, None))
    expect_pages("pages", pages, q.shape[2])
    expect_table("page_table", page_table)
    expect_int32((), length=length)
    if own is not None:
        expect_own(own, q)
    if q.shape[1] == pages.k.shape[0] == 0:
        return q, jnp.zeros(q.shape[:2])
    expect_groups(q.shape[1], pages.k.shape[0])
    check_table("page_table", page_table, pages, length)
    attend = implementation("prefix_attention", backend)
    return forward_only("prefix_attention", attend(q, pages, page_table, length, own))


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
    backend: Backend = "auto",
) -> tuple[Float[Array, "B H D"], KVPages, KVPages, Float[Array, "Kq N g 2 D"] | None]:
    """Rotates q and k, writes one token a row into its pages, widens the page's key statistics.

    ``page``/``streaming_page`` are physical ids in the two pools, ``offset`` (position % P) is the
    place in either page; a negative id writes nothing (an inactive row). Two rows must not name the
    same place of a page. ``key_stats[..., 0, :]`` is kmax and ``[..., 1, :]`` kmin per logical page
    of P / g tokens, of the rotated, unquantised key; the first token of a logical page assigns.
    They are those of the first Kq <= Kr retrieval heads, which are ranked by them; None keeps none.
    Pools of codes quantise on write (``quantize_kv``). Donate the pools to update them in place.

    Returns (rotated q, retrieval, streaming, key_stats).

    >>> import jax.numpy as jnp
    >>> pool = lambda heads: KVPages(jnp.zeros((heads, 4, 16, 8)), jnp.zeros((heads, 4, 16, 8)))
    >>> x, angle, one = jnp.ones((1, 2, 8)), jnp.zeros((1, 4)), jnp.array([1])
    >>> stats = jnp.zeros((1, 4, 1, 2, 8))
    >>> q, r, s, stats = append_kv(
    ...     x, x, x, angle + 1, angle, pool(1), pool(1), stats, one, one, jnp.array([3])
    ... )
    >>> float(r.k[0, 1, 3, 0]), float(r.k.sum())
    (1.0, 8.0)
    """
    expect_shape("q", q, (None, None, None))
    B, H, D = q.shape
    expect_shape("k", k, (B, None, D))
    expect_shape("v", v, k.shape)
    expect_groups(H, k.shape[1])
    expect_shape("cos", cos, (B, D // 2))
    expect_shape("sin", sin, (B, D // 2))
    expect_dtype("float32", cos=cos, sin=sin)
    expect_pools(retrieval, streaming, k.shape[1], D)
    expect_stats(key_stats, retrieval, k.shape[2])
    expect_int32((B,), page=page, streaming_page=streaming_page, offset=offset)
    check_range("offset", offset, retrieval.k.shape[2] - 1)
    check_targets("page", page, retrieval)
    check_targets("streaming_page", streaming_page, streaming)
    return implementation("append_kv", backend)(
        q, k, v, cos, sin, retrieval, streaming, key_stats, page, streaming_page, offset
    )


def append_kv_chunk(
    k: Float[Array, "*R T Hk D"],
    v: Float[Array, "*R T Hk D"],
    retrieval: KVPages,
    streaming: KVPages,
    key_stats: Float[Array, "Kq N g 2 D"] | None,
    page_table: Int[Array, "*R M"],
    streaming_page: Int[Array, "*R T"],
    start: Int[Array, "*R"],
    length: Int[Array, "*R"],
    *,
    backend: Backend = "auto",
) -> tuple[KVPages, KVPages, Float[Array, "Kq N g 2 D"] | None]:
    """Writes the first ``length`` tokens of a prefill chunk, or of each of R: positions ``start``
    on.

    k is already rotated. Retrieval heads write every token through ``page_table``; streaming
    heads write token t to page ``streaming_page[t]`` of their pool, or not at all if that is
    negative (a ring keeps only sink and local tokens). Two tokens, of whichever chunks, must
    not name the same place of a page, and ``page_table`` must reach as far as ``start + length``.
    Statistics, of the first Kq <= Kr retrieval heads, are merged correctly whether or not ``start``
    and ``start + length`` fall on logical page edges.

    Returns (retrieval, streaming, key_stats).

    >>> import jax.numpy as jnp
    >>> pool = lambda heads: KVPages(jnp.zeros((heads, 4, 16, 8)), jnp.zeros((heads, 4, 16, 8)))
    >>> x, table, dropped = jnp.ones((24, 2, 8)), jnp.array([2, 0]), jnp.full(24, -1)
    >>> r, s, _ = append_kv_chunk(
    ...     x, x, pool(1), pool(1), None, table, dropped, jnp.int32(0), jnp.int32(20)
    ... )
    >>> r.k[0, :, :, 0].sum(axis=1).tolist()  # tokens on each physical page
    [4.0, 0.0, 16.0, 0.0]
    >>> float(s.k.sum())
    0.0
    """
    rows = expect_chunks("k", k)
    T, Hk, D = k.shape[-3:]
    expect_shape("v", v, k.shape)
    expect_pools(retrieval, streaming, Hk, D)
    expect_stats(key_stats, retrieval, D)
    expect_int32((*rows, None), page_table=page_table)
    expect_int32((*rows, T), streaming_page=streaming_page)
    expect_int32(rows, start=start, length=length)
    check_range("length", length, T)
    check_table("page_table", page_table, retrieval, start + length)
    check_targets("streaming_page", streaming_page, streaming)
    return implementation("append_kv_chunk", backend)(
        k, v, retrieval, streaming, key_stats, page_table, streaming_page, start, length
    )
