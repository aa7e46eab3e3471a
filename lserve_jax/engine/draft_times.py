"""Whether drafting pays, by the time that bursts took (exact mode).

Bytes say how one number of drafts compares with another. They do not say what launches and
arithmetic cost, which of a small model is most: there a pass over eight tokens takes three times
as long as one over a single token, and reads as much. So the seconds of a byte are measured, of
bursts with drafts and of those without, and what makes a token in less time is done.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from statistics import median

from lserve_jax.engine.costs import BurstRow
from lserve_jax.engine.metrics import DraftDecision

KEPT = 3  # measurements, of which the median counts
# Bursts with drafts before one without is tried. The first run of a program is not timed, so a try
# that told nothing is repeated at once; if that did not help, after twice as many bursts. One that
# may have to be compiled waits until bursts with drafts have taken about as long as that takes.
FIRST_LOOK = 4
COMPILING = 10.0  # seconds
LOOK_AGAIN = 64  # bursts of the one kind, after which the other is measured anew
SIMILAR = 1.5  # by how much bytes may differ so that the seconds of one still count


@dataclass(kw_only=True)
class _Kind:
    """Bursts with drafts, or those without, of one number of slots, which have a program."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))  # a byte
    dense: float = 0.0  # bytes of a dense pass when that was measured
    spent: float = 0.0  # seconds in its bursts, by their bytes where they were not timed
    ran: bool = False
    others: int = 0  # bursts of the other kind since this one ran
    tries: int = 0  # that told nothing

    def seconds_a_byte(self, dense: float) -> float | None:
        """None: not known, or of batches unlike one whose dense pass reads ``dense`` bytes."""
        alike = self.dense / SIMILAR <= dense <= self.dense * SIMILAR
        return median(self.seconds) if self.seconds and alike else None

    def note(self, seconds: float, read: float, dense: float) -> None:
        if self.seconds_a_byte(dense) is None:
            self.seconds.clear()
        self.seconds.append(seconds / read)
        self.dense, self.tries = dense, 0


@dataclass(frozen=True, kw_only=True)
class TimedBurst:
    """A burst whose time is taken."""

    slots: int
    decisions: Mapping[int, DraftDecision]  # by slot
    queued: float  # seconds: when the device was given it
    alone: bool  # no prompt was queued behind the burst before, and nothing compiled

    @property
    def drafts(self) -> bool:
        return any(decision.drafts for decision in self.decisions.values())


class DraftTimes:
    """Times of an engine's bursts. ``clock`` tells seconds."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._kinds: defaultdict[tuple[int, bool], _Kind] = defaultdict(_Kind)  # slots, drafts
        self._others: Hashable = None
        # When the device was through with the last burst; None: it was before anybody looked.
        self._free: float | None = -math.inf

    def choose(
        self, slots: int, decisions: Mapping[int, DraftDecision], is_ready: Callable[[], bool]
    ) -> dict[int, DraftDecision]:
        """The decisions, or none of them to draft where that takes less time a token.

        ``is_ready`` says whether a burst without drafts needs no compiling; it is asked after 4,
        8, 16, ... bursts with drafts.
        """
        decided = dict(decisions)
        if not any(decision.drafts for decision in decided.values()):
            return decided
        drafting, plain = self._kinds[slots, True], self._kinds[slots, False]
        dense = sum(decision.dense_bytes for decision in decided.values())
        first, second = drafting.seconds_a_byte(dense), plain.seconds_a_byte(dense)
        if first is None or drafting.others >= LOOK_AGAIN:
            return decided
        # Sooner where a single measurement stands against drafts' many: it may be a bad one.
        wait = min(FIRST_LOOK * 4 ** len(plain.seconds), LOOK_AGAIN)
        if second is None:
            wait = 1 if plain.tries % 2 else FIRST_LOOK * 2 ** min(plain.tries // 2, 8)
        # The question costs a burst's inputs: not asked each time.
        ask = plain.others.bit_count() == 1
        if plain.others >= wait and (
            plain.ran or drafting.spent >= COMPILING or (ask and is_ready())
        ):
            plain.tries += 1
            return _none(decided, "no drafts in this burst, whose time is measured")
        if second is None:
            return decided
        tokens = sum(decision.tokens for decision in decided.values())
        with_drafts = first * sum(decision.round_bytes for decision in decided.values()) / tokens
        without = second * dense / len(decided)
        times = (
            f"by the bursts before, a token of the batch takes {1e3 * with_drafts:.3g} ms with "
            f"drafts and {1e3 * without:.3g} ms without"
        )
        if without < with_drafts:
            return _none(decided, f"no draft pays: {times}")
        return {slot: d.because(f"{d.reason}; {times}") for slot, d in decided.items()}

    def begin(
        self, slots: int, decisions: Mapping[int, DraftDecision], others: Hashable
    ) -> TimedBurst:
        """Says that a burst was given to the device.

        ``others`` changes with the prompts that it was given, and with what was compiled.
        """
        alone, self._others = others == self._others, others
        burst = TimedBurst(slots=slots, decisions=decisions, queued=self._clock(), alone=alone)
        kind = self._kinds[slots, burst.drafts]
        kind.ran, kind.others = True, 0
        self._kinds[slots, not burst.drafts].others += 1
        return burst

    def untimed(self) -> None:
        """Says that a burst ended whose time is not taken."""
        self._free = None

    def end(
        self, burst: TimedBurst, rows: Mapping[int, BurstRow], now: float, *, waited: bool
    ) -> None:
        """Takes in what a burst did, by slot; ``waited``: it ended only ``now``."""
        free, self._free = self._free, now if waited else None
        kind = self._kinds[burst.slots, burst.drafts]
        read = sum(row.verified * burst.decisions[slot].round_bytes for slot, row in rows.items())
        if read > 0 and burst.alone and waited and free is not None:
            dense = sum(decision.dense_bytes for decision in burst.decisions.values())
            kind.note(now - max(free, burst.queued), read, dense)
        if kind.seconds:  # not the clock's: prompts and compiling are in that
            kind.spent += median(kind.seconds) * read


def _none(decisions: Mapping[int, DraftDecision], reason: str) -> dict[int, DraftDecision]:
    return {slot: d.because(reason, drafts=0) for slot, d in decisions.items()}
