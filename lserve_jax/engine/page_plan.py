"""How many pages the cache gets, by the memory that there is."""

from collections.abc import Mapping

import jax

from lserve_jax.attention.cache import CacheSpec, cache_bytes
from lserve_jax.engine.options import EngineOptions
from lserve_jax.model.config import ModelConfig

# The CPU has no reported limit; more than this, and half of it for the windows of remembered
# prompts, is taken only when asked for.
CPU_CACHE_BYTES = 2 << 30


def _rounded(pages: int) -> int:
    """``pages`` without what is below its seven leading bits: less than a 64th."""
    low = max(pages.bit_length() - 7, 0)
    return pages >> low << low


def plan_pages(
    config: ModelConfig, spec: CacheSpec, dtype, options: EngineOptions, coming: int
) -> int:
    """How many retrieval pages to allocate, given a spec with one page.

    ``coming``: bytes that parameters will take which are not there yet. Never more pages than can
    be used at once. Raises ``ValueError`` if not even one page fits, and ``MemoryError`` if those
    parameters do not.
    """
    sizes = cache_bytes(config, spec, dtype)
    page_bytes = sizes["retrieval"] + sizes["key_stats"]
    kv_cache_bytes, stats = options.kv_cache_bytes, None
    if kv_cache_bytes is None:
        stats = jax.local_devices()[0].memory_stats()  # None on the CPU
        kv_cache_bytes = CPU_CACHE_BYTES
        if stats is not None:
            free = stats["bytes_limit"] - stats["bytes_in_use"]
            if coming > free:
                raise MemoryError(
                    f"{coming} bytes for the weights, which weights='int8' or 'int4' makes fewer, "
                    f"where {free} are free"
                )
            free -= coming
            kv_cache_bytes = room_for_pages(sizes, free, options.memory_fraction)
    pages = kv_cache_bytes // max(page_bytes, 1)
    if stats is not None:
        # So that a start with a little less memory finds the programs of the one before.
        pages = _rounded(pages)
    if pages < 1:
        raise ValueError(f"{kv_cache_bytes=} holds no page: one takes {page_bytes} bytes")
    # Sequences of all slots, and prompts that none of them shares.
    return min((spec.max_num_seqs + options.max_prefixes) * spec.pages_per_sequence, pages)


def plan_windows(config: ModelConfig, spec: CacheSpec, dtype, options: EngineOptions) -> int:
    """How many pages of prefill windows to allocate: of those in ``spec`` what can be used."""
    window = spec.prefill_window
    own = window.pages_with_behind  # of a prompt in prefill
    most = spec.num_pages + own  # a page that is remembered has one
    if options.kv_cache_bytes is None and jax.local_devices()[0].memory_stats() is None:
        page_bytes = cache_bytes(config, spec, dtype)["prefill_window"] // spec.num_window_pages
        # Beside the prompt in prefill at least one is remembered.
        room = max(CPU_CACHE_BYTES // 2 // max(page_bytes, 1), own + window.num_pages)
        most = min(most, room)
    return min(spec.num_window_pages, most)


def room_for_pages(sizes: Mapping[str, int], free: int, memory_fraction: float) -> int:
    """Bytes for retrieval pages where ``free`` are left beside the parameters.

    ``sizes``: ``cache_bytes`` of a spec with one page.
    """
    return max(int(memory_fraction * (free - sum(sizes.values()))), 0)
