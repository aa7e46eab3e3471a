"""prefill_attention, paged_attention and merge_attention against the float64 oracle.

All that an op must not read is NaN: pages nobody owns, places that are not written yet, tokens of a
list outside [start, stop), the padded tail of a chunk. One read of them, even with
weight 0, makes the result NaN.
"""

import jax
import jax.numpy as jnp
import kv_oracle
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import api
from pallas_kernels.api import BlockList, KVPages, PageList

prefill = jax.jit(api.prefill_attention, static_argnames=("sink", "local"))
paged = jax.jit(api.paged_attention, static_argnames="selected_page_size")
prefix = jax.jit(api.prefix_attention)
merge = jax.jit(api.merge_attention)

D = 8
# float32 rounds each of the D products and sums of a score, |score| < 16, to 2^-24 of itself: the
# score, hence the lse and each weight's relative error, is off by less than 1e-5, and out, an
# average of |v| < 5, by a few times that at the very worst. Attending one key too many or too few
# of the at most 1,700 here moves the lse by 1/1700 = 6e-4 on average.
TOLERANCE = 2e-5

properties = settings(max_examples=15, deadline=None, derandomize=True)


class Pool:
    """Pages of NaN (codes: of NaN scales) until tokens are put."""

    def __init__(self, heads: int, pages: int, page_size: int, kind: str | None = None) -> None:
        self.kind = kind
        nothing = np.full((heads, pages, page_size, D), np.nan)
        self.blank = kv_oracle.stored(nothing, kind)
        self.k, self.v = (kv_oracle.stored(nothing, kind) for _ in "kv")  # numbers or codes, scales

    def put(self, places: tuple[np.ndarray, np.ndarray], k: np.ndarray, v: np.ndarray) -> None:
        """Tokens [n, heads, D] into ``places`` = (pages [n], offsets [n])."""
        for pool, x in ((self.k, k), (self.v, v)):
            for array, new in zip(pool, kv_oracle.stored(x.swapaxes(0, 1), self.kind), strict=True):
                array[:, *places] = new

    def get(self, places: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """k, v [n, heads, D] as stored."""
        k, v = (x[:, *places].swapaxes(0, 1) for x in self.values())
        return k, v

    def poison(self, keep: np.ndarray) -> None:
        """NaN wherever ``keep`` [heads, pages, page_size] is false."""
        for pool in (self.k, self.v):
            for array, blank in zip(pool, self.blank, strict=True):
                array[~keep] = blank[~keep]

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """What the pages say, float64 [heads, pages, page_size, D]."""
        return kv_oracle.values(*self.k), kv_oracle.values(*self.v)

    def arrays(self) -> KVPages:
        return kv_oracle.pages(self.k, self.v)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


# ---------------------------------------------------------------------------------------- prefill


def random_lists(
    rng: np.random.Generator, heads: int, start: int, length: int, share: float
) -> list[list[list[int]]]:
    """[head][tile]: blocks in ascending order. The first tile of the first head lists none."""
    tiles, count = -(-length // 128), -(-start // 128) + -(-length // 128)
    lists = [
        [np.flatnonzero(rng.random(count) < share).tolist() for _ in range(tiles)]
        for _ in range(heads)
    ]
    lists[0][0] = []
    return lists


def block_list(rng: np.random.Generator, lists: list[list[list[int]]], chunk: int) -> BlockList:
    """As arrays: anything stands behind a list, and in tiles of padding."""
    tiles = -(-chunk // 128)
    width = max(1, *(len(ids) for of_head in lists for ids in of_head))
    ids = rng.integers(-5, 1000, (len(lists), tiles, width)).astype(np.int32)
    counts = np.full(ids.shape[:2], width, np.int32)
    for head, of_head in enumerate(lists):
        for tile, blocks in enumerate(of_head):
            ids[head, tile, : len(blocks)] = blocks
            counts[head, tile] = len(blocks)
    return BlockList(jnp.asarray(ids), jnp.asarray(counts))


def check_prefill(
    *,
    start: int,
    length: int,
    window: tuple[int, int],
    chunk: int,
    table_pages: int,
    page_size: int = 16,
    heads: tuple[int, int],
    group: int = 1,
    kind: str | None = None,
    seed: int = 0,
    listed: float | None = None,
) -> None:
    """``listed``: share of the blocks that each tile lists, at random; None: no lists."""
    rng = np.random.default_rng([seed, start, length])
    sink, local = window
    Kr, Ks = heads
    k, v = (normal(rng, start + chunk, Kr + Ks, D) for _ in range(2))
    q = normal(rng, chunk, (Kr + Ks) * group, D)
    for x in (q, k[start:], v[start:]):
        x[length:] = np.nan

    retrieval = Pool(Kr, table_pages + 2, page_size, kind)
    table = rng.permutation(table_pages + 2)[:table_pages].astype(np.int32)
    # A ring just large enough: most pages of the sequence lie where a later page lies now.
    sink_pages, local_pages = -(-sink // page_size), -(-local // page_size) + 1
    streaming = Pool(Ks, sink_pages + local_pages + 1, page_size, kind)
    ring = rng.permutation(sink_pages + local_pages + 1).astype(np.int32)
    ring_table = np.array(
        [ring[oracle.ring_index(p, sink_pages, local_pages)] for p in range(table_pages)]
    )
    position = np.arange(start)
    visible = (position < sink) | (position > start - local)  # to the chunk's first query
    for pool, pages, kept, part in (
        (retrieval, table, position, slice(None, Kr)),
        (streaming, ring_table, position[visible], slice(Kr, None)),
    ):
        places = (pages[kept // page_size], kept % page_size)
        pool.put(places, k[kept, part], v[kept, part])
        k[kept, part], v[kept, part] = pool.get(places)  # pages of codes hold rounded values
    lists = None if listed is None else random_lists(rng, Kr, start, length, listed)
    out, lse = prefill(
        jnp.asarray(q),
        jnp.asarray(k[start:]),
        jnp.asarray(v[start:]),
        retrieval.arrays(),
        streaming.arrays(),
        jnp.asarray(table),
        jnp.asarray(ring_table),
        jnp.int32(start),
        jnp.int32(length),
        sink=sink,
        local=local,
        blocks=None if lists is None else block_list(rng, lists, chunk),
    )
    true_out, true_lse = oracle.prefill_attention(
        q[:length].astype(float),
        k[: start + length].astype(float),
        v[: start + length].astype(float),
        start,
        Kr,
        sink,
        local,
        lists,
    )
    assert_allclose(np.asarray(out)[:length], true_out, atol=TOLERANCE, rtol=0)
    assert_allclose(np.asarray(lse)[:length], true_lse, atol=TOLERANCE, rtol=0)


# (sink, local): own token only; both small, beside a causal head; windows larger than a query tile
# (256) and a key block (512), ending beside their edges; everything visible.
@pytest.mark.parametrize(
    ("window", "causal"),
    [
        ((0, 1), 0),
        ((40, 24), 1),
        ((0, 300), 0),
        ((520, 1), 0),
        ((513, 257), 0),
        ((16, 5000), 0),
    ],
)
# Chunks that start at 0, inside the sink, on a page edge, where sink and local tokens touch,
# around a block of history; and end around tiles and blocks of the chunk.
@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 600), (5, 1), (16, 255), (45, 257), (511, 513), (512, 512), (513, 511), (1030, 600)],
)
def test_prefill_around_tiles_and_blocks(
    window: tuple[int, int], causal: int, start: int, length: int
) -> None:
    check_prefill(
        start=start,
        length=length,
        window=window,
        chunk=600,
        table_pages=80,
        heads=(causal, 1),
    )


@pytest.mark.parametrize(
    ("heads", "group", "page_size", "kind"),
    [
        ((1, 2), 3, 16, None),
        ((2, 1), 4, 64, "fp8"),
        ((0, 2), 1, 16, None),
        ((2, 0), 3, 16, None),
        ((1, 1), 4, 16, "int4"),
    ],
)
@properties
@given(start=st.integers(0, 150), length=st.integers(1, 40), seed=st.integers(0, 99))
def test_prefill_any_chunk(
    heads: tuple[int, int],
    group: int,
    page_size: int,
    kind: str | None,
    start: int,
    length: int,
    seed: int,
) -> None:
    check_prefill(
        start=start,
        length=length,
        window=(20, 13),
        chunk=40,
        table_pages=-(-190 // page_size),
        page_size=page_size,
        heads=heads,
        group=group,
        kind=kind,
        seed=seed,
    )


def test_prefill_of_many_tiles_by_groups_of_heads() -> None:
    check_prefill(
        start=530,
        length=590,
        window=(30, 280),
        chunk=600,
        table_pages=80,
        heads=(2, 1),
        group=3,
        kind="int8",
    )


# Blocks listed at random, all of them (causal), and none at all; more than are read in a step.
@pytest.mark.parametrize(
    ("start", "length", "heads", "group", "page_size", "kind", "share"),
    [
        (0, 300, (2, 0), 1, 16, None, 0.5),
        (1000, 300, (2, 1), 2, 64, None, 0.5),
        (777, 257, (1, 1), 3, 48, "int4", 0.7),
        (128, 129, (1, 0), 1, 256, None, 1.0),
        (100, 128, (2, 0), 2, 16, None, 0.0),
    ],
)
def test_prefill_of_listed_blocks(start, length, heads, group, page_size, kind, share) -> None:
    check_prefill(
        start=start,
        length=length,
        window=(20, 70),
        chunk=450,
        table_pages=-(-1450 // page_size),
        page_size=page_size,
        heads=heads,
        group=group,
        kind=kind,
        listed=share,
    )


# ------------------------------------------------------------------------------------------ paged


class PagedCase:
    """Random lists of B rows over both pools, NaN for every token that no row attends."""

    B = 3

    def __init__(
        self,
        rng: np.random.Generator,
        ranges: list[tuple[int, int]],  # (start, stop) for each row and KV head
        *,
        page_size: int = 16,
        entries: int = 40,
        heads: tuple[int, int] = (2, 1),
        group: int = 2,
        kind: str | None = None,
        together: int = 1,  # listed pages in a page of the pools
    ) -> None:
        K, self.split, self.together = sum(heads), heads[0], together
        count = together * -(-(entries + 4) // together)
        self.q = normal(rng, self.B, K * group, D)
        starts, stops = np.array(ranges, np.int32).reshape(self.B, K, 2).transpose(2, 0, 1)
        # Entries outside [start, stop) name a page that is all NaN, the last one.
        pages = np.full((self.B, K, entries), entries + 3, np.int32)
        keep = np.zeros((K, count, page_size), bool)
        for row, head in np.ndindex(self.B, K):
            chosen = rng.choice(entries + 3, entries, replace=False)
            entry, place = np.divmod(np.arange(starts[row, head], stops[row, head]), page_size)
            pages[row, head, entry] = chosen[entry]
            keep[head, chosen[entry], place] = True
        self.lists = PageList(pages, starts, stops)
        self.pools = []
        for part in (slice(None, self.split), slice(self.split, None)):
            pool = Pool(len(keep[part]), count, page_size, kind)
            places = np.divmod(np.arange(count * page_size), page_size)
            tokens = normal(rng, 2, len(places[0]), len(keep[part]), D)
            pool.put(places, *tokens)
            pool.poison(keep[part])
            self.pools.append(pool)

    def run(self, lists: PageList | None = None) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            PageList(*(jnp.asarray(x[:, part]) for x in lists or self.lists))
            for part in (slice(None, self.split), slice(self.split, None))
        ]
        pools = [pool.arrays() for pool in self.pools]
        size = None
        if self.together > 1:
            size = pools[0].k.shape[2]
            pools = [jax.tree.map(self.join, pool) for pool in pools]
        out, lse = paged(jnp.asarray(self.q), *pools, *parts, selected_page_size=size)
        return np.asarray(out), np.asarray(lse)

    def join(self, pool: jax.Array) -> jax.Array:
        """Pages of ``together`` times as many tokens, one after another in memory."""
        K, N, P, *channels = pool.shape
        return pool.reshape(K, N // self.together, self.together * P, *channels)

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        B, H, _ = self.q.shape
        K = self.lists.start.shape[1]
        values = [pool.values() for pool in self.pools]
        out, lse = np.zeros(self.q.shape), np.zeros((B, H))
        for row, h in np.ndindex(B, H):
            head = h // (H // K)
            k, v = values[0] if head < self.split else values[1]
            pool_head = head if head < self.split else head - self.split
            out[row, h], lse[row, h] = oracle.paged_attention(
                self.q[row, h].astype(float),
                k[pool_head],
                v[pool_head],
                *(x[row, head] for x in self.lists),
            )
        return out, lse


@st.composite
def token_ranges(draw: st.DrawFn, count: int, entries: int, page_size: int) -> list:
    """(start, stop) pairs: empty, within one page, to the very end; page edges are likely."""
    end = st.one_of(
        st.integers(0, entries).map(lambda n: n * page_size),
        st.integers(0, entries * page_size),
    )
    pair = st.tuples(end, end).map(lambda ends: tuple(sorted(ends)))
    return draw(st.lists(pair, min_size=count, max_size=count))


@pytest.mark.parametrize(
    ("page_size", "entries", "heads", "group", "kind", "together"),
    [
        (16, 40, (2, 1), 2, None, 1),  # more tokens than one block of 512
        (16, 40, (2, 1), 2, None, 4),
        (16, 7, (0, 2), 4, "fp8", 1),
        (16, 7, (0, 2), 4, "fp8", 4),
        (64, 3, (2, 0), 1, "int8", 1),
        (64, 9, (1, 1), 3, "int4", 4),
    ],
)
@properties
@given(data=st.data(), seed=st.integers(0, 99))
def test_paged_attention(
    page_size: int,
    entries: int,
    heads: tuple[int, int],
    group: int,
    kind: str | None,
    together: int,
    data: st.DataObject,
    seed: int,
) -> None:
    """Lists of whole pages, or of quarters."""
    ranges = data.draw(token_ranges(PagedCase.B * sum(heads), entries, page_size))
    case = PagedCase(
        np.random.default_rng(seed),
        ranges,
        page_size=page_size,
        entries=entries,
        heads=heads,
        group=group,
        kind=kind,
        together=together,
    )
    out, lse = case.run()
    true_out, true_lse = case.truth()
    assert_allclose(out, true_out, atol=TOLERANCE, rtol=0)
    assert_allclose(lse, true_lse, atol=TOLERANCE, rtol=0)


def test_a_row_that_attends_nothing_gives_zero_and_minus_infinity() -> None:
    case = PagedCase(np.random.default_rng(0), [(0, 0), (33, 33), (640, 640)] + [(0, 640)] * 6)
    out, lse = case.run()
    assert_array_equal(out[0], 0.0)
    assert_array_equal(lse[0], -np.inf)


@pytest.mark.parametrize("row", range(PagedCase.B))
def test_a_row_does_not_depend_on_its_neighbours(row: int) -> None:
    """Bitwise, although longer neighbours make the loop run past its end, and attend NaN."""
    rng = np.random.default_rng(1)
    case = PagedCase(rng, [(3, 40), (0, 16), (5, 6)] * 3)
    before = case.run()
    other = PagedCase(rng, [(0, 640), (0, 0), (100, 513)] * 3)
    mixed = PageList(*(x.copy() for x in other.lists))
    for new, kept in zip(mixed, case.lists, strict=True):
        new[row] = kept[row]
    q = other.q.copy()
    q[row] = case.q[row]
    case.q = q
    after = case.run(mixed)
    for x, y in zip(before, after, strict=True):
        assert_array_equal(x[row], y[row])
        assert not np.array_equal(x, y, equal_nan=True)


# ----------------------------------------------------------------------------------------- prefix


@pytest.mark.parametrize(
    ("page_size", "length", "kind"),
    [(16, 1, None), (16, 15, "int8"), (16, 16, "fp8"), (16, 640, None), (64, 193, "int4")],
)
def test_prefix_attention(page_size: int, length: int, kind: str | None) -> None:
    """All rows attend the same tokens, none masked; everything else in the pool is NaN."""
    rng = np.random.default_rng(length)
    B, K, group, count = 3, 2, 2, 41
    table = rng.permutation(count).astype(np.int32)
    token = np.arange(length)
    places = table[token // page_size], token % page_size
    pool = Pool(K, count, page_size, kind)
    pool.put(places, *normal(rng, 2, length, K, D))
    used = np.zeros((K, count, page_size), bool)
    used[:, *places] = True
    pool.poison(used)
    q = normal(rng, B, K * group, D)
    out, lse = prefix(jnp.asarray(q), pool.arrays(), jnp.asarray(table), jnp.int32(length))
    k, v = pool.values()
    for row, h in np.ndindex(B, K * group):
        true_out, true_lse = oracle.paged_attention(
            q[row, h].astype(float), k[h // group], v[h // group], table, 0, length
        )
        assert_allclose(out[row, h], true_out, atol=TOLERANCE, rtol=0)
        assert_allclose(lse[row, h], true_lse, atol=TOLERANCE, rtol=0)


def test_a_prefix_joined_with_what_rows_have_of_their_own() -> None:
    """Row 0 has both, row 1 only its own, row 2 only the prefix, row 3 neither."""
    rng = np.random.default_rng(3)
    B, K, group, S, u = 4, 2, 2, 37, 5
    k, v = normal(rng, 2, S, K, D)
    pool = Pool(K, 4, 16)
    pool.put((np.arange(S) // 16, np.arange(S) % 16), k, v)
    q, own_k, own_v = normal(rng, B, K * group, D), *normal(rng, 2, B, u, K, D)
    own_out = np.full(q.shape, np.nan, np.float32)
    own_lse = np.full(q.shape[:2], -np.inf, np.float32)
    shares = np.array([True, False, True, False])
    for row, h in np.ndindex(2, K * group):
        head = h // group
        own_out[row, h], own_lse[row, h] = oracle.softmax_attention(
            q[row, h].astype(float), own_k[row, :, head], own_v[row, :, head]
        )
    own = api.OwnAttention(jnp.asarray(own_out), jnp.asarray(own_lse), jnp.asarray(shares))
    out, lse = prefix(jnp.asarray(q), pool.arrays(), jnp.arange(4), jnp.int32(S), own)
    for row, h in np.ndindex(3, K * group):
        head = h // group
        keys = [x[:, head] for x, seen in ((k, shares[row]), (own_k[row], row < 2)) if seen]
        values = [x[:, head] for x, seen in ((v, shares[row]), (own_v[row], row < 2)) if seen]
        true_out, true_lse = oracle.softmax_attention(
            q[row, h].astype(float), np.concatenate(keys), np.concatenate(values)
        )
        assert_allclose(out[row, h], true_out, atol=TOLERANCE, rtol=0)
        assert_allclose(lse[row, h], true_lse, atol=TOLERANCE, rtol=0)
    assert_array_equal(out[3], 0.0)
    assert_array_equal(lse[3], -np.inf)


def test_an_empty_prefix_gives_zero_and_minus_infinity() -> None:
    pool = Pool(1, 2, 16)
    pool.poison(np.zeros((1, 2, 16), bool))
    q = jnp.ones((2, 3, D))
    out, lse = prefix(q, pool.arrays(), jnp.array([1]), jnp.int32(0))
    assert_array_equal(out, 0.0)
    assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("with_own", [False, True])
def test_a_prefix_without_heads_gives_nothing(with_own: bool) -> None:
    pool, q = KVPages(*[jnp.ones((0, 2, 16, D))] * 2), jnp.ones((2, 0, D))
    own = api.OwnAttention(q, jnp.zeros((2, 0)), jnp.array([True, False])) if with_own else None
    out, lse = prefix(q, pool, jnp.array([1]), jnp.int32(9), own)
    assert (out.shape, out.dtype) == ((2, 0, D), q.dtype)
    assert (lse.shape, lse.dtype) == ((2, 0), jnp.float32)


# ------------------------------------------------------------------------------------------ merge


@properties
@given(ends=token_ranges(9, 40, 16), cut=st.floats(0, 1))
def test_merge_of_a_split_equals_unsplit(ends: list[tuple[int, int]], cut: float) -> None:
    """Any split point, also at either end, where one part is empty and its out is NaN."""
    case = PagedCase(np.random.default_rng(2), ends)
    pages, start, stop = case.lists
    middle = (start + np.round(cut * (stop - start))).astype(np.int32)
    parts = [case.run(PageList(pages, start, middle)), case.run(PageList(pages, middle, stop))]
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    outs[lses == -np.inf] = np.nan
    out, lse = merge(jnp.asarray(outs), jnp.asarray(lses))
    true_out, true_lse = case.truth()
    assert_allclose(out, true_out, atol=TOLERANCE, rtol=0)
    assert_allclose(lse, true_lse, atol=TOLERANCE, rtol=0)


part_lse = st.one_of(st.sampled_from([-np.inf, -200.0, 0.0, 200.0]), st.floats(-50, 50, width=32))


@settings(properties, max_examples=100)
@given(lses=st.lists(st.tuples(part_lse, part_lse, part_lse), min_size=4, max_size=4))
def test_merge_weighs_parts_by_their_lse(lses: list[tuple[float, float, float]]) -> None:
    """Empty parts, all parts empty, parts 200 (a factor of e^200) apart."""
    lse_parts = np.array(lses, np.float32).T  # [3, 4]
    outs = normal(np.random.default_rng(3), 3, 4, D)
    outs[lse_parts == -np.inf] = np.nan
    out, lse = map(np.asarray, merge(jnp.asarray(outs), jnp.asarray(lse_parts)))
    for i in range(4):
        true_out, true_lse = oracle.merge(outs[:, i].astype(float), lse_parts[:, i].astype(float))
        assert_allclose(out[i], true_out, atol=TOLERANCE, rtol=0)
        # One part in 2^24 of an lse of 200 is 1.2e-5.
        assert_allclose(lse[i], true_lse, atol=2 * TOLERANCE, rtol=0)
