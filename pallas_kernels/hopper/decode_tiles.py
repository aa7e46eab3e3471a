"""The tiles of decode attention: how a split fetches them.

See ``decode_attention`` for the index map and the letters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kv_codes
from pallas_kernels.hopper.mosaic import MATRIX, cdiv, tile_transforms
from pallas_kernels.types import KVPages, PageList

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
    # bf16 pages: q [N, D] bf16; int8, fp8: high [N, D], low [N, D] like K; int4: see ``load_query``
    query: tuple[Any, ...]
    # For pages of codes only:
    v_bf16: Any = None  # [T, D] bf16, codes
    k_scale: tuple[Any, ...] = ()  # [stages, boxes * scale_stride] each
    v_scale: tuple[Any, ...] = ()  # [stages, boxes * scale_stride] each

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
    # wgmma takes 8 bits for 4, and for int4 pages all parts of a query at once.
    query_rows, query_type = (4 * columns, jnp.int8) if kind == "int4" else (columns, dtype)
    query_tile = plgpu.SMEM(
        (query_rows, head_dim), query_type, transforms=tile_transforms(head_dim, query_type)
    )
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
        query=(query_tile,) if kind == "int4" else (query_tile, query_tile),
        v_bf16=plgpu.SMEM(
            (TILE, head_dim), jnp.bfloat16, transforms=tile_transforms(head_dim, jnp.bfloat16)
        ),
        k_scale=(scale_tile,) * scales,
        v_scale=(scale_tile,) * scales,
    )


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

    def token_numbers(self, step, shape: tuple[int, ...]):
        """Of a tile's tokens in the list, one a row of a matrix [T, ...] of ``shape``."""
        rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
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
