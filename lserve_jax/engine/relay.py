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

from typing import Literal

from lserve_jax.attention.cache import CacheSpec
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.metrics import RelayDecision

RelayMode = Literal["auto", "always", "never"]

# Bytes that reading together must save in a layer and step. Measured with Llama-3-8B's heads, 4096
# bytes a token, on an H200 (``benchmarks/results/relay.md``): one layer of dense attention was
# slower where relay saved 56 MiB (2K tokens for 8 requests) and 96 MiB (8K for 4), faster where it
# saved 120 MiB (2K for 16); whole steps agree.
LEAST_SAVED_BYTES = 128 << 20


def check_mode(relay: RelayMode, deterministic: bool, sparsity: SparsityConfig | None) -> None:
    """Raises ``ValueError`` for a mode that does not exist, or that is not deterministic."""
    if relay not in ("auto", "always", "never"):
        raise ValueError(f"{relay=} must be 'auto', 'always' or 'never'")
    fixed = ("never",) if sparsity is not None else ("never", "always")
    if deterministic and relay not in fixed:
        raise ValueError(
            f"{deterministic=} needs relay in {fixed}, got {relay=}: what a request attends would "
            "depend on who else shares its prefix"
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

    if mode != "auto":
        return decision(mode == "always", f"relay={mode!r}")
    together = one_by_one = private_tokens
    if spec.sparsity is None:
        one_by_one += prefix_tokens
    else:
        budget = spec.sparsity.token_budget
        together = min(budget, private_tokens)
        one_by_one = min(budget, prefix_tokens + private_tokens)
    saved = (requests * (one_by_one - together) - prefix_tokens) * token_bytes
    amount, least = (f"{x / 2**20:,.1f} MiB" for x in (saved, LEAST_SAVED_BYTES))
    if saved < LEAST_SAVED_BYTES:
        return decision(False, f"it would save {amount} a layer < {least}")
    return decision(True, f"it saves {amount} a layer >= {least}")
