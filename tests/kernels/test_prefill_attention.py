"""The prefill attention kernel, interpreted on a CPU, against its reference.

Tokens of the history that no query of the chunk sees are NaN, and so are rows past ``length``.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from pallas_kernels import reference
from pallas_kernels.api import quantize_kv
from pallas_kernels.hopper.prefill_attention import Config, choose_config, prefill_attention
from pallas_kernels.types import BlockList, KVPages

# Weights and out are rounded to bf16: 2^-9 of a weight, averaged over the keys, and 2^-9 of out.
# |v| < 5, so out is off by at most 2 * 5 * 2^-9 = 2e-2, in practice by a unit in its last place.
OUT_TOLERANCE = 1e-2
# Scores are exact products summed in float32; int8 pages are rounded to bf16 first: |q| |k| 2^-9
# / sqrt(D), and rounding errors of 64 or more channels average.
LSE_TOLERANCE = {False: 1e-5, True: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; ``int8`` is the retrieval pool's storage."""

    tokens: int
    start: int
    length: int
    sink: int
    local: int
    retrieval: int = 1
    streaming: int = 1
    group: int = 1
    head_dim: int = 64
    page_size: int = 32
    int8: bool = False
    listed: float | None = None  # share of the blocks that a tile lists, at random


def problem(case: Case) -> tuple[tuple, dict[str, Any]]:
    """Arguments, with tables longer than the history; the window, and blocks if they are listed."""
    rng = np.random.default_rng(0)
    heads, page_size = case.retrieval + case.streaming, case.page_size
    width = -(-case.start // page_size) + 3
    position = np.arange(width * page_size).reshape(width, page_size)
    in_history = position < case.start

    def pool(number, seen, int8):  # seen [width, page_size], or with the heads before
        table = rng.permutation(width + 2)[:width].astype(np.int32)
        kept = np.zeros((number, width + 2, page_size), bool)
        kept[:, table] = seen
        k, v = rng.normal(size=(2, *kept.shape, case.head_dim))
        if int8:
            (k, k_scale), (v, v_scale) = (quantize_kv(jnp.asarray(x, jnp.float32)) for x in (k, v))
            pages = KVPages(k, v, *(jnp.where(kept, x, jnp.nan) for x in (k_scale, v_scale)))
        else:
            k, v = (np.where(kept[..., None], x, np.nan) for x in (k, v))
            pages = KVPages(jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16))
        return pages, jnp.asarray(table)

    blocks, used = None, in_history
    if case.listed is not None:
        blocks = random_blocks(rng, case)
        ids, counts = np.asarray(blocks.ids), np.asarray(blocks.counts)
        listed = np.where(np.arange(ids.shape[2]) < counts[..., None], ids, -1)
        # What no tile of the head lists is NaN.
        used = [in_history & np.isin(position // 128, of_head) for of_head in listed]
    full, table = pool(case.retrieval, used, case.int8)
    in_window = (position < case.sink) | (position > case.start - case.local)
    ring, ring_table = pool(case.streaming, in_history & in_window, False)
    exists = (np.arange(case.tokens) < case.length)[:, None, None]
    q, k, v = (
        jnp.asarray(
            np.where(exists, rng.normal(size=(case.tokens, n, case.head_dim)), np.nan), jnp.bfloat16
        )
        for n in (heads * case.group, heads, heads)
    )
    args = q, k, v, full, ring, table, ring_table, jnp.int32(case.start), jnp.int32(case.length)
    return args, {"sink": case.sink, "local": case.local, "blocks": blocks}


def random_blocks(rng: np.random.Generator, case: Case) -> BlockList:
    """A block that is seen but not listed stands behind a list, then anything, as in tiles of
    padding; the first tile of the first head lists nothing."""
    blocks = -(-case.start // 128) + -(-case.length // 128)
    shape = (case.retrieval, -(-case.tokens // 128), blocks + 1)
    ids = rng.integers(-9, 99, shape).astype(np.int32)
    counts = np.full(shape[:2], 99, np.int32)
    for head, tile in np.ndindex(case.retrieval, -(-case.length // 128)):
        share = 0.0 if head == tile == 0 else case.listed
        chosen = np.flatnonzero(rng.random(blocks) < share)
        left_out = np.setdiff1d(np.arange(blocks), chosen)[:1]
        behind = np.concatenate([chosen, left_out])
        ids[head, tile, : len(behind)] = behind
        counts[head, tile] = len(chosen)
    return BlockList(jnp.asarray(ids), jnp.asarray(counts))


def check(args, window, config: Config | None = None) -> tuple[jax.Array, jax.Array]:
    length = int(args[-1])
    out, lse = prefill_attention(*args, **window, config=config)
    expected_out, expected_lse = reference.prefill_attention(*args, **window)
    tolerance = LSE_TOLERANCE[args[3].k.dtype == jnp.int8]
    assert_allclose(lse[:length], expected_lse[:length], atol=tolerance, rtol=0)
    assert (out.dtype, out.shape, lse.shape) == (
        expected_out.dtype,
        expected_out.shape,
        expected_lse.shape,
    )
    assert_allclose(
        np.asarray(out[:length], np.float32),
        np.asarray(expected_out[:length], np.float32),
        atol=OUT_TOLERANCE,
    )
    return out, lse


@pytest.mark.parametrize(
    "case",
    [
        # Both classes; ragged history, chunk, sink and local edge; two pages a block.
        {"start": 333, "length": 230, "sink": 20, "local": 70, "page_size": 64},
        # One class, D 128, a group that does not divide a tile, pages of 16, no history.
        {"start": 0, "length": 100, "streaming": 0, "group": 3, "head_dim": 128, "page_size": 16},
        # A block is a page; the window begins in the chunk itself for later tiles.
        {"start": 128, "length": 256, "retrieval": 0, "sink": 129, "local": 60, "page_size": 128},
        # int8 history; a window beyond its beginning.
        {"start": 150, "length": 128, "local": 300, "int8": True},
    ],
    ids=lambda case: ", ".join(f"{name} {value}" for name, value in case.items()),
)
def test_matches_reference(case: dict) -> None:
    shape = {"tokens": -(-case["length"] // 128) * 128, "sink": 32, "local": 100} | case
    check(*problem(Case(**shape)))


@pytest.mark.parametrize(
    "case",
    [
        # Both classes, ragged parts, pages of 64, a tile of padding.
        {"start": 333, "length": 230, "tokens": 384, "retrieval": 2, "page_size": 64},
        # Retrieval only, D 128, int8 history; few blocks, hence tiles and queries without a key.
        {"start": 500, "length": 200, "streaming": 0, "group": 3, "head_dim": 128, "int8": True},
    ],
    ids=["both classes", "retrieval only"],
)
def test_listed_blocks(case: dict) -> None:
    shape = {"tokens": 256, "sink": 20, "local": 70, "page_size": 16, "listed": 0.4} | case
    args, how = problem(Case(**shape))
    out, lse = check(args, how)
    group = shape.get("group", 1)
    assert np.isneginf(lse[:128, :group]).all()
    assert not np.asarray(out[:128, :group], np.float32).any()


@pytest.mark.parametrize(
    ("start", "length", "sink", "local"),
    [
        (127, 64, 0, 1),  # no sink, only the token itself
        (128, 1, 300, 1),  # the sink reaches beyond the chunk
        (640, 64, 100, 180),  # blocks between sink and window are not visited
    ],
)
def test_edges_of_a_short_chunk(start, length, sink, local) -> None:
    """64 tokens, padded to a tile: a block of the chunk has rows that no array holds."""
    case = Case(tokens=64, start=start, length=length, sink=sink, local=local, retrieval=0)
    check(*problem(case))


@pytest.mark.parametrize("how", [{"listed": 0.4}, {"int8": True}], ids=str)
def test_chunks_of_several_prompts(how: dict) -> None:
    """One launch; each has the numbers that it has alone, where there is no prompt, too."""
    spans = ((333, 130), (0, 0), (40, 200))
    shape = {"tokens": 200, "sink": 20, "local": 70, "page_size": 16} | how
    rows = [problem(Case(start=start, length=length, **shape)) for start, length in spans]
    largest = max(len(args[5]) for args, _ in rows)
    widest = max(0 if how["blocks"] is None else how["blocks"].ids.shape[2] for _, how in rows)
    pools = jax.tree.map(jnp.nan_to_num, rows[0][0][3:5])  # rows see other tokens of them
    args = []
    for *arrays, table, ring_table, start, length in (args for args, _ in rows):
        tables = (
            np.pad(np.asarray(x) % pool.k.shape[1], (0, largest - len(x)))
            for x, pool in zip((table, ring_table), pools, strict=True)
        )
        args.append((*arrays[:3], *tables, start, length))
    blocks = None
    if "listed" in how:
        pad = [(0, 0), (0, 0)]
        blocks = [
            BlockList(np.pad(ids, (*pad, (0, widest - ids.shape[2]))), counts)
            for ids, counts in (how["blocks"] for _, how in rows)
        ]
        blocks = jax.tree.map(lambda *each: np.stack(each), *blocks)
    q, k, v, *bounds = (np.stack(each) for each in zip(*args, strict=True))
    window = rows[0][1] | {"blocks": None}
    together = prefill_attention(q, k, v, *pools, *bounds, **window | {"blocks": blocks})
    together = [np.asarray(x) for x in together]
    for row, (*arrays, table, ring_table, start, length) in enumerate(args):
        window["blocks"] = jax.tree.map(lambda x, row=row: x[row], blocks)
        alone = prefill_attention(*arrays, *pools, table, ring_table, start, length, **window)
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(found[row][: spans[row][1]], expected[: spans[row][1]])


def test_length_decides_what_is_computed() -> None:
    """Tiles of padding alone give 0, and the first one is as if they were not there."""
    case = Case(tokens=256, start=40, length=128, sink=8, local=50, streaming=0)
    args, window = problem(case)
    out, lse = check(args, window, Config(stages=1))
    assert not np.asarray(out[128:], np.float32).any()
    assert np.isneginf(lse[128:]).all()


def test_choice_of_config() -> None:
    assert choose_config(128).stages == 2
    assert choose_config(64).stages == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
        ({"page_size": 8}, "page size must be 16, 32, 64 or 128, got 8"),
    ],
)
def test_refuses_by_name(change: dict, reason: str) -> None:
    args, window = problem(Case(tokens=64, start=16, length=64, sink=4, local=8, **change))
    with pytest.raises(NotImplementedError, match=reason):
        prefill_attention(*args, **window)


def test_refuses_other_dtypes() -> None:
    args, window = problem(Case(tokens=64, start=16, length=64, sink=4, local=8))
    q, *rest = args
    with pytest.raises(NotImplementedError, match="q must be bfloat16, got float32"):
        prefill_attention(q.astype(jnp.float32), *rest, **window)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), args[3])
    with pytest.raises(NotImplementedError, match="retrieval pages must be bfloat16 or codes"):
        prefill_attention(*args[:3], wide, *args[4:], **window)


def test_config_checks_itself() -> None:
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        Config(stages=0)
