"""Declares what went wrong, from the losses of successive steps: the rule of the flight recorder and of replays.

    not finite   a loss is NaN or infinite
    skipped      the step was not taken (`model.gradient.skip_spikes`)
    spike        the total loss, less its trend, has a robust z-score above the threshold against the last steps with
                 the same loss terms
    frozen       an expert that gets a quarter of an even share of the tokens or more has changed by less than a
    expert       hundredth of the median of its layer in each of the last 8 steps

A spike that lasts several steps is declared once, and does not enter the past that later steps are judged by. Batches
of one modality have other losses than pairs, so they have a past of their own.
"""

import math
from collections import defaultdict, deque
from typing import NamedTuple

from lightning_moevlm.study.forensics.deviation import find_level, robust_score
from lightning_moevlm.tracking.recordings.recording import Event, RecordedStep

WINDOW, LEAST = 32, 12
"""Differences from the trend in the past, and those that must be known before a step is judged."""
_FLOOR = 0.01  # of the loss: least standard deviation
STILL_STEPS = 8
_STILL = 0.01  # of the median update: an expert below it does not learn
_FED = 0.25  # of an even share of the tokens: an expert below it has little to learn from


class Judgement(NamedTuple):
    """What the watch says of a step."""

    events: tuple[Event, ...]
    """Those that begin in it."""
    kinds: frozenset[str]
    """Of all events that are there, those that began earlier too."""
    score: float
    """Robust z of the total loss; 0 while too little is known."""


class _Past:
    """The steps with the same loss terms."""

    def __init__(self) -> None:
        self.losses = deque[float](maxlen=WINDOW)
        self.differences = deque[float](maxlen=WINDOW)

    def judge(self, loss: float) -> float:
        """Return the score of a loss; 0 while too little is known."""
        level = find_level([*self.losses])
        if level is None or len(self.differences) < LEAST:
            return 0.0
        return robust_score(loss - level, self.differences, _FLOOR * abs(level))

    def add(self, loss: float) -> None:
        """Add a loss that was no spike."""
        level = find_level([*self.losses])
        if level is not None:
            self.differences.append(loss - level)
        self.losses.append(loss)


class Watch:
    """Judges steps one after the other.

    Args:
        threshold: robust z-score that makes a spike; None declares none.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._past = defaultdict[tuple[str, ...], _Past](_Past)
        self._still: dict[str, int] = {}  # steps without an update, by quantity
        self._before = frozenset[str]()  # kinds that the step before had

    def judge(self, step: RecordedStep) -> Judgement:
        """Judge the next step."""
        events, score = self._find(step)
        before, self._before = self._before, frozenset(event.kind for event in events)
        return Judgement(tuple(event for event in events if event.kind not in before), self._before, score)

    def _find(self, step: RecordedStep) -> tuple[list[Event], float]:
        events = self._find_frozen(step)
        if step.values.get("skipped"):
            events.append(Event(step.step, "skipped", "the step was not taken"))
        losses = {name: value for name, value in step.values.items() if name.startswith("loss/")}
        wrong = [name.partition("/")[2] for name, value in losses.items() if not math.isfinite(value)]
        total = step.values["total_loss"]
        if wrong or not math.isfinite(total):
            return [*events, Event(step.step, "not finite", ", ".join(wrong) or "total loss")], math.inf
        past = self._past[tuple(losses)]
        score = past.judge(total)
        if self._threshold is not None and score > self._threshold:
            text = f"total loss {total:.4g}, {score:.1f} deviations above its past"
            return [*events, Event(step.step, "spike", text)], score
        past.add(total)
        return events, score

    def _find_frozen(self, step: RecordedStep) -> list[Event]:
        """Return an event that names the experts that have been still for long enough."""
        still = [name for name, value in step.values.items() if value < _STILL and name.startswith("expert_update/")]
        unknown = {name: steps for name, steps in self._still.items() if name not in step.values}
        self._still = unknown | {name: self._still.get(name, 0) + 1 for name in still if _is_fed(step, name)}
        frozen = [name.partition("/")[2] for name, steps in self._still.items() if steps >= STILL_STEPS]
        text = f"{', '.join(frozen)}: chosen by tokens and without an update for {STILL_STEPS} steps"
        return [Event(step.step, "frozen expert", text)] if frozen else []


def _is_fed(step: RecordedStep, update: str) -> bool:
    """Return whether an expert is chosen by enough pairs in one of its passes, measured by an equal share."""
    layer, expert = update.partition("/")[2].rsplit("/", 1)
    num_experts = sum(name.startswith(f"expert_update/{layer}/") for name in step.values)
    shares = (
        value
        for name, value in step.values.items()
        if name.startswith(f"load/{layer}/") and name.endswith(f"/{expert}")
    )
    return max(shares, default=0.0) * num_experts >= _FED
