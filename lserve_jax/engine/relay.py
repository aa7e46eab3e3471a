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

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lserve_jax.attention.attend import PrefixGroups
from lserve_jax.attention.cache import CacheSpec
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.checks import check_choice
from lserve_jax.engine.buckets import bucket
from lserve_jax.engine.costs import CacheUnits
from lserve_jax.engine.metrics import RelayDecision
from lserve_jax.engine.request import Request
from lserve_jax.engine.runner import ModelRunner

RelayMode = Literal["auto", "always", "never"]

# Bytes that reading together must save in a layer and step. Measured with Llama-3-8B's heads, 4096
# bytes a token, on an H200 (``benchmarks/results/relay.md``): one layer of dense attention was
# slower where relay saved 56 MiB (2K tokens for 8 requests) and 96 MiB (8K for 4), faster where it
# saved 120 MiB (2K for 16); whole steps agree.
LEAST_SAVED_BYTES = 128 << 20


def check_mode(relay: RelayMode, deterministic: bool, sparsity: SparsityConfig | None) -> None:
    """Raises ``ValueError`` for a mode that does not exist, or that is not deterministic."""
    check_choice("relay", relay, ("auto", "always", "never"))
    fixed = ("never",) if sparsity is not None else ("never", "always")
    if deterministic and relay not in fixed:
        raise ValueError(
            f"{deterministic=} needs relay in {fixed}, got {relay=}: what a request attends would "
            "depend on who else shares its prefix"
        )


def check_kernel(relay: RelayMode, spec: CacheSpec, *, has_kernel: bool) -> None:
    """Raises ``NotImplementedError`` where prefixes would be read together, which has no kernel."""
    if relay == "always" and not has_kernel:
        raise NotImplementedError(
            f"{relay=} with kv_dtype={spec.kv_dtype!r} has no kernel: prefix_attention reads "
            "bfloat16 pages"
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
    """Which requests of a burst read their prefix together, and why the others do not.

    ``requests`` are (slot, request), the slots below ``num_rows``. Returns the groups with NumPy
    arrays, None where no prefix is read together, and the decision for each slot whose request has
    a prefix.
    """
    spec = runner.spec
    groups: dict[tuple[int, int], list[tuple[int, Request]]] = {}  # by prefix and tokens shared
    for slot, request in requests:
        if request.prefix is not None:
            key = (request.prefix.index, request.shared_tokens)
            groups.setdefault(key, []).append((slot, request))
    decisions: dict[int, RelayDecision] = {}
    read_together = []
    for (_, shared), members in groups.items():
        private = sum(request.length - shared for _, request in members) // len(members)
        decision = decide(
            mode,
            spec,
            token_bytes=units.retrieval_token,
            prefix_tokens=shared,
            private_tokens=private,
            requests=len(members),
        )
        if decision.used and not runner.has_prefix_kernel:
            reason = f"no kernel for {spec.kv_dtype} pages"
            decision = dataclasses.replace(decision, used=False, reason=reason)
        decisions |= {slot: decision for slot, _ in members}
        if decision.used:
            read_together.append((shared, members))
    if not read_together:
        return None, decisions
    P = spec.page_size
    count = bucket(len(read_together), 1, 2 * spec.max_prefixes)
    longest = max(shared // P for shared, _ in read_together)
    page_table = np.zeros((count, bucket(longest, 1, spec.pages_per_sequence)), np.int32)
    length, group = np.zeros((count,), np.int32), np.full((num_rows,), -1, np.int32)
    for i, (shared, members) in enumerate(read_together):
        _, any_member = members[0]
        length[i] = shared
        page_table[i, : shared // P] = any_member.pages[: shared // P]
        group[[slot for slot, _ in members]] = i
    return PrefixGroups(page_table=page_table, length=length, group=group), decisions
