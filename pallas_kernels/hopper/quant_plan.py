"""How a quantised linear layer is cut for a Hopper GPU, for a few rows: CTAs and their memory."""

import dataclasses
from dataclasses import dataclass

from pallas_kernels.device import MOST_FUSED_PACKED_ROWS
from pallas_kernels.hopper.mosaic import SHARED_BYTES, SM_COUNT
from pallas_kernels.hopper.quant_operands import PLANE_PADDING
from pallas_kernels.packed import BITS, INPUTS, ROWS, group_size
from pallas_kernels.types import PackedWeight

N = MOST_FUSED_PACKED_ROWS  # rows of x in memory, of which a call may have fewer
_ENOUGH_BITS = 2048  # of codes that warpgroups of all CTAs hold: 256 of 8 bits, 512 of 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of one call; ``choose_config`` gives a good one."""

    warpgroups: int  # a CTA; each has 64 output channels
    splits: int  # of K, a CTA each
    stages: int  # steps in flight a warpgroup
    blocks: int  # of 128 inputs a step
    cluster: bool = False  # whether the splits of a block are one, of 8 CTAs at most


# What was fastest on one H200 for Llama-3-8B's layers, by K, out and bits of a code, up to a number
# of rows: (warpgroups, splits, stages, blocks), and True for clusters. Measured one layer after the
# other: a kernel begins before the one ahead has ended, and by itself another may be faster.
_MEASURED = {
    (4096, 6144, 4): {8: (2, 4, 3, 2, True)},
    (4096, 4096, 4): {8: (1, 4, 4, 2, True)},
    (4096, 28672, 4): {8: (4, 1, 4, 2)},
    (14336, 4096, 4): {8: (4, 8, 3, 2)},
    (4096, 128256, 4): {8: (4, 1, 4, 2)},
    (4096, 6144, 8): {1: (2, 4, 4, 1, True), 8: (3, 4, 4, 1)},
    (4096, 4096, 8): {8: (1, 8, 2, 1, True)},
    (4096, 28672, 8): {8: (4, 1, 4, 1)},
    (14336, 4096, 8): {1: (2, 8, 4, 1), 8: (2, 4, 4, 1)},
    (4096, 128256, 8): {8: (4, 1, 4, 1)},
}


def choose_config(packed: PackedWeight, rows: int) -> Config:
    """The configuration for ``rows`` rows, at most N."""
    (K, out), bits = packed.shape, BITS[packed.codes]
    measured = _MEASURED.get((K, out, bits), {})
    most = min((n for n in measured if rows <= n), default=None)
    if most is None:
        return _by_rule(packed)
    warpgroups, splits, stages, blocks, *cluster = measured[most]
    config = Config(
        warpgroups=warpgroups,
        splits=splits,
        stages=stages,
        blocks=blocks,
        cluster=bool(cluster),
    )
    return _fitted(packed, config)


def shared_bytes(packed: PackedWeight, config: Config) -> int:
    """Shared memory of a CTA: x, its sums by group, the ring of words, and a cluster's sums."""
    of_split = packed.shape[0] // config.splits
    group = group_size(packed)
    totals = 4 * N * (of_split // group) if group is not None and packed.zeros == "word" else 0
    ring = config.warpgroups * config.stages * config.blocks * 4 * ROWS * packed.words.shape[2]
    parts = config.splits * config.warpgroups * 4 * ROWS * N if config.cluster else 0
    return 2 * N * (of_split + 4 * PLANE_PADDING) + totals + ring + parts


def _fitted(packed: PackedWeight, config: Config) -> Config:
    """With as much in flight as there is room for: rather short steps than a single one."""
    while shared_bytes(packed, config) > SHARED_BYTES:
        if config.stages > 2 or (config.stages == 2 and config.blocks == 1):
            config = dataclasses.replace(config, stages=config.stages - 1)
        elif config.blocks > 1:
            config = dataclasses.replace(config, stages=4, blocks=1)
        else:
            break
    return config


def _by_rule(packed: PackedWeight) -> Config:
    """Enough splits to fill the GPU, no more; several warpgroups share an x if enough CTAs stay."""
    tiles, bits, steps = packed.words.shape[0], BITS[packed.codes], packed.shape[0] // INPUTS
    config = None
    for splits in (n for n in range(1, steps + 1) if steps % n == 0):
        if config is not None and (splits > 16 or tiles * config.splits * bits >= _ENOUGH_BITS):
            break
        blocks = 2 if bits == 4 and steps // splits % 2 == 0 else 1
        shared = [n for n in (4, 3, 2) if tiles % n == 0 and tiles // n * splits >= SM_COUNT]
        for warpgroups in (*shared, 1):
            wanted = Config(warpgroups=warpgroups, splits=splits, stages=4, blocks=blocks)
            wanted = _fitted(packed, wanted)
            if shared_bytes(packed, wanted) <= SHARED_BYTES and wanted.stages > 1:
                config = wanted
                break
    assert config is not None  # as many splits as blocks always fit
    return config
