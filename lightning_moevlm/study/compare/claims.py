"""Holds published claims against the runs of a study: each is reproduced, not seen or reversed.

Differences are paired by seed and tested as arms are (`statistics/effects.py`), at the study's error rate. If the study
corrects, Holm corrects over its claims; controls are a family of their own.

- `expect: lower` or `higher` is reproduced if that difference is shown, reversed if the opposite one is.
- `expect: same` is reproduced if the whole interval lies within the margin, reversed if it lies outside of it.
- Anything else is not seen, which does not refute the claim.

In the primary metric a failed run counts with its capped value. Other metrics compare runs that survived.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from lightning_moevlm.study.compare.results import (
    ClaimResult,
    LadderResult,
    Reproduction,
    RunResult,
    count_lost,
    ended_seeds,
    mean_of,
    read_finals,
    read_values,
)
from lightning_moevlm.study.declare.claims import LR_SENSITIVITY, Claim
from lightning_moevlm.study.declare.comparison import Comparison
from lightning_moevlm.study.statistics.effects import Effect, compare_paired, judge_alone, judge_family
from lightning_moevlm.study.statistics.verdict import Rule, Sides, Verdict

Runs = Mapping[str, Sequence[RunResult]]


def judge_claims(study: Comparison, by_arm: Runs, ladders: Sequence[LadderResult]) -> tuple[ClaimResult, ...]:
    """Return every claim with its verdict, in the file's order.

    Args:
        study: Claims and rules.
        by_arm: All runs, those that did not learn marked so.
        ladders: Arms that differ in the learning rate alone.
    """
    rule = Rule("lower", study.decide.alpha, study.decide.test, study.decide.correction)
    effects = {str(i): _compare(study, claim, rule, by_arm, ladders) for i, claim in enumerate(study.claims)}
    judged: dict[str, Effect] = {}
    for family in (False, True):
        own = {str(i) for i, claim in enumerate(study.claims) if claim.is_control is family}
        judged |= judge_family({name: effect for name, effect in effects.items() if name in own}, rule)
    return tuple(
        _result(claim, judged[str(i)], rule, _measure(study, claim, by_arm, ladders))
        for i, claim in enumerate(study.claims)
    )


def _result(
    claim: Claim, effect: Effect, rule: Rule, sides: tuple[Mapping[int, float], Mapping[int, float]]
) -> ClaimResult:
    if claim.within is not None:
        effect = judge_alone(effect, dataclasses.replace(rule, within=claim.within))
    mine, theirs = (mean_of([values[seed] for seed in effect.seeds]) for values in sides)
    return ClaimResult(claim, _verdict(claim, effect), effect, mine, theirs)


def _verdict(claim: Claim, effect: Effect) -> Reproduction:
    if not effect.differences:
        return Reproduction.NOT_RUN
    shown = {Verdict.HELPS: "lower", Verdict.HURTS: "higher", Verdict.NO_DIFFERENCE: "same"}.get(effect.verdict)
    if shown == claim.expect:
        return Reproduction.REPRODUCED
    if shown is None or effect.interval is None:
        return Reproduction.NOT_SEEN
    margin = claim.within or 0.0
    is_outside = effect.interval.low > margin or effect.interval.high < -margin
    return Reproduction.REVERSED if is_outside else Reproduction.NOT_SEEN


def _compare(study: Comparison, claim: Claim, rule: Rule, by_arm: Runs, ladders: Sequence[LadderResult]) -> Effect:
    mine, theirs = _measure(study, claim, by_arm, ladders)
    runs, others = by_arm[claim.arm], by_arm[claim.against]
    finals, other_finals = read_finals(runs, study.primary), read_finals(others, study.primary)
    is_primary = claim.metric == claim.against_metric == study.primary.metric
    return compare_paired(
        arm=mine,
        baseline=theirs,
        seeds=study.seeds,
        rule=rule if claim.within is None else dataclasses.replace(rule, within=claim.within),
        arm_lost=count_lost(runs, finals, ended_seeds(others)) if is_primary else None,
        baseline_lost=count_lost(others, other_finals, ended_seeds(runs)) if is_primary else None,
        sides=Sides(claim.arm, claim.against),
        arm_failed={seed for seed, final in finals.items() if final.failed} if is_primary else (),
        baseline_failed={seed for seed, final in other_finals.items() if final.failed} if is_primary else (),
    )


def _measure(
    study: Comparison, claim: Claim, by_arm: Runs, ladders: Sequence[LadderResult]
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the values of both sides by seed."""
    sides = ((claim.arm, claim.metric), (claim.against, claim.against_metric))
    mine, theirs = (_values(study, arm, metric, by_arm, ladders) for arm, metric in sides)
    return mine, theirs


def _values(
    study: Comparison, arm: str, metric: str, by_arm: Runs, ladders: Sequence[LadderResult]
) -> dict[int, float]:
    if metric == LR_SENSITIVITY:
        own = [one for one in ladders if arm in {*one.ladder.rungs.values(), *one.ladder.twins}]
        return dict(own[0].by_seed) if own else {}
    if metric == study.primary.metric:
        return {seed: final.value for seed, final in read_finals(by_arm[arm], study.primary).items()}
    return read_values(by_arm[arm], metric)
