"""What ops check: shapes and dtypes always, values if ``value_checks`` asks for it.

``expect_*`` raise ``ValueError`` from shapes and dtypes, which are known while tracing. ``check_*``
leave a check for ``checkify`` in the traced function.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array

from pallas_kernels.kv_codes import KVKind, kv_kind, stored_channels
from pallas_kernels.types import (
    BLOCK_KEYS,
    TILE_QUERIES,
    BlockList,
    KVPages,
    KVScale,
    OwnAttention,
    PageList,
    Weight,
)

INT32_MAX = 2**31 - 1

# Jitted functions are traced anew where it is another.
_checks_values = jax.make_user_context(False)


@contextmanager
def value_checks() -> Iterator[None]:
    """Ops traced inside also check values, for ``checkify`` to report:

        with api.value_checks():
            error, result = jax.experimental.checkify.checkify(step)(...)
        error.throw()

    A function that was jitted and called before is traced anew.

    Checks are off by default: to JAX a check is an effect even if nobody looks at it, and JAX calls
    programs with effects from Python, which takes milliseconds for the hundreds of arrays of a
    model.

    >>> import jax.numpy as jnp
    >>> from jax.experimental import checkify
    >>> from pallas_kernels import api
    >>> pool = KVPages(jnp.ones((1, 4, 16, 8)), jnp.ones((1, 4, 16, 8)))
    >>> with value_checks():
    ...     attend = checkify.checkify(lambda table: api.prefix_attention(
    ...         jnp.ones((3, 2, 8)), pool, table, jnp.int32(20)))
    ...     error, _ = attend(jnp.array([2, 4]))
    >>> error.get().split(" (")[0]
    'page_table must lie in [0, 3], got 2 to 4'
    """
    with _checks_values(True):
        yield


def expect_shape(name: str, x: Array, shape: tuple[int | None, ...]) -> None:
    """``None`` in ``shape`` accepts any size."""
    if x.ndim != len(shape) or any(
        n is not None and n != m for n, m in zip(shape, x.shape, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {x.shape}, expected [{wanted}]")


def expect_chunks(name: str, x: Array) -> tuple[int, ...]:
    """``x`` is of one chunk [T, heads, D], or of R chunks [R, T, heads, D]; returns R, or none."""
    expect_shape(name, x, (None,) * (4 if x.ndim == 4 else 3))
    return x.shape[:-3]


def expect_dtype(dtype: str, **arrays: Array) -> None:
    for name, x in arrays.items():
        if x.dtype != dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, expected {dtype}")


def expect_int32(shape: tuple[int | None, ...], **arrays: Array) -> None:
    for name, x in arrays.items():
        expect_shape(name, x, shape)
    expect_dtype("int32", **arrays)


def expect_table(name: str, table: Array, *rows: int) -> None:
    """Page ids of one sequence, or of each of ``rows``, at least one."""
    expect_int32((*rows, None), **{name: table})
    if table.shape[-1] == 0:
        raise ValueError(f"{name} has shape {table.shape}, needs an entry")


def check_selection(counts: Array, pages: Array, candidates: Array) -> None:
    """Under ``value_checks``: a selection names pages that there are; nothing otherwise.

    The first ``counts`` [B, K] of a head's ``pages`` [B, K, n] must be below its row's
    ``candidates`` [B].

    >>> import jax.numpy as jnp
    >>> from jax.experimental import checkify
    >>> counts, pages = jnp.array([[2]]), jnp.array([[[0, 5, 9]]])
    >>> with value_checks():
    ...     error, _ = checkify.checkify(check_selection)(counts, pages, jnp.array([5]))
    >>> error.get().split(" (")[0]
    'a selected page must lie before page 5 of its sequence, got page 5'
    """
    if not _checks_values.value or pages.size == 0:
        return
    most = pages.shape[2]
    check_range("counts of selected pages", counts, most)
    limit = jnp.broadcast_to(candidates[:, None, None], pages.shape)
    read = jnp.arange(most)[None, None] < counts[:, :, None]
    wrong = read & ((pages < 0) | (pages >= limit))
    at = jnp.argmax(wrong)
    checkify.debug_check(
        ~wrong.any(),
        "a selected page must lie before page {limit} of its sequence, got page {page}",
        limit=limit.ravel()[at],
        page=pages.ravel()[at],
    )


def check_range(name: str, x: Array, limit: int, *, lowest: int = 0) -> None:
    """Under ``value_checks``: every x is in [lowest, limit]. For functions of one's own, too.

    >>> import jax.numpy as jnp
    >>> from jax.experimental import checkify
    >>> with value_checks():
    ...     error, _ = checkify.checkify(lambda x: check_range("x", x, 3))(jnp.array([0, 4]))
    >>> error.get().split(" (")[0]
    'x must lie in [0, 3], got 0 to 4'
    """
    if _checks_values.value and x.size > 0:
        least, most = x.min(), x.max()
        checkify.debug_check(
            (least >= lowest) & (most <= limit),
            f"{name} must lie in [{lowest}, {limit}], got {{least}} to {{most}}",
            least=least,
            most=most,
        )


def check_table(name: str, table: Array, pages: KVPages, tokens: Array) -> None:
    """Under ``value_checks``: the table reaches ``tokens`` and up to there names pages of the pool.

    ``tokens`` is a count for each row of the table.
    """
    N, P = pages.k.shape[1:3]
    if _checks_values.value and pages.k.shape[0] > 0:
        reach = table.shape[-1] * P
        check_range(f"tokens cached through {name}, which holds {reach},", tokens, reach)
        first = jnp.broadcast_to(jnp.arange(table.shape[-1]) * P, table.shape)
        used = first < tokens[..., None]
        check_range(name, jnp.where(used, table, 0), N - 1)


def check_targets(name: str, page: Array, pages: KVPages) -> None:
    """Under ``value_checks``: pages to be written are in the pool, or negative for none."""
    if pages.k.shape[0] > 0:
        check_range(name, page, pages.k.shape[1] - 1, lowest=jnp.iinfo(jnp.int32).min)


def expect_page_sizes(page_size: int, selected_page_size: int, logical_pages: int) -> None:
    """A logical page divides a selected one, and that a whole one. Sizes are in tokens."""
    if logical_pages == 0 or page_size % logical_pages:
        raise ValueError(f"{page_size=} must be a multiple of {logical_pages} logical pages")
    logical_page_size = page_size // logical_pages
    if selected_page_size < 1 or (
        page_size % selected_page_size or selected_page_size % logical_page_size
    ):
        raise ValueError(
            f"{selected_page_size=} must divide {page_size=} and be a multiple of "
            f"{logical_page_size=}"
        )


def expect_pages(name: str, pages: KVPages, head_dim: int) -> None:
    kind = kv_kind(pages.k.dtype)
    if kind == "int4" and head_dim % 2:
        raise ValueError(f"{name} pages of 4 bits need an even head_dim, got {head_dim}")
    expect_shape(f"{name}.k", pages.k, (None, None, None, stored_channels(kind, head_dim)))
    expect_shape(f"{name}.v", pages.v, pages.k.shape)
    if pages.v.dtype != pages.k.dtype:
        raise ValueError(f"{name}.v has dtype {pages.v.dtype}, {name}.k has {pages.k.dtype}")
    for part, scale in (("k_scale", pages.k_scale), ("v_scale", pages.v_scale)):
        expect_kv_scale(f"{name}.{part}", scale, kind, pages.k.shape[:3])


def expect_kv_scale(
    name: str, scale: KVScale | None, kind: KVKind | None, shape: tuple[int, ...]
) -> None:
    """A ``scale`` of codes of one kind, of which there are vectors of ``shape``."""
    wanted = {None: "None", "int4": "two arrays"}.get(kind, "an array")
    given = "None" if scale is None else "an array"
    if isinstance(scale, tuple):
        given = "two arrays" if len(scale) == 2 else f"a tuple of {len(scale)}"
    if given != wanted:
        raise ValueError(f"{name} must be {wanted} for {kind or 'plain'} pages, got {given}")
    for array in jax.tree.leaves(scale):
        expect_shape(name, array, shape)
        expect_dtype("int32" if kind == "int4" else "float32", **{name: array})


def expect_pools(retrieval: KVPages, streaming: KVPages, heads: int, head_dim: int) -> None:
    expect_pages("retrieval", retrieval, head_dim)
    expect_pages("streaming", streaming, head_dim)
    split = (retrieval.k.shape[0], streaming.k.shape[0])
    if sum(split) != heads:
        raise ValueError(f"retrieval + streaming pools hold {split} KV heads, expected {heads}")
    if retrieval.k.shape[2] != streaming.k.shape[2]:
        raise ValueError(
            f"page sizes differ: retrieval {retrieval.k.shape[2]}, streaming {streaming.k.shape[2]}"
        )


def expect_groups(heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a positive multiple of {kv_heads} KV heads")


def expect_list(name: str, lists: PageList, rows: int, heads: int) -> None:
    expect_shape(f"{name}.page_ids", lists.page_ids, (None, None, None))
    if lists.page_ids.shape[2] == 0:
        raise ValueError(f"{name}.page_ids has shape {lists.page_ids.shape}, needs an entry")
    expect_shape(f"{name}.start", lists.start, (None, None))
    expect_shape(f"{name}.stop", lists.stop, (None, None))
    for part, x in lists._asdict().items():
        expect_dtype("int32", **{f"{name}.{part}": x})
        if x.shape[0] < rows or x.shape[1] not in (1, heads):
            raise ValueError(
                f"{name}.{part} has shape {x.shape}, expected at least {rows} rows and {heads} "
                "heads, those of its pool, or 1 for all of them"
            )


def check_list(
    name: str, lists: PageList, rows: int, pages: KVPages, selected_page_size: int
) -> None:
    heads, N, P = pages.k.shape[:3]
    if heads > 0:
        tokens = lists.page_ids.shape[2] * selected_page_size
        check_range(f"{name}.page_ids", lists.page_ids[:rows], N * (P // selected_page_size) - 1)
        check_range(f"{name}.start", lists.start[:rows], tokens)
        check_range(f"{name}.stop", lists.stop[:rows], tokens)


def expect_blocks(blocks: BlockList, rows: tuple[int, ...], heads: int, tokens: int) -> None:
    """``rows``: R, where there are chunks of several sequences."""
    tiles = -(-tokens // TILE_QUERIES)
    expect_int32((*rows, heads, tiles, None), **{"blocks.ids": blocks.ids})
    expect_int32((*rows, heads, tiles), **{"blocks.counts": blocks.counts})
    if blocks.ids.shape[-1] == 0:
        raise ValueError(f"blocks.ids has shape {blocks.ids.shape}, needs an entry")


def check_blocks(blocks: BlockList, start: Array, length: Array) -> None:
    """Under ``value_checks``: tiles with a token list blocks that there are, in ascending order."""
    if not _checks_values.value or blocks.ids.size == 0:
        return
    shape = blocks.ids.shape  # [*R, Kr, tiles, entries]
    start, length = (
        jnp.broadcast_to(x[..., None, None, None], (*x.shape, *shape[-3:])) for x in (start, length)
    )
    tile, entry = (lax.broadcasted_iota(jnp.int32, shape, len(shape) - n) for n in (2, 1))
    counts = jnp.where(tile * TILE_QUERIES < length, blocks.counts[..., None], 0)
    check_range("blocks.counts", counts, shape[-1])
    listed = entry < counts
    last = -(-start // BLOCK_KEYS) + -(-length // BLOCK_KEYS) - 1
    ids = jnp.where(listed, blocks.ids, last)
    before = jnp.concatenate([jnp.full_like(ids[..., :1], -1), ids[..., :-1]], axis=-1)
    wrong = listed & ((ids <= before) | (ids > last))
    at = jnp.argmax(wrong)
    checkify.debug_check(
        ~wrong.any(),
        "blocks.ids must ascend and lie in [0, {last}], got {found} after {before}",
        last=last.ravel()[at],
        found=ids.ravel()[at],
        before=before.ravel()[at],
    )


def expect_most_heads(most_heads: int | None, heads: int) -> None:
    if most_heads is not None and most_heads < heads:
        raise ValueError(f"{most_heads=} must be at least the {heads} heads that there are")


def expect_most_tokens(most_tokens: tuple[int, ...] | None, heads: int) -> None:
    if most_tokens is None:
        return
    if len(most_tokens) != heads:
        raise ValueError(f"{most_tokens=} must have an entry for each of the {heads} KV heads")
    if any(tokens < 1 for tokens in most_tokens):
        raise ValueError(f"{most_tokens=} must be at least 1 each")


def expect_own(own: OwnAttention, q: Array) -> None:
    for name, x, shape, dtype in (
        ("own.out", own.out, q.shape, str(q.dtype)),
        ("own.lse", own.lse, q.shape[:2], "float32"),
        ("own.shares", own.shares, q.shape[:1], "bool"),
    ):
        expect_shape(name, x, shape)
        expect_dtype(dtype, **{name: x})


def expect_stats(key_stats: Array | None, retrieval: KVPages, head_dim: int) -> None:
    if key_stats is None:
        return
    K, N, P = retrieval.k.shape[:3]
    expect_shape("key_stats", key_stats, (None, N, None, 2, head_dim))
    if key_stats.shape[0] > K:
        raise ValueError(f"key_stats are of {key_stats.shape[0]} heads, the pool has {K}")
    if key_stats.shape[2] == 0 or P % key_stats.shape[2]:
        raise ValueError(
            f"page size {P} must be a multiple of the {key_stats.shape[2]} logical pages it holds"
        )


def expect_weight(name: str, weight: Weight, inputs: int) -> None:
    expect_shape(f"{name}.codes", weight.codes, (inputs, None))
    if weight.codes.dtype not in ("int8", "uint4", "float8_e4m3fn"):
        raise ValueError(
            f"{name}.codes has dtype {weight.codes.dtype}, expected int8, uint4 or float8_e4m3fn"
        )
    expect_shape(f"{name}.scale", weight.scale, (None, weight.codes.shape[1]))
    groups = weight.scale.shape[0]
    if groups == 0 or inputs % groups:
        raise ValueError(f"{name}.scale has {groups} groups, which do not divide {inputs} inputs")
    expect_dtype("float32", **{f"{name}.scale": weight.scale})
    if weight.zero is not None:
        expect_shape(f"{name}.zero", weight.zero, weight.scale.shape)
        expect_dtype("float32", **{f"{name}.zero": weight.zero})
