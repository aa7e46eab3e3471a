"""The few sizes that jitted functions run with: powers of two, so that little is compiled.

Prompts are padded to such chunk lengths, decode runs on such numbers of slots.
"""

from lserve_jax.attention.cache import CacheSpec

SMALLEST_CHUNK = 64  # tokens; shorter prompts are padded to this
MOST_ROWS = 8  # prompts that are prefilled in one call
MOST_JOINED_TOKENS = 4096  # of those, padding included


def bucket(n: int, smallest: int, largest: int) -> int:
    """The power of two at or above ``n``, within the two limits."""
    return min(max(smallest, 1 << (n - 1).bit_length()), largest)


def buckets(smallest: int, largest: int) -> list[int]:
    """All that ``bucket`` can return, ascending; ``smallest`` is a power of two."""
    sizes = [min(smallest, largest)]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return sizes


def most_groups(spec: CacheSpec) -> int:
    """Groups of at least two requests that a batch can have."""
    return max(spec.max_num_seqs // 2, 1)


def shape_buckets(
    spec: CacheSpec, chunks: list[int], *, joined: list[int], relays: bool, all_slots: bool
) -> dict[str, list[int]]:
    """What ``Engine.shape_buckets`` returns; ``chunks`` are the lengths of prompt chunks.

    ``joined``: those of which several can run in one call.
    """
    slots, groups = [spec.max_num_seqs], buckets(1, most_groups(spec))
    return {
        "chunk_tokens": chunks,
        "joined_tokens": joined,
        "slots": slots if all_slots else buckets(1, spec.max_num_seqs),
        "relay_groups": [0, *groups] if relays else [0],
        "prefix_pages": buckets(1, spec.pages_per_sequence),
    }
