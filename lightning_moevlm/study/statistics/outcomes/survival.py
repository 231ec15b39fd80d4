"""Counts the runs that survived: those that ended, did not diverge, and learned by the study's rule.

The interval of their share is exact (Clopper and Pearson 1934): it covers in at least 1 - alpha of all studies,
whatever the share. Wilson's covers 95 % on average over shares, and as little as 83 % at the worst share for n = 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats


class Final(NamedTuple):
    """The last value of the metric in one run."""

    value: float
    """Of a failed run, the capped one, see `cap_failed`."""
    failed: bool = False
    """Diverged, or did not learn."""


@dataclass(frozen=True)
class Survival:
    """Surviving runs of all runs with a result."""

    stable: int
    total: int

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
