"""When a run counts as diverged. A divergence is a result of the run, not a failure of the job.

Diverged is: the training loss was not finite at some step (the run's guard logs the first one); or the rule's metric
was not finite at some point; or it lay above `times_untrained` x its first value, which is the untrained model's, for
`in_a_row` points in a row; or it ended above it. All but the last can be told in the middle, and end a run there.
A run that was first validated after some training does not tell the untrained model's value, and is not held against
what is none.
"""

import math
from collections.abc import Sequence
from itertools import groupby

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.declare.comparison import Divergence
from lightning_moevlm.tracking.point import Point

NONFINITE_STEP = metric_keys.FIRST_NONFINITE_STEP.key()


def explain_divergence(points: Sequence[Point], rule: Divergence) -> str:
    """Return why a run that has ended counts as diverged, or an empty text.

    Args:
        points: Of the rule's metric and of `NONFINITE_STEP`, by key, then step; other keys are passed over.
        rule: As the study declares it.
    """
    early = explain_early_divergence(points, rule)
    if early:
        return early
    own = _own(points, rule)
    if len(own) >= 2 and _has_untrained(own) and own[-1].value > rule.times_untrained * own[0].value:
        return f"{rule.metric} ended at {own[-1].value:.4g}, {_above(own, rule)}"
    return ""


def explain_early_divergence(points: Sequence[Point], rule: Divergence) -> str:
    """Return why a run has diverged by now, whatever it will log yet, or an empty text; see `explain_divergence`."""
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
