"""Computes effects paired by seed: an arm's difference from the baseline, its interval, p values and verdict.

Runs of one seed share data order and, if shapes agree, initial weights. So the difference d_i = arm_i - baseline_i
within a seed carries the information. Of these n differences: the mean, the interval that decides (`intervals`), p
values (`paired_tests`), the share of better seeds, the number of seeds needed (`power`) and the verdict (`verdict`). A
bootstrap of three numbers covers far less than it promises, so of t and bootstrap the wider interval decides. Pure
functions of numbers.

A run that failed counts with its capped value (`outcomes.survival`). The t-test of one comparison keeps its error rate
if both sides fail alike, at any rate. At the small p that a family asks for it does not: at a rate of 1/2, three runs
of one side fail and three of the other survive in 1 of 32 studies. So chance limits p in a family: if an arm failed
with some seeds and not with others, and its failed runs end far from its other runs (`find_jump`: half of a difference
or more), the p of that difference is at least that of the two counts of failures (`chance_p`).

The interval is of the mean capped difference. It covers that as often as it says if runs never or always fail. In
between it covers less: three runs without a failure do not exclude a failure in ten. So the mean over the seeds in
which both runs survived, with its t interval, and the exact interval of the share of survivors stand beside it; these
two cover at any rate of failure.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lightning_moevlm.study.declare.comparison import Direction
from lightning_moevlm.study.statistics.intervals import (
    Interval,
    bootstrap_interval,
    centre_of,
    interval_of,
    is_constant,
    t_interval,
    wider,
)
from lightning_moevlm.study.statistics.outcomes.survival import find_jump, is_within_jump
from lightning_moevlm.study.statistics.paired_tests import (
    chance_p,
    format_p,
    holm,
    least_seeds,
    p_outside,
    paired_p,
    two_sided_p,
)
from lightning_moevlm.study.statistics.power import seeds_against_chance, seeds_needed
from lightning_moevlm.study.statistics.verdict import Evidence, GuardResult, Rule, Sides, Verdict, apply_guards, decide

_LEAST_PAIRS = 2  # of one no test has a p


class Lost(NamedTuple):
    """Runs of an arm without a value that could be compared; a failed run with a capped value is not lost."""

    diverged: int = 0
    crashed: int = 0
    unpaired: int = 0
    """Of both, those of seeds for which the other side has no run."""

    @property
    def against(self) -> int:
        """Lost runs that count against the arm; an arm with more seeds than the other has more to lose."""
        return self.diverged + self.crashed - self.unpaired


@dataclass(frozen=True)
class Effect:
    """An arm compared with the baseline; differences are arm minus baseline, in the metric's unit."""

    seeds: tuple[int, ...]
    """Those compared."""
    left_out: tuple[int, ...]
    """Seeds of the study without a difference: crashed, non-finite or not yet run, in either arm."""
    differences: tuple[float, ...]
    failed: tuple[int, ...]
    """Compared seeds in which a run of either side failed and counts with its capped value."""
    failures: tuple[int, int]
    """Number of these runs, of the arm and of the baseline."""
    jump: float
    """How far failed runs of one side end from its other runs; 0 if none or all of them failed."""
    survivors: float | None
    """Mean over the other seeds, in which both runs survived."""
    survivors_interval: Interval | None
    """Of that mean, t."""
    mean: float | None
    centre: float | None
    """Estimate of the rule's test: the mean; for ranks the Hodges-Lehmann estimate; for signs the median."""
    bootstrap: Interval | None
    """Of the mean."""
    t: Interval | None
    """Of the mean."""
    interval: Interval | None
    """The one that decides, around the centre."""
    p_t: float | None
    """Two-sided, as the next two."""
    p_sign: float | None
    """None if n is too small to reach alpha, as the next."""
    p_wilcoxon: float | None
    p_value: float | None
    """Of the rule's test."""
    p_adjusted: float | None
    """Corrected within the family; without a correction equal to p_value."""
    p_outside: float | None
    """Of "differs by at least the rule's `within`"."""
    p_outside_adjusted: float | None
    share_better: float | None
    """Fraction of compared seeds in which the arm is better."""
    seeds_needed: int | None
    """For 80 % power of one t-test at this effect and spread; None: fewer than 3 seeds, or more than 1,000. Where
    chance limits p in a family: at least so many that it does not at these shares of failures, in the whole family."""
    more_lost: int
    """Lost runs of the arm, minus those of the baseline."""
    losses: tuple[str, ...]
    """Failed runs that count with a capped value, and reasons for missing seeds, in words."""
    guards: tuple[GuardResult, ...]
    verdict: Verdict
    limit: str
    """Reason or limit of the verdict, in words."""
    within: float | None = None
    sides: Sides | None = None
    """Names of a contrast's sides, if they are not arm and baseline."""

    @property
    def note(self) -> str:
        """Limits of the verdict, guards and lost runs, in words."""
        guards = [guard.text for guard in self.guards if guard.text]
        return "; ".join([*([self.limit] if self.limit else []), *guards, *self.losses])

    @property
    def text(self) -> str:
        """The verdict, with its margin if it has one."""
        return f"{self.verdict} within {self.within:g}" if self.verdict is Verdict.NO_DIFFERENCE else str(self.verdict)


def compare_paired(
    arm: Mapping[int, float],
    baseline: Mapping[int, float],
    seeds: tuple[int, ...],
    rule: Rule,
    arm_lost: Lost | None = None,
    baseline_lost: Lost | None = None,
    guards: tuple[GuardResult, ...] = (),
    sides: Sides | None = None,
    arm_failed: Collection[int] = (),
    baseline_failed: Collection[int] = (),
) -> Effect:
    """Compare an arm with the baseline as a single comparison; `judge_family` corrects for the others.

    Args:
        arm: Final value of the metric by seed; a seed without a result is absent, a failed run has its capped value.
        baseline: The same of the baseline.
        seeds: All seeds of the study.
        rule: How the verdict is reached.
        arm_lost: Runs of the arm that crashed, or diverged without any value. If the arm lost more than the baseline, a
            mean over the others cannot show that it helps; if it lost fewer, none can show that it hurts.
        baseline_lost: The same of the baseline.
        guards: Results of the guard metrics.
        sides: Names for arm and baseline, if they are something else.
        arm_failed: Seeds whose run of the arm failed.
        baseline_failed: The same of the baseline.
    """
    arm_lost, baseline_lost = arm_lost or Lost(), baseline_lost or Lost()
    paired = pair_differences(arm, baseline, seeds)
    differences = tuple(paired.values())
    left_out = tuple(s for s in seeds if s not in paired)
    failed = tuple(s for s in paired if s in arm_failed or s in baseline_failed)
    survivors = tuple(d for s, d in paired.items() if s not in failed)
    allowed = len(differences) >= least_seeds("sign", rule.alpha)
    p_value = two_sided_p(rule.test, differences) if differences else None
    outside = None if rule.within is None or not differences else p_outside(rule.test, differences, rule.within)
    sign = -1.0 if rule.direction == "lower" else 1.0
    t, bootstrap = t_interval(differences, rule.alpha), bootstrap_interval(differences, rule.alpha)
    return judge_alone(
        Effect(
            seeds=tuple(paired),
            left_out=left_out,
            differences=differences,
            failed=failed,
            failures=(sum(s in arm_failed for s in failed), sum(s in baseline_failed for s in failed)),
            jump=max(
                find_jump({s: arm[s] for s in paired}, arm_failed),
                find_jump({s: baseline[s] for s in paired}, baseline_failed),
            ),
            survivors=float(np.mean(survivors)) if survivors else None,
            survivors_interval=t_interval(survivors, rule.alpha),
            mean=float(np.mean(differences)) if differences else None,
            centre=centre_of(rule.test, differences),
            bootstrap=bootstrap,
            t=t,
            interval=wider(t, bootstrap) if rule.test == "t" else interval_of(rule.test, differences, rule.alpha),
            p_t=paired_p(differences),
            p_sign=two_sided_p("sign", differences) if allowed else None,
            p_wilcoxon=two_sided_p("wilcoxon", differences) if allowed else None,
            p_value=p_value,
            p_adjusted=p_value,
            p_outside=outside,
            p_outside_adjusted=outside,
            share_better=sum(sign * d > 0 for d in differences) / len(differences) if differences else None,
            seeds_needed=seeds_needed(differences, rule.alpha),
            more_lost=arm_lost.against - baseline_lost.against,
            losses=(
                *_explain_failures(tuple(paired), arm_failed, baseline_failed, survivors, rule, sides),
                *_explain_losses(left_out, seeds, arm_lost, baseline_lost, sides),
            ),
            guards=guards,
            verdict=Verdict.INCONCLUSIVE,
            limit="",
            within=rule.within,
            sides=sides,
        ),
        rule,
    )


def judge_family(
    effects: Mapping[str, Effect], rule: Rule, jumps: Mapping[str, float] | None = None
) -> dict[str, Effect]:
    """Judge the comparisons of one study together, with Holm's correction if the rule asks for it.

    "No difference" and "differs by at least `within`" are two families, since only one of them can be true of an arm.
    An arm without a p (stopped early, or too few seeds so far) counts in both with p = 1. So no other arm's p gets
    smaller by its absence, and arms to come take back no verdict of a running study.

    Args:
        effects: The family, by name.
        rule: How verdicts are reached.
        jumps: What chance can make of the runs of each comparison; None: the largest jump of any of them.
    """
    if rule.correction == "none":
        return dict(effects)
    if jumps is None:
        jumps = dict.fromkeys(effects, max((effect.jump for effect in effects.values()), default=0.0))
    effects = {name: _limit_p(effect, rule, jumps[name], len(effects)) for name, effect in effects.items()}
    absent = {name: 1.0 for name, effect in effects.items() if len(effect.differences) < _LEAST_PAIRS}
    plain = holm({name: effect.p_value for name, effect in effects.items()} | absent)
    outside = holm({name: effect.p_outside for name, effect in effects.items()} | absent)
    return {
        name: effect
        if name in absent
        else judge_alone(dataclasses.replace(effect, p_adjusted=plain[name], p_outside_adjusted=outside[name]), rule)
        for name, effect in effects.items()
    }


def _limit_p(effect: Effect, rule: Rule, jump: float, family: int) -> Effect:
    """Return an effect whose p is at least that of its counts of failures, if a jump could have made the effect.

    Holm asks of one comparison in `family` at most alpha / family; that counts for the seeds needed.
    """
    mine, theirs = effect.failures
    if effect.p_value is None or effect.mean is None or mine == theirs or not is_within_jump(effect.mean, jump):
        return effect
    limit = chance_p(mine, theirs, len(effect.seeds))
    if limit <= effect.p_value:
        return effect
    text = f"p of {mine} against {theirs} failures by chance: {format_p(limit, rule.alpha)}"
    least = seeds_against_chance(mine, theirs, len(effect.seeds), rule.alpha / family)
    return dataclasses.replace(
        effect,
        p_value=limit,
        p_adjusted=limit,
        losses=(*effect.losses, text),
        seeds_needed=None if least is None else max(least, effect.seeds_needed or 0),
    )


def check_guard(
    metric: str,
    arm: Mapping[int, float],
    baseline: Mapping[int, float],
    seeds: tuple[int, ...],
    direction: Direction,
    at_most: float,
    alpha: float,
    compared: tuple[int, ...] = (),
) -> GuardResult:
    """Return the result of a guard: a metric that may get worse by `at_most`.

    arm, baseline: final values by seed. compared: seeds in which the primary metric is compared. The guard cannot hold
    if one of them lacks a finite value in either arm.
    """
    sign = 1.0 if direction == "lower" else -1.0
    paired = pair_differences(arm, baseline, seeds)
    worse = tuple(sign * d for d in paired.values())
    mean = float(np.mean(worse)) if worse else None
    missing = sum(seed not in paired for seed in compared)
    return GuardResult(metric, at_most, mean, t_interval(worse, alpha), missing)


def pair_differences(
    arm: Mapping[int, float], baseline: Mapping[int, float], seeds: tuple[int, ...]
) -> dict[int, float]:
    """Return the finite differences arm - baseline by seed, in the study's order."""
    paired = {s: arm[s] - baseline[s] for s in seeds if s in arm and s in baseline}
    return {s: d for s, d in paired.items() if math.isfinite(d)}


def judge_alone(effect: Effect, rule: Rule) -> Effect:
    """Return an effect with its verdict, by the p values that it has; `judge_family` corrects them before."""
    if not effect.differences:
        return dataclasses.replace(effect, limit="no seed has a finite result in both arms")
    evidence = Evidence(
        effect.interval,
        len(effect.differences),
        effect.more_lost,
        effect.p_adjusted,
        effect.p_outside_adjusted,
        is_constant(effect.differences),
        effect.sides,
    )
    verdict, limit = decide(evidence, rule)
    return dataclasses.replace(effect, verdict=apply_guards(verdict, effect.guards), limit=limit)


def _explain_failures(
    seeds: tuple[int, ...],
    arm: Collection[int],
    baseline: Collection[int],
    survivors: tuple[float, ...],
    rule: Rule,
    sides: Sides | None,
) -> list[str]:
    """Return how many runs failed on each side, how they count, and the mean over the other seeds."""
    mine, theirs = sides or ("this arm", "the baseline")
    counts = [(sum(seed in failed for seed in seeds), whose) for failed, whose in ((arm, mine), (baseline, theirs))]
    phrases = [f"{whose} failed in {count} of {len(seeds)} seeds" for count, whose in counts if count]
    if not phrases:
        return []
    phrases.append("failed runs count with their capped value")
    if survivors:
        interval = t_interval(survivors, rule.alpha)
        around = f" [{interval.low:+.4g}, {interval.high:+.4g}]" if interval else ""
        where = "the seed" if len(survivors) == 1 else f"the {len(survivors)} seeds"
        phrases.append(f"{float(np.mean(survivors)):+.4g}{around} in {where} without a failure")
    return phrases


def _explain_losses(
    left_out: tuple[int, ...], seeds: tuple[int, ...], arm: Lost, baseline: Lost, sides: Sides | None
) -> list[str]:
    """Return one phrase per reason for which seeds are missing from a comparison."""
    phrases = []
    if left_out:
        phrases.append(f"{len(left_out)} of {len(seeds)} seeds left out")
    for whose, lost in zip(sides or ("this arm", "the baseline"), (arm, baseline), strict=True):
        for count, what in ((lost.diverged, "diverged"), (lost.crashed, "crashed")):
            if count and sides is not None:
                phrases.append(f"{count} of the {whose} {what}")
            elif count == len(seeds):
                phrases.append(f"every run of {whose} {what}")
            elif count:
                phrases.append(f"{count} {'run' if count == 1 else 'runs'} of {whose} {what}")
    return phrases
