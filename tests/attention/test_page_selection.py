"""Page lists, decoded back into the positions they attend, against explicit sets of positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budgets import budgets_of
from numpy.testing import assert_array_equal

from lserve_jax import ModelConfig, SparsityConfig
from lserve_jax.attention.cache import CacheSpec, make_spec
from lserve_jax.attention.selection import (
    first_tail_page,
    retrieval_pages,
    retrieval_stop,
    window_list,
)
from pallas_kernels.api import PageList

CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
)


def make(sparsity: SparsityConfig | None, max_model_len: int) -> CacheSpec:
    return make_spec(
        CONFIG,
        sparsity=sparsity,
        heads=budgets_of((2,), sparsity),
        max_model_len=max_model_len,
        max_num_seqs=1,
        num_pages=1,
        max_prefixes=0,
        kv_dtype="auto",
    )


def slots(lists: PageList, row: int, head: int, page_size: int) -> list[tuple[int, int]]:
    """(physical page, offset) of every token that a row's head attends, in order."""
    pages, start, stop = (np.asarray(x)[row, min(head, x.shape[1] - 1)] for x in lists)
    return [(int(pages[s // page_size]), s % page_size) for s in range(start, stop)]


@functools.partial(jax.jit, static_argnums=0)
def retrieval_list(spec, selected, tail, position, active, table) -> PageList:
    """As decode puts it together: pages once a selection, how many are attended every step."""
    stop = retrieval_stop(spec, 0, tail, position, active)
    pages = retrieval_pages(spec, 0, selected, tail, table)
    return PageList(pages, jnp.zeros_like(stop), stop)


@pytest.mark.parametrize(
    ("cut", "page_size", "reuse"),
    [(1, 16, 1), (1, 16, 4), (1, 16, 40), (1, 32, 8), (4, 16, 1), (4, 16, 40), (2, 32, 8)],
)
def test_retrieval_list(cut: int, page_size: int, reuse: int) -> None:
    """Every position of a selection and every step that reuses it, as rows of one batch.

    Attended are the chosen pages and every position from the newest history page at selection on,
    each position once. The cache's pages are ``cut`` times those that are selected.
    """
    rng = np.random.default_rng(0)
    budget = 4 * page_size
    length = 8 * page_size + reuse
    sparsity = SparsityConfig(
        page_size=cut * page_size,
        selected_page_size=page_size,
        token_budget=budget,
        reuse_interval=reuse,
        decode_local=128,
        prefill_local=128,
    )
    spec = make(sparsity, length)
    R, M = budget // page_size - 1, spec.pages_per_sequence
    rows = [(n, n + step) for n in range(1, 8 * page_size) for step in range(reuse)]
    selected = np.full((len(rows), 2, R), -1, np.int32)
    table = np.stack([rng.permutation(M) + 100 for _ in rows]).astype(np.int32)
    wanted: list[list[set[int]]] = []
    for row, (selection, position) in enumerate(rows):
        tail = (selection - 1) // page_size
        wanted.append([])
        for head in range(2):
            chosen = rng.permutation(tail)[:R]
            selected[row, head, : len(chosen)] = chosen
            numbers = {*chosen.tolist(), *range(tail, M * cut)}
            wanted[-1].append({p for p in range(position + 1) if p // page_size in numbers})
    selection, position = (jnp.array(x, jnp.int32) for x in zip(*rows, strict=True))
    tail = first_tail_page(selection, page_size)
    lists = retrieval_list(
        spec,
        jnp.asarray(selected),
        tail,
        position,
        jnp.ones(len(rows), bool),
        jnp.asarray(table),
    )
    number_of = [
        {page * cut + part: i * cut + part for i, page in enumerate(pages) for part in range(cut)}
        for pages in table.tolist()
    ]
    for row, head in np.ndindex(len(rows), 2):
        attended = [
            number_of[row][page] * page_size + offset
            for page, offset in slots(lists, row, head, page_size)
        ]
        assert len(attended) == len(set(attended)), rows[row]
        assert set(attended) == wanted[row][head], rows[row]
    # Also past the end: ids that a kernel may load.
    assert np.isin(np.asarray(lists.page_ids) // cut, table).all()


def test_dense_list() -> None:
    """No selection: all pages up to the newest, in order; rows that are not active, nothing."""
    spec = make(None, 300)
    position = jnp.array([0, 63, 64, 299, 130], jnp.int32)
    table = jnp.arange(25, dtype=jnp.int32).reshape(5, 5)
    active = jnp.array([True, True, True, True, False])
    stop_of = jax.jit(retrieval_stop, static_argnums=(0, 1))
    stop = stop_of(spec, 0, jnp.zeros(5, jnp.int32), position, active)
    lists = PageList(table[:, None], np.zeros(stop.shape, np.int32), stop)
    for row, last in enumerate([0, 63, 64, 299]):
        attended = [(page - 5 * row) * 64 + offset for page, offset in slots(lists, row, 0, 64)]
        assert attended == list(range(last + 1))
    assert slots(lists, 4, 0, 64) == []


def of_ring(sink: int, local: int, page_size: int, selected_page_size: int) -> CacheSpec:
    sparsity = SparsityConfig(
        page_size=page_size,
        selected_page_size=selected_page_size,
        decode_sink=sink,
        decode_local=local,
    )
    return make(sparsity, 4096)


@functools.partial(jax.jit, static_argnums=0)
def make_window_list(spec, slot, position, active) -> PageList:
    return window_list(spec, slot, position, active)


@pytest.mark.parametrize(
    ("page_size", "listed", "sink", "local"),
    [
        *((16, 16, *window) for window in ((2, 4), (0, 1), (1, 1))),
        *((64, 16, *window) for window in ((2, 4), (0, 1), (1, 1))),
        (64, 64, 2, 4),
        (64, 32, 0, 1),
    ],
)
def test_ring_list(page_size: int, listed: int, sink: int, local: int) -> None:
    """At every position from 0 to 1,000, the ring being written token by token.

    That is more than twice round the largest, of five pages of 64 tokens behind two that stay.
    """
    spec = of_ring(sink * page_size, local * page_size, page_size, listed)
    ring, cut = spec.decode_window, page_size // listed
    positions = np.arange(1001, dtype=np.int32)
    slot = np.full_like(positions, 3)
    pages = sink + local + 1
    made = make_window_list(spec, slot, positions, np.ones_like(positions, bool))
    lists = PageList(*map(np.asarray, made))
    held: dict[tuple[int, int], int] = {}  # (physical page, offset): position of its token
    for position in range(1001):
        page, offset = divmod(position, page_size)
        place = page if page < sink else sink + (page - sink) % (local + 1)
        held[(3 * pages + place) * cut + offset // listed, offset % listed] = position
        attended = [held.get(where, -1) for where in slots(lists, position, 1, listed)]
        wanted = [p for p in range(position + 1) if p < ring.sink or p > position - ring.local]
        assert sorted(attended) == wanted, position
    assert np.all((lists.page_ids >= 3 * pages * cut) & (lists.page_ids < 4 * pages * cut))


def test_ring_list_of_inactive_rows() -> None:
    spec = of_ring(16, 32, 16, 16)
    position = np.array([100, 100], np.int32)
    lists = make_window_list(spec, np.arange(2), position, np.array([False, True]))
    assert slots(lists, 0, 0, 16) == []
    assert len(slots(lists, 1, 0, 16)) == 48


def test_first_tail_page() -> None:
    """The newest history page, not the page of the token that selects."""
    position = jnp.array([0, 1, 63, 64, 65, 128, 129], jnp.int32)
    assert_array_equal(first_tail_page(position, 64), [0, 0, 0, 0, 1, 1, 2])


def test_list_sizes() -> None:
    """Ranked pages are the budget less the newest page; lists hold these and the longest tail."""
    settings = {"page_size": 16, "token_budget": 160, "decode_local": 128, "prefill_local": 128}
    for reuse, tail in ((1, 2), (16, 2), (17, 3), (32, 3), (33, 4)):
        spec = make(SparsityConfig(reuse_interval=reuse, **settings), 2000)
        assert (spec.num_ranked(0), spec.num_listed(0)) == (9, 9 + tail)
        assert spec.reuse_interval == reuse
    cut = make(SparsityConfig(**settings | {"page_size": 64}), 2000)
    assert (cut.num_ranked(0), cut.num_listed(0), cut.selected_pages_per_sequence) == (9, 11, 128)
    short = make(SparsityConfig(**settings), 64)  # nothing longer than the longest sequence
    assert (short.num_ranked(0), short.num_listed(0)) == (4, 4)
    dense = make(None, 300)
    assert (dense.num_ranked(0), dense.num_listed(0), dense.reuse_interval) == (0, 5, 1)
