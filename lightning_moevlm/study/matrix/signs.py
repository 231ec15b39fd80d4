"""Finds when the sick runs leave the range of the healthy ones: in a sign of the illness, and in the loss.

At a step a metric is out of range if every sick run lies above all healthy ones, or every one below. The loss parts at
the first step from which it is out of range to the end. A sign leads if it was out of range without a break from an
earlier step up to that one. No threshold is chosen, and no test is made: with three seeds a side, a metric without any
effect is out of range at one step in ten.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_moevlm.tracking.read.series import Series

_LEAST_RUNS = 2  # of one run a range is a point


@dataclass(frozen=True)
class SignLead:
    """A sign against the loss."""

    metric: str
    step: int | None
    """The sign's first step out of range, see above; None: never for good."""
    loss_step: int | None
    """The step at which the loss parts; None: it does not."""
    known: bool = True
    """Whether enough runs have logged both."""

    @property
    def lead(self) -> int | None:
        """Steps by which the sign is earlier; negative if it is later; None if one of them stays in range."""
        return None if self.step is None or self.loss_step is None else self.loss_step - self.step

    @property
    def text(self) -> str:
        """The result in words."""
        if not self.known:
            return "not logged by two runs of each model"
        if self.loss_step is None:
            return "the loss does not leave the healthy range for good"
        if self.lead is None:
            return f"stays in the healthy range; the loss leaves it at step {self.loss_step}"
        if self.lead > 0:
            return f"leads: step {self.step}, the loss at {self.loss_step}"
        return f"{'with the loss' if self.lead == 0 else 'follows'}: step {self.step}, the loss at {self.loss_step}"


def find_lead(
    metric: str,
    sick: Sequence[Series],
    healthy: Sequence[Series],
    sick_loss: Sequence[Series],
    healthy_loss: Sequence[Series],
) -> SignLead:
    """Return when the sign and the loss leave the healthy range.

    Args:
        metric: Name of the sign.
        sick: The sign in each sick run.
        healthy: The sign in each healthy run.
        sick_loss: The training loss in each sick run.
        healthy_loss: The training loss in each healthy run.
    """
    if min(map(len, (sick, healthy, sick_loss, healthy_loss))) < _LEAST_RUNS:
        return SignLead(metric, None, None, known=False)
    loss, sign = _out_of_range(sick_loss, healthy_loss), _out_of_range(sick, healthy)
    parted = _start_of_stretch(loss)
    if parted is None:
        return SignLead(metric, None, None)
    until = [point for point in sign if point[0] <= parted]
    start = _start_of_stretch(until)
    return SignLead(metric, _start_of_stretch(sign) if start is None else start, parted)


def _out_of_range(sick: Sequence[Series], healthy: Sequence[Series]) -> list[tuple[int, bool]]:
    """Return by step, ascending, whether it is out of range. A sick run that has ended holds nothing against it."""
    below = [dict(zip(*one, strict=True)) for one in healthy]
    above = [dict(zip(*one, strict=True)) for one in sick]
    points = []
    for step in sorted(set.intersection(*map(set, below))):
        usual = [one[step] for one in below]
        ours = [one[step] for one in above if step in one]
        if not ours:
            break
        high, low = all(value > max(usual) for value in ours), all(value < min(usual) for value in ours)
        lost = any(value != value for value in ours)  # NaN
        points.append((step, high or low or lost))
    return points


def _start_of_stretch(points: Sequence[tuple[int, bool]]) -> int | None:
    """Return the first step of the unbroken stretch out of range that reaches the last point."""
    start = None
    for step, out in reversed(points):
        if not out:
            break
        start = step
    return start
