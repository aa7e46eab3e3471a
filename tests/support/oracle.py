"""The ops of ``pallas_kernels`` once more, in float64 NumPy, straight from the algorithm.

Nothing here is shared with the code under test: masks are explicit, pages are walked slot by
slot, sequences are plain arrays ``[n, heads, D]`` in token order. Slow and obvious on purpose.
"""

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def softmax_attention(q: F64, k: F64, v: F64) -> tuple[F64, float]:
    """One query [D] over n keys [n, D], all visible: (out [D], natural-log lse)."""
    if len(k) == 0:
        return np.zeros(v.shape[-1]), -math.inf
    scores = k @ q / math.sqrt(len(q))
    peak = scores.max()
    weights = np.exp(scores - peak)
    return weights @ v / weights.sum(), float(peak + math.log(weights.sum()))


def causal_mask(query_positions: ArrayLike, keys: int) -> NDArray[np.bool_]:
    i, j = np.asarray(query_positions)[:, None], np.arange(keys)
    return j <= i


def lambda_mask(query_positions: ArrayLike, keys: int, sink: int, local: int) -> NDArray[np.bool_]:
    """Causal, and either one of the first ``sink`` tokens or one of the newest ``local``.

    The query's own token counts as one of the ``local``.
    """
    i, j = np.asarray(query_positions)[:, None], np.arange(keys)
    return (j <= i) & ((j < sink) | (j >= i - (local - 1)))


def prefill_attention(
    q: F64,
    k: F64,
    v: F64,
    start: int,
    retrieval_heads: int,
    sink: int,
    local: int,
    blocks: list[list[list[int]]] | None = None,
) -> tuple[F64, F64]:
    """Queries [T, H, D] at positions ``start`` on; k, v [start + T, Hk, D] from position 0 on.

    ``blocks`` [retrieval head][tile]: what a tile of 128 queries attends (``block_mask``).
    """
    T, H, _ = q.shape
    positions, n = start + np.arange(T), len(k)
    window = lambda_mask(positions, n, sink, local)
    causal = np.broadcast_to(causal_mask(positions, n), (retrieval_heads, T, n))
    if blocks is not None:
        causal = block_mask(start, T, blocks)
    out, lse = np.zeros(q.shape), np.zeros((T, H))
    for h in range(H):
        head = h // (H // k.shape[1])
        visible = causal[head] if head < retrieval_heads else window
        for t in range(T):
            keys = visible[t]
            out[t, h], lse[t, h] = softmax_attention(q[t, h], k[keys, head], v[keys, head])
    return out, lse


def block_mask(start: int, length: int, blocks: list[list[list[int]]]) -> NDArray[np.bool_]:
    """[heads, length, start + length]: what queries see of the blocks of 128 keys that are listed
    for their head and tile of 128 queries; blocks are counted through the history, then anew from
    ``start`` on."""
    history = [range(first, min(first + 128, start)) for first in range(0, start, 128)]
    end = start + length
    chunk = [range(first, min(first + 128, end)) for first in range(start, end, 128)]
    seen = np.zeros((len(blocks), length, end), bool)
    for head, tiles in enumerate(blocks):
        for t in range(length):
            for block in tiles[t // 128]:
                keys = (history + chunk)[block]
                seen[head, t, keys.start : keys.stop] = True
    return seen & causal_mask(start + np.arange(length), end)


def block_shares(q: F64, k: F64, start: int) -> F64:
    """[Hk, tiles, blocks]: each block's share of a tile's attention, as two of its queries see it.

    q [T, H, D] at positions ``start`` on, k [start + T, Hk, D]. Of every 64 queries the last one
    counts. Blocks are numbered as in ``block_mask``.
    """
    (T, H, _), Hk = q.shape, k.shape[1]
    edges = [*range(0, start, 128), *range(start, start + T, 128), start + T]
    shares = np.zeros((Hk, -(-T // 128), len(edges) - 1))
    for h in range(H):
        head = h // (H // Hk)
        for first in range(0, T, 64):
            query = min(first + 63, T - 1)
            seen = k[: start + query + 1, head]
            for block, (begin, end) in enumerate(itertools.pairwise(edges)):
                # Attention with a value of 1 at the block's keys: what they hold.
                mark = np.zeros((len(seen), 1))
                mark[begin:end] = 1.0
                out, _ = softmax_attention(q[query, h], seen, mark)
                shares[head, first // 128, block] += out[0]
    return shares / shares.sum(axis=2, keepdims=True)


def fewest_blocks(shares: F64, start: int, threshold: float) -> list[list[list[int]]]:
    """[head][tile]: the blocks always attended, and the best others up to the threshold."""
    history = -(-start // 128)
    lists = []
    for head in shares:
        lists.append([])
        for tile, row in enumerate(head):
            own = history + tile
            chosen = {0, own, max(own - 1, 0)}
            if tile == 0 and start % 128:
                chosen.add(max(own - 2, 0))
            for block in sorted(range(own + 1), key=lambda b: -row[b]):
                if sum(row[b] for b in chosen) >= threshold:
                    break
                chosen.add(block)
            lists[-1].append(sorted(chosen))
    return lists


def paged_attention(
    q: F64, k_pool: F64, v_pool: F64, pages: ArrayLike, start: int, stop: int
) -> tuple[F64, float]:
    """One query [D] of one head over slots start..stop-1 of its listed pages; pools [N, P, D]."""
    pages, page_size = np.asarray(pages), k_pool.shape[1]
    slots = [(pages[s // page_size], s % page_size) for s in range(start, stop)]
    k = np.array([k_pool[slot] for slot in slots]).reshape(-1, len(q))
    v = np.array([v_pool[slot] for slot in slots]).reshape(-1, len(q))
    return softmax_attention(q, k, v)


def merge(outs: F64, lses: F64) -> tuple[F64, float]:
    """Parts [n, D] with lse [n] of one query: weights are shares of the total probability mass."""
    if np.all(lses == -np.inf):
        return np.zeros(outs.shape[1]), -math.inf
    lse = np.logaddexp.reduce(lses)
    out = np.zeros(outs.shape[1])
    for part, part_lse in zip(outs, lses, strict=True):
        if part_lse > -np.inf:
            out += math.exp(part_lse - lse) * part
    return out, float(lse)


def rotate(x: F64, angles: F64) -> F64:
    """RoPE of one vector [D] by angles [D/2]: channels d and d + D/2 are a point in the plane."""
    half = len(x) // 2
    points = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([points.real, points.imag])


def key_statistics(keys: F64, logical_page_size: int) -> list[tuple[F64, F64]]:
    """(kmax [D], kmin [D]) of every logical page of one head's keys [n, D]."""
    return [
        (page.max(axis=0), page.min(axis=0))
        for page in (
            keys[first : first + logical_page_size]
            for first in range(0, len(keys), logical_page_size)
        )
    ]


def page_score(queries: F64, statistics: list[tuple[F64, F64]], lower_bound_weight: float) -> float:
    """Of one page: the group's queries [G, D] against (kmax, kmin) of its logical pages in use."""
    scores = [-math.inf]
    for q in queries:
        for kmax, kmin in statistics:
            channels = list(zip(q, kmax, kmin, strict=True))
            upper = sum(max(c * high, c * low) for c, high, low in channels)
            lower = sum(min(c * high, c * low) for c, high, low in channels)
            scores.append(float(upper + lower_bound_weight * lower))
    return max(scores)


def select(scores: ArrayLike, num_candidates: int, num_pages: int, sink_pages: int) -> list[int]:
    """Forced pages first, then by falling score, the lower page number first among equals."""
    ranked = sorted(
        (p >= sink_pages, 0.0 if p < sink_pages else -score, p)
        for p, score in enumerate(np.asarray(scores).tolist())
        if p < num_candidates
    )
    chosen = [p for _, _, p in ranked[:num_pages]]
    return chosen + [-1] * (num_pages - len(chosen))


def ring_index(page: int, sink_pages: int, local_pages: int) -> int:
    """Where page number ``page`` of a sequence lies in a ring of sink and local pages."""
    return page if page < sink_pages else sink_pages + (page - sink_pages) % local_pages
