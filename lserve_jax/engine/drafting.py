"""How many tokens a request drafts before dense attention verifies them (exact mode).

A round of k drafts costs k sparse passes and one dense pass and makes, if each draft is confirmed
with probability a, (1 - a^(k+1)) / (1 - a) tokens on average (Leviathan et al., arXiv 2211.17192).
What a pass costs goes by the bytes that it reads: its share of the weights, and the keys and values
of its request. So k grows with the context, and where it is short nothing is drafted. Nor is it
where rounds were seen to take longer than dense steps (``draft_times``).
"""

from collections.abc import Callable, Sequence

from lserve_jax.attention.cache import CacheSpec
from lserve_jax.engine.costs import CacheUnits, RequestCosts
from lserve_jax.engine.draft_times import DraftTimes
from lserve_jax.engine.metrics import DraftDecision
from lserve_jax.engine.request import Request
from lserve_jax.engine.runner import ModelRunner

# What a request is thought to have confirmed before it has drafted anything: few tokens, so that
# its own soon count for more.
PRIOR_ACCEPTANCE, PRIOR_ROUNDS = 0.8, 2.0


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens that a round makes on average: the confirmed drafts and the one after them."""
    return sum(acceptance**i for i in range(drafts + 1))


def acceptance_of(costs: RequestCosts, most: int) -> float:
    """The probability that a draft is confirmed, given those before it, as far as it is known.

    That with which rounds of as many drafts would have made as many tokens. Rounds without a draft
    say nothing of it: a request may go long without any.
    """
    rounds = PRIOR_ROUNDS + costs.judging
    drafts = (PRIOR_ROUNDS * most + costs.drafted) / rounds
    prior = PRIOR_ROUNDS * (expected_tokens(PRIOR_ACCEPTANCE, most) - 1)
    confirmed = (prior + costs.confirmed) / rounds
    low, high = 0.0, 1.0
    for _ in range(20):  # halves: to 1e-6
        middle = (low + high) / 2
        made = sum(middle**i for i in range(1, int(drafts) + 1))
        made += (drafts - int(drafts)) * middle ** (int(drafts) + 1)
        low, high = (middle, high) if made < confirmed else (low, middle)
    return low


def decide_drafts(
    spec: CacheSpec,
    units: CacheUnits,
    costs: RequestCosts,
    *,
    length: int,
    weight_bytes: float,
    draft_weight_bytes: float,
) -> DraftDecision:
    """For a request of ``length`` tokens, with its share of the weights that a pass reads."""
    assert spec.max_drafts is not None  # exact mode
    context = units.kv_heads * units.token
    dense = weight_bytes + length * context
    sparse = 0.0  # to look tokens up reads next to nothing
    if spec.draft == "sparse":
        sparse = draft_weight_bytes + spec.tokens_listed(length) * context
    acceptance = acceptance_of(costs, spec.max_drafts)

    def speed(drafts: int) -> float:
        return expected_tokens(acceptance, drafts) / (drafts * sparse + dense)

    best = max(range(spec.max_drafts + 1), key=speed)
    known = (
        f"expected acceptance {acceptance:.2f}, a draft reads {sparse / dense:.2f} of a dense step"
    )
    # Rounds may find nothing to draft, or have one token left to make.
    drafting = (PRIOR_ROUNDS + costs.judging) / (PRIOR_ROUNDS + costs.rounds)
    return DraftDecision(
        drafts=best,
        reason=f"{best} drafts a round: {known}" if best else f"no draft pays: {known}",
        tokens=1 + drafting * (expected_tokens(acceptance, best) - 1),
        dense_bytes=dense,
        sparse_bytes=sparse,
    )


def decide_all(
    requests: Sequence[tuple[int, Request]],
    runner: ModelRunner,
    units: CacheUnits,
    times: DraftTimes | None,
    slots: int,
    is_ready: Callable[[], bool],
) -> dict[int, DraftDecision] | None:
    """By slot, for the requests of a burst, (slot, request); None outside of exact mode.

    The requests share the weights, and a program for that many slots. What is decided goes to their
    metrics. Without ``times`` bytes alone decide. ``is_ready``: see ``DraftTimes.choose``.
    """
    if runner.spec.max_drafts is None:
        return None
    if any(request.is_stepwise for _, request in requests):
        reason = "the burst is one step: it has a request whose next mask needs the last token"
        decisions = {slot: DraftDecision(drafts=0, reason=reason) for slot, _ in requests}
    else:
        decisions = {
            slot: decide_drafts(
                runner.spec,
                units,
                request.costs,
                length=request.length,
                weight_bytes=runner.step_bytes / len(requests),
                draft_weight_bytes=runner.draft_step_bytes / len(requests),
            )
            for slot, request in requests
        }
        if times is not None:
            decisions = times.choose(slots, decisions, is_ready)
    for slot, request in requests:
        request.costs.draft_reason = decisions[slot].reason
    return decisions
