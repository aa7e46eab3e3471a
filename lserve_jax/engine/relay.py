"""When reading a prefix together pays (RelayAttention), in one rule with its constant.

Decode is bound by the bytes that it reads. With S tokens of prefix, u private tokens a request, B
requests that share the prefix and a budget of T tokens, a retrieval head reads a step

    together (A)       S + B min(T, u)     the prefix once for all, private pages by selection
    one by one (B)     B min(T, S + u)     pages selected from prefix and private part alike

While everything fits the budget, and in dense attention, A saves (B - 1) S tokens. In the sparse
case it saves some if ``B > S / (T - min(T, u))``, and never if the private part alone fills the
budget. Saving some is not enough: A adds a few launches to every layer, and the tokens it saves are
cheaper than others, because the second request to read a page of the prefix finds it in the
L2 cache.

A also attends more (the whole prefix), so it is at least as exact as B.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lserve_jax.attention.attend import PrefixGroups
from lserve_jax.attention.cache import CacheSpec
from lserve_jax.checks import check_choice
from lserve_jax.engine.buckets import bucket, most_groups
from lserve_jax.engine.costs import CacheUnits
from lserve_jax.engine.metrics import RelayDecision
from lserve_jax.engine.prefix_tree import Node
from lserve_jax.engine.request import Request
from lserve_jax.engine.runner import ModelRunner

RelayMode = Literal["auto", "always", "never"]

# Bytes that reading together must save in a layer and step. Measured with Llama-3-8B's heads, 4096
# bytes a token, on an H200 (``benchmarks/results/relay.md``): one layer of dense attention was
# slower where relay saved 56 MiB (2K tokens for 8 requests) and 96 MiB (8K for 4), faster where it
# saved 120 MiB (2K for 16); whole steps agree.
LEAST_SAVED_BYTES = 128 << 20


def check_mode(relay: RelayMode, deterministic: bool) -> None:
    """Raises ``ValueError`` for a mode that does not exist, or that is not deterministic."""
    check_choice("relay", relay, ("auto", "always", "never"))
    if deterministic and relay != "never":
        raise ValueError(
            f"{deterministic=} needs relay='never', got {relay=}: how a request's sums are "
            "rounded, in sparse attention what it attends, would depend on who else begins alike"
        )


def decide(
    mode: RelayMode,
    spec: CacheSpec,
    *,
    token_bytes: float,
    prefix_tokens: int,
    private_tokens: int,
    requests: int,
) -> RelayDecision:
    """For ``requests`` that share ``prefix_tokens`` and have ``private_tokens`` each on average.

    ``token_bytes``: K and V of a token in the retrieval heads of a layer, on average over layers.
    """

    def decision(used: bool, reason: str) -> RelayDecision:
        return RelayDecision(
            used=used, reason=reason, prefix_tokens=prefix_tokens, requests=requests
        )

    if spec.max_drafts is not None:
        return decision(False, "exact mode: verification reads each row by itself")
    if mode != "auto":
        return decision(mode == "always", f"relay={mode!r}")
    together = spec.tokens_listed(private_tokens)
    one_by_one = spec.tokens_listed(prefix_tokens + private_tokens)
    saved = (requests * (one_by_one - together) - prefix_tokens) * token_bytes
    amount, least = (f"{x / 2**20:,.1f} MiB" for x in (saved, LEAST_SAVED_BYTES))
    if saved < LEAST_SAVED_BYTES:
        return decision(False, f"it would save {amount} a layer < {least}")
    return decision(True, f"it saves {amount} a layer >= {least}")


def group_by_prefix(
    requests: Sequence[tuple[int, Request]],
    mode: RelayMode,
    runner: ModelRunner,
    units: CacheUnits,
    *,
    num_rows: int,
) -> tuple[PrefixGroups | None, dict[int, RelayDecision]]:
    """Which requests of a burst read a common beginning together, and why the others do not.

    ``requests`` are (slot, request), the slots below ``num_rows``. Of all that a request shares
    with others it reads the longest beginning for which that pays, by what the prefix tree says,
    whoever asked first. Returns the groups with NumPy arrays, None where nothing is read together,
    and the decision for each slot that shares a beginning.
    """
    decisions: dict[int, RelayDecision] = {}
    spec = runner.spec
    alone = dict(requests)  # by slot, those that read by themselves so far
    read_together: list[tuple[int, list[int]]] = []  # pages, slots
    for pages, slots in sorted(_common(requests), key=lambda x: -x[0]):
        members = [slot for slot in slots if slot in alone]
        if len(members) < 2:
            continue
        shared = pages * spec.page_size
        decision = decide(
            mode,
            spec,
            token_bytes=units.heads_a_layer * units.token,
            prefix_tokens=shared,
            private_tokens=sum(alone[slot].length - shared for slot in members) // len(members),
            requests=len(members),
        )
        decisions |= {slot: decision for slot in members}
        if decision.used:
            read_together.append((pages, members))
            for slot in members:
                del alone[slot]
    if not read_together:
        return None, decisions
    requests_of = dict(requests)
    count = bucket(len(read_together), 1, most_groups(spec))
    longest = bucket(max(pages for pages, _ in read_together), 1, spec.pages_per_sequence)
    page_table = np.zeros((count, longest), np.int32)
    length, group = np.zeros((count,), np.int32), np.full((num_rows,), -1, np.int32)
    for i, (pages, members) in enumerate(read_together):
        length[i] = pages * spec.page_size
        page_table[i, :pages] = requests_of[members[0]].pages[:pages]
        group[members] = i
    return PrefixGroups(page_table=page_table, length=length, group=group), decisions


def _common(requests: Sequence[tuple[int, Request]]) -> list[tuple[int, list[int]]]:
    """Beginnings that two requests or more share: how many pages, and the slots, all that share it.

    Of one set of requests the longest. Paths of the tree that are one at some page are one before.
    """
    found = []
    sets = [(0, [(slot, request.path) for slot, request in requests])]
    while sets:
        depth, paths = sets.pop()
        branches: dict[Node, list[tuple[int, list[Node]]]] = {}
        for slot, path in paths:
            if len(path) > depth:
                branches.setdefault(path[depth], []).append((slot, path))
        for members in branches.values():
            if len(members) < 2:
                continue
            pages = _longest([path for _, path in members], depth + 1)
            found.append((pages, [slot for slot, _ in members]))
            sets.append((pages, members))
    return found


def _longest(paths: Sequence[list[Node]], known: int) -> int:
    """The length of the beginning that all paths share, at least ``known``."""
    low, high = known, min(map(len, paths))
    while low < high:
        middle = (low + high + 1) // 2
        if all(path[middle - 1] is paths[0][middle - 1] for path in paths):
            low = middle
        else:
            high = middle - 1
    return low
