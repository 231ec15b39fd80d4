"""Declares what is worth a recording, from the losses of successive steps.

    not finite   a loss is NaN or infinite
    skipped      the step was not taken (`model.gradient.skip_spikes`)
    spike        the total loss has a robust z-score above the threshold against the last steps with the same loss terms

A spike that lasts several steps is declared once, and does not enter the past that later steps are judged by. Batches
of one modality have other losses than pairs, so they have a past of their own.
"""

import math
from collections import defaultdict, deque

from lightning_moevlm.study.forensics.deviation import robust_score
from lightning_moevlm.tracking.recordings.recording import Event, RecordedStep

WINDOW, LEAST = 32, 16
"""Steps of the past, and those that must be known before a step is judged."""


class Watch:
    """Judges steps one after the other.

    Args:
        threshold: robust z-score that makes a spike; None declares none.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._past: defaultdict[tuple[str, ...], deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._before: set[str] = set()  # kinds that the step before had

    def judge(self, step: RecordedStep) -> list[Event]:
        """Return the events that begin in this step."""
        found = self._find(step)
        new = [event for event in found if event.kind not in self._before]
        self._before = {event.kind for event in found}
        return new

    def _find(self, step: RecordedStep) -> list[Event]:
        events = []
        if step.values.get("skipped"):
            events.append(Event(step.step, "skipped", "the step was not taken"))
        losses = {name: value for name, value in step.values.items() if name.startswith("loss/")}
        wrong = [name.partition("/")[2] for name, value in losses.items() if not math.isfinite(value)]
        total = step.values["total_loss"]
        if wrong or not math.isfinite(total):
            return [*events, Event(step.step, "not finite", ", ".join(wrong) or "total loss")]
        past = self._past[tuple(losses)]
        score = robust_score(total, past) if len(past) >= LEAST else 0.0
        if self._threshold is not None and score > self._threshold:
            return [
                *events,
                Event(step.step, "spike", f"total loss {total:.4g}, {score:.1f} deviations above its past"),
            ]
        past.append(total)
        return events
