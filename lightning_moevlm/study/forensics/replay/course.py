"""Judges the steps of a replay by the rule that the flight recorder declares events by.

A replay starts without a past, so the run's recorded steps up to the checkpoint stand before it. A change may add or
remove loss terms: the total is then that of the terms that run and replay share, with the weights of the run, so that
all arms are judged by the same loss.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_moevlm.study.forensics.watch import Watch
from lightning_moevlm.tracking.recordings.recording import Event, RecordedStep

_BY_WATCH = ("spike", "not finite", "skipped", "frozen expert")
"""Kinds that the rule declares; others are taken from the replay's own recording."""


class JudgedStep(NamedTuple):
    """A step of a replay."""

    step: int
    loss: float
    """Total of the shared terms, with the weights of the run."""
    score: float
    """Robust deviations above the past; 0 while too little is known."""
    is_spoilt: bool
    """Whether an event is there, which may have begun earlier."""


class Course(NamedTuple):
    """The judged steps of a replay."""

    steps: tuple[JudgedStep, ...]
    events: tuple[Event, ...]
    """Those that begin after the checkpoint, by step."""

    def at(self, step: int) -> JudgedStep | None:
        """Return a step; None if the replay ended before it."""
        return next((one for one in self.steps if one.step == step), None)

    def events_at(self, step: int) -> tuple[Event, ...]:
        """Return the events that begin in a step."""
        return tuple(event for event in self.events if event.step == step)


def judge_replay(
    past: Sequence[RecordedStep],
    steps: Sequence[RecordedStep],
    recorded: Sequence[Event],
    reference: Sequence[RecordedStep],
    threshold: float | None,
) -> Course:
    """Judge a replay.

    Args:
        past: recorded steps of the run up to the checkpoint.
        steps: of the replay.
        recorded: events that the replay itself has recorded.
        reference: steps of the unchanged replay.
        threshold: robust z-score that makes a spike; None declares none.
    """
    known = [one for one in steps if one.values]
    terms = _terms([*past, *reference]) & _terms(known)
    weights = _weights_by_step([*past, *reference])
    watch = Watch(threshold)
    for one in past:
        watch.judge(_share(one, terms, weights))
    judged, events = [], [event for event in recorded if event.kind not in _BY_WATCH]
    for one in known:
        shared = _share(one, terms, weights)
        found = watch.judge(shared)
        events += found.events
        judged.append(JudgedStep(one.step, shared.values["total_loss"], found.score, bool(found.kinds)))
    return Course(tuple(judged), tuple(sorted(events, key=lambda event: event.step)))


def _terms(steps: Sequence[RecordedStep]) -> set[str]:
    return {name.removeprefix("loss/") for one in steps for name in one.values if name.startswith("loss/")}


def _weights_by_step(steps: Sequence[RecordedStep]) -> Mapping[int, Mapping[str, float]]:
    """Return the weights of the terms in each step; a term that a step lacks keeps its last weight."""
    found: dict[int, Mapping[str, float]] = {}
    last: dict[str, float] = {}
    for one in sorted(steps, key=lambda each: each.step):
        last |= {
            name.removeprefix("loss_weight/"): value
            for name, value in one.values.items()
            if name.startswith("loss_weight/")
        }
        found[one.step] = dict(last)
    return found


def _share(one: RecordedStep, terms: set[str], weights: Mapping[int, Mapping[str, float]]) -> RecordedStep:
    """Return the step with the shared terms and their total; a term that is not finite stays in any case."""
    own = {name.removeprefix("loss/"): value for name, value in one.values.items() if name.startswith("loss/")}
    of_step = weights.get(one.step) or weights[max(weights)]
    kept = {term: value for term, value in own.items() if term in terms or not math.isfinite(value)}
    total = sum(value * of_step.get(term, 0.0) for term, value in kept.items() if term in terms)
    others = {name: value for name, value in one.values.items() if not name.startswith("loss/")}
    losses = {f"loss/{term}": value for term, value in kept.items()}
    return one._replace(values={**others, **losses, "total_loss": total})
