"""When reading a prefix together pays (RelayAttention), in one rule with all of its constants.

Decode is bound by the bytes that it reads. With S tokens of prefix, u private tokens a request, B
requests that share the prefix and a budget of T tokens, a retrieval head reads a step

    together (A)       S + B min(T, u)     the prefix once for all, private pages by selection
    one by one (B)     B min(T, S + u)     pages selected from prefix and private part alike

so in the sparse case A reads less when ``B > S / (T - min(T, u))``, and never if the private part
alone fills the budget. While everything fits the budget, and in dense attention, A always reads
less; what is left to win back are the launches that it adds and the merging of its two parts.

A also attends more (the whole prefix), so it is at least as exact as B.
"""

import math
from dataclasses import dataclass
from typing import Literal

from lserve_jax.cache import CacheSpec
from lserve_jax.config import SparsityConfig

RelayMode = Literal["auto", "always", "never"]

# A shorter prefix is read as fast one by one, whatever the number of requests.
LEAST_PREFIX_TOKENS = 256
# Fewer requests do not win back the launches that relay adds to every layer.
LEAST_REQUESTS = 4
# Bytes alone decide at 1.0. The prefix is read by a kernel of its own, whose cost the bytes leave
# out, so relay must promise to read clearly less.
MARGIN = 1.5


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


@dataclass(frozen=True, kw_only=True)
class RelayDecision:
    """Whether the requests of one prefix read it together in a burst, and why."""

    used: bool
    reason: str
    prefix_tokens: int
    requests: int


def decide(
    mode: RelayMode, spec: CacheSpec, *, prefix_tokens: int, private_tokens: int, requests: int
) -> RelayDecision:
    """For ``requests`` that share ``prefix_tokens`` and have ``private_tokens`` each on average."""

    def decision(used: bool, reason: str) -> RelayDecision:
        return RelayDecision(
            used=used, reason=reason, prefix_tokens=prefix_tokens, requests=requests
        )

    if mode != "auto":
        return decision(mode == "always", f"relay={mode!r}")
    if prefix_tokens < LEAST_PREFIX_TOKENS:
        return decision(False, f"a prefix of {prefix_tokens} tokens < {LEAST_PREFIX_TOKENS}")
    least = LEAST_REQUESTS
    if spec.sparsity is not None and prefix_tokens + private_tokens > spec.sparsity.token_budget:
        budget = spec.sparsity.token_budget
        left = budget - min(budget, private_tokens)
        if left == 0:
            return decision(False, f"{private_tokens} private tokens fill the budget of {budget}")
        least = max(least, math.ceil(MARGIN * prefix_tokens / left))
    if requests < least:
        return decision(False, f"{requests} requests < {least}")
    return decision(True, f"{requests} requests >= {least}")
