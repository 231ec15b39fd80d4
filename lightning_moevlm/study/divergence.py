"""When a run counts as diverged. A divergence is a result of the run, not a failure of the job.

Diverged is: the training loss was not finite at some step (the run's guard logs the first one); or the rule's metric
was not finite at some point; or it ended above `times_untrained` x its first value, which is the untrained model's.
"""

import math
from collections.abc import Sequence

from lightning_moevlm import keys
from lightning_moevlm.study.spec import Divergence
from lightning_moevlm.tracking.runs import Point

NONFINITE_STEP = keys.FIRST_NONFINITE_STEP.key()


def divergence(points: Sequence[Point], rule: Divergence) -> str:
    """Return why a run counts as diverged, or an empty text.

    Args:
        points: Of the rule's metric and of `NONFINITE_STEP`, by key, then step; other keys are passed over.
        rule: As the study declares it.
    """
    guard = [point for point in points if point.key == NONFINITE_STEP]
    if guard:
        return f"the training loss was not finite at step {guard[0].value:.0f}"
    own = [point for point in points if point.key == rule.metric]
    for point in own:
        if not math.isfinite(point.value):
            return f"{rule.metric} is {point.value} at step {point.step}"
    if len(own) >= 2 and own[-1].value > rule.times_untrained * own[0].value:
        return (
            f"{rule.metric} ended at {own[-1].value:.4g}, above {rule.times_untrained:g} x "
            f"{own[0].value:.4g} of the untrained model"
        )
    return ""
