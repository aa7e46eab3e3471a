"""What ops take and return beside plain arrays: pages and their lists, quantised matrices."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, Int32

# A tile of queries lists blocks of keys (``BlockList``); both are as large as the kernels' tiles.
TILE_QUERIES = 128
BLOCK_KEYS = 128


# Of codes of 8 bits a float32 [...]; of 4 bits an int32 [...] for either half of the channels.
KVScale = Float[Array, "..."] | tuple[Int32[Array, "..."], Int32[Array, "..."]]


class KVPages(NamedTuple):
    """Pages of keys and values of one class of heads in one layer.

    Numbers as they are, without scales, or codes for each token and head. Codes of 8 bits, int8 or
    float8_e4m3fn, are symmetric: ``x = code * scale``. Codes of 4 bits are two to a byte (uint8,
    D / 2 of them), those of channel c and of channel c + D / 2, and each half of the channels is a
    group, with a word of 32 bits in the pages' place of a scale: its upper 16 bits are the step
    between codes, its lower 16 what code 0 stands for, both bf16: ``x = code * step + lowest``.

    K and V are separate arrays so that updating one never copies the other.
    """

    k: Array  # [K, N, P, D]  float, int8 or float8_e4m3fn; [K, N, P, D / 2] uint8
    v: Array  # as k
    k_scale: KVScale | None = None  # [K, N, P]
    v_scale: KVScale | None = None


class Weight(NamedTuple):
    """A quantised matrix of [K, out]: ``(codes - zero) * scale``, in groups along K.

    Kinds: int8 with a scale for each output channel (g = 1); uint4 with scale and zero point for
    each group of K / g inputs; float8 e4m3 with a scale for each output channel. A pytree: jit,
    sharding and checkpoints see its arrays.

    Of a table whose rows are looked up, [V, E], the groups are along E: scale is [V, g], so that
    rows of its arrays are a ``Weight`` of these rows. It is not multiplied with.
    """

    codes: Array  # [K, out]  int8, uint4 or float8_e4m3fn
    scale: Float[Array, "g out"]  # float32; g divides K
    zero: Float[Array, "g out"] | None = None  # float32, in units of codes; None: 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for."""
        return self.codes.shape


class W8A8Weight(NamedTuple):
    """A matrix of [K, out] that rows of its own 8 bits are multiplied with: ``(scale * codes).T``.

    A ``Weight`` is multiplied with x as it is, this one with codes of x. A pytree.
    """

    codes: Array  # [out, K]  int8 or float8_e4m3fn
    scale: Float[Array, " out"]  # float32, one for each row of codes

    @property
    def shape(self) -> tuple[int, ...]:
        """[K, out] of the matrix that it stands for."""
        return self.codes.shape[::-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A ``Weight`` in the order in which Hopper's tensor cores take it; see ``packed.py``.

    Blocks of 64 output channels by 128 inputs, each contiguous: codes in words of 32 bits, then a
    word a channel for each of its scales, then for each of its zero points that has a word of its
    own.
    """

    words: Int32[Array, "blocks K/128 rows 64"]
    channel_scale: Float[Array, "blocks 64"] | None  # float32, where a channel has one scale
    codes: str = field(metadata={"static": True})  # dtype: int8, uint4 or float8_e4m3fn
    groups: int = field(metadata={"static": True})  # scales along K, as the ``Weight`` had them
    # Where the zero points are: nowhere, in eighths in the low byte of each scale, or in words of
    # their own.
    zeros: Literal["none", "byte", "word"] = field(metadata={"static": True})
    # Whether the first half of the channels alternates with the second, eight by eight.
    paired: bool = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """[K, out] of the matrix that it stands for."""
        return self.words.shape[1] * 128, self.words.shape[0] * 64


class PageList(NamedTuple):
    """For each sequence and KV head of one pool, which tokens to attend.

    The listed pages, of U tokens each (the pool's P or less, see ``api.paged_attention``), laid end
    to end form a row of ``L * U`` tokens; tokens ``start`` to ``stop - 1`` of that row are
    attended. Softmax does not care about order, so a caller with a page that is valid only at its
    end (the oldest local page) lists it first, and one valid only at its beginning (the newest
    page) last. Entries past ``stop`` must be valid page ids.

    The axis K of each field has the pool's number of heads, or 1 for what all of them share.
    """

    page_ids: Int[Array, "B K L"]  # physical page ids
    start: Int[Array, "B K"]  # first attended token of the row
    stop: Int[Array, "B K"]  # one past the last, at most L * U; start == stop attends nothing


class BlockList(NamedTuple):
    """For each retrieval KV head and tile of queries of a chunk, which blocks of keys to attend.

    Tile i has the queries ``128 * i`` to ``128 * i + 127`` of the chunk (``TILE_QUERIES``). Blocks
    of 128 keys (``BLOCK_KEYS``) are numbered through the history, whose last block ends with it,
    and then through the chunk: with ``h = ceil(start / 128)``, block b < h begins at position
    ``128 * b`` and block h + c at ``start + 128 * c``. Ids ascend. All query heads of a KV head
    share its lists.

    Of a listed block a query sees the keys up to its own position, as it would without lists. What
    tiles list that begin at ``length`` or later means nothing.
    """

    ids: Int[Array, "Kr tiles L"]  # those from ``counts`` on mean nothing
    counts: Int[Array, "Kr tiles"]  # how many blocks the tile lists; 0: it attends nothing


class OwnAttention(NamedTuple):
    """Attention of each row over tokens that are its own, to be joined with that over a prefix."""

    out: Float[Array, "B H D"]  # in q's dtype
    lse: Float[Array, "B H"]  # float32
    shares: Bool[Array, " B"]  # whether the prefix belongs to the row; others keep what they have
