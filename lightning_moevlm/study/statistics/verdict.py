"""From evidence to a word. An arm helps or hurts where all of this holds:

- the deciding interval of the differences does not hold 0;
- the p of the declared test, adjusted for the family of comparisons where the study says so, is at most alpha;
- runs that were lost do not speak against it: no mean over survivors makes the arm with more losses the better one;
- and, to help, no guard is broken: no metric that may not get worse did so by more than it may, on average over seeds.

Where the study says which difference matters (`within`), an arm whose whole interval lies inside of it makes no
difference, also where the interval does not hold 0; corrected for the family by two one-sided tests (TOST). Everything
else is inconclusive, which is no proof that there is no effect.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from lightning_moevlm.study.declare.comparison import Correction, Direction, Test
from lightning_moevlm.study.statistics.intervals import Interval
from lightning_moevlm.study.statistics.paired_tests import format_p, least_seeds


class Verdict(StrEnum):
    """The word for a comparison. BASELINE marks the row that the others are compared with.

    STOPPED_EARLY is the word for none: the arm was withdrawn by the study's rule, see `futility`.
    """

    BASELINE = "baseline"
    HELPS = "helps"
    HURTS = "hurts"
    NO_DIFFERENCE = "no difference"
    BREAKS_GUARD = "breaks guard"
    INCONCLUSIVE = "inconclusive"
    STOPPED_EARLY = "stopped early"


@dataclass(frozen=True)
class Rule:
    """How verdicts are reached.

    direction: which way is progress. alpha: two-sided error rate; intervals cover 1 - alpha. test: whose p decides.
    correction: over the study's comparisons. within: the difference that matters, in the metric's unit; None = any.
    """

    direction: Direction
    alpha: float
    test: Test = "t"
    correction: Correction = "none"
    within: float | None = None


class Sides(NamedTuple):
    """What the two sides of a contrast are called that is not arm against baseline."""

    mine: str
    theirs: str


class Evidence(NamedTuple):
    """What a verdict is read from.

    p: of "no difference", p_outside: of "a difference of at least `within`", both adjusted for the family; None where
    they cannot be told. more_lost: diverged and crashed runs of the arm, minus those of the baseline. is_constant:
    whether all differences are the same. sides: None for arm and baseline.
    """

    interval: Interval | None
    num_pairs: int
    more_lost: int = 0
    p: float | None = None
    p_outside: float | None = None
    is_constant: bool = False
    sides: Sides | None = None


@dataclass(frozen=True)
class GuardResult:
    """One guard metric of one arm.

    worse: by how much it got worse on average over paired seeds, in the metric's unit, negative where it got better;
    None where no seed has it in both arms. at_most: by how much it may. missing: how many of the seeds in which the
    primary metric is compared do not have it in both arms, in finite numbers.
    """

    metric: str
    at_most: float
    worse: float | None
    interval: Interval | None
    missing: int = 0

    @property
    def is_broken(self) -> bool:
        """Whether it got worse by more than it may; 1.05 - 1 is no more than 0.05, whatever fp64 makes of it."""
        if self.worse is None or math.isclose(self.worse, self.at_most, rel_tol=1e-9, abs_tol=1e-12):
            return False
        return self.worse > self.at_most

    @property
    def text(self) -> str:
        """What a reader must know of it; empty where it held."""
        if self.worse is None:
            return f"guard {self.metric} could not be compared: no seed has it in both arms"
        if not self.is_broken:
            missing = (
                f"guard {self.metric} could not be compared in {self.missing} of the seeds: no number in both arms"
            )
            return missing if self.missing else ""
        sure = self.interval is not None and self.interval.low > self.at_most
        doubt = "" if sure else ", although its interval does not exclude less"
        return f"{self.metric} is worse by {self.worse:.4g}, more than the {self.at_most:g} it may be{doubt}"


def decide(evidence: Evidence, rule: Rule) -> tuple[Verdict, str]:
    """Return the word for the primary metric, before guards, and what limits it."""
    interval, n = evidence.interval, evidence.num_pairs
    least = least_seeds(rule.test, rule.alpha)
    if n < least:
        return Verdict.INCONCLUSIVE, f"{_count_seeds(n)} no interval; at least {least} are needed"
    # Of ranks an interval without length may be that of the many equal ones among unequal differences.
    if interval is None or evidence.is_constant or (interval.width == 0 and rule.test == "t"):
        return Verdict.INCONCLUSIVE, _explain_constant(n, interval)
    low, high = interval.low, interval.high
    ahead = high < 0 if rule.direction == "lower" else low > 0
    behind = low > 0 if rule.direction == "lower" else high < 0
    if _is_small(evidence, interval, rule):
        return Verdict.NO_DIFFERENCE, "not 0, but too small to matter" if ahead or behind else ""
    if (ahead and evidence.more_lost > 0) or (behind and evidence.more_lost < 0):
        return Verdict.INCONCLUSIVE, _explain_survivors(evidence.more_lost, evidence.sides)
    if not (ahead or behind):
        return Verdict.INCONCLUSIVE, ""
    if evidence.p is not None and evidence.p > rule.alpha:
        family = " over the study's comparisons" if rule.correction == "holm" else ""
        return Verdict.INCONCLUSIVE, f"its interval does not hold 0, but p = {format_p(evidence.p, rule.alpha)}{family}"
    return (Verdict.HELPS if ahead else Verdict.HURTS), ""


def apply_guards(verdict: Verdict, guards: tuple[GuardResult, ...]) -> Verdict:
    """Return the word after the guards: only "helps" can be lost to them."""
    if verdict is not Verdict.HELPS:
        return verdict
    if any(guard.is_broken for guard in guards):
        return Verdict.BREAKS_GUARD
    return Verdict.INCONCLUSIVE if any(guard.worse is None or guard.missing for guard in guards) else verdict


def _is_small(evidence: Evidence, interval: Interval, rule: Rule) -> bool:
    """Whether the effect is shown to be smaller than what matters; runs lost on one side alone speak against it."""
    if rule.within is None or evidence.more_lost or not -rule.within < interval.low <= interval.high < rule.within:
        return False
    return evidence.p_outside is None or evidence.p_outside <= rule.alpha


def _explain_constant(n: int, interval: Interval | None) -> str:
    if interval is not None and interval.low == interval.high == 0:
        return f"the difference is exactly 0 in all {n} seeds, as if it changed nothing"
    return f"all {n} seeds give exactly the same difference, as repetitions would"


def _explain_survivors(more_lost: int, sides: Sides | None) -> str:
    """Return why a mean over the survivors says nothing, where the side that looks better has lost more runs."""
    count = abs(more_lost)
    if sides is not None:
        word, (lost, kept) = ("ahead", sides) if more_lost > 0 else ("behind", (sides.theirs, sides.mine))
        return f"{word} where all runs of a seed survive, but {lost} lost {count} more than {kept}"
    if more_lost > 0:
        return f"ahead where it survives, but it lost {count} more than the baseline"
    return f"behind where the baseline survives, but that lost {count} more than this arm"


def _count_seeds(n: int) -> str:
    return f"{n} seed gives" if n == 1 else f"{n} seeds give"
