"""Blocks of keys for block-sparse prefill: estimated shares and lists, against float64 loops."""

import jax
import jax.numpy as jnp
import kv_oracle
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose

from pallas_kernels import api, block_choice, block_scores
from pallas_kernels.api import KVPages

K, G, D, P = 2, 2, 8, 32
M = 31  # pages of a table, whatever of them is used: cases of as many rows share their programs


def case(start: int, length: int, *, kind: str | None = None, rows: int = 0):
    """Arguments of ``choose_blocks``, and q and k of the whole sequence in float64.

    Keys that must not count, in the pages behind ``start`` and the chunk behind ``length``, are
    large. ``rows``: of the chunk, padding included.
    """
    rng, rows = np.random.default_rng(start + length), max(rows, length)
    q, k = (rng.standard_normal((start + rows, n, D)) * 3 for n in (K * G, K))
    table = rng.permutation(M + 2)[:M]
    pool = np.full((K, M + 2, P, D), 50.0)
    for t in range(start):
        pool[:, table[t // P], t % P] = k[t]
    stored = kv_oracle.stored(pool, kind)
    if kind is not None:
        read = kv_oracle.values(*stored)
        for t in range(start):
            k[t] = read[:, table[t // P], t % P]
    pages = kv_oracle.pages(stored, stored)
    end = start + length
    new_q, new_k = q[start:].copy(), k[start:].copy()
    new_q[length:], new_k[length:] = 50.0, 50.0
    args = (jnp.asarray(new_q, jnp.float32), jnp.asarray(new_k, jnp.float32), pages)
    where = jnp.asarray(table, jnp.int32), jnp.int32(start), jnp.int32(length)
    return (*args, *where), q[start:end], k[:end]


def in_order(shares: np.ndarray, start: int, tiles: int) -> np.ndarray:
    """Shares by block, without those that the history does not have."""
    most = shares.shape[2] - tiles
    return np.concatenate([shares[:, :, : -(-start // 128)], shares[:, :, most:]], axis=2)


CASES = {
    "first chunk": {"start": 0, "length": 300, "rows": 512},
    "history of whole blocks": {"start": 256, "length": 256},
    "history that ends within a page": {"start": 331, "length": 150, "rows": 256},
    "int4": {"start": 200, "length": 140, "kind": "int4", "rows": 256},
}


@pytest.mark.parametrize("name", CASES)
def test_shares_and_lists_against_the_oracle(name: str) -> None:
    args, q, k = case(**CASES[name])
    start = CASES[name]["start"]
    exact = oracle.block_shares(q, k, start)
    tiles = -(-len(args[0]) // 128)
    real = exact.shape[1]  # tiles with a token
    shares = in_order(np.asarray(block_choice.attention_shares(*args)), start, tiles)
    # Scores of up to 100 in float32 are right to 1e-5.
    assert_allclose(shares[:, :real, : exact.shape[2]], exact, atol=1e-4, rtol=0)
    assert not shares[:, real:].any()
    for threshold in (0.5, 0.9):
        blocks = api.choose_blocks(*args, threshold=threshold)
        lists = listed(blocks)
        assert [tiles[:real] for tiles in lists] == oracle.fewest_blocks(exact, start, threshold)
        assert not any(any(tiles[real:]) for tiles in lists)
    everything = listed(api.choose_blocks(*args, threshold=1.0))
    history = -(-start // 128)
    whole = [list(range(history + tile + 1)) for tile in range(real)]
    assert [tiles[:real] for tiles in everything] == [whole] * K


def listed(blocks: api.BlockList) -> list[list[list[int]]]:
    """By head and tile."""
    ids, counts = np.asarray(blocks.ids), np.asarray(blocks.counts)
    return [
        [row[:count].tolist() for row, count in zip(head, n, strict=True)]
        for head, n in zip(ids, counts, strict=True)
    ]


def test_a_density_lists_the_best_blocks() -> None:
    args, q, k = case(start=640, length=256)
    exact = oracle.block_shares(q, k, 640)
    for density, count in ((0.5, 4), (0.9, 7), (0.01, 3)):  # of seven blocks and of eight
        lists = listed(api.choose_blocks(*args, density=density))
        for head in range(K):
            for tile in (0, 1):
                own = 5 + tile
                always = {0, own, own - 1}
                wanted = max(int(np.ceil(density * (own + 1) - 1e-9)), len(always))
                others = sorted(set(range(own + 1)) - always, key=lambda b: -exact[head, tile, b])
                best = always | set(others[: wanted - len(always)])
                assert lists[head][tile] == sorted(best)
        assert len(lists[0][1]) in (count, count + 1)


@pytest.mark.parametrize("how", [{"threshold": 0.5}, {"density": 0.3}])
def test_whole_tiles_and_dense_heads_list_everything(how: dict[str, float]) -> None:
    """Tiles of queries 640 to 895, and the last of two heads; the others as without them."""
    args, _, _ = case(start=640, length=256)
    everything = [list(range(6)), list(range(7))]
    usual = listed(api.choose_blocks(*args, **how))
    assert everything[0] not in [head[0] for head in usual]
    for whole_from, tiles in ((0, (0, 1)), (767, (0, 1)), (768, (1,)), (895, (1,)), (896, ())):
        made = listed(api.choose_blocks(*args, **how, whole_from=jnp.int32(whole_from)))
        for head in range(K):
            wanted = [everything[t] if t in tiles else usual[head][t] for t in (0, 1)]
            assert made[head] == wanted
    cut, _, _ = case(start=640, length=64, rows=128)  # a tile of 64 queries
    usual_cut = listed(api.choose_blocks(*cut, **how))
    for whole_from, whole in ((703, True), (704, False), (767, False)):
        made = listed(api.choose_blocks(*cut, **how, whole_from=jnp.int32(whole_from)))
        assert made == ([[everything[0]]] * K if whole else usual_cut)
    made = listed(api.choose_blocks(*args, **how, dense_heads=1))
    assert made == [usual[0], everything]
    assert listed(api.choose_blocks(*args, **how, dense_heads=2)) == [everything] * 2


@pytest.mark.parametrize("sign", [1.0, -1.0])  # that of NaN is the machine's
@pytest.mark.parametrize("how", [{"density": 0.1}, {"threshold": 0.5}])
def test_a_tile_with_nan_lists_what_is_always_listed(
    how: dict[str, float], sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, _, _ = case(start=640, length=256)
    shares = jnp.asarray(np.copysign(np.full((K, 2, 9), np.nan, np.float32), sign))
    monkeypatch.setattr(block_choice, "attention_shares", lambda *args, **how: shares)
    assert listed(api.choose_blocks(*args, **how)) == [[[0, 4, 5], [0, 5, 6]]] * K


def test_spans_of_keys_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a chunk, or its history, has more keys than are scored at a time."""
    args, _, _ = case(start=331, length=500, rows=512)
    whole = block_choice.attention_shares(*args)
    monkeypatch.setattr(block_scores, "_MOST_SCORES", 1)
    # A function of its own, which is traced anew.
    cut = jax.jit(lambda *args: block_choice.attention_shares.__wrapped__(*args))(*args)
    assert_allclose(cut, whole, atol=1e-6, rtol=0)  # the same sums in another order


def test_attention_over_the_lists_of_threshold_one_is_causal() -> None:
    args, _, _ = case(start=200, length=140, rows=256)
    q, k, pages, table, start, length = args
    no_pages = KVPages(*[np.zeros((0, 1, P, D), np.float32)] * 2)
    blocks = api.choose_blocks(*args, threshold=1.0)
    rest = (q, k, k, pages, no_pages, table, table, start, length)
    sparse = api.prefill_attention(*rest, sink=0, local=P, blocks=blocks)
    dense = api.prefill_attention(*rest, sink=0, local=P)
    for x, y in zip(sparse, dense, strict=True):
        assert_allclose(x[:140], y[:140], atol=2e-5, rtol=0)  # other sums of float32


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "give one of threshold=None and density=None"),
        ({"threshold": 0.5, "density": 0.5}, "give one of"),
        ({"threshold": 0.0}, r"threshold=0.0 must lie in \(0, 1\]"),
        ({"density": 1.5}, r"density=1.5 must lie in \(0, 1\]"),
        ({"density": 0.5, "dense_heads": 3}, r"dense_heads=3 must lie in \[0, 2\]"),
    ],
)
def test_refusals(how: dict[str, float], message: str) -> None:
    args, _, _ = case(start=0, length=16)
    with pytest.raises(ValueError, match=message):
        api.choose_blocks(*args, **how)


def test_blocks_must_hold_whole_pages() -> None:
    args, _, _ = case(start=0, length=16)
    large = KVPages(*[np.zeros((K, 4, 48, D), np.float32)] * 2)
    with pytest.raises(ValueError, match="pages of 48 tokens must divide blocks of 128"):
        api.choose_blocks(args[0], args[1], large, *args[3:], threshold=0.9)
