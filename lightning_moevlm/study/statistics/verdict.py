"""Decides the verdict on an arm from evidence. An arm helps if all of this holds, and
hurts if the first three do:

- the deciding interval of the differences excludes 0;
- the p of the declared test, corrected for the family of comparisons if the study asks for it, is at most alpha;
- the better side has not lost more runs, so that no mean over survivors decides;
- no guard is broken: no guard metric got worse by more than it may, on average over seeds.

If the study names the difference that matters (`within`), an arm whose whole interval lies inside makes no difference,
even if the interval excludes 0. Two one-sided tests (TOST) correct this for the family. Everything else is
inconclusive, which does not prove that there is no effect.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from lightning_moevlm.study.declare.comparison import Correction, Direction, Test
from lightning_moevlm.study.statistics.intervals import Interval
from lightning_moevlm.study.statistics.paired_tests import format_p, least_seeds


class Verdict(StrEnum):
    """The result of a comparison."""

    BASELINE = "baseline"  # the arm that the others are compared with
    HELPS = "helps"
    HURTS = "hurts"
    NO_DIFFERENCE = "no difference"
    BREAKS_GUARD = "breaks guard"
    INCONCLUSIVE = "inconclusive"
    STOPPED_EARLY = "stopped early"  # no verdict: the study's rule withdrew the arm, see `futility`


@dataclass(frozen=True)
class Rule:
    """How verdicts are reached."""

    direction: Direction
    """Of improvement."""
    alpha: float
    """Two-sided error rate; intervals cover 1 - alpha."""
    test: Test = "t"
    correction: Correction = "none"
    """Over the study's comparisons."""
    within: float | None = None
    """The smallest difference that matters, in the metric's unit; None: any difference matters."""


class Sides(NamedTuple):
    """The names of a contrast's two sides, if they are not arm and baseline."""

    mine: str
    theirs: str


class Evidence(NamedTuple):
    """The numbers that decide a verdict."""

    interval: Interval | None
    num_pairs: int
    more_lost: int = 0
    """Diverged and crashed runs of the arm, minus those of the baseline."""
    p: float | None = None
    """Of "no difference", corrected for the family; None if unknown."""
    p_outside: float | None = None
    """Of "a difference of at least `within`", corrected for the family; None if unknown."""
    is_constant: bool = False
    """Whether all differences are the same."""
    sides: Sides | None = None


@dataclass(frozen=True)
class GuardResult:
    """One guard metric of one arm, in the metric's unit."""

    metric: str
    at_most: float
    """By how much it may get worse."""
    worse: float | None
    """By how much it got worse, mean over paired seeds; negative: better; None: no seed has it in both arms."""
    interval: Interval | None
    missing: int = 0
    """Seeds in which the primary metric is compared, but this one is not finite in both arms."""

    @property
    def is_broken(self) -> bool:
        """Whether it got worse by more than it may; rounding is allowed for: 1.05 - 1 is not more than 0.05."""
        if self.worse is None or math.isclose(self.worse, self.at_most, rel_tol=1e-9, abs_tol=1e-12):
            return False
        return self.worse > self.at_most

    @property
    def text(self) -> str:
        """The failure in words; empty if the guard held."""
        if self.worse is None:
            return f"guard {self.metric} could not be compared: no seed has it in both arms"
        if not self.is_broken:
            missing = (
                f"guard {self.metric} could not be compared in {self.missing} of the seeds: not finite in both arms"
            )
            return missing if self.missing else ""
        sure = self.interval is not None and self.interval.low > self.at_most
        doubt = "" if sure else ", but its interval includes less"
        return f"{self.metric} is worse by {self.worse:.4g}, and {self.at_most:g} is allowed{doubt}"


def decide(evidence: Evidence, rule: Rule) -> tuple[Verdict, str]:
    """Return the verdict on the primary metric, before guards, and its reason or limit in words."""
    interval, n = evidence.interval, evidence.num_pairs
    least = least_seeds(rule.test, rule.alpha)
    if n < least:
        return Verdict.INCONCLUSIVE, f"{_count_seeds(n)} no interval; at least {least} are needed"
    # Of ranks an interval without length may be that of the many equal ones among unequal differences.
    if interval is None or evidence.is_constant or (interval.width == 0 and rule.test == "t"):
        return Verdict.INCONCLUSIVE, _explain_constant(n, interval)
    low, high = interval.low, interval.high
    is_better = high < 0 if rule.direction == "lower" else low > 0
    is_worse = low > 0 if rule.direction == "lower" else high < 0
    if _is_small(evidence, interval, rule):
        return Verdict.NO_DIFFERENCE, "not 0, but too small to matter" if is_better or is_worse else ""
    if (is_better and evidence.more_lost > 0) or (is_worse and evidence.more_lost < 0):
        return Verdict.INCONCLUSIVE, _explain_survivors(evidence.more_lost, evidence.sides)
    if not (is_better or is_worse):
        return Verdict.INCONCLUSIVE, ""
    if evidence.p is not None and evidence.p > rule.alpha:
        family = " over the study's comparisons" if rule.correction == "holm" else ""
        return Verdict.INCONCLUSIVE, f"its interval excludes 0, but p = {format_p(evidence.p, rule.alpha)}{family}"
    return (Verdict.HELPS if is_better else Verdict.HURTS), ""


def apply_guards(verdict: Verdict, guards: tuple[GuardResult, ...]) -> Verdict:
    """Return the verdict after the guards, which can only take away "helps"."""
    if verdict is not Verdict.HELPS:
        return verdict
    if any(guard.is_broken for guard in guards):
        return Verdict.BREAKS_GUARD
    return Verdict.INCONCLUSIVE if any(guard.worse is None or guard.missing for guard in guards) else verdict


def _is_small(evidence: Evidence, interval: Interval, rule: Rule) -> bool:
    """Whether the effect is shown to be smaller than what matters; not if one side lost more runs."""
    if rule.within is None or evidence.more_lost or not -rule.within < interval.low <= interval.high < rule.within:
        return False
    return evidence.p_outside is None or evidence.p_outside <= rule.alpha


def _explain_constant(n: int, interval: Interval | None) -> str:
    if interval is not None and interval.low == interval.high == 0:
        return f"the difference is exactly 0 in all {n} seeds, as if it changed nothing"
    return f"all {n} seeds give exactly the same difference, as repetitions would"


def _explain_survivors(more_lost: int, sides: Sides | None) -> str:
    """Explain that a mean over survivors decides nothing if the better side has lost more runs."""
    word, count = ("better" if more_lost > 0 else "worse"), abs(more_lost)
    mine, theirs = sides or ("this arm", "the baseline")
    lost, kept = (mine, theirs) if more_lost > 0 else (theirs, mine)
    return f"{word} in the seeds that finished, but {lost} lost {count} more than {kept}"


def _count_seeds(n: int) -> str:
    return f"{n} seed gives" if n == 1 else f"{n} seeds give"
