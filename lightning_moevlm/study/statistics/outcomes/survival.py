"""Counts the runs that survived, and says with which value the others count.

A run fails if it diverges, or does not learn by the study's rule; else it survives. A crash is neither.

A failed run has a value that no mean may take silently: nothing, infinity, or that of a model which stopped learning.
Means of final values are over survivors, and say so. Where runs are paired by seed, a mean over survivors would favour
the side that fails. There a failed run counts with its capped value: its last one, but no worse than its untrained
model's, and that of the untrained model if it is not finite. So every run with a result counts, and none counts for
more than "has learned nothing". The cap is min(loss, loss_0) of Wortsman et al. 2023 (arXiv 2309.14322), section 2.

The interval of their share is exact (Clopper and Pearson 1934): it covers in at least 1 - alpha of all studies,
whatever the share. Wilson's covers 95 % on average over shares, and as little as 83 % at the worst share for n = 3.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from lightning_moevlm.study.declare.comparison import Direction


class Final(NamedTuple):
    """The last value of the metric in one run."""

    value: float
    """Of a failed run, the capped one."""
    failed: bool = False
    """Diverged, or did not learn."""


def cap_failed(value: float | None, untrained: float | None, direction: Direction) -> float | None:
    """Return the value with which a failed run counts; None if neither value is a finite number.

    Args:
        value: Its last one.
        untrained: That of its untrained model.
        direction: Of progress.
    """
    known = [one for one in (value, untrained) if one is not None and math.isfinite(one)]
    return None if not known else min(known) if direction == "lower" else max(known)


def find_jump(values: Mapping[int, float], failed: Collection[int]) -> float:
    """Return how far failed runs of one model end from its other runs, on average; 0 if all or none failed.

    It is what chance can make of a model: the same one fails with some seeds and not with others.

    Args:
        values: Final values by seed, finite.
        failed: Seeds whose run failed; others than those of the values do not count.
    """
    bad = [value for seed, value in values.items() if seed in failed]
    good = [value for seed, value in values.items() if seed not in failed]
    return abs(math.fsum(bad) / len(bad) - math.fsum(good) / len(good)) if bad and good else 0.0


def is_within_jump(difference: float, jump: float) -> bool:
    """Whether chance may have made a difference of means: a jump is at least half of it."""
    return jump > 0 and jump >= abs(difference) / 2


@dataclass(frozen=True)
class Survival:
    """Surviving runs of all runs with a result."""

    stable: int
    total: int

    def __str__(self) -> str:
        return f"{self.stable}/{self.total}"

    @property
    def failed(self) -> int:
        """Runs that did not survive."""
        return self.total - self.stable

    @classmethod
    def of(cls, finals: Mapping[int, Final]) -> "Survival":
        """Count the runs of one model. finals: by seed."""
        return cls(sum(not final.failed for final in finals.values()), len(finals))

    def interval(self, alpha: float) -> tuple[float, float] | None:
        """Return the exact interval of the share of runs that survive; None without runs."""
        if not self.total:
            return None
        found = stats.binomtest(self.stable, self.total).proportion_ci(1 - alpha, method="exact")
        return float(found.low), float(found.high)
