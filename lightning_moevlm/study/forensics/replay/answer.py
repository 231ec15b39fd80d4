"""Answers whether a change would have prevented an event.

    would have prevented it   no event in the event's step, and none elsewhere that the unchanged replay has not
    would have moved it       no event in the event's step, but one elsewhere
    would not                 an event in the event's step
    changes nothing           every value equals that of the unchanged replay

An event is what the flight recorder declares. A bad batch has a high loss under every change but its own removal; then
the steps until the loss is back tell more.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from lightning_moevlm.study.forensics.replay.course import Course, JudgedStep
from lightning_moevlm.tracking.recordings.recording import Event


class Verdict(StrEnum):
    """Whether a change would have prevented the event."""

    PREVENTS = "would have prevented it"
    MOVES = "would have moved it"
    DOES_NOT = "would not have prevented it"
    CHANGES_NOTHING = "changes nothing"
    NO_EVENT = "nothing to prevent"
    REFUSED = "cannot be replayed"


class Answer(NamedTuple):
    """The answer of one change."""

    verdict: Verdict
    sentence: str


def answer(name: str, step: int, arm: Course, unchanged: Course, is_equal: bool) -> Answer:
    """Return what a change does to the event of a step.

    Args:
        name: of the change.
        step: step of the event.
        arm: replay with the change.
        unchanged: replay without it.
        is_equal: whether all values of both are equal.
    """
    if not unchanged.events_at(step):
        ends = [course.steps[-1].step if course.steps else 0 for course in (arm, unchanged)]
        rest = f"; but it ends at step {ends[0]}, before the unchanged replay does" if ends[0] < ends[1] else ""
        return Answer(Verdict.NO_EVENT, f"{name}: {Verdict.NO_EVENT}, since no event begins at step {step}{rest}.")
    if is_equal:
        return Answer(
            Verdict.CHANGES_NOTHING, f"{name} {Verdict.CHANGES_NOTHING}: every value equals the unchanged replay's."
        )
    here = arm.events_at(step)
    if here or arm.at(step) is None:
        what = describe_events(here) if here else f"it ends at step {arm.steps[-1].step if arm.steps else 0}"
        return Answer(Verdict.DOES_NOT, f"{name} {Verdict.DOES_NOT}: {what}{_describe_recovery(arm, unchanged, step)}.")
    known = {(event.step, event.kind) for event in unchanged.events}
    new = [event for event in arm.events if (event.step, event.kind) not in known]
    if new:
        return Answer(
            Verdict.MOVES, f"{name} {Verdict.MOVES}: {describe_events(new[:1])} at step {new[0].step} instead."
        )
    at = arm.at(step)
    assert at is not None
    left = [event for event in arm.events if event.step != step]
    rest = f"; the {left[0].kind} at step {left[0].step} stays" if left else ""
    return Answer(Verdict.PREVENTS, f"{name} {Verdict.PREVENTS}: the loss of step {step} is {describe_step(at)}{rest}.")


def describe_events(events: Sequence[Event]) -> str:
    """Return events as text."""
    return " and ".join(f"{event.kind}{f' ({event.detail})' if event.detail else ''}" for event in events)


def describe_step(step: JudgedStep) -> str:
    """Return a loss with its score as text."""
    return f"{step.loss:.4g}, {step.score:+.1f} deviations" if math.isfinite(step.score) else f"{step.loss:.4g}"


def count_spoilt(course: Course, step: int) -> int:
    """Return the steps from one on in which an event is there."""
    return sum(one.is_spoilt for one in course.steps if one.step >= step)


def _describe_recovery(arm: Course, unchanged: Course, step: int) -> str:
    mine, theirs = count_spoilt(arm, step), count_spoilt(unchanged, step)
    return f", in {mine} steps (unchanged: {theirs})"
