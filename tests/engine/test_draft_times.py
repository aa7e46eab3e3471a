"""Drafts are left out where bursts with them took longer, as a clock of the test's own tells."""

import dataclasses
from typing import Any

import pytest

from lserve_jax.engine.costs import BurstRow
from lserve_jax.engine.draft_times import COMPILING, FIRST_LOOK, KEPT, LOOK_AGAIN, DraftTimes
from lserve_jax.engine.metrics import DraftDecision

SLOTS = 4
ROW = BurstRow(  # ten rounds
    steps=30,
    bypassed=0,
    selections=0,
    scored=0,
    attended=0.0,
    verified=10,
    judging=10,
    drafted=30,
    confirmed=20,
)


class Bursts:
    """Runs bursts of one request, one after the other, that take as long as it is told."""

    def __init__(self, *, round_seconds: float, dense_seconds: float):
        self.now = 100.0
        self.times = DraftTimes(lambda: self.now)
        self.seconds = {True: round_seconds, False: dense_seconds}
        self.others, self.is_ready = 0, True
        self.decision = DraftDecision(
            drafts=3, reason="by bytes", tokens=3.0, dense_bytes=100.0, sparse_bytes=20.0
        )

    def run(self, *, waited: bool = True, compiles: bool = False) -> DraftDecision:
        """One burst of ten rounds or steps; what it was to draft.

        ``compiles``: one without drafts does not run by itself.
        """
        decisions = self.times.choose(SLOTS, {0: self.decision}, lambda: self.is_ready)
        self.others += compiles and not decisions[0].drafts
        burst = self.times.begin(SLOTS, decisions, self.others)
        self.now += 10 * self.seconds[burst.drafts]
        self.times.end(burst, {0: ROW}, self.now, waited=waited)
        return decisions[0]

    def drafted(self, count: int, **how: Any) -> list[int]:
        return [self.run(**how).drafts for _ in range(count)]


@pytest.mark.parametrize(
    ("round_seconds", "pays"),
    [(0.029, True), (0.031, False)],  # three tokens a round beside one of 0.01 s each
    ids=["pays", "does not"],
)
def test_the_faster_kind_is_run(round_seconds: float, pays: bool) -> None:
    bursts = Bursts(round_seconds=round_seconds, dense_seconds=0.01)
    # The very first burst is not timed: what went before it is not known.
    assert bursts.drafted(FIRST_LOOK + 1) == [3] * FIRST_LOOK + [0]
    decision = bursts.run()
    assert decision.drafts == (3 if pays else 0)
    took = (
        f"by the bursts before, a token of the batch takes {1e3 * round_seconds / 3:.3g} ms with "
        "drafts and 10 ms without"
    )
    reason = f"by bytes; {took}" if pays else f"no draft pays: {took}"
    assert decision.reason == reason


def test_the_other_kind_is_measured_again() -> None:
    bursts = Bursts(round_seconds=0.06, dense_seconds=0.01)
    bursts.drafted(FIRST_LOOK + 2)
    bursts.seconds[True] = 0.006  # drafts pay from now on
    seen = bursts.drafted((KEPT + 1) * LOOK_AGAIN)
    assert seen.index(3) < LOOK_AGAIN
    assert seen[-1] == 3


def test_one_bad_measurement_does_not_stand_for_long() -> None:
    bursts = Bursts(round_seconds=0.06, dense_seconds=0.1)
    bursts.drafted(FIRST_LOOK + 1)
    bursts.seconds[False] = 0.01  # as it is when nothing else keeps the device busy
    assert bursts.drafted(6 * FIRST_LOOK).count(0) == 1
    bursts.drafted(LOOK_AGAIN)
    assert bursts.run().drafts == 0


def test_bursts_of_other_lengths_are_measured_anew() -> None:
    bursts = Bursts(round_seconds=0.06, dense_seconds=0.01)
    bursts.drafted(FIRST_LOOK + 2)
    assert bursts.run().drafts == 0
    bursts.decision = dataclasses.replace(bursts.decision, dense_bytes=200.0)
    assert bursts.run().drafts == 3


def test_what_is_not_known_to_the_clock_does_not_count() -> None:
    """Ended before anybody looked, or beside other work, such as compiling."""
    bursts = Bursts(round_seconds=0.06, dense_seconds=0.01)
    assert bursts.drafted(40, waited=False) == [3] * 40
    for _ in range(40):
        bursts.others += 1
        assert bursts.run().drafts == 3


def test_what_a_burst_that_is_not_timed_leaves_to_run_does_not_count() -> None:
    bursts = Bursts(round_seconds=0.06, dense_seconds=0.01)
    for _ in range(40):
        assert bursts.run().drafts == 3
        bursts.times.untimed()


def test_a_try_that_tells_nothing_comes_rarely() -> None:
    """A burst without drafts is slow where drafts pay: those that cannot be timed are few."""
    bursts = Bursts(round_seconds=0.006, dense_seconds=0.01)
    tries = bursts.drafted(1000, compiles=True).count(0)
    assert 8 < tries <= 16  # two after 4, 8, 16, ... more


def test_a_burst_that_must_be_compiled_is_tried_when_that_pays() -> None:
    """When as long was drafted as compiling takes, and at once if it was compiled before."""
    bursts = Bursts(round_seconds=0.06, dense_seconds=0.01)
    bursts.is_ready = False
    # Those that are not timed count, too; ten rounds each.
    bursts.drafted(5)
    assert bursts.drafted(10, waited=False) == [3] * 10
    assert bursts.now - 100.0 < COMPILING
    assert 0 in bursts.drafted(int((COMPILING - 9.0) / 0.6) + 3)
    bursts.decision = dataclasses.replace(bursts.decision, dense_bytes=200.0)
    assert bursts.drafted(FIRST_LOOK + 1)[-1] == 0


@pytest.mark.parametrize("waited", [False, True])
def test_compiling_and_prompts_are_no_drafting(waited: bool) -> None:
    """They lie between a burst that cannot be timed and its end."""
    bursts = Bursts(round_seconds=0.01, dense_seconds=0.1)
    bursts.is_ready = False
    for _ in range(40):
        bursts.others += 1
        burst = bursts.times.begin(SLOTS, {0: bursts.decision}, bursts.others)
        bursts.now += COMPILING
        bursts.times.end(burst, {0: ROW}, bursts.now, waited=waited)
        assert bursts.run(waited=waited).drafts == 3


def test_nothing_is_weighed_where_nothing_is_drafted() -> None:
    bursts = Bursts(round_seconds=0.06, dense_seconds=0.01)
    bursts.decision = DraftDecision(drafts=0, reason="no draft pays by bytes")
    assert bursts.drafted(3) == [0, 0, 0]
    assert bursts.run().reason == "no draft pays by bytes"
