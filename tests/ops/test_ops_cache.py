"""append_kv, append_kv_chunk, quantize_kv and apply_rotary against the float64 oracle."""

import jax
import jax.numpy as jnp
import kv_oracle
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import api
from pallas_kernels.api import KVPages

append = jax.jit(api.append_kv)
append_chunk = jax.jit(api.append_kv_chunk)
quantize = jax.jit(api.quantize_kv, static_argnames="kind")
dequantize = jax.jit(api.dequantize_kv)
rotary = jax.jit(api.apply_rotary)

D, KR, KS, GROUP = 8, 2, 1, 2
# A rotated channel is two products and a sum, with cos and sin themselves rounded: 4 roundings of
# 2^-24 at magnitude < 8.
ROTATED = {"atol": 2e-6, "rtol": 0}
# Below it a float32 is denormal, which XLA takes for zero.
TINY = 2.0**-126

properties = settings(max_examples=25, deadline=None, derandomize=True)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Vectors [B, heads, D] by the angles [B, D/2] of their rows."""
    return np.array(
        [[oracle.rotate(v.astype(float), a) for v in row] for row, a in zip(x, angles, strict=True)]
    )


class Sequences:
    """Two sequences that grow and end in one cache, beside a plain record of what they hold.

    The cache starts as NaN, keys' statistics included, and pages go from one sequence to the next
    as they are. The record knows nothing of pages but which ones a sequence owns: it keeps each
    sequence's keys in order and derives every page, ring page and statistic from those.
    """

    B, M, T = 2, 4, 24  # rows, pages a sequence, largest chunk
    SINK_PAGES, LOCAL_PAGES = (
        1,
        2,
    )  # of the ring: the first page and, page-exact, one page of tokens

    def __init__(
        self, rng: np.random.Generator, page_size: int, logical_pages: int, ranked: int = KR
    ) -> None:
        """Statistics are those of the first ``ranked`` retrieval heads."""
        self.rng, self.P, self.logical_page_size = rng, page_size, page_size // logical_pages
        N = self.B * self.M + 1
        self.free = list(rng.permutation(N))
        ring = self.SINK_PAGES + self.LOCAL_PAGES
        self.rings = rng.permutation(self.B * ring).reshape(self.B, ring)
        self.tables = np.zeros((self.B, self.M), np.int32)
        self.owned: list[list[int]] = [[] for _ in range(self.B)]
        self.keys: list[list[np.ndarray]] = [[] for _ in range(self.B)]  # [KR + KS, D] a token
        self.values: list[list[np.ndarray]] = [[] for _ in range(self.B)]
        # The cache under test and, in float64, what it should be.
        shapes = ((KR, N, page_size, D), (KS, self.B * ring, page_size, D))
        self.truth = [np.full(shape, np.nan) for shape in shapes for _ in "kv"]
        self.true_stats = np.full((ranked, N, logical_pages, 2, D), np.nan)
        self.retrieval, self.streaming = (
            KVPages(*(jnp.full(shape, jnp.nan) for _ in "kv")) for shape in shapes
        )
        self.stats = jnp.full(self.true_stats.shape, jnp.nan)

    def length(self, row: int) -> int:
        return len(self.keys[row])

    def room(self, row: int) -> int:
        return self.M * self.P - self.length(row)

    def _own(self, row: int, tokens: int) -> None:
        while len(self.owned[row]) * self.P < tokens:
            self.owned[row].append(self.free.pop())
        # What a table holds past a sequence's end is the caller's leftover.
        self.tables[row] = self.rng.integers(self.true_stats.shape[1], size=self.M)
        self.tables[row, : len(self.owned[row])] = self.owned[row]

    def _ring_page(self, row: int, position: int) -> int:
        index = oracle.ring_index(position // self.P, self.SINK_PAGES, self.LOCAL_PAGES)
        return self.rings[row, index]

    def _record(self, row: int, k: np.ndarray, v: np.ndarray, in_ring: bool) -> None:
        """One token's keys and values, [KR + KS, D]."""
        position = self.length(row)
        self.keys[row].append(k)
        self.values[row].append(v)
        page, place = self.owned[row][position // self.P], position % self.P
        for pool, x in zip(self.truth[:2], (k, v), strict=True):
            pool[:, page, place] = x[:KR]
        if in_ring:
            for pool, x in zip(self.truth[2:], (k, v), strict=True):
                pool[:, self._ring_page(row, position), place] = x[KR:]
        per_page = self.P // self.logical_page_size
        for head in range(len(self.true_stats)):
            history = np.array([key[head] for key in self.keys[row]])
            statistics = oracle.key_statistics(history, self.logical_page_size)
            for i, high_low in enumerate(statistics):
                self.true_stats[head, self.owned[row][i // per_page], i % per_page] = high_low

    def chunk(self, row: int, length: int) -> None:
        start, H = self.length(row), KR + KS
        end = start + length
        k, v = normal(self.rng, self.T, H, D), normal(self.rng, self.T, H, D)
        k[length:], v[length:] = np.nan, np.nan
        self._own(row, end)
        position = start + np.arange(self.T)
        kept = (position < self.SINK_PAGES * self.P) | (position >= end - self.P)
        ring_pages = np.array([self._ring_page(row, t) for t in position])
        ring_pages[~kept] = -1
        self.retrieval, self.streaming, self.stats = append_chunk(
            jnp.asarray(k),
            jnp.asarray(v),
            self.retrieval,
            self.streaming,
            self.stats,
            jnp.asarray(self.tables[row]),
            jnp.asarray(ring_pages, jnp.int32),
            jnp.int32(start),
            jnp.int32(length),
        )
        for t in range(length):
            self._record(row, k[t], v[t], in_ring=bool(kept[t]))

    def decode(self, rows: list[int]) -> None:
        """One token for each of ``rows``; the other rows are inactive."""
        H = KR + KS
        q, k, v = (normal(self.rng, self.B, n, D) for n in (H * GROUP, H, H))
        page, ring_page, offset = (np.full(self.B, x, np.int32) for x in (-1, -1, 3))
        angles = np.zeros((self.B, D // 2))
        for row in rows:
            position = self.length(row)
            self._own(row, position + 1)
            page[row] = self.tables[row, position // self.P]
            ring_page[row] = self._ring_page(row, position)
            offset[row] = position % self.P
            angles[row] = position * 10.0 ** -np.arange(D // 2)
        rotated, self.retrieval, self.streaming, self.stats = append(
            *map(jnp.asarray, (q, k, v)),
            *(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)),
            self.retrieval,
            self.streaming,
            self.stats,
            *map(jnp.asarray, (page, ring_page, offset)),
        )
        assert_allclose(rotated, rotate(q, angles), **ROTATED)
        true_k = rotate(k, angles)
        for row in rows:
            self._record(row, true_k[row], v[row].astype(float), in_ring=True)

    def end(self, row: int) -> None:
        """The pages are free again, just as they are."""
        self.free = self.owned[row] + self.free
        self.rng.shuffle(self.free)
        self.owned[row], self.keys[row], self.values[row] = [], [], []

    def check(self) -> None:
        """Every token and statistic of the cache, also those that nobody should have touched."""
        pools = (*self.retrieval[:2], *self.streaming[:2], self.stats)
        for array, truth in zip(pools, (*self.truth, self.true_stats), strict=True):
            assert_allclose(array, truth, **ROTATED)


@pytest.mark.parametrize(("logical_pages", "ranked"), [(1, KR), (2, KR), (4, KR), (2, 1), (2, 0)])
@properties
@given(
    events=st.lists(
        st.one_of(
            st.tuples(st.just("chunk"), st.integers(0, 1), st.integers(1, Sequences.T)),
            st.tuples(st.just("decode"), st.lists(st.integers(0, 1), unique=True)),
            st.tuples(st.just("decode both"), st.integers(1, 12)),
            st.tuples(st.just("end"), st.integers(0, 1)),
        ),
        min_size=1,
        max_size=15,
    ),
    seed=st.integers(0, 99),
)
def test_any_mixture_of_chunks_and_steps(
    logical_pages: int, ranked: int, events: list[tuple], seed: int
) -> None:
    """Heads that are not ranked are written, too."""
    cache = Sequences(np.random.default_rng(seed), 16, logical_pages, ranked)
    for kind, *arguments in events:
        match kind, arguments:
            case "chunk", [row, length] if cache.room(row) > 0:
                cache.chunk(row, min(length, cache.room(row)))
            case "decode", [rows]:
                cache.decode([row for row in rows if cache.room(row) > 0])
            case "decode both", [steps]:
                for _ in range(min(steps, cache.room(0), cache.room(1))):
                    cache.decode([0, 1])
            case "end", [row]:
                cache.end(row)
        cache.check()


@pytest.mark.parametrize("by_chunk", [True, False])
def test_first_token_of_a_recycled_page_assigns_statistics(by_chunk: bool) -> None:
    """Stale statistics wider than anything the new sequence holds must not survive."""
    cache = Sequences(np.random.default_rng(0), 16, 2)
    cache.true_stats[..., 0, :], cache.true_stats[..., 1, :] = 1e9, -1e9
    cache.stats = jnp.asarray(cache.true_stats, jnp.float32)
    for _ in range(20):
        cache.chunk(0, 1) if by_chunk else cache.decode([0])
    cache.check()


def test_without_statistics_and_with_one_class_of_heads() -> None:
    rng = np.random.default_rng(0)
    empty, pool = (KVPages(*(jnp.zeros((n, 3, 16, D)) for _ in "kv")) for n in (0, 1))
    k, v = (normal(rng, 5, 1, D) for _ in "kv")
    tokens, span = (jnp.asarray(k), jnp.asarray(v)), (jnp.int32(14), jnp.int32(4))
    table, nowhere, ring = jnp.array([2, 1]), jnp.full(5, -1), jnp.array([0, 0, -1, 1, 1])

    retrieval, _, stats = append_chunk(*tokens, pool, empty, None, table, nowhere, *span)
    assert stats is None
    for pages, x in zip(retrieval[:2], (k, v), strict=True):
        truth = np.zeros((1, 3, 16, D))
        truth[0, [2, 2, 1, 1], [14, 15, 0, 1]] = x[:4, 0]
        assert_array_equal(pages, truth)

    _, streaming, stats = append_chunk(*tokens, empty, pool, None, table, ring, *span)
    assert stats is None
    for pages, x in zip(streaming[:2], (k, v), strict=True):
        truth = np.zeros((1, 3, 16, D))
        truth[0, [0, 0, 1], [14, 15, 1]] = x[[0, 1, 3], 0]
        assert_array_equal(pages, truth)


@pytest.mark.parametrize(("page", "streaming_page"), [(-1, 2), (2, -1), (-1, -1)])
def test_a_negative_page_drops_the_token(page: int, streaming_page: int) -> None:
    """In each pool by itself; the statistics go with the retrieval pool."""
    rng = np.random.default_rng(0)
    pools = [KVPages(*(jnp.full((1, 3, 16, D), 7.0) for _ in "kv")) for _ in range(2)]
    stats = jnp.full((1, 3, 2, 2, D), 7.0)
    q, k, v = (jnp.asarray(normal(rng, 1, 2, D)) for _ in range(3))
    one = jnp.ones((1, D // 2))
    ids = (jnp.array([page]), jnp.array([streaming_page]))
    _, retrieval, streaming, new_stats = append(
        q, k, v, one, one, *pools, stats, *ids, jnp.array([15])
    )
    for pages, page_id in ((retrieval, page), (streaming, streaming_page)):
        for x in map(np.asarray, pages[:2]):
            changed = np.argwhere(np.any(x != 7.0, axis=-1)).tolist()
            assert changed == ([] if page_id < 0 else [[0, page_id, 15]])
    assert np.array_equal(new_stats, stats) == (page < 0)

    chunk = jnp.broadcast_to(k, (3, 2, D))
    retrieval, streaming, new_stats = append_chunk(
        chunk,
        chunk,
        *pools,
        stats,
        jnp.array([page]),
        jnp.full(3, streaming_page),
        jnp.int32(0),
        jnp.int32(3),
    )
    for pages, page_id in ((retrieval, page), (streaming, streaming_page)):
        assert np.count_nonzero(np.asarray(pages.k) != 7.0) == (0 if page_id < 0 else 3 * D)
    assert np.array_equal(new_stats, stats) == (page < 0)


# ------------------------------------------------------------------------------------------ codes

vectors = arrays(
    np.float32,
    (6, D),
    elements=st.one_of(st.floats(-1e4, 1e4, width=32), st.floats(-(2.0**-23), 2.0**-23, width=32)),
)


@pytest.mark.parametrize("kind", api.KV_KINDS)
@settings(properties, max_examples=100)
@given(x=vectors, constant=st.booleans())
def test_codes_are_off_by_half_a_step_at_most(
    kind: api.KVKind, x: np.ndarray, constant: bool
) -> None:
    """And steps are no larger than they must be; zeros stay zeros."""
    if constant:
        x = np.broadcast_to(x[:, :1], x.shape)
    codes, scale = quantize(jnp.asarray(x), kind)
    found = [np.asarray(leaf) for leaf in jax.tree.leaves((codes, scale))]
    wanted = kv_oracle.stored(x, kind)
    assert [(leaf.shape, leaf.dtype) for leaf in found] == [(y.shape, y.dtype) for y in wanted]
    error = np.abs(x - kv_oracle.values(*found))
    assert np.all(error <= kv_oracle.bound(x, kind, *found[1:]))
    if kind == "int4":
        for word, true in zip(found[1:], wanted[1:], strict=True):
            (step, lowest), (true_step, true_lowest) = map(kv_oracle.steps, (word, true))
            assert_allclose(lowest, true_lowest, rtol=0, atol=TINY)
            # In bf16: to the next one, if what is rounded was rounded on the way.
            assert_allclose(step, true_step, rtol=2**-7)
    else:
        assert_allclose(found[1], wanted[1], rtol=1e-6)
    restored = np.asarray(dequantize(codes, scale))
    assert_allclose(restored, kv_oracle.values(*found).astype(np.float32), rtol=0, atol=TINY)
    assert_array_equal(restored[~x.any(axis=-1)], 0.0)


@pytest.mark.parametrize("rows", [3, 5000])  # fewer than a register holds, and parts for threads
@pytest.mark.parametrize("kind", api.KV_KINDS)
def test_nan_stays_nan(kind: api.KVKind, rows: int) -> None:
    """In the vector that has it, or its half, and nowhere else: XLA's max may lose it."""
    rng = np.random.default_rng(rows)
    x = normal(rng, rows, 32)
    spoilt = rng.permutation(rows)[: rows // 3 + 1]
    x[spoilt, rng.integers(32, size=len(spoilt))] = np.nan
    x[spoilt[0]] = np.nan
    wanted = np.isnan(x).reshape(rows, 2 if kind == "int4" else 1, -1).any(axis=-1)
    for function in (quantize, api.quantize_kv):
        restored = np.asarray(dequantize(*function(jnp.asarray(x), kind)))
        found = np.isnan(restored).reshape(*wanted.shape, -1)
        assert_array_equal(found, np.broadcast_to(wanted[..., None], found.shape))


@pytest.mark.parametrize("kind", api.KV_KINDS)
def test_pages_of_codes_quantise_on_write_and_leave_the_rest(kind: api.KVKind) -> None:
    """Both appends; the statistics see the key before it is rounded."""
    rng = np.random.default_rng(0)
    before = kv_oracle.stored(np.full((1, 3, 16, D), 5.0), kind)

    def check(pool: KVPages, places: tuple[np.ndarray, np.ndarray], *x: np.ndarray) -> None:
        """``x`` are keys and values [n, D] that were written to ``places``."""
        untouched = np.ones((3, 16), bool)
        untouched[places] = False
        for stored, numbers in zip(
            ((pool.k, pool.k_scale), (pool.v, pool.v_scale)), x, strict=True
        ):
            arrays = [np.asarray(leaf)[0] for leaf in jax.tree.leaves(stored)]
            written = [array[places] for array in arrays]
            error = np.abs(numbers - kv_oracle.values(*written))
            assert np.all(error <= kv_oracle.bound(numbers, kind, *written[1:]) + ROTATED["atol"])
            for array, old in zip(arrays, before, strict=True):
                assert_array_equal(array[untouched], old[0][untouched])

    q, k, v = (normal(rng, 2, 2, D) for _ in range(3))
    k[1], v[1] = 0.0, 2.5  # a zero and a constant vector
    angles = np.array([[0.3, 1.0, 2.0, -5.0], [1.0, 1.0, 1.0, 1.0]])
    page, streaming_page, offset = np.array([2, 0]), np.array([1, 2]), np.array([0, 15])
    _, retrieval, streaming, stats = append(
        *map(jnp.asarray, (q, k, v)),
        *(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)),
        kv_oracle.pages(before, before),
        kv_oracle.pages(before, before),
        jnp.zeros((1, 3, 2, 2, D)),
        *(jnp.asarray(x, jnp.int32) for x in (page, streaming_page, offset)),
    )
    true_k = rotate(k, angles)
    for head, (pool, page_id) in enumerate(((retrieval, page), (streaming, streaming_page))):
        check(pool, (page_id, offset), true_k[:, head], v[:, head])
    assert_allclose(stats[0, 2, 0], np.stack([true_k[0, 0]] * 2), **ROTATED)

    k, v = (normal(rng, 5, 2, D) for _ in "kv")
    k[2], v[3] = 0.0, 2.5
    retrieval, streaming, _ = append_chunk(
        jnp.asarray(k),
        jnp.asarray(v),
        kv_oracle.pages(before, before),
        kv_oracle.pages(before, before),
        None,
        jnp.array([2, 0]),
        jnp.full(5, 1),
        jnp.int32(15),
        jnp.int32(4),
    )
    offset = np.array([15, 0, 1, 2])
    check(retrieval, (np.array([2, 0, 0, 0]), offset), k[:4, 0], v[:4, 0])
    check(streaming, (np.full(4, 1), offset), k[:4, 1], v[:4, 1])


# ----------------------------------------------------------------------------------------- rotary


@properties
@given(seed=st.integers(0, 999), rows=st.sampled_from([1, 2]))
def test_apply_rotary(seed: int, rows: int) -> None:
    """Angles for each row, or one row of angles for all."""
    rng = np.random.default_rng(seed)
    x, angles = normal(rng, 2, 3, 2, D), rng.uniform(-1e5, 1e5, (rows, 3, D // 2))
    out = rotary(jnp.asarray(x), *(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)))
    for row in range(2):
        assert_allclose(out[row], rotate(x[row], angles[row % rows]), **ROTATED)
