"""The few sizes that jitted functions run with: powers of two, so that little is compiled.

Prompts are padded to such chunk lengths, decode runs on such numbers of slots.
"""

SMALLEST_CHUNK = 64  # tokens; shorter prompts are padded to this


def bucket(n: int, smallest: int, largest: int) -> int:
    """The power of two at or above ``n``, within the two limits."""
    return min(max(smallest, 1 << (n - 1).bit_length()), largest)


def buckets(smallest: int, largest: int) -> list[int]:
    """All that ``bucket`` can return, ascending; ``smallest`` is a power of two."""
    sizes = [min(smallest, largest)]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return sizes
