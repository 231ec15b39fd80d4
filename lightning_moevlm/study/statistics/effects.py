"""Effects paired by seed: how much an arm differs from the baseline, how sure that is, and the word for it.

Runs of one seed share data order and, where shapes agree, initial weights, so the difference d_i = arm_i - baseline_i
within a seed is what carries the information. Of these n differences: the mean, the interval that decides
(`intervals`), the p values (`paired_tests`), the share of seeds that got better, the seeds it would take (`power`), and
the word (`verdict`). A bootstrap of three numbers covers far less than it promises, so of t and bootstrap **the wider
interval decides**. Pure functions of numbers.
"""

import dataclasses
import math
from collections.abc import Mapping
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
)
from lightning_moevlm.study.statistics.paired_tests import holm, least_seeds, p_outside, paired_p, two_sided_p
from lightning_moevlm.study.statistics.power import seeds_needed
from lightning_moevlm.study.statistics.verdict import Evidence, GuardResult, Rule, Sides, Verdict, apply_guards, decide

_LEAST_PAIRS = 2  # of one no test has a p


class Lost(NamedTuple):
    """Runs of an arm that gave no sound result, by kind. unpaired: how many of them the other side has no run for."""

    diverged: int = 0
    crashed: int = 0
    unpaired: int = 0

    @property
    def against(self) -> int:
        """Those that speak against the arm: an arm with more seeds than the other has more to lose."""
        return self.diverged + self.crashed - self.unpaired


@dataclass(frozen=True)
class Effect:
    """An arm against the baseline; differences are arm minus baseline, in the metric's unit.

    seeds: those compared. left_out: seeds of the study that have no difference (crashed, diverged to a non-finite value
    or not yet run, in either arm). centre: what the deciding interval is of, by the rule's test: the mean, for ranks
    the Hodges-Lehmann estimate, for signs the median; one seed may pull a mean out of an interval of these. bootstrap,
    t: the two intervals of the mean; interval: the one that decides. p_t, p_sign, p_wilcoxon: two-sided; the last two
    None where n is too small for them at alpha. p_value: of the rule's test. p_outside: of "differs by at least the
    rule's `within`". p_adjusted, p_outside_adjusted: of the two within the family; without a correction they are the
    plain ones. share_better: fraction of compared seeds in which the arm is ahead. seeds_needed: for 80 % power of a
    t-test at this effect and spread, one comparison; None where it cannot be told (fewer than 3 seeds) or is beyond
    1,000. losses: what to know of missing seeds. limit: what limits the verdict. sides: of a contrast that is not arm
    against baseline.
    """

    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None
    centre: float | None
    bootstrap: Interval | None
    t: Interval | None
    interval: Interval | None
    p_t: float | None
    p_sign: float | None
    p_wilcoxon: float | None
    p_value: float | None
    p_adjusted: float | None
    p_outside: float | None
    p_outside_adjusted: float | None
    share_better: float | None
    seeds_needed: int | None
    more_lost: int
    losses: tuple[str, ...]
    guards: tuple[GuardResult, ...]
    verdict: Verdict
    limit: str
    within: float | None = None
    sides: Sides | None = None

    @property
    def note(self) -> str:
        """All that a reader must know of the verdict."""
        guards = [guard.text for guard in self.guards if guard.text]
        return "; ".join([*([self.limit] if self.limit else []), *guards, *self.losses])

    @property
    def text(self) -> str:
        """The verdict as it is shown, with the margin where it speaks of one."""
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
) -> Effect:
    """Compare an arm with the baseline, as the only comparison; `judge_family` judges it among others.

    Args:
        arm: Final value of the metric by seed; a seed without a result is absent, a diverged one may be non-finite.
        baseline: The same of the baseline.
        seeds: All seeds of the study.
        rule: How the verdict is reached.
        arm_lost: Runs of the arm that diverged or crashed. Where they are more than of the baseline, no mean over the
            survivors may say that the arm helps; where they are fewer, none may say that it hurts.
        baseline_lost: The same of the baseline.
        guards: What became of the metrics that may not get worse.
        sides: What arm and baseline are called where they are something else.
    """
    arm_lost, baseline_lost = arm_lost or Lost(), baseline_lost or Lost()
    paired = pair_differences(arm, baseline, seeds)
    differences = tuple(paired.values())
    left_out = tuple(s for s in seeds if s not in paired)
    allowed = len(differences) >= least_seeds("sign", rule.alpha)
    p_value = two_sided_p(rule.test, differences) if differences else None
    outside = None if rule.within is None or not differences else p_outside(rule.test, differences, rule.within)
    sign = -1.0 if rule.direction == "lower" else 1.0
    return _judge(
        Effect(
            seeds=tuple(paired),
            left_out=left_out,
            differences=differences,
            mean=float(np.mean(differences)) if differences else None,
            centre=centre_of(rule.test, differences),
            bootstrap=bootstrap_interval(differences, rule.alpha),
            t=t_interval(differences, rule.alpha),
            interval=interval_of(rule.test, differences, rule.alpha),
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
            losses=tuple(_explain_losses(left_out, seeds, arm_lost, baseline_lost, sides)),
            guards=guards,
            verdict=Verdict.INCONCLUSIVE,
            limit="",
            within=rule.within,
            sides=sides,
        ),
        rule,
    )


def judge_family(effects: Mapping[str, Effect], rule: Rule) -> dict[str, Effect]:
    """Judge the comparisons of one study together: with Holm's correction, if that is the rule's.

    "No difference" and "differs by at least `within`" are two families: of one arm only one of the two can be true. An
    arm that was stopped early, or has too few seeds for a p, yet or for good, counts in both with p = 1: no other arm's
    p gets smaller by its absence, and no verdict of a study that still runs is taken back by the arms to come.
    """
    if rule.correction == "none":
        return dict(effects)
    absent = {name: 1.0 for name, effect in effects.items() if len(effect.differences) < _LEAST_PAIRS}
    plain = holm({name: effect.p_value for name, effect in effects.items()} | absent)
    outside = holm({name: effect.p_outside for name, effect in effects.items()} | absent)
    return {
        name: effect
        if name in absent
        else _judge(
            dataclasses.replace(effect, p_adjusted=plain[name], p_outside_adjusted=outside[name]),
            rule,
        )
        for name, effect in effects.items()
    }


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
    """Return what became of a metric that may get worse by `at_most`.

    arm, baseline: final values by seed. compared: seeds in which the primary metric is compared; where one of them has
    no finite value of this one in both arms, nobody can say that it held.
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
    """Return arm - baseline of every seed that has a finite one, in the study's order."""
    paired = {s: arm[s] - baseline[s] for s in seeds if s in arm and s in baseline}
    return {s: d for s, d in paired.items() if math.isfinite(d)}


def _judge(effect: Effect, rule: Rule) -> Effect:
    """Return an effect with its verdict."""
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


def _explain_losses(
    left_out: tuple[int, ...], seeds: tuple[int, ...], arm: Lost, baseline: Lost, sides: Sides | None
) -> list[str]:
    """Return what a reader must know of the seeds that are missing from a comparison."""
    told = []
    if left_out:
        told.append(f"{len(left_out)} of {len(seeds)} seeds left out")
    for whose, lost in zip(sides or ("this arm", "the baseline"), (arm, baseline), strict=True):
        for count, what in ((lost.diverged, "diverged"), (lost.crashed, "crashed")):
            if count and sides is not None:
                told.append(f"{count} of the {whose} {what}")
            elif count == len(seeds):
                told.append(f"every run of {whose} {what}")
            elif count:
                told.append(f"{count} {'run' if count == 1 else 'runs'} of {whose} {what}")
    return told
