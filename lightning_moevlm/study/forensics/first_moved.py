"""Finds which recorded quantity moved first before an event.

The past is all recorded steps before the last `LOOKBACK` ones. A quantity has moved at the first of those last steps,
the event's included, in which its robust z-score against the past is beyond

    THRESHOLD (1 + 8 / n)

in size, n being the number of past values: few values say little of the spread. Norms and logits are compared by their
logarithm, since they vary by factors; losses after their trend is taken away. An update is divided by its learning
rate, which the schedule changes. Of quantities that moved in one step the one with the largest score is first.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_moevlm.study.forensics.deviation import find_level, remove_trend, robust_score
from lightning_moevlm.tracking.recordings.recording import RecordedStep, split_quantity

LOOKBACK, THRESHOLD, LEAST = 10, 6.0, 3
_FEW = 8.0
_TREND_FLOOR = 0.01  # of a loss


class _Treatment(NamedTuple):
    floor: float
    """Least standard deviation."""
    by_logarithm: bool = False
    has_trend: bool = False
    matters: Literal["up", "down", "both"] = "both"
    """Direction that is a move; schedules lower the rate, and loss scaling raises its factor."""


_FACTOR = _Treatment(0.1, by_logarithm=True)  # moved: about twice or half of the usual value
_TREATMENTS = {
    "loss": _Treatment(0.0, has_trend=True),
    "gradient_norm": _FACTOR,
    "update_norm": _FACTOR,
    "attention_logit": _FACTOR,
    "router_logit": _FACTOR,
    "output_logit": _FACTOR,
    "learning_rate": _FACTOR._replace(matters="up"),
    "loss_scale": _FACTOR._replace(matters="down"),
    "expert_update": _Treatment(0.5, by_logarithm=True, matters="down"),  # moved: about a twentieth of the usual share
    "load": _Treatment(0.05),
}
"""Kinds that may move; sums and weights of others are left out."""


class Moved(NamedTuple):
    """A quantity that left its past."""

    step: int
    """The first step beyond the threshold."""
    quantity: str
    score: float
    """Robust z; below 0 is downwards, infinite is not finite."""
    value: float
    """That of an update is per unit of learning rate."""
    past: float
    """Median of the past."""

    @property
    def kind(self) -> str:
        """Kind of the quantity."""
        return split_quantity(self.quantity)[0]

    @property
    def layer(self) -> str:
        """Layer of the quantity; "" if it has none."""
        kind, place = split_quantity(self.quantity)
        return "" if kind in ("loss", "output_logit", "learning_rate", "loss_scale") else place.partition("/")[0]


def find_moved(steps: Sequence[RecordedStep], event_step: int) -> list[Moved]:
    """Return the quantities that moved up to an event, the first one first.

    Args:
        steps: of a recording, oldest first.
        event_step: step of the event.
    """
    before = [one for one in steps if one.step < event_step]
    lookback = min(LOOKBACK, len(before) // 2)
    past, late = before[: len(before) - lookback], before[len(before) - lookback :]
    late += [one for one in steps if one.step == event_step]
    names = dict.fromkeys(name for one in late for name in one.values)
    found = [_find_first(name, past, late) for name in names if split_quantity(name)[0] in _TREATMENTS]
    return sorted((each for each in found if each is not None), key=lambda each: (each.step, -abs(each.score)))


def _find_first(name: str, past: Sequence[RecordedStep], late: Sequence[RecordedStep]) -> Moved | None:
    treatment = _TREATMENTS[split_quantity(name)[0]]
    known = [_treat(value, treatment) for one in past if (value := _read(one, name)) is not None]
    finite = [value for value in known if math.isfinite(value)]
    level = (find_level(finite) or 0.0) if treatment.has_trend else 0.0
    usual = remove_trend(finite) if treatment.has_trend else finite
    if len(usual) < LEAST:
        return None
    threshold = THRESHOLD * (1 + _FEW / len(usual))
    floor = max(treatment.floor, _TREND_FLOOR * abs(level))
    for one in late:
        value = _read(one, name)
        if value is None:
            continue
        score = robust_score(_treat(value, treatment) - level, usual, floor)
        is_wanted = treatment.matters == "both" or (score > 0) == (treatment.matters == "up")
        if is_wanted and abs(score) > threshold:
            middle = statistics.median(usual) + level
            return Moved(one.step, name, score, value, math.exp(middle) if treatment.by_logarithm else middle)
    return None


def _read(step: RecordedStep, name: str) -> float | None:
    """Return a value, an update per unit of learning rate; None if it was not measured or the rate is 0."""
    value = step.values.get(name)
    if value is None or not name.startswith("update_norm/"):
        return value
    rate = step.values.get("learning_rate", 1.0)
    return value / rate if rate > 0 else None


def _treat(value: float, treatment: _Treatment) -> float:
    if not treatment.by_logarithm or not math.isfinite(value):
        return value
    return math.log(max(abs(value), 1e-12))
