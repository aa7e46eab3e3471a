"""The tiles of decode attention: how a split fetches them, and what it multiplies them with.

See ``decode_attention`` for the index map, the letters and the way int8 pages are multiplied.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kv_codes
from pallas_kernels.hopper.mosaic import (
    LOG2_E,
    MATRIX,
    MATRIX_TRANSPOSED,
    PER_ROW,
    cdiv,
    matmul,
    spread_columns,
    spread_rows,
    tile_transforms,
)
from pallas_kernels.types import KVPages, PageList

# An int8 holds a query to 1/127; the rounding error, at most 1/254 of that step, fills another. Of
# e4m3 the error is at most half of the largest step, 32, and 16 times that still a number.
LOW_STEPS = {"int8": 254.0, "int4": 254.0, "fp8": 16.0}
# T, tokens of one step: the least that wgmma multiplies. Twice as many took so many registers for
# int8 that one CTA an SM was left, and gained nothing for bf16.
TILE = 64
# Positions of K and V in ``KVPages``; their scales follow two further on.
KEYS, VALUES = 0, 1


@dataclass(frozen=True)
class Boxes:
    """How tiles lie on pages of ``page_size`` tokens. A box is what one copy (TMA) moves."""

    page_size: int

    @property
    def tokens(self) -> int:
        return min(self.page_size, TILE)

    @property
    def count(self) -> int:
        """Boxes of a tile of K (or V): the pages that it spans."""
        return TILE // self.tokens

    @property
    def tiles_per_page(self) -> int:
        return max(self.page_size // TILE, 1)

    @property
    def scale_stride(self) -> int:
        """From the scales of one box to those of the next, in shared memory.

        A copy starts at a multiple of 128 bytes there: scales of a page of 16 leave gaps.
        """
        return max(self.tokens, 128 // 4)


class Buffers(NamedTuple):
    """Shared memory and barriers of a CTA."""

    k: Any  # [stages, T, D] as stored
    v: Any  # [stages, T, D] as stored
    p: Any  # [N, T] bf16, the weights; int4 pages: [2 N, T], those of either half of the channels
    k_ready: Any  # [stages] barriers
    v_ready: Any  # [stages] barriers
    # bf16 pages: q [N, D] bf16; int8, fp8: high [N, D], low [N, D] like K; int4: [2 N, D] int8
    query: tuple[Any, ...]
    # For pages of codes only:
    v_bf16: Any = None  # [T, D] bf16, codes
    k_scale: tuple[Any, ...] = ()  # [stages, boxes * scale_stride] each
    v_scale: tuple[Any, ...] = ()  # [stages, boxes * scale_stride] each
    k_codes: Any = None  # [T, D] int8, for int4 pages

    @property
    def kind(self) -> kv_codes.KVKind | None:
        """Of the pages."""
        return kv_codes.kv_kind(self.k.dtype)


def allocate_buffers(
    head_dim: int, columns: int, boxes: Boxes, stages: int, dtype: jax.typing.DTypeLike
) -> Buffers:
    """The scratch types for pages of ``dtype`` and a query tile of ``columns`` rows (N)."""
    kind = kv_codes.kv_kind(dtype)
    stored = kv_codes.stored_channels(kind, head_dim)
    kv_tile = plgpu.SMEM((stages, TILE, stored), dtype, transforms=tile_transforms(stored, dtype))
    # What wgmma multiplies: codes of 4 bits as int8, each half of the channels by itself.
    operand = jnp.int8 if kind == "int4" else dtype
    transforms = tile_transforms(stored, operand)
    query_tile = plgpu.SMEM((columns, head_dim), operand, transforms=transforms)
    both_parts = plgpu.SMEM((2 * columns, head_dim), operand, transforms=transforms)
    scales = {None: 0, "int4": 2}.get(kind, 1)
    ready = plgpu.Barrier(num_arrivals=(1 + scales) * boxes.count, num_barriers=stages)
    weights = plgpu.SMEM(
        (max(scales, 1) * columns, TILE),
        jnp.bfloat16,
        transforms=tile_transforms(TILE, jnp.bfloat16),
    )
    buffers = Buffers(kv_tile, kv_tile, weights, ready, ready, (query_tile,))
    if kind is None:
        return buffers
    scale_tile = plgpu.SMEM(
        (stages, boxes.count * boxes.scale_stride), jnp.int32 if kind == "int4" else jnp.float32
    )
    return buffers._replace(
        query=(both_parts,) if kind == "int4" else (query_tile, query_tile),
        v_bf16=plgpu.SMEM(
            (TILE, head_dim), jnp.bfloat16, transforms=tile_transforms(head_dim, jnp.bfloat16)
        ),
        k_scale=(scale_tile,) * scales,
        v_scale=(scale_tile,) * scales,
        k_codes=plgpu.SMEM((TILE, head_dim), operand, transforms=transforms)
        if kind == "int4"
        else None,
    )


def of_halves(first, second):
    """[D, N]: the first of the channels of a matrix, or value, the others of another."""
    D = first.shape[0]
    if D == 128:
        return jnp.concatenate([first[:64], second[64:]], axis=0)
    channel = plgpu.broadcasted_iota(jnp.int32, first.shape, 0, layout=MATRIX)
    return jnp.where(channel < D // 2, first, second)


class Place(NamedTuple):
    """Whose split a number is, and where that head's list lies in flat arrays: a row of a table."""

    head: Any  # KV head k
    split: Any  # which of the head's splits
    splits: Any  # how many the head has; 0: the number is nobody's
    of_second: Any  # 0: the head is in the first pool, 1: in the second
    pool_head: Any  # which head it is there
    last_entry: Any  # of the head's list
    # Of each field of the list: elements of a row, and those before the head's in it.
    page_ids: tuple[Any, Any]
    start: tuple[Any, Any]
    stop: tuple[Any, Any]


def read_place(table, number) -> Place:
    """Row ``number`` of a table in device memory."""
    columns = [table[number, i] for i in range(_PLACE.num_leaves)]
    return jax.tree.unflatten(_PLACE, columns)


_PLACE = jax.tree.structure(Place(0, 0, 0, 0, 0, 0, (0, 0), (0, 0), (0, 0)))


class Split(NamedTuple):
    """What one CTA has to do: tiles s, s + S, ... of the list of one (row, KV head)."""

    steps: Any  # number of tiles to attend
    start: Any  # tokens [start, stop) of the list are attended
    stop: Any
    tile_of: Callable[[Any], Any]  # number of a step's tile in the list
    page_ids: Callable[[Any], list]  # page_ids(step): one for each box of the tile
    first_page_ids: list[list]  # those of the first stages + 1 steps
    # fetch(KEYS or VALUES, step, page_ids): starts the copies of a tile, and of its scales
    fetch: Callable[[int, Any, list], None]

    def token_numbers(self, step, shape: tuple[int, ...], layout=MATRIX):
        """Of a tile's tokens in the list, one a row of a matrix [T, ...] of ``shape``."""
        rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
        return rows + self.tile_of(step) * TILE

    def attends(self, token):
        return (token >= self.start) & (token < self.stop)


def plan_split(
    lists: tuple[PageList, ...],  # in device memory, as the pools; flat; of the pools with heads
    pools: tuple[KVPages, ...],
    buffers: Buffers,
    b,  # row
    place: Place,
) -> Split:
    """The work of a CTA. All that does not depend on ``stop`` is loaded before it."""
    stages, boxes = buffers.k.shape[0], Boxes(pools[0].k.shape[2])
    s, splits = place.split, place.splits

    def of_head(field: str, entry=0):
        """Element ``entry`` of a field of this head's list."""
        a_row, before = getattr(place, field)
        index, values = b * a_row + before + entry, []
        for number, page_list in enumerate(lists):
            # The other pool's list is shorter, maybe: its first element stands in.
            own = index if len(lists) == 1 else jnp.where(place.of_second == number, index, 0)
            values.append(getattr(page_list, field)[own])
        return values[0] if len(values) == 1 else jnp.where(place.of_second == 0, *values)

    def tile_of(step):
        return s + step * splits

    def page_ids(step):
        entry = lax.div(tile_of(step), jnp.int32(boxes.tiles_per_page)) * boxes.count
        entries = [jnp.minimum(entry + j, place.last_entry) for j in range(boxes.count)]
        return [of_head("page_ids", entry) for entry in entries]

    # Loaded before anything that depends on ``stop``: one trip to memory instead of two.
    first_page_ids = [page_ids(step) for step in range(stages + 1)]
    start, stop = of_head("start"), of_head("stop")
    tiles = jnp.where((stop > start) & (splits > 0), cdiv(stop, TILE), 0)
    steps = lax.div(jnp.maximum(tiles - s, 0) + splits - 1, jnp.maximum(splits, 1))

    def fetch(part, step, ids):
        stage = lax.rem(step, jnp.int32(stages))
        tile = tile_of(step)
        inside = 0  # the tile's first token in a page of more than one tile
        if boxes.tiles_per_page > 1:
            inside = lax.rem(tile, jnp.int32(boxes.tiles_per_page)) * TILE
        target, ready = ((buffers.k, buffers.k_ready), (buffers.v, buffers.v_ready))[part]
        scale_targets = (buffers.k_scale, buffers.v_scale)[part]

        def copy(pool, head):
            for j, page in enumerate(ids):
                if j:  # the tile's first page stands in for those past ``stop``
                    page = jnp.where(tile * TILE + j * boxes.page_size < stop, page, ids[0])
                source = head, page, pl.ds(inside, boxes.tokens)
                plgpu.copy_gmem_to_smem(
                    pool[part].at[source],
                    target.at[stage, pl.ds(j * boxes.tokens, boxes.tokens)],
                    ready.at[stage],
                )
                of_pool = jax.tree.leaves(pool[2 + part])
                for scale, scale_target in zip(of_pool, scale_targets, strict=True):
                    plgpu.copy_gmem_to_smem(
                        scale.at[source],
                        scale_target.at[stage, pl.ds(j * boxes.scale_stride, boxes.tokens)],
                        ready.at[stage],
                    )

        if len(pools) == 1:
            copy(pools[0], place.pool_head)
        else:
            for number, pool in enumerate(pools):
                of_pool = place.of_second == number
                pl.when(of_pool)(lambda pool=pool: copy(pool, place.pool_head))

    return Split(steps, start, stop, tile_of, page_ids, first_page_ids, fetch)


def query_tile_start(pair, group: int, columns: int, query_rows: int):
    """First of the ``columns`` query rows to load for a (row, KV head) pair.

    The pair's own rows start at ``pair * group``. The tile runs on into the next pair's, whose
    results are dropped; at the end of the array it starts early instead.
    """
    return jnp.minimum(pair * group, query_rows - columns)


class QueryScale(NamedTuple):
    """What products of codes of K with a query's two parts are multiplied by, and added to."""

    scale: Any  # [N]
    totals: tuple[Any, ...]  # [N], of the query in either half of the channels; for int4 pages only


def load_query(rows, buffers: Buffers) -> QueryScale | None:
    """Puts Q ``rows`` [N, D] bf16 where wgmma reads it, as one bf16 matrix or two of codes.

    Returns what scores are made with, if those are codes.
    """
    N, D = rows.shape
    transposed = plgpu.load(
        rows.transpose((1, 0)),
        layout=MATRIX_TRANSPOSED,
        optimized=False,  # D * N elements once a split
    )
    if buffers.kind is None:
        buffers.query[0].transpose((1, 0))[...] = transposed
        plgpu.commit_smem()
        return None
    query = plgpu.layout_cast(transposed, MATRIX).astype(jnp.float32)  # [D, N]
    largest = jnp.maximum(jnp.abs(query).max(axis=0), 1e-30)
    if buffers.kind == "fp8":
        # By a power of two: then two e4m3, of 4 digits each, hold the 8 of a bf16.
        bits = lax.bitcast_convert_type(448.0 / largest, jnp.int32) & jnp.int32(0x7F800000)
        factor = lax.bitcast_convert_type(bits, jnp.float32)
        largest = 127.0 / factor  # what 127 stands for, as with int8
    else:
        factor = 127.0 / largest
    query = query * spread_columns(factor, query)
    high = _rounded(query, buffers.kind)
    low = _rounded((query - high) * LOW_STEPS[buffers.kind], buffers.kind)
    parts = buffers.query
    if buffers.kind == "int4":
        parts = [parts[0].at[pl.ds(N * part, N)] for part in range(2)]
    for to, value in zip(parts, (high, low), strict=True):
        # Codes are exact in bf16, the width that can be transposed.
        value = plgpu.layout_cast(value.astype(jnp.bfloat16), MATRIX_TRANSPOSED)
        to.transpose((1, 0))[...] = value.astype(jnp.float32).astype(to.dtype)
    plgpu.commit_smem()
    scale = largest * (score_scale(D) / 127.0)
    if buffers.kind != "int4":
        return QueryScale(scale, ())
    query = high + low * (1.0 / LOW_STEPS["int4"])
    channel = plgpu.broadcasted_iota(jnp.int32, query.shape, 0, layout=MATRIX)
    upper = jnp.where(channel < D // 2, 0.0, query).sum(axis=0)
    return QueryScale(scale, (query.sum(axis=0) - upper, upper))


def _rounded(x, kind: kv_codes.KVKind):
    if kind == "fp8":
        return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.round(x)


def score_scale(head_dim: int) -> float:
    """Scores in base 2: exp2 is one instruction."""
    return head_dim**-0.5 * LOG2_E


def scales(scale_smem, stage, boxes: Boxes, like):
    """Of a tile's tokens, in every column of ``like`` [T, ...]."""

    def shifted(j):
        """Right in the rows of box j: what lies before its scales is left out."""
        gaps = j * (boxes.scale_stride - boxes.tokens)
        row_scale = plgpu.load(scale_smem.at[stage, pl.ds(gaps, TILE)], layout=PER_ROW)
        return spread_rows(row_scale, like)

    result = shifted(0)
    if boxes.tokens < boxes.scale_stride:
        row = plgpu.broadcasted_iota(jnp.int32, like.shape, 0, layout=MATRIX)
        for j in range(1, boxes.count):
            result = jnp.where(row >= j * boxes.tokens, shifted(j), result)
    return result


def scores(buffers: Buffers, stage, boxes: Boxes, query_scale: QueryScale | None):
    """Of a tile's keys [T, N], base 2; ``query_scale`` is what ``load_query`` returned."""
    keys = buffers.k.at[stage]
    N, D = buffers.query[0].shape
    if query_scale is None:
        query = buffers.query[0].transpose((1, 0))
        return matmul(keys, query, TILE, N) * score_scale(D)
    if buffers.kind == "int4":
        return _scores_of_halves(buffers, stage, boxes, query_scale)
    sums = jnp.int32 if buffers.kind == "int8" else jnp.float32
    high, low = (
        matmul(keys, x.transpose((1, 0)), TILE, N, sums).astype(jnp.float32)
        for x in buffers.query
    )
    x = high + low * (1.0 / LOW_STEPS[buffers.kind])
    x = x * spread_columns(query_scale.scale, high)
    return x * scales(buffers.k_scale[0], stage, boxes, x)


def _scores_of_halves(buffers: Buffers, stage, boxes: Boxes, query_scale: QueryScale):
    """The same where each half of the channels has codes and a word of its own (int4)."""
    [query] = buffers.query
    N, D = query.shape[0] // 2, query.shape[1]
    halves = [pl.ds(half * D // 2, D // 2) for half in range(2)]
    codes = plgpu.load(buffers.k.at[stage], layout=wide_layout(D // 2))
    buffers.k_codes[...] = _nibbles(codes)
    plgpu.commit_smem()
    x = None
    for number, half in enumerate(halves):
        sums = matmul(buffers.k_codes.at[:, half], query.at[:, half].T, TILE, 2 * N, jnp.int32)
        high, low = sums[:, :N], sums[:, N:]
        product = high.astype(jnp.float32) + low.astype(jnp.float32) * (1.0 / LOW_STEPS["int4"])
        step, lowest = step_and_lowest(buffers.k_scale, number, stage, boxes, product)
        product = product * step + lowest * spread_columns(query_scale.totals[number], product)
        x = product if x is None else x + product
    return x * spread_columns(query_scale.scale, x)


def step_and_lowest(words: tuple[Any, ...], half: int, stage, boxes: Boxes, like, attended=None):
    """What ``_nibbles`` of a half of the channels stand for, ``code * step + lowest``: [T, ...].

    Both are 0 where not ``attended``, if that is given.
    """
    word = scales(words[half], stage, boxes, like)
    if attended is not None:
        word = jnp.where(attended, word, 0)
    step, lowest = kv_codes.word_values(word)
    return (step, lowest) if half == 0 else (step * (1 / 16), lowest + 8.0 * step)


def _nibbles(codes):
    """Codes of 4 bits [T, D / 2] uint8 as int8 [T, D]: n, and of the upper half 16 * (n - 8).

    Numbers of 8 bits can be masked, and not shifted.
    """
    return jnp.concatenate([codes & 15, (codes & 240) ^ 128], axis=1).astype(jnp.int8)


def wide_layout(row: int):
    """[T, row] of codes: a thread has 8 in a row, so 16 bytes when they are bf16."""
    rows = 256 // row  # a warp's
    tiling = fa.Tiling(((4 * rows, row), (rows, row), (8,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def values(buffers: Buffers, stage, split: Split, step):
    """V bf16 in shared memory [T, D]: as it is, with zeros where not attended, or its codes."""
    tile, v = buffers.v.at[stage], buffers.v_bf16
    if buffers.kind is None:
        _zero_unattended(tile, split, step, MATRIX)
        return tile
    if buffers.kind == "int8":
        codes = plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        v[...] = plgpu.layout_cast(codes, MATRIX).astype(jnp.bfloat16)
        return v  # codes are never NaN; the weights of unattended rows are zero
    layout = wide_layout(tile.shape[1])
    codes = plgpu.load(tile, layout=layout)
    if buffers.kind == "int4":
        v[...] = _nibbles(codes).astype(jnp.bfloat16)
        return v
    v[...] = codes.astype(jnp.float32).astype(jnp.bfloat16)
    _zero_unattended(v, split, step, layout)
    return v


def _zero_unattended(tile, split: Split, step, layout) -> None:
    """Zeroes rows of V that are not attended: a weight of zero does not silence a NaN."""
    first = split.tile_of(step) * TILE

    @pl.when((first < split.start) | (first + TILE > split.stop))
    def _():
        v = plgpu.load(tile, layout=layout)
        attended = split.attends(split.token_numbers(step, v.shape, layout))
        tile[...] = jnp.where(attended, v, jnp.zeros_like(v))
