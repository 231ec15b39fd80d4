"""Summarises the stability of an arm's runs, and compares it with the baseline's.

A run is stable if it reached its end and did not diverge by the study's rule. Crashes are not counted. The share of
stable runs is compared with the baseline's by Fisher's exact test, which shows little with few seeds: 0 of 3 against 3
of 3 has p = 0.1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_moevlm.study.statistics.outcomes.stability import Stability
from lightning_moevlm.study.statistics.paired_tests import fisher_p


@dataclass(frozen=True)
class ArmStability:
    """The stability of an arm."""

    runs: tuple[Stability, ...]
    """Those with a result, in the order of seeds."""
    stable: int
    p: float | None
    """Fisher's; None for the baseline."""

    @property
    def total(self) -> int:
        """Runs with a result."""
        return len(self.runs)

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


def summarise_stability(runs: Sequence[Stability], diverged: int, baseline: tuple[int, int] | None) -> ArmStability:
    """Return the stability of an arm.

    Args:
        runs: Those with a result.
        diverged: The number of them that diverged.
        baseline: Stable and total runs of the baseline; None for the baseline itself.
    """
    stable = len(runs) - diverged
    return ArmStability(tuple(runs), stable, None if baseline is None else fisher_p(stable, len(runs), *baseline))
