"""Decides whether a run has diverged. A divergence is a result of the run, not a failure of the job.

A run has diverged if one of this holds:

- the training loss was not finite at some step (the run's guard logs the first one);
- the rule's metric was not finite at some point;
- the metric was above `times_untrained` x the untrained model's value for `in_a_row` points in a row;
- it ended above that value.

All but the last can be found during training, and end the run. The untrained model's value is the first one; a run that
was first validated after some training has none, and the last two do not apply.
"""

import math
from collections.abc import Sequence
from itertools import groupby

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.comparison import Divergence
from lightning_moevlm.tracking.point import Point

NONFINITE_STEP = metric_keys.FIRST_NONFINITE_STEP.key()


def explain_divergence(points: Sequence[Point], rule: Divergence) -> str:
    """Return why a run that has ended counts as diverged; empty if it does not.

    Args:
        points: Of the rule's metric and of `NONFINITE_STEP`, by key, then step; other keys are ignored.
        rule: The study's.
    """
    early = explain_early_divergence(points, rule)
    if early:
        return early
    own = _own(points, rule)
    if len(own) >= 2 and _has_untrained(own) and own[-1].value > rule.times_untrained * own[0].value:
        return f"{rule.metric} ended at {own[-1].value:.4g}, {_above(own, rule)}"
    return ""


def explain_early_divergence(points: Sequence[Point], rule: Divergence) -> str:
    """Return why a running run has diverged already; empty if it has not. See `explain_divergence`."""
    guard = [point for point in points if point.key == NONFINITE_STEP]
    if guard:
        return f"the training loss was not finite at step {guard[0].value:.0f}"
    own = _own(points, rule)
    for point in own:
        if not math.isfinite(point.value):
            return f"{rule.metric} is {point.value} at step {point.step}"
    if rule.in_a_row is None or not _has_untrained(own):
        return ""
    for is_above, group in groupby(own, lambda point: point.value > rule.times_untrained * own[0].value):
        row = list(group)[: rule.in_a_row]
        if is_above and len(row) == rule.in_a_row:
            return (
                f"{rule.metric} is {row[-1].value:.4g} at step {row[-1].step}, for {rule.in_a_row} points in a row "
                f"{_above(own, rule)}"
            )
    return ""


def _own(points: Sequence[Point], rule: Divergence) -> list[Point]:
    return [point for point in points if point.key == rule.metric]


def _has_untrained(own: Sequence[Point]) -> bool:
    return bool(own) and metric_keys.is_untrained(own[0].key, own[0].step)


def _above(own: Sequence[Point], rule: Divergence) -> str:
    return f"above {rule.times_untrained:g} x {own[0].value:.4g} of the untrained model"
