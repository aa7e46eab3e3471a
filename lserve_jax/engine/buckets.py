"""The few sizes that jitted functions run with: powers of two, so that little is compiled.

Prompts are padded to such chunk lengths, decode runs on such numbers of slots.
"""

from lserve_jax.attention.cache import CacheSpec

SMALLEST_CHUNK = 64  # tokens; shorter prompts are padded to this
FEW_ROWS, MANY_ROWS = 8, 32  # prompts that are prefilled in one call, if there is room for them
MOST_JOINED_TOKENS = 4096  # of those, padding included
# Operations of products that take a GPU as long as launching a call and the host's work for it,
# some 5 ms on an H200: from there on more prompts in a call save nothing.
BUSY_OPERATIONS = 4e12


def bucket(n: int, smallest: int, largest: int) -> int:
    """The power of two at or above ``n``, within the two limits."""
    return min(max(smallest, 1 << (n - 1).bit_length()), largest)


def buckets(smallest: int, largest: int) -> list[int]:
    """All that ``bucket`` can return, ascending; ``smallest`` is a power of two."""
    sizes = [min(smallest, largest)]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return sizes


def row_counts(size: int, most: int, *, most_tokens: int, parameters: int | None) -> list[int]:
    """Numbers of prompts of ``size`` padded tokens that a call can have, descending; the last is 1.

    ``most`` bounds them, rounded down to a power of two, and ``most_tokens`` and
    ``MOST_JOINED_TOKENS`` bound a call's tokens. ``MANY_ROWS`` are for models of so few
    ``parameters`` that a call of ``FEW_ROWS`` leaves the GPU waiting; None: they are for none.

    >>> row_counts(64, 128, most_tokens=8192, parameters=135_000_000)
    [32, 8, 1]
    >>> row_counts(64, 128, most_tokens=8192, parameters=8_000_000_000)
    [8, 1]
    >>> row_counts(1024, 128, most_tokens=8192, parameters=135_000_000)
    [4, 1]
    """
    most = min(most, min(most_tokens, MOST_JOINED_TOKENS) // size)
    most = 1 << max(most, 1).bit_length() - 1
    counts = {1, min(FEW_ROWS, most)}
    if parameters is not None and 2 * parameters * FEW_ROWS * size <= BUSY_OPERATIONS:
        counts.add(min(MANY_ROWS, most))
    return sorted(counts, reverse=True)


def most_groups(spec: CacheSpec) -> int:
    """Groups of at least two requests that a batch can have."""
    return max(spec.max_num_seqs // 2, 1)


def shape_buckets(
    spec: CacheSpec, chunks: list[int], *, joined: list[int], relays: bool, all_slots: bool
) -> dict[str, list[int]]:
    """What ``Engine.shape_buckets`` returns; ``chunks`` are the lengths of prompt chunks.

    ``joined``: those of which several can run in one call, once for each number of them.
    """
    slots, groups = [spec.max_num_seqs], buckets(1, most_groups(spec))
    return {
        "chunk_tokens": chunks,
        "joined_tokens": joined,
        "slots": slots if all_slots else buckets(1, spec.max_num_seqs),
        "relay_groups": [0, *groups] if relays else [0],
        "prefix_pages": buckets(1, spec.pages_per_sequence),
    }
