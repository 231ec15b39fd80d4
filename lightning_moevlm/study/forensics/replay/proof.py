"""Proves that an unchanged replay is the run, bit for bit: the same samples, and the same value of every quantity.

The change of the weights in the first step of a replay is not compared: a run's contains what actions did after the
step before.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.recordings.recording import RecordedStep, split_quantity

_OF_THE_PROCESS = (
    "system/",
    "throughput/",
    "memory/",
    "time/",
    "liveness/",
    "balance_gradient_share/",
    "val/",
    "test/",
)
"""Metrics that measure the machine, or that a replay does not measure."""


class Difference(NamedTuple):
    """The first value that differs."""

    step: int
    quantity: str
    """`samples` if the batches differ."""
    run: str
    replay: str


class Proof(NamedTuple):
    """The result of a comparison."""

    num_steps: int
    """Compared steps; 0 if nothing could be compared."""
    num_values: int
    first: Difference | None
    """None if all values are equal."""
    source: str
    """Where the values of the run come from."""

    @property
    def holds(self) -> bool:
        """Whether something was compared, and all of it is equal."""
        return self.num_values > 0 and self.first is None


def compare_recordings(run: Mapping[int, RecordedStep], replay: Sequence[RecordedStep], after: int) -> Proof:
    """Compare the steps that both have.

    Args:
        run: recorded steps of the run, by step.
        replay: steps of the unchanged replay, oldest first.
        after: step of the checkpoint that the replay starts from.
    """
    num_steps = num_values = 0
    for mine in replay:
        if mine.step not in run or mine.step <= after or not mine.values:
            continue
        theirs = run[mine.step]
        num_steps += 1
        if dict(theirs.keys) != dict(mine.keys):
            first = Difference(mine.step, "samples", _shorten(theirs.keys), _shorten(mine.keys))
            return Proof(num_steps, num_values, first, "recording")
        names = [name for name in {**theirs.values, **mine.values} if _is_compared(name, mine.step == after + 1)]
        for name in names:
            num_values += 1
            old, new = theirs.values.get(name), mine.values.get(name)
            if not _are_equal(old, new):
                return Proof(num_steps, num_values, Difference(mine.step, name, _show(old), _show(new)), "recording")
    return Proof(num_steps, num_values, None, "recording")


def compare_points(run: Sequence[Point], replay: Sequence[Point], after: int) -> Proof:
    """Compare metrics that both have logged; the proof for a run without a recording.

    Args:
        run: points of the run.
        replay: points of the unchanged replay.
        after: step of the checkpoint that the replay starts from.
    """
    theirs = {(point.step, point.key): point.value for point in run}
    mine = sorted((point.step, point.key, point.value) for point in replay if not point.key.startswith(_OF_THE_PROCESS))
    common = [one for one in mine if one[0] > after and one[:2] in theirs]
    steps = {step for step, *_ in common}
    for step, key, value in common:
        if not _are_equal(theirs[step, key], value):
            first = Difference(step, key, _show(theirs[step, key]), _show(value))
            return Proof(len(steps), len(common), first, "MLflow")
    return Proof(len(steps), len(common), None, "MLflow")


def equal_steps(one: Sequence[RecordedStep], other: Sequence[RecordedStep], after: int) -> bool:
    """Return whether two replays are equal in all values and samples, so that a change has no effect."""
    return len(one) == len(other) and compare_recordings({each.step: each for each in one}, other, after).first is None


def _is_compared(name: str, is_first: bool) -> bool:
    return not (is_first and split_quantity(name)[0] in ("update_norm", "expert_update"))


def _are_equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or (one != one and other != other)


def _show(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.9g}"


def _shorten(keys: Mapping[str, tuple[str, ...]]) -> str:
    held = [key for of_source in keys.values() for key in of_source]
    return ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
