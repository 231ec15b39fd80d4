"""Summarises the stability of an arm's runs, and compares it with the baseline's.

A run is stable if it reached its end, did not diverge and learned, by the study's rules (`survival`). Crashes are not
counted. The share of stable runs gets an exact interval. An exact test compares it with the baseline's: McNemar's, of
the seeds in which one of the two runs is stable and the other is not, if both have the same seeds; else Fisher's.
Three seeds show little: 0 of 3 against 3 of 3 has p = 0.25 paired, and 0.1 else. Six such seeds have p = 0.031.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lightning_moevlm.study.statistics.intervals import Interval, t_interval
from lightning_moevlm.study.statistics.outcomes.stability import Stability
from lightning_moevlm.study.statistics.outcomes.survival import Survival
from lightning_moevlm.study.statistics.paired_tests import fisher_p, mcnemar_p


@dataclass(frozen=True)
class Recovery:
    """The time from a spike of the loss until it is back, of the runs that had a spike; each run's longest."""

    spiked: int
    """Number of runs with a spike."""
    recovered: int
    """Those of them whose loss came back from every spike."""
    steps: float | None
    """Geometric mean over the recovered runs, in optimiser steps."""
    interval: Interval | None
    """Of that mean: t, of the logarithms; None for fewer than two recovered runs."""


@dataclass(frozen=True)
class ArmStability:
    """The stability of an arm."""

    runs: tuple[Stability, ...]
    """Those with a result, in the order of seeds."""
    survival: Survival
    interval: tuple[float, float] | None
    """Exact, of the share of stable runs; None without runs."""
    test: str
    """"McNemar" or "Fisher"; empty for the baseline."""
    p: float | None
    """Of that test, two-sided; None for the baseline."""
    recovery: Recovery

    @property
    def first_divergence(self) -> int | None:
        """The earliest step at which a run diverged."""
        return min((run.diverged_at for run in self.runs if run.diverged_at is not None), default=None)

    def mean(self, read: Callable[[Stability], float | None]) -> float | None:
        """Return the mean of one number over the runs that have it; infinite if one of them is."""
        known = self._known(read)
        return sum(known) / len(known) if known else None

    def worst(self, read: Callable[[Stability], float | None]) -> float | None:
        """Return the largest of one number over the runs that have it."""
        return max(self._known(read), default=None)

    def _known(self, read: Callable[[Stability], float | None]) -> list[float]:
        return [value for run in self.runs if (value := read(run)) is not None and not math.isnan(value)]


def summarise_stability(
    runs: Mapping[int, Stability], survived: Mapping[int, bool], baseline: Mapping[int, bool] | None, alpha: float
) -> ArmStability:
    """Return the stability of an arm.

    Args:
        runs: Those with a result, by seed.
        survived: Whether each is stable.
        baseline: The same of the baseline's runs; None for the baseline itself.
        alpha: Intervals cover 1 - alpha.
    """
    survival = Survival(sum(survived.values()), len(survived))
    test, p = ("", None) if baseline is None else _compare(survived, baseline)
    return ArmStability(
        tuple(runs.values()),
        survival,
        survival.interval(alpha),
        test,
        p,
        summarise_recovery((run.recovery_steps for run in runs.values()), alpha),
    )


def summarise_recovery(steps: Iterable[float | None], alpha: float) -> Recovery:
    """Return the recovery of an arm.

    Args:
        steps: Of each run the longest recovery; 0 without a spike, infinite if it never came back, None if unknown.
        alpha: The interval covers 1 - alpha.
    """
    times = [one for one in steps if one]
    logs = tuple(math.log(time) for time in times if math.isfinite(time))
    around = t_interval(logs, alpha)
    return Recovery(
        len(times),
        len(logs),
        math.exp(float(np.mean(logs))) if logs else None,
        None if around is None else Interval(math.exp(around.low), math.exp(around.high), around.method),
    )


def _compare(mine: Mapping[int, bool], theirs: Mapping[int, bool]) -> tuple[str, float | None]:
    if mine and mine.keys() == theirs.keys():
        better = sum(mine[seed] and not theirs[seed] for seed in mine)
        return "McNemar", mcnemar_p(better, sum(theirs[seed] and not mine[seed] for seed in mine))
    return "Fisher", fisher_p(sum(mine.values()), len(mine), sum(theirs.values()), len(theirs))
