"""The appending kernels, interpreted on a CPU, against their reference.

Pools and statistics hold NaN (codes: a NaN scale) wherever nothing was written before: what a
kernel reads or writes without leave becomes visible.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, reference
from pallas_kernels.hopper.kv_append_chunk import append_kv_chunk
from pallas_kernels.hopper.kv_append_token import Config, append_kv, choose_config
from pallas_kernels.types import KVPages

PAGES = 7
FP8 = jnp.float8_e4m3fn


def random(seed: int, *shape: int, dtype=jnp.bfloat16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def pool(heads: int, page_size: int, head_dim: int, stored: Any) -> KVPages:
    """``stored``: a dtype, or the kind of its codes."""
    size = heads, PAGES, page_size
    match stored:
        case "int8":
            codes, scale = np.full((*size, head_dim), 99, np.int8), np.full(size, np.nan, "f")
        case "fp8":
            codes, scale = np.full((*size, head_dim), 1.5, FP8), np.full(size, np.nan, "f")
        case "int4":
            codes = np.full((*size, head_dim // 2), 0x93, np.uint8)
            scale = tuple(np.full(size, -1, np.int32) for _ in range(2))  # each word is two NaN
        case _:
            codes, scale = np.full((*size, head_dim), np.nan, stored), None
    return jax.tree.map(np.copy, KVPages(codes, codes, scale, scale))


def statistics(heads: int, g: int, head_dim: int, held: np.ndarray, dtype) -> np.ndarray:
    """kmax above kmin in the logical pages ``held`` [N, g], NaN in all others."""
    x = -np.sort(-random(5, heads, PAGES, g, 2, head_dim, dtype=np.float32), axis=3)
    return np.where(held[..., None, None], x, np.nan).astype(dtype)


def same(result: object, expected: object) -> None:
    """Bit for bit, NaN where NaN: on a CPU all that kernels round is rounded as XLA does it."""
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        wide = np.int64 if np.issubdtype(x.dtype, np.integer) else np.float32
        np.testing.assert_array_equal(np.asarray(x, wide), np.asarray(y, wide))


def token_problem(rows, group, retrieval, streaming, head_dim, page_size, g, dtype, stats_dtype):
    """Row 0 begins a logical page, row 1 does not; a third row is inactive."""
    rng = np.random.default_rng(0)
    kv_heads = retrieval + streaming
    angle = random(4, rows, head_dim // 2, dtype=np.float32)
    page, ring_page = (rng.permutation(PAGES)[:rows].astype(np.int32) for _ in range(2))
    logical = page_size // g if g else page_size
    offset = rng.integers(1, page_size, rows).astype(np.int32)
    offset[0] = page_size - logical
    offset[1:2] = logical - 1
    page[2:3] = ring_page[2:3] = -1
    stats = None
    if g:
        held = np.zeros((PAGES, g), bool)
        held[page, offset // logical] = offset % logical != 0
        stats = statistics(retrieval, g, head_dim, held, stats_dtype)
    return (
        random(1, rows, kv_heads * group, head_dim),
        random(2, rows, kv_heads, head_dim),
        random(3, rows, kv_heads, head_dim),
        np.cos(angle),
        np.sin(angle),
        pool(retrieval, page_size, head_dim, dtype),
        pool(streaming, page_size, head_dim, dtype),
        stats,
        page,
        ring_page,
        offset,
    )


TOKEN_CASES = {
    "bf16": (3, 4, 1, 1, 128, 64, 4, jnp.bfloat16, jnp.bfloat16),
    "int8, two heads a CTA": (2, 2, 4, 2, 64, 16, 2, "int8", jnp.float32),
    "fp8, retrieval only, four heads": (3, 1, 4, 0, 128, 32, 16, "fp8", jnp.bfloat16),
    "int4": (2, 1, 1, 1, 128, 16, 2, "int4", jnp.float32),
    "streaming only": (1, 3, 0, 3, 64, 128, 0, jnp.bfloat16, None),
}


@pytest.mark.parametrize("case", TOKEN_CASES.values(), ids=TOKEN_CASES)
def test_append_kv(case: tuple) -> None:
    arguments = token_problem(*case)
    same(jax.jit(append_kv)(*arguments), reference.append_kv(*arguments))


@pytest.mark.parametrize("ranked", [0, 3])  # of four, in two CTAs
def test_append_kv_with_statistics_of_the_first_heads(ranked: int) -> None:
    arguments = list(token_problem(*TOKEN_CASES["int8, two heads a CTA"]))
    arguments[7] = arguments[7][:ranked]
    result = jax.jit(append_kv)(*arguments)
    assert result[-1].shape == arguments[7].shape
    same(result, reference.append_kv(*arguments))


def chunk_problem(tokens, start, length, retrieval, streaming, head_dim, page_size, g, dtype, kept):
    """``kept`` says of which positions streaming heads keep the token."""
    rng = np.random.default_rng(0)
    kv_heads = retrieval + streaming
    order = rng.permutation(PAGES).astype(np.int32)
    number = (start + np.arange(tokens)) // page_size
    table = order[np.arange(number[-1] + 1) % PAGES]
    position = start + np.arange(tokens)
    ring_page = np.where(kept(position), order[::-1][number % PAGES], -2).astype(np.int32)
    stats = None
    if g:
        held, logical = np.zeros((PAGES, g), bool), page_size // g
        held[table[number[0]], start % page_size // logical] = start % logical != 0
        stats = statistics(retrieval, g, head_dim, held, jnp.bfloat16)
    exists, nan = (np.arange(tokens) < length)[:, None, None], np.array(np.nan, jnp.bfloat16)
    return (
        *(np.where(exists, random(i, tokens, kv_heads, head_dim), nan) for i in (2, 3)),
        pool(retrieval, page_size, head_dim, dtype),
        pool(streaming, page_size, head_dim, dtype),
        stats,
        table,
        ring_page,
        np.int32(start),
        np.int32(length),
    )


def everything(position: np.ndarray) -> np.ndarray:
    return position >= 0


def sink_and_local(position: np.ndarray) -> np.ndarray:
    """A page may hold the end of the sink, dropped tokens, and local tokens."""
    return (position < 70) | (position >= 75)


CHUNK_CASES = {
    "whole pages, one not kept": (
        *(128, 128, 128, 1, 1, 128, 64, 4, jnp.bfloat16),
        lambda position: position >= 192,
    ),
    "edges inside logical pages": (72, 21, 69, 1, 1, 128, 32, 2, "int8", everything),
    "pages kept in part": (40, 53, 37, 1, 1, 64, 16, 4, jnp.bfloat16, sink_and_local),
    "shorter than a page, in two": (5, 62, 4, 1, 0, 64, 64, 2, "int8", everything),
    "inside a page": (5, 66, 2, 1, 1, 128, 128, 4, jnp.bfloat16, everything),
    "no token": (40, 53, 0, 1, 1, 64, 16, 4, jnp.bfloat16, sink_and_local),
    "streaming only": (33, 31, 33, 0, 1, 64, 32, 0, "int8", sink_and_local),
    "int4, all of it": (48, 53, 47, 1, 1, 128, 16, 4, "int4", sink_and_local),
}


@pytest.mark.parametrize("case", CHUNK_CASES.values(), ids=CHUNK_CASES)
def test_append_kv_chunk(case: tuple) -> None:
    arguments = chunk_problem(*case)
    same(jax.jit(append_kv_chunk)(*arguments), reference.append_kv_chunk(*arguments))


@pytest.mark.parametrize("kind", ["int8", jnp.bfloat16], ids=str)
def test_append_kv_chunk_of_several_prompts(kind: Any) -> None:
    """In one launch: pages of whole tiles, edges of pages, and a row without a prompt."""
    spans, pages = ((21, 40), (0, 0), (16, 19)), (slice(0, 4), slice(0), slice(4, 7))
    alone = [
        chunk_problem(40, start, length, 1, 1, 64, 16, 4, kind, everything)
        for start, length in spans
    ]
    table, ring_page = np.full((3, 4), -1, np.int32), np.full((3, 40), -1, np.int32)
    for row, ((start, _), mine) in enumerate(zip(spans, pages, strict=True)):
        ids = np.random.default_rng(0).permutation(PAGES)[mine]  # nobody else's
        table[row, : len(ids)] = ids
        ring_page[row] = table[row, np.minimum((start + np.arange(40)) // 16, 3)]
    k, v, start, length = (np.stack([args[i] for args in alone]) for i in (0, 1, 7, 8))
    k, v = (x * np.array([1, 2, -1], x.dtype)[:, None, None, None] for x in (k, v))
    expected = pools = alone[0][2:5]
    for row in range(3):
        each = (x[row] for x in (table, ring_page, start, length))
        expected = reference.append_kv_chunk(k[row], v[row], *expected, *each)
    arguments = k, v, *pools, table, ring_page, start, length
    same(jax.jit(append_kv_chunk)(*arguments), expected)
    same(reference.append_kv_chunk(*arguments), expected)


def test_each_pool_has_codes_of_its_own_kind() -> None:
    k, v, _, _, *rest = chunk_problem(48, 53, 47, 1, 1, 64, 16, 4, "fp8", sink_and_local)
    arguments = k, v, pool(1, 16, 64, "fp8"), pool(1, 16, 64, "int4"), *rest
    same(jax.jit(append_kv_chunk)(*arguments), reference.append_kv_chunk(*arguments))


def vectors(seed: int) -> np.ndarray:
    """[16, 1, 64]: of all sizes, zeros, all the same, one outweighs the rest, NaN in both halves.

    The last has steps of 3 / 16 in 4 bits, and numbers halfway between codes.
    """
    x = random(seed, 16, 1, 64, dtype=np.float32) * 2.0 ** np.arange(-32, 32, 4)[:, None, None]
    x[0], x[1], x[2, 0, 9], x[3, 0, 5::32] = 0.0, -3.0, 100.0, np.nan
    x[15] = np.arange(64) % 31 * (3 / 32)
    return x.astype(jnp.bfloat16)


def check_codes(x: np.ndarray, stored: np.ndarray, scale: Any, kind: str) -> None:
    """In float64: the scale is right, and of all codes none is nearer to a number than its own."""
    if kind == "int4":
        parts = np.split(x, 2, axis=-1)
        for part, codes, word in zip(parts, (stored & 15, stored >> 4), scale, strict=True):
            bits = word.view(np.uint32) & np.uint32(0xFFFF0000), word.view(np.uint32) << 16
            step, lowest = (value.view(np.float32).astype(float) for value in bits)
            np.testing.assert_array_equal(lowest, part.min(axis=-1))
            span = np.maximum(part.max(axis=-1) - lowest, 1e-6)
            np.testing.assert_allclose(step, span / 15, rtol=2**-8)  # in bf16
            check_nearest((part - lowest[..., None]) / step[..., None], codes, np.arange(16.0))
        return
    every, largest = np.arange(-127.0, 128.0), 127
    if kind == "fp8":
        every, largest = np.arange(256, dtype=np.uint8).view(FP8).astype(float), 448
        every = every[np.isfinite(every)]
    peak = np.maximum(np.abs(x).max(axis=-1), 1e-6)
    np.testing.assert_allclose(scale, peak / largest, rtol=2**-23)
    check_nearest(x / scale[..., None].astype(float), stored, every)


def check_nearest(quotient: np.ndarray, codes: np.ndarray, every: np.ndarray) -> None:
    """Two roundings of a quotient to 2^-24 of it may put it on the other side of halfway."""
    off = np.abs(quotient - codes.astype(float))
    least = np.abs(quotient[..., None] - every).min(axis=-1)
    assert (off <= least + 2**-22 * np.abs(quotient)).all()


@pytest.mark.parametrize("kind", api.KV_KINDS)
def test_codes_are_the_nearest_of_either_op(kind: str) -> None:
    k, v = vectors(1), vectors(2)
    pools = pool(1, 16, 64, kind), pool(0, 16, 64, kind)
    place = np.zeros(16, np.int32)
    chunk, *_ = append_kv_chunk(
        *(k, v, *pools, None, place[:1], place - 1), np.int32(0), np.int32(16)
    )
    angle = np.zeros((16, 32), np.float32)
    _, token, *_ = append_kv(
        *(k, k, v, angle + 1, angle, *pools, None, place, place), np.arange(16, dtype=np.int32)
    )
    same(token, chunk)
    holds_nan = np.arange(16) == 3
    for x, codes, scale in ((k, chunk.k, chunk.k_scale), (v, chunk.v, chunk.v_scale)):
        codes, scale = jax.tree.map(lambda leaf: np.asarray(leaf[0, 0]), (codes, scale))
        values = api.dequantize_kv(codes, scale)
        np.testing.assert_array_equal(np.isnan(values).any(axis=-1), holds_nan)
        codes, scale = jax.tree.map(lambda leaf: leaf[~holds_nan], (codes, scale))
        check_codes(x[~holds_nan, 0].astype(float), codes, scale, kind)


@pytest.mark.parametrize("ranked", [0, 1])
@pytest.mark.parametrize(("start", "length"), [(64, 64), (85, 69)], ids=["whole", "in part"])
def test_append_kv_chunk_with_statistics_of_the_first_heads(
    start: int, length: int, ranked: int
) -> None:
    case = 72, start, length, 2, 0, 64, 32, 2, jnp.bfloat16, everything
    *arguments, stats, table, ring_page, first, count = chunk_problem(*case)
    arguments += [stats[:ranked], table, ring_page, first, count]
    result = jax.jit(append_kv_chunk)(*arguments)
    assert result[-1].shape == arguments[4].shape
    same(result, reference.append_kv_chunk(*arguments))


@pytest.mark.parametrize("beyond", [-1, PAGES, 2**30])
def test_tokens_of_pages_that_do_not_exist_are_not_written(beyond: int) -> None:
    *arguments, page, ring_page, offset = token_problem(*TOKEN_CASES["bf16"])
    page[0] = ring_page[1] = beyond
    arguments += [page, ring_page, offset]
    same(jax.jit(append_kv)(*arguments), reference.append_kv(*arguments))


@pytest.mark.parametrize("beyond", [-1, PAGES, 2**30])
def test_pages_that_do_not_exist_are_not_written(beyond: int) -> None:
    *arguments, table, ring_page, start, length = chunk_problem(*CHUNK_CASES["pages kept in part"])
    table = np.where(np.arange(table.size) == 3, beyond, table).astype(np.int32)
    ring_page[7:19] = beyond
    arguments += [table, ring_page, start, length]
    same(jax.jit(append_kv_chunk)(*arguments), reference.append_kv_chunk(*arguments))


@pytest.mark.parametrize("op", ["token", "chunk"])
def test_maps_over_sequences(op: str) -> None:
    """Each sequence its own pools: ``vmap`` makes one launch of them."""
    if op == "token":
        kernel, plain, arguments = (
            append_kv,
            reference.append_kv,
            token_problem(*TOKEN_CASES["bf16"]),
        )
    else:
        kernel, plain = append_kv_chunk, reference.append_kv_chunk
        arguments = chunk_problem(*CHUNK_CASES["inside a page"])
    both = jax.tree.map(lambda x: np.stack([x, x]), arguments)
    same(jax.jit(jax.vmap(kernel))(*both), jax.vmap(plain)(*both))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({4: 32}, "head_dim must be 64 or 128, got 32"),
        ({7: np.float32}, "retrieval pages must be bfloat16 or codes, got float32"),
        ({8: np.float16}, "key statistics must be bfloat16 or float32, got float16"),
    ],
)
def test_refuses_by_name(change: dict[int, object], reason: str) -> None:
    case = (change.get(i, x) for i, x in enumerate(TOKEN_CASES["bf16"]))
    with pytest.raises(NotImplementedError, match=f"append_kv kernel: .*{reason}"):
        append_kv(*token_problem(*case))


def test_refuses_small_pages() -> None:
    arguments = chunk_problem(16, 0, 16, 1, 1, 64, 8, 4, jnp.bfloat16, everything)
    with pytest.raises(NotImplementedError, match="128, got 8; logical pages must hold 4 tokens"):
        append_kv_chunk(*arguments)


def test_refuses_float32_tokens() -> None:
    q, *rest = token_problem(*TOKEN_CASES["bf16"])
    with pytest.raises(
        NotImplementedError, match=r"must be bfloat16, got \['bfloat16', 'float32'\]"
    ):
        append_kv(q.astype(np.float32), *rest)


def test_choice_of_config() -> None:
    assert choose_config(32, 8, 8, 0) == Config(query_heads=4, kv_heads=4)
    assert choose_config(9, 0, 2, 0) == Config(query_heads=1, kv_heads=2)
    assert choose_config(6, 0, 0, 5) == Config(query_heads=2, kv_heads=1)
    for split in ((4, 4, 4), (4, 8, 0), (0, 4, 4)):  # layers of all splits share a kernel
        assert choose_config(32, *split) == Config(query_heads=4, kv_heads=1)
    with pytest.raises(ValueError, match="kv_heads must be 1, 2 or 4, got 3"):
        Config(query_heads=1, kv_heads=3)
