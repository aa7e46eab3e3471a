"""A tile of 128 query rows attends blocks of 128 keys: what the prefill and prefix kernels share.

One CTA holds one tile and has three warpgroups of 128 threads. Two of them compute, 64 rows each,
out of phase: they hand the tensor cores to each other, so that one multiplies while the other
does its softmax. The third copies keys and values ahead of them.

    warpgroup 0   Q K^T | softmax . . . . . | P V, Q K^T | softmax . . . . . | P V, Q K^T |
    warpgroup 1         | Q K^T | softmax . . . . . | P V, Q K^T | softmax . . . . . |
    warpgroup 2   copies K and V of later blocks as buffers become free

Pages of codes are copied to slots of their own, K and V in turn, and the third warpgroup makes bf16
of them, ahead of those that compute too:

    warpgroup 2   | slot 0 to K | slot 1 to V | slot 2 to K | slot 0 to V | as buffers become free

For a block, with 64 rows in registers:

    scores [64, 128] = Q [64, D] @ K^T [D, 128]      both from shared memory
    online softmax along the rows
    acc [64, D] += P [64, 128] @ V [128, D]          P from registers, V from shared memory

A kernel says which blocks a tile attends and how to fetch and mask them; whatever it does not mask
is attended. A tile may attend no block at all: its output is 0, its lse -inf.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.hopper.code_blocks import convert, scale_stride
from pallas_kernels.hopper.mosaic import (
    LN_2,
    LOG2_E,
    LOWEST,
    MATRIX,
    PER_ROW,
    add_product,
    full,
    matmul,
    spread_rows,
    tile_transforms,
)
from pallas_kernels.kv_codes import CODE_TYPES, KVKind, stored_channels
from pallas_kernels.types import BLOCK_KEYS, TILE_QUERIES

ROWS = TILE_QUERIES
HALF = ROWS // 2  # queries of a compute warpgroup
BLOCK = BLOCK_KEYS  # half as many keys leave the tensor cores idle a fifth of the time
# A fourth to convert codes does not compile for D = 128 where budgets of registers are ignored (see
# docs/kernels.md): each would have 128.
WARPGROUPS = 3
COPYING = 2  # the warpgroup that copies, and converts codes
# Registers a thread. All begin with 168 and hand over what they have, so that two budgets of the
# first and one of the second are 504: accumulators, scores and weights need many, copying few.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24
COMPUTE_BESIDE_CODES, CONVERT_REGISTERS = 216, 72

# Positions of K and V where a function takes one or the other.
KEYS, VALUES = 0, 1


class Codes(NamedTuple):
    """Shared memory and barriers for blocks as they are stored: of keys, of values, and so on."""

    block: Any  # [slots, 128, D or D / 2]
    scales: tuple[Any, ...]  # [slots, pages * stride] each, see ``code_blocks``
    ready: Any  # [slots] barriers, after all copies of a block


class Tile(NamedTuple):
    """Shared memory and barriers of a CTA. Barriers of buffers come one for each stage."""

    q: Any  # [2, 64, D]; at the end the tile's output
    k: Any  # [stages, 128, D]
    v: Any  # [stages, 128, D]
    lse: Any  # [2, 64] float32
    q_ready: Any  # [2] barriers
    k_ready: Any  # [stages] barriers, after all copies of a block, or when it is converted
    v_ready: Any
    k_free: Any  # [stages] barriers, after both compute warpgroups have used a block
    v_free: Any
    turn: Any  # [2] barriers: a compute warpgroup may use the tensor cores
    codes: Codes | None = None  # None: pages are bf16


def tile_scratch(
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    stages: int,
    page_size: int,
    kind: KVKind | None = None,
) -> Tile:
    """For queries of ``dtype``, and pages of that or of codes of a kind."""
    transforms = tile_transforms(head_dim, dtype)
    block = plgpu.SMEM((stages, BLOCK, head_dim), dtype, transforms=transforms)
    copies = BLOCK // page_size if kind is None else 1  # that bring a block; or its conversion
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    each = plgpu.Barrier(num_barriers=2)
    return Tile(
        q=plgpu.SMEM((2, HALF, head_dim), dtype, transforms=transforms),
        k=block,
        v=block,
        lse=plgpu.SMEM((2, HALF), jnp.float32),
        q_ready=each,
        k_ready=ready,
        v_ready=ready,
        k_free=free,
        v_free=free,
        turn=each,
        codes=None if kind is None else _code_scratch(head_dim, page_size, kind),
    )


def _code_scratch(head_dim: int, page_size: int, kind: KVKind) -> Codes:
    # Three of 128 channels and 8 bits are what fits beside the tile: one is converted while two
    # arrive.
    slots = 3 * 128 // head_dim
    stored, dtype = stored_channels(kind, head_dim), CODE_TYPES[kind]
    pages, words = BLOCK // page_size, 2 if kind == "int4" else 1
    scale = plgpu.SMEM(
        (slots, pages * scale_stride(page_size)), jnp.int32 if kind == "int4" else jnp.float32
    )
    return Codes(
        block=plgpu.SMEM((slots, BLOCK, stored), dtype, transforms=tile_transforms(stored, dtype)),
        scales=(scale,) * words,
        ready=plgpu.Barrier(num_arrivals=pages * (1 + words), num_barriers=slots),
    )


class Work(NamedTuple):
    """What one tile has to do."""

    steps: Int[Array, ""]  # number of blocks to attend
    # rows_of(half): 64 rows of q and out [64, D] and of lse [64] in device memory
    rows_of: Callable[[Any], tuple[Any, Any, Any]]
    # block(step): the block's number, by which the others know it; any where no such step is
    block: Callable[[Any], Any]
    # fetch(block, KEYS or VALUES, to, ready): starts the copies of a block to [128, D]
    fetch: Callable[[Any, int, Any, Any], None]
    # mask(block, half, scores): scores [64, 128] with -inf where a query must not see a key
    mask: Callable[[Any, Any, Any], Any]
    # clean(block, v): zeroes rows of v [128, D] that may hold NaN, which a weight of zero does not
    # silence; called by one warpgroup before either uses them
    clean: Callable[[Any, Any], None]
    # For pages of codes, instead of ``fetch``, in two steps. page_id(block, j): the j-th of a block
    page_id: Callable[[Any, Any], Any] | None = None
    # fetch_codes(block, its first page, KEYS or VALUES, targets, ready): starts the copies of codes
    # to [128, D or D / 2], and of their scales
    fetch_codes: Callable[[Any, Any, int, list[Any], Any], None] | None = None


def attend(tile: Tile, plan: Callable[[], Work]) -> None:
    """The whole of a kernel for one tile, run by all three warpgroups.

    ``plan`` is traced for either role anew: numbers computed before the roles part would have to
    fit into the few registers of the one that copies.
    """

    warpgroup = lax.axis_index("warpgroup")
    codes = tile.codes
    if codes is None:
        compute_registers, other_registers = COMPUTE_REGISTERS, COPY_REGISTERS
    else:
        compute_registers, other_registers = COMPUTE_BESIDE_CODES, CONVERT_REGISTERS

    @pl.when(warpgroup < COPYING)
    def _():
        plgpu.set_max_registers(compute_registers, action="increase")
        _compute(tile, warpgroup, plan())

    @pl.when(warpgroup == COPYING)
    def _():
        plgpu.set_max_registers(other_registers, action="decrease")
        if codes is None:
            _copy(tile, plan())
        else:
            _convert(tile, codes, plan())


def zero_rows(v, keep: Callable[[Any], Any]) -> None:
    """Zeroes the rows of a block v [128, D] in shared memory whose numbers ``keep`` refuses."""
    for first in range(0, BLOCK, HALF):  # a warpgroup holds multiples of 64 rows
        part = v.at[pl.ds(first, HALF)]
        values = plgpu.load(part, layout=MATRIX)
        number = first + plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=MATRIX)
        part[...] = jnp.where(keep(number), values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _compute(tile: Tile, half, work: Work) -> None:
    steps = work.steps
    q_gmem, out_gmem, lse_gmem = work.rows_of(half)
    q, lse_smem = tile.q.at[half], tile.lse.at[half]
    stages, _, D = tile.k.shape
    scale = D**-0.5 * LOG2_E  # scores in base 2: exp2 is one instruction

    def wait_for_turn():
        plgpu.barrier_wait(tile.turn.at[half])

    def pass_turn():
        plgpu.barrier_arrive(tile.turn.at[1 - half])

    def wait_for_keys(step):
        @pl.when(step < steps)
        def _():
            plgpu.barrier_wait(tile.k_ready.at[lax.rem(step, jnp.int32(stages))])

    def attend_block(step, carry):
        acc, peak, total = carry  # [64, D], [64], [64]
        stage = lax.rem(step, jnp.int32(stages))
        block = work.block(step)  # which may have to be read: the product hides the wait
        # Its keys were waited for during the previous block's last product.
        x = matmul(q, tile.k.at[stage].transpose((1, 0)), HALF, BLOCK, meanwhile=pass_turn)
        plgpu.barrier_arrive(tile.k_free.at[stage])
        x = work.mask(block, half, x)

        new_peak = jnp.maximum(peak, x.max(axis=1) * scale)
        decay = jnp.exp2(peak - new_peak)
        p = jnp.exp2(x * scale - spread_rows(new_peak, x))
        total = total * decay + p.sum(axis=1)
        acc = acc * spread_rows(decay, acc)
        p = p.astype(tile.v.dtype)
        # All of this is to happen before the tensor cores are asked for, not after.
        acc, p, total, new_peak = lax.optimization_barrier((acc, p, total, new_peak))

        plgpu.barrier_wait(tile.v_ready.at[stage])
        # Warpgroup 1 multiplies by these values a turn later.
        pl.when(half == 0)(lambda: work.clean(block, tile.v.at[stage]))
        wait_for_turn()
        acc = add_product(acc, p, tile.v.at[stage], meanwhile=lambda: wait_for_keys(step + 1))
        plgpu.barrier_arrive(tile.v_free.at[stage])
        return acc, new_peak, total

    plgpu.copy_gmem_to_smem(q_gmem, q, tile.q_ready.at[half])
    wait_for_keys(0)
    plgpu.barrier_wait(tile.q_ready.at[half])
    pl.when(half == 1)(wait_for_turn)  # warpgroup 0 begins
    acc, peak, total = lax.fori_loop(
        0,
        steps,
        attend_block,
        (full((HALF, D), 0.0, MATRIX), full((HALF,), LOWEST, PER_ROW), full((HALF,), 0.0, PER_ROW)),
    )
    pl.when(half == 0)(pass_turn)  # for warpgroup 1's last block

    inverse = jnp.where(total > 0.0, 1.0 / total, 0.0)
    q[...] = (acc * spread_rows(inverse, acc)).astype(q.dtype)
    lse_smem[...] = jnp.where(total > 0.0, (peak + jnp.log2(total)) * LN_2, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, out_gmem)
    plgpu.copy_smem_to_gmem(lse_smem, lse_gmem)
    plgpu.wait_smem_to_gmem(0)


def _copy(tile: Tile, work: Work) -> None:
    steps, stages = work.steps, tile.k.shape[0]

    def fetch_keys(block, stage):
        work.fetch(block, KEYS, tile.k.at[stage], tile.k_ready.at[stage])

    def fetch_values(block, stage):
        work.fetch(block, VALUES, tile.v.at[stage], tile.v_ready.at[stage])

    def fill(step, _):
        block = work.block(step)
        fetch_keys(block, step)
        fetch_values(block, step)

    def refill(step, _):
        stage = lax.rem(step, jnp.int32(stages))
        more = step + stages < steps
        block = work.block(step + stages)
        plgpu.barrier_wait(tile.k_free.at[stage])
        pl.when(more)(lambda: fetch_keys(block, stage))
        plgpu.barrier_wait(tile.v_free.at[stage])
        pl.when(more)(lambda: fetch_values(block, stage))

    lax.fori_loop(0, jnp.minimum(steps, stages), fill, None)
    lax.fori_loop(0, steps, refill, None)


def _convert(tile: Tile, codes: Codes, work: Work) -> None:
    """Makes bf16 of blocks of codes, and copies others to where these were."""
    steps, stages, slots = work.steps, tile.k.shape[0], codes.block.shape[0]
    page_id, fetch_codes = work.page_id, work.fetch_codes
    assert page_id is not None and fetch_codes is not None
    parts = (tile.k, tile.k_ready, tile.k_free), (tile.v, tile.v_ready, tile.v_free)

    def convert_step(step, _):
        stage = lax.rem(step, jnp.int32(stages))
        for part, (to, ready, free) in enumerate(parts):
            slot = lax.rem(2 * step + part + slots, jnp.int32(slots))
            scales = [scale.at[slot] for scale in codes.scales]
            # What the slot gets afterwards. Its page is looked up before the conversion, which
            # hides the wait.
            later, later_part = step + (part + slots) // 2, (part + slots) % 2
            block = work.block(jnp.maximum(later, 0))
            page = page_id(block, 0)
            pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[stage]))

            @pl.when((step >= 0) & (step < steps))
            def _(slot=slot, scales=scales, to=to, ready=ready):
                plgpu.barrier_wait(codes.ready.at[slot])
                convert(codes.block.at[slot], scales, to.at[stage])
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[stage])

            @pl.when((later >= 0) & (later < steps))
            def _(slot=slot, scales=scales, later_part=later_part, block=block, page=page):
                targets = [codes.block.at[slot], *scales]
                fetch_codes(block, page, later_part, targets, codes.ready.at[slot])

    # From where nothing but the first blocks is fetched to where all that was free is waited for.
    lax.fori_loop(-((slots + 1) // 2), steps + stages, convert_step, None)


def copy_pages(pages, head, page_id: Callable[[int], Any], to, ready) -> None:
    """Starts the copies of a block [128, D] from the pages [heads, N, P, D] of a head.

    ``page_id(j)`` names the block's j-th page. Any number will do for a page that is masked.
    """
    _, N, P, _ = pages.shape
    for j in range(BLOCK // P):
        page = jnp.minimum(jnp.maximum(page_id(j), 0), N - 1)
        plgpu.copy_gmem_to_smem(pages.at[head, page], to.at[pl.ds(j * P, P)], ready)


def copy_code_pages(
    arrays: Sequence[Any], head, first, page_id: Callable[[Any], Any], targets: Sequence[Any], ready
) -> None:
    """The same for pages of codes and their scales, each [heads, N, P, ...], and page 0 known.

    ``targets`` [128, ...] in shared memory; more of them leave gaps behind each page.
    """
    N, P = arrays[0].shape[1:3]

    def copy_page(j, page):
        later = page_id(j + 1)  # read while these copies start
        page = jnp.minimum(jnp.maximum(page, 0), N - 1)
        for array, to in zip(arrays, targets, strict=True):
            at = pl.multiple_of(j * (to.shape[0] * P // BLOCK), P)
            plgpu.copy_gmem_to_smem(array.at[head, page], to.at[pl.ds(at, P)], ready)
        return later

    # A loop: many copies in a row would take more registers than there are.
    lax.fori_loop(0, BLOCK // P, copy_page, first)
