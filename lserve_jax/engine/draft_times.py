"""Whether drafting pays, by the time that bursts took (exact mode).

Bytes say how one number of drafts compares with another. They do not say what launches and
arithmetic cost, which of a small model is most: there a pass over eight tokens takes three times
as long as one over a single token, and reads as much. So the seconds of a byte are measured, of
bursts with drafts and of those without, and what makes a token in less time is done.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from statistics import median

from lserve_jax.engine.costs import BurstRow
from lserve_jax.engine.metrics import DraftDecision

KEPT = 3  # measurements, of which the median counts
# Bursts with drafts before one without is tried: that is another program, and may have to be
# compiled, which few tokens do not pay for. Four times as many after each try that told nothing.
FIRST_LOOK = 4
LOOK_AGAIN = 64  # bursts of the one kind, after which the other is measured anew
SIMILAR = 1.5  # by how much bytes may differ so that the seconds of one still count


@dataclass(kw_only=True)
class _Kind:
    """Bursts with drafts, or those without."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))  # a byte
    dense: float = 0.0  # bytes of a dense pass when that was measured
    others: int = 0  # bursts of the other kind since this one ran
    untold: int = 0  # of this one, that could not be timed

    def seconds_a_byte(self, dense: float) -> float | None:
        """None: not known, or of batches unlike one whose dense pass reads ``dense`` bytes."""
        alike = self.dense / SIMILAR <= dense <= self.dense * SIMILAR
        return median(self.seconds) if self.seconds and alike else None

    def note(self, seconds: float, dense: float) -> None:
        if self.seconds_a_byte(dense) is None:
            self.seconds.clear()
        self.seconds.append(seconds)
        self.dense, self.untold = dense, 0


@dataclass(kw_only=True)
class _Slots:
    """What is known for one number of slots, which has programs of its own."""

    with_drafts: _Kind = field(default_factory=_Kind)
    without: _Kind = field(default_factory=_Kind)

    def kind(self, drafts: bool) -> _Kind:
        return self.with_drafts if drafts else self.without


@dataclass(frozen=True, kw_only=True)
class TimedBurst:
    """A burst whose time is taken."""

    slots: int
    decisions: Mapping[int, DraftDecision]  # by slot
    queued: float  # seconds: when the device was given it
    alone: bool  # nothing else was queued behind the burst before, and nothing compiled

    @property
    def drafts(self) -> bool:
        return any(decision.drafts for decision in self.decisions.values())


class DraftTimes:
    """Times of an engine's bursts. ``clock`` tells seconds."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._slots: dict[int, _Slots] = {}
        self._others: Hashable = None
        # When the device was through with the last burst; None: it was before anybody looked.
        self._free: float | None = -math.inf

    def choose(
        self, slots: int, decisions: Mapping[int, DraftDecision]
    ) -> dict[int, DraftDecision]:
        """The decisions, or none of them to draft where that took less time a token."""
        decided = dict(decisions)
        if not any(decision.drafts for decision in decided.values()):
            return decided
        known = self._slots.setdefault(slots, _Slots())
        dense = sum(decision.dense_bytes for decision in decided.values())
        first, second = (kind.seconds_a_byte(dense) for kind in (known.with_drafts, known.without))
        if first is None or known.with_drafts.others >= LOOK_AGAIN:
            return decided
        wait = LOOK_AGAIN if second is not None else FIRST_LOOK * 4 ** min(known.without.untold, 4)
        if known.without.others >= wait:
            return _none(decided, "no drafts in this burst, whose time is measured")
        if second is None:
            return decided
        tokens = sum(decision.tokens for decision in decided.values())
        drafting = first * sum(decision.round_bytes for decision in decided.values()) / tokens
        plain = second * dense / len(decided)
        times = f"a token took {1e3 * drafting:.3g} ms with drafts and {1e3 * plain:.3g} ms without"
        if plain < drafting:
            return _none(decided, f"no draft pays: {times}")
        return {slot: d.because(f"{d.reason}; {times}") for slot, d in decided.items()}

    def begin(
        self, slots: int, decisions: Mapping[int, DraftDecision], others: Hashable
    ) -> TimedBurst:
        """Says that a burst was given to the device.

        ``others`` changes with whatever else the device was given, and with what was compiled.
        """
        alone, self._others = others == self._others, others
        burst = TimedBurst(slots=slots, decisions=decisions, queued=self._clock(), alone=alone)
        known = self._slots.setdefault(slots, _Slots())
        known.kind(burst.drafts).others = 0
        known.kind(burst.drafts).untold += 1
        known.kind(not burst.drafts).others += 1
        return burst

    def end(
        self, burst: TimedBurst, rows: Mapping[int, BurstRow], now: float, *, waited: bool
    ) -> None:
        """Takes in what a burst did, by slot; ``waited``: it ended only ``now``."""
        free, self._free = self._free, now if waited else None
        if not burst.alone or not waited or free is None:
            return
        read = sum(row.verified * burst.decisions[slot].round_bytes for slot, row in rows.items())
        if read > 0:
            dense = sum(decision.dense_bytes for decision in burst.decisions.values())
            seconds = (now - max(free, burst.queued)) / read
            self._slots[burst.slots].kind(burst.drafts).note(seconds, dense)


def _none(decisions: Mapping[int, DraftDecision], reason: str) -> dict[int, DraftDecision]:
    return {slot: d.because(reason, drafts=0) for slot, d in decisions.items()}
