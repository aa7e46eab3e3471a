"""The decode attention kernel, interpreted on a CPU, against its reference.

Tokens that a list does not attend are NaN, and entries past ``stop`` name a page of nothing else.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from shapes.pages import stored

from pallas_kernels import reference
from pallas_kernels.hopper import decode_attention
from pallas_kernels.hopper.decode_attention import Config, choose_config, paged_attention
from pallas_kernels.hopper.decode_splits import (
    Alike,
    deal_splits,
    most_splits,
    place_alike,
    split_table,
)
from pallas_kernels.hopper.decode_tiles import read_place
from pallas_kernels.kv_codes import CODE_TYPES, KVKind, kv_kind
from pallas_kernels.types import KVPages, PageList

# Weights and out are rounded to bf16: 2^-9 of a weight, averaged over the tokens, and 2^-9 of out.
# |v| < 5, so out is off by at most 2 * 5 * 2^-9 = 2e-2, in practice by a unit in its last place.
OUT_TOLERANCE = 1e-2
# bf16 scores are exact products summed in float32. int8 and int4 ones also have q rounded to 2^-16
# of its largest element: |q| |k| sqrt(D) 2^-16 / sqrt(D) < 11 * 11 * 2^-16. fp8 has all digits of q
# but those below 2^-18 of its largest element.
LSE_TOLERANCE = {None: 1e-5, "int8": 2e-3, "fp8": 5e-4, "int4": 2e-3}


store = jax.jit(stored, static_argnums=2)  # one program in place of an op's each


def problem(rows, retrieval, streaming, group, head_dim, page_size, width, kind, *, seed=0):
    """Lists of every length from 1 token to all; the last row's last head attends nothing."""
    rng = np.random.default_rng(seed)
    heads, pages = retrieval + streaming, rows * width + 1
    order = np.stack([rng.permutation(pages) for _ in range(heads)]).astype(np.int32)
    ids, spare = order[:, 1:].reshape(heads, rows, width).transpose(1, 0, 2), order[:, 0]
    stop = rng.integers(1, width * page_size, (rows, heads)).astype(np.int32)
    stop[0, 0] = width * page_size
    start = np.minimum(rng.integers(0, page_size, (rows, heads)), stop - 1).astype(np.int32)
    start[-1, -1] = stop[-1, -1]
    token = np.arange(width * page_size).reshape(width, page_size)
    attended = (token >= start[..., None, None]) & (token < stop[..., None, None])
    used = np.zeros((heads, pages, page_size), bool)
    used[np.arange(heads)[None, :, None], ids] = attended
    past = token[:, 0] >= stop[..., None]
    fields = np.where(past, spare[:, None], ids), start, stop
    lists = [
        PageList(*(jnp.asarray(x[:, part]) for x in fields))
        for part in (slice(retrieval), slice(retrieval, heads))
    ]

    def pool(part: slice) -> KVPages:
        numbers = rng.normal(size=(2, *used[part].shape, head_dim)).astype(jnp.bfloat16)
        (k, k_scale), (v, v_scale) = (store(x, used[part], kind) for x in numbers)
        return KVPages(k, v, k_scale, v_scale)

    q = jnp.asarray(rng.normal(size=(rows, heads * group, head_dim)), jnp.bfloat16)
    return q, pool(slice(retrieval)), pool(slice(retrieval, heads)), *lists


def splits(args, *of_heads: int) -> tuple[int, ...]:
    """One for every KV head, those that are given over and over."""
    heads = args[1].k.shape[0] + args[2].k.shape[0]
    return tuple(itertools.islice(itertools.cycle(of_heads), heads))


def check(args, config: Config, selected_page_size: int | None = None) -> None:
    how = {"selected_page_size": selected_page_size}
    out, lse = jax.jit(lambda *xs: paged_attention(*xs, **how, config=config))(*args)
    expected_out, expected_lse = reference.paged_attention(*args, **how)
    tolerance = LSE_TOLERANCE[kv_kind(args[1].k.dtype)]
    assert_allclose(lse, expected_lse, atol=tolerance, rtol=0)
    assert out.dtype == expected_out.dtype
    assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected_out, np.float32), atol=OUT_TOLERANCE
    )
    empty = np.isneginf(expected_lse)
    assert empty.any()
    assert_array_equal(np.asarray(out, np.float32)[empty], 0)


@pytest.mark.parametrize(
    ("rows", "retrieval", "streaming", "group", "head_dim", "page_size", "width", "kind"),
    [
        (2, 1, 1, 4, 128, 64, 5, None),  # both pools
        (1, 2, 0, 3, 64, 16, 12, None),  # four pages a tile, fewer query rows than N
        (1, 0, 2, 16, 64, 128, 2, None),  # two tiles a page, two blocks of columns
        (2, 1, 1, 4, 128, 32, 9, "int8"),  # two pages a tile
        (1, 2, 0, 9, 64, 128, 3, "int8"),  # two tiles a page, two blocks of columns
        (2, 1, 1, 4, 128, 16, 11, "int8"),  # scales of a page are half of what a copy aligns to
        (1, 1, 1, 4, 128, 64, 5, "fp8"),
        (1, 1, 1, 9, 64, 16, 12, "fp8"),
        (1, 1, 1, 4, 128, 16, 11, "int4"),
        (1, 1, 1, 4, 128, 64, 5, "int4"),
        (1, 2, 0, 9, 64, 128, 3, "int4"),
    ],
)
def test_matches_reference(
    rows, retrieval, streaming, group, head_dim, page_size, width, kind
) -> None:
    args = problem(rows, retrieval, streaming, group, head_dim, page_size, width, kind)
    check(args, Config(splits=splits(args, 3), parts=2))


@pytest.mark.parametrize("count", [1, 8])
def test_any_number_of_splits(count: int) -> None:
    """Also more splits than tiles."""
    args = problem(1, 1, 1, 1, 64, 64, 4, None, seed=1)
    check(args, Config(splits=splits(args, count), stages=3, parts=count))


@pytest.mark.parametrize(
    ("rows", "retrieval", "streaming", "kind", "counts"),
    [
        (2, 2, 2, None, (2, 2, 7, 1)),  # two loads of parts for one head, one for the others
        # No more tiles than stages: the interpreter takes the next copy of scales for a race with
        # their load, which the maximum over the tile's rows waits for.
        (1, 3, 1, "int8", (2, 5, 2, 5)),
        (1, 0, 3, None, (4, 2, 2)),
    ],
)
def test_heads_have_splits_of_their_own(rows, retrieval, streaming, kind, counts) -> None:
    args = problem(rows, retrieval, streaming, 4, 64, 32, 7, kind, seed=8)
    check(args, Config(splits=counts, parts=4))


def test_most_tokens_deals_out_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a hint: a list may attend more. None is what the lists hold."""
    dealt = []
    monkeypatch.setattr(decode_attention, "SM_COUNT", 4)  # fewer CTAs to interpret
    monkeypatch.setattr(
        decode_attention,
        "choose_config",
        lambda *args: dealt.append(args) or choose_config(*args),
    )
    args = problem(1, 2, 1, 4, 64, 64, 6, None, seed=6)
    lists = PageList(*(x[..., :3] if x.ndim == 3 else jnp.minimum(x, 150) for x in args[4]))
    for most_tokens in (None, (384, 64, 1000)):
        out, lse = paged_attention(*args[:4], lists, most_tokens=most_tokens)
        expected_out, expected_lse = reference.paged_attention(*args[:4], lists)
        assert_allclose(lse, expected_lse, atol=LSE_TOLERANCE[None], rtol=0)
        assert_allclose(*(np.asarray(x, np.float32) for x in (out, expected_out)), atol=1e-2)
    assert [most for _, most, *_ in dealt] == [(384, 384, 192), (384, 64, 192)]


def test_start_beyond_the_first_tiles() -> None:
    *args, retrieval_list, empty = problem(1, 1, 1, 4, 64, 16, 16, None, seed=2)
    lists = PageList(retrieval_list.page_ids, jnp.array([[150]]), jnp.array([[256]]))
    check((*args, lists, empty), Config(splits=(2, 2), parts=2))


@pytest.mark.parametrize("kind", [None, "int4"])
def test_lists_name_parts_of_pages(kind: KVKind | None) -> None:
    q, *pools, retrieval_list, ring = problem(1, 1, 1, 4, 64, 16, 11, kind, seed=4)
    # Pages of 64 in the same memory.
    pools = [
        jax.tree.map(lambda x: x.reshape(x.shape[0], -1, 64, *x.shape[3:]), pool) for pool in pools
    ]
    check((q, *pools, retrieval_list, ring), Config(splits=(2, 2), parts=2), selected_page_size=16)


def test_heads_share_a_list() -> None:
    """One list for the three heads of a pool, and bounds shared while pages are not."""
    q, retrieval, streaming, own, ring = problem(2, 2, 3, 2, 64, 32, 4, None, seed=3)
    valid = KVPages(*(jnp.nan_to_num(x) for x in streaming[:2]))
    shared = PageList(*(x[:, :1] for x in ring))
    shared = shared._replace(stop=shared.stop.at[1].set(0))
    bounds = own._replace(start=own.start[:, :1] * 0, stop=own.stop[:, :1] * 0 + 70)
    whole = KVPages(*(jnp.nan_to_num(x) for x in retrieval[:2]))
    check((q, whole, valid, bounds, shared), Config(splits=(1,) * 5, parts=1))


def test_choice_of_config() -> None:
    def dealt(rows: int, *pages: int, dtype: str = jnp.bfloat16, queries: int = 4):
        return choose_config(rows, tuple(64 * count for count in pages), dtype, queries).splits

    assert dealt(1, *[64] * 8) == (32,) * 8  # two tiles a split
    assert dealt(8, *[65] * 8) == (4,) * 8  # two CTAs an SM
    assert dealt(1, *[2048] * 8) == (33,) * 8
    for dtype in CODE_TYPES.values():
        assert dealt(1, *[2048] * 8, dtype=dtype) == (64,) * 8  # four
        assert dealt(1, *[2048] * 8, dtype=dtype, queries=17) == (33,) * 8
    # Registers do not suffice for four with 16 columns.
    assert dealt(1, *[2048] * 8, dtype=CODE_TYPES["int8"], queries=16) == (64,) * 8
    assert dealt(1, *[2048] * 8, dtype=CODE_TYPES["int4"], queries=16) == (33,) * 8
    assert dealt(1, *[1] * 8) == (1,) * 8
    assert dealt(64, *[65] * 8) == (1,) * 8
    # Streaming heads beside ranked ones, one row and eight.
    assert dealt(1, *[64] * 4, *[6] * 4) == (32,) * 4 + (3,) * 4
    assert dealt(8, *[64] * 4, *[6] * 4) == (7,) * 4 + (1,) * 4
    # A head that reads everything: a CTA on every SM, a fair share of many rows.
    assert dealt(1, 2048) == (132,)
    assert dealt(1, *[64] * 7, 2048) == (16,) * 7 + (132,)
    assert dealt(8, *[64] * 7, 2048) == (1,) * 7 + (26,)
    assert dealt(64, *[64] * 7, 2048) == (1,) * 7 + (2,)


def test_splits_are_numbered_through() -> None:
    """Every number is one split of one head, in order, and the combining kernel finds them."""
    own, shared = (
        PageList(*(np.zeros(shape, np.int32) for shape in ((1, heads, width), (1, heads), (1, 1))))
        for heads, width in ((4, 7), (1, 5))
    )
    splits = (3, 1, 2, 2, 4, 4)
    table = split_table(splits, [(4, own), (2, shared)], 20)
    for number, row in enumerate(table.tolist()):
        place = read_place(table, number)
        assert jax.tree.leaves(place) == row[:-2]
        if number >= sum(splits):
            assert place.splits == 0
            continue
        assert table[place.head, -2:].tolist() == [number - place.split, splits[place.head]]
        assert 0 <= place.split < place.splits == splits[place.head]
        if place.head < 4:
            assert (place.of_second, place.pool_head) == (0, place.head)
            assert (place.page_ids, place.start) == ((28, 7 * place.head), (4, place.head))
            assert (place.stop, place.last_entry) == ((1, 0), 6)
        else:
            assert (place.of_second, place.pool_head) == (1, place.head - 4)
            assert (place.page_ids, place.stop, place.last_entry) == ((5, 0), (1, 0), 4)


@pytest.mark.parametrize("of_lists", [1, 4])
def test_heads_that_are_alike_need_no_table(of_lists: int) -> None:
    lists = PageList(*(np.zeros(x, np.int32) for x in ((2, of_lists, 7), (2, of_lists), (2, 1))))
    table = split_table((3,) * 4, [(4, lists)], 12)
    for number, row in enumerate(table.tolist()):
        place = jax.tree.map(int, place_alike(jnp.int32(number), Alike(3, lists)))
        assert jax.tree.leaves(place) == row[:-2]


@given(
    st.sampled_from([1, 2, 3, 8, 32, 100, 300]),
    st.lists(st.integers(1, 1 << 18), min_size=1, max_size=8),
    st.sampled_from([264, 528]),
)
def test_no_deal_needs_more_numbers(rows: int, most_tokens: list[int], ctas: int) -> None:
    splits = deal_splits(rows, tuple(most_tokens), ctas)
    assert sum(splits) <= most_splits(rows, len(most_tokens), ctas)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
        ({"page_size": 8}, "listed pages must have 16, 32, 64 or 128 tokens, got 8"),
        ({"group": 17}, "at most 16 query heads a KV head, got 17"),
    ],
)
def test_refuses_by_name(change: dict, reason: str) -> None:
    shape = {"group": 1, "head_dim": 64, "page_size": 16} | change
    args = problem(1, 1, 1, width=2, kind=None, **shape)
    with pytest.raises(NotImplementedError, match=reason):
        paged_attention(*args)


def test_refuses_float32() -> None:
    q, *pools_and_lists = problem(1, 1, 1, 1, 64, 16, 2, None)
    with pytest.raises(NotImplementedError, match="queries must be bfloat16, got float32"):
        paged_attention(q.astype(jnp.float32), *pools_and_lists)
    retrieval, *rest = pools_and_lists
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), retrieval)
    with pytest.raises(NotImplementedError, match="pages must be bfloat16 or codes, got float32"):
        paged_attention(q, wide, *rest)


def test_config_checks_itself() -> None:
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        Config(splits=(1,), stages=0)
    with pytest.raises(ValueError, match=r"splits must be at least 1, got \(2, 0\)"):
        Config(splits=(2, 0))
