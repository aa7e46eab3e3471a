"""page_scores and select_pages against the float64 oracle and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import api

page_scores = jax.jit(
    api.page_scores, static_argnames=("page_size", "selected_page_size", "lower_bound_weight")
)
select_pages = jax.jit(api.select_pages, static_argnames=("num_pages", "sink_pages"))

B, KR, GROUP, M, D, P = 3, 2, 2, 5, 8, 16
WEIGHTS = [0.0, 0.5, 0.3, 1.0]  # of the lower bound
# A score is a sum of 16 products of size < 16, each rounded to 2^-24 of itself.
TOLERANCE = 2e-5

properties = settings(max_examples=25, deadline=None, derandomize=True)


class Case:
    """B sequences of random keys with their statistics in a pool; everything else is NaN."""

    def __init__(
        self,
        seed: int,
        lengths: list[int],
        logical_pages: int,
        sign: int,
        lower_bound_weight: float = 0.0,
        together: int = 1,
    ) -> None:
        """``together`` logical pages have one score."""
        rng = np.random.default_rng(seed)
        self.lengths, self.lower_bound_weight = lengths, lower_bound_weight
        self.q = rng.standard_normal((B, KR * GROUP, D), np.float32)
        self.keys = rng.standard_normal((B, KR, M * P, D), np.float32)
        if sign:  # every product q_d * k_d has this sign
            self.q, self.keys = np.abs(self.q), sign * np.abs(self.keys)
        N, logical = B * M + 2, P // logical_pages
        self.selected_page_size = together * logical
        self.stats = np.full((KR, N, logical_pages, 2, D), np.nan, np.float32)
        self.tables = rng.permutation(N)[: B * M].reshape(B, M).astype(np.int32)
        self.truth = np.full((B, KR, M * logical_pages // together), -np.inf)
        for row, head in np.ndindex(B, KR):
            keys = self.keys[row, head, : lengths[row]]
            statistics = oracle.key_statistics(keys, logical)
            for i, high_low in enumerate(statistics):
                page = self.tables[row, i // logical_pages]
                self.stats[head, page, i % logical_pages] = high_low
            for page in range(self.truth.shape[2]):
                self.truth[row, head, page] = oracle.page_score(
                    self.group(row, head),
                    statistics[page * together : (page + 1) * together],
                    lower_bound_weight,
                )

    def group(self, row: int, head: int) -> np.ndarray:
        """Queries [G, D] of the group that shares a KV head."""
        return self.q[row, head * GROUP : (head + 1) * GROUP].astype(float)

    def scores(self) -> np.ndarray:
        arguments = (self.q, self.stats, self.tables, np.array(self.lengths, np.int32))
        scores = page_scores(
            *map(jnp.asarray, arguments),
            page_size=P,
            selected_page_size=self.selected_page_size,
            lower_bound_weight=self.lower_bound_weight,
        )
        return np.asarray(scores)


# Multiples of the page size, where the newest page is exactly full and no next one has begun.
length = st.one_of(st.integers(0, M).map(lambda n: n * P), st.integers(0, M * P))
lengths_of_rows = st.lists(length, min_size=B, max_size=B)


@pytest.mark.parametrize(
    ("logical_pages", "together"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
)
@properties
@given(
    seed=st.integers(0, 99),
    lengths=lengths_of_rows,
    sign=st.sampled_from([-1, 0, 0, 1]),
    weight=st.sampled_from(WEIGHTS),
)
def test_page_scores(
    logical_pages: int, together: int, seed: int, lengths: list[int], sign: int, weight: float
) -> None:
    """Rows of unequal length; -inf exactly where no token is, also below negatives."""
    case = Case(seed, lengths, logical_pages, sign, weight, together)
    scores = case.scores()
    assert_allclose(scores, case.truth, atol=TOLERANCE, rtol=0)
    first_token = np.arange(scores.shape[2]) * case.selected_page_size
    holds_tokens = first_token < np.array(lengths)[:, None, None]
    assert_array_equal(scores > -np.inf, np.broadcast_to(holds_tokens, scores.shape))


@properties
@given(seed=st.integers(0, 99), lengths=lengths_of_rows)
def test_a_score_bounds_every_product_with_the_pages_keys(seed: int, lengths: list[int]) -> None:
    """Where the lower bound has no weight."""
    case = Case(seed, lengths, 2, 0)
    scores = case.scores()
    for row, head in np.ndindex(B, KR):
        for token in range(lengths[row]):
            products = case.group(row, head) @ case.keys[row, head, token]
            assert scores[row, head, token // (P // 2)] >= products.max() - TOLERANCE


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_page_of_one_key_repeated_scores_its_exact_product(weight: float) -> None:
    """Both bounds are tight, and the best query head of the group decides."""
    case = Case(0, [M * P] * B, 2, 0, weight)
    key = case.keys[0, :, 0]
    case.stats[:] = key[:, None, None, None]
    scores = case.scores()
    for row, head in np.ndindex(B, KR):
        best = (case.group(row, head) @ key[head]).max()
        assert_allclose(scores[row, head], (1 + weight) * best, atol=TOLERANCE, rtol=0)


def test_rows_do_not_depend_on_each_others_length() -> None:
    """Bitwise."""
    scores = Case(3, [33, 80, 16], 2, 0).scores()
    for other in (0, 33, 80):
        assert_array_equal(Case(3, [33, other, other], 2, 0).scores()[0], scores[0])


# ----------------------------------------------------------------------------------------- select

COUNT = 9
# Few values, so that ties are common; both zeros are equal.
tied_scores = arrays(
    np.float32, (B, KR, COUNT), elements=st.sampled_from([-2.0, -1.0, -0.0, 0.0, 3.0])
)
# XLA's CPU code takes subnormal numbers for zero, in the comparison of two scores too.
any_scores = arrays(
    np.float32,
    (B, KR, COUNT),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


@pytest.mark.parametrize(
    ("num_pages", "sink_pages"), [(4, 1), (1, 0), (3, 3), (9, 0), (20, 2), (0, 0)]
)
@properties
@given(
    scores=st.one_of(tied_scores, any_scores),
    candidates=st.lists(st.integers(0, COUNT + 2), min_size=B, max_size=B),
    data=st.data(),
)
def test_select_pages(
    num_pages: int, sink_pages: int, scores: np.ndarray, candidates: list[int], data: st.DataObject
) -> None:
    """Every head of every row wants a number of its own, which may be less than the sinks."""
    wanted = data.draw(arrays(np.int32, (B, KR), elements=st.integers(0, num_pages)))
    for row, count in enumerate(candidates):
        scores[row, :, count:] = np.nan  # no candidate, whatever its score
    check_selection(scores, candidates, wanted, num_pages=num_pages, sink_pages=sink_pages)


@pytest.mark.parametrize("score", [0.0, -5.0, 1e30, -np.inf])
def test_among_equal_scores_the_lowest_numbers_win(score: float) -> None:
    scores = np.full((B, KR, COUNT), score, np.float32)
    selected = check_selection(scores, [COUNT, 3, 0], num_pages=4, sink_pages=1)
    assert_array_equal(selected[:, 0], [[0, 1, 2, 3], [0, 1, 2, -1], [-1, -1, -1, -1]])


def test_both_zeros_are_equal() -> None:
    scores = np.zeros((B, KR, COUNT), np.float32)
    scores[..., ::2] = -0.0
    selected = check_selection(scores, [COUNT, 3, 0], num_pages=4, sink_pages=0)
    assert_array_equal(selected[:, 0], [[0, 1, 2, 3], [0, 1, 2, -1], [-1, -1, -1, -1]])


def check_selection(
    scores: np.ndarray,
    candidates: list[int],
    wanted: np.ndarray | None = None,
    *,
    num_pages: int,
    sink_pages: int,
) -> np.ndarray:
    """``wanted`` None: every head as many as there may be."""
    wanted = np.full((B, KR), num_pages) if wanted is None else wanted
    choose = functools.partial(select_pages, num_pages=num_pages, sink_pages=sink_pages)
    counts = jnp.asarray(candidates, jnp.int32), jnp.asarray(wanted, jnp.int32)
    selected = np.asarray(choose(jnp.asarray(scores), *counts))
    width = min(num_pages, COUNT)
    assert selected.shape == (B, KR, width) and selected.dtype == np.int32
    for row, head in np.ndindex(B, KR):
        truth = oracle.select(scores[row, head], candidates[row], wanted[row, head], sink_pages)
        best = sorted(number for number in truth if number >= 0)
        assert selected[row, head].tolist() == best + [-1] * (width - len(best))
    return selected


def test_everything_is_selected_when_the_candidates_fit() -> None:
    """Then sparse attention is dense attention."""
    scores = np.random.default_rng(0).standard_normal((B, KR, COUNT), np.float32)
    selected = check_selection(scores, [COUNT, 5, 1], num_pages=20, sink_pages=2)
    for row, count in enumerate([COUNT, 5, 1]):
        assert np.all(selected[row][:, :count] == np.arange(count))


def test_no_retrieval_heads_have_no_scores_and_no_pages() -> None:
    tables, lengths = jnp.zeros((B, M), jnp.int32), jnp.full((B,), 9)
    scores = page_scores(
        jnp.ones((B, 0, D)),
        jnp.ones((0, 4, 2, 2, D)),
        tables,
        lengths,
        page_size=P,
        selected_page_size=8,
    )
    assert (scores.shape, scores.dtype) == ((B, 0, 2 * M), jnp.float32)
    selected = select_pages(
        scores, lengths, jnp.zeros((B, 0), jnp.int32), num_pages=3, sink_pages=1
    )
    assert (selected.shape, selected.dtype) == ((B, 0, 3), jnp.int32)
