"""What a study gave, as flat records, one per row: what `sweep report --json` writes and the report's folder holds."""

import math
from dataclasses import dataclass

from lightning_moevlm.study.compare.results import ArmResult, RunResult, StudyResult
from lightning_moevlm.study.run.ledger import Status
from lightning_moevlm.study.statistics.stability import Stability
from lightning_moevlm.study.statistics.verdict import GuardResult


@dataclass(frozen=True)
class GuardRecord:
    """One guard metric of one arm; worse: mean over paired seeds, negative where it got better.

    seeds_missing: of those in which the primary metric is compared, how many have no finite value of it in both arms.
    """

    metric: str
    at_most: float
    worse: float | None
    worse_low: float | None
    worse_high: float | None
    broken: bool
    seeds_missing: int


@dataclass(frozen=True)
class StabilityRecord:
    """One run, as `stability.Stability` tells it; null also for an infinite number. recovered: every spike ended."""

    seed: int
    diverged: bool
    diverged_at: int | None
    spikes_loss: float | None
    spikes_gradient: float | None
    spikes_update: float | None
    recovered: bool | None
    recovery_steps: float | None
    recovery_tokens: float | None
    largest_attention_logit: float | None
    largest_router_logit: float | None
    largest_log_partition: float | None
    dead_share: float | None
    max_violation: float | None
    balance_share: float | None


@dataclass(frozen=True)
class FactorRecord:
    """A main effect (one factor) or a two-way interaction, in the metric's unit.

    levels, against: of each factor, the level that is held against another one; on against off of a switch.
    """

    study: str
    factors: list[str]
    levels: list[str]
    against: list[str]
    metric: str
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    p_value: float | None
    p_adjusted: float | None
    verdict: str
    note: str
    seeds_compared: int


@dataclass(frozen=True)
class LadderRecord:
    """One learning rate of one ladder; sensitivity, with its deviation over seeds, is the ladder's."""

    study: str
    ladder: str
    learning_rate: float
    arm: str
    final_mean: float | None
    stable: int
    total: int
    largest_stable: float | None
    sensitivity: float | None
    sensitivity_deviation: float | None


@dataclass(frozen=True)
class UnlikeRecord:
    """One thing that was not the same in all runs. weight: biases, warns or declared; values: to the runs."""

    study: str
    what: str
    weight: str
    values: dict[str, list[str]]


@dataclass(frozen=True)
class ArmRecord:
    """One arm in numbers; None where there is none yet. Units as in keys.py; differences are arm minus baseline.

    p_value: of the study's test; p_adjusted: corrected as the study says; p_outside_within: of "differs by `within` or
    more", corrected too. at_equal: the metric where all runs had spent the same tokens, active FLOPs or seconds.
    """

    study: str
    arm: str
    metric: str
    final_mean: float | None
    final_deviation: float | None
    untrained: float | None
    seeds_learned: int
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    interval_method: str | None
    bootstrap_low: float | None
    bootstrap_high: float | None
    test: str
    p_value: float | None
    p_adjusted: float | None
    p_t: float | None
    p_sign: float | None
    p_wilcoxon: float | None
    within: float | None
    p_outside_within: float | None
    share_better: float | None
    seeds_compared: int
    seeds_needed: int | None
    verdict: str
    note: str
    guards: list[GuardRecord]
    stability: list[StabilityRecord]
    stable_p: float | None
    at_equal: dict[str, float]
    accuracy: dict[str, float]
    majority_accuracy: dict[str, float]
    also: dict[str, float]
    total_parameters: int | None
    active_parameters: int | None
    active_flops_per_sample: float | None
    samples_per_second: float | None
    seconds_per_run: float | None
    runs_planned: int
    runs_finished: int
    runs_diverged: int
    runs_failed: int


def arm_record(study: StudyResult, arm: ArmResult) -> ArmRecord:
    """Return an arm's record."""
    effect = arm.effect
    interval = effect.interval if effect else None
    bootstrap = effect.bootstrap if effect else None
    return ArmRecord(
        study=study.comparison.name,
        arm=arm.arm.name,
        metric=study.comparison.primary.metric,
        final_mean=arm.final.mean if arm.final else None,
        final_deviation=arm.final.deviation if arm.final else None,
        untrained=arm.untrained.mean if arm.untrained else None,
        seeds_learned=arm.learned,
        effect=effect.centre if effect else None,
        effect_low=interval.low if interval else None,
        effect_high=interval.high if interval else None,
        interval_method=interval.method if interval else None,
        bootstrap_low=bootstrap.low if bootstrap else None,
        bootstrap_high=bootstrap.high if bootstrap else None,
        test=study.comparison.decide.test,
        p_value=effect.p_value if effect else None,
        p_adjusted=effect.p_adjusted if effect else None,
        p_t=effect.p_t if effect else None,
        p_sign=effect.p_sign if effect else None,
        p_wilcoxon=effect.p_wilcoxon if effect else None,
        within=study.comparison.decide.within,
        p_outside_within=effect.p_outside_adjusted if effect else None,
        share_better=effect.share_better if effect else None,
        seeds_compared=len(effect.seeds) if effect else 0,
        seeds_needed=effect.seeds_needed if effect else None,
        verdict=str(arm.verdict),
        note=effect.note if effect else "",
        guards=[_guard_record(guard) for guard in effect.guards] if effect else [],
        stability=[
            _stability_record(run, one)
            for run, one in zip((r for r in arm.runs if r.state.status.has_result), arm.stability.runs, strict=True)
        ],
        stable_p=arm.stability.p,
        at_equal={what: mean.mean for what, mean in arm.equal.items()},
        accuracy={term: mean.mean for term, mean in arm.accuracy.items()},
        majority_accuracy={term: mean.mean for term, mean in arm.majority.items()},
        also={key: mean.mean for key, mean in arm.also.items()},
        total_parameters=arm.card.total_parameters if arm.card else None,
        active_parameters=arm.card.active_parameters if arm.card else None,
        active_flops_per_sample=arm.card.active_flops_per_sample if arm.card else None,
        samples_per_second=arm.samples_per_second.mean if arm.samples_per_second else None,
        seconds_per_run=arm.seconds.mean if arm.seconds else None,
        runs_planned=arm.planned,
        runs_finished=arm.finished,
        runs_diverged=arm.diverged,
        runs_failed=arm.failed,
    )


def factor_records(study: StudyResult) -> list[FactorRecord]:
    """Return one record per main effect and interaction."""
    return [
        FactorRecord(
            study=study.comparison.name,
            factors=list(one.factors),
            levels=[contrast.level for contrast in one.contrasts],
            against=[contrast.other for contrast in one.contrasts],
            metric=study.comparison.primary.metric,
            effect=one.effect.centre,
            effect_low=one.effect.interval.low if one.effect.interval else None,
            effect_high=one.effect.interval.high if one.effect.interval else None,
            p_value=one.effect.p_value,
            p_adjusted=one.effect.p_adjusted,
            verdict=str(one.effect.verdict),
            note=one.effect.note,
            seeds_compared=len(one.effect.seeds),
        )
        for one in study.factors
    ]


def ladder_records(study: StudyResult) -> list[LadderRecord]:
    """Return one record per learning rate of every ladder."""
    return [
        LadderRecord(
            study=study.comparison.name,
            ladder=one.ladder.name,
            learning_rate=rate,
            arm=arm,
            final_mean=mean.mean if (mean := one.finals[rate]) else None,
            stable=one.stable[rate],
            total=one.total[rate],
            largest_stable=one.largest_stable,
            sensitivity=one.sensitivity.mean if one.sensitivity else None,
            sensitivity_deviation=one.sensitivity.deviation if one.sensitivity else None,
        )
        for one in study.ladders
        for rate, arm in one.ladder.rungs.items()
    ]


def unlike_records(study: StudyResult) -> list[UnlikeRecord]:
    """Return one record per thing that was not the same in all runs."""
    name = study.comparison.name
    return [
        UnlikeRecord(name, one.name, str(one.weight), {value: list(runs) for value, runs in one.values.items()})
        for one in study.unlike
    ]


def _guard_record(guard: GuardResult) -> GuardRecord:
    return GuardRecord(
        metric=guard.metric,
        at_most=guard.at_most,
        worse=guard.worse,
        worse_low=guard.interval.low if guard.interval else None,
        worse_high=guard.interval.high if guard.interval else None,
        broken=guard.is_broken,
        seeds_missing=guard.missing,
    )


def _stability_record(run: RunResult, one: Stability) -> StabilityRecord:
    steps = one.recovery_steps
    return StabilityRecord(
        seed=run.seed,
        diverged=run.state.status is Status.DIVERGED,
        diverged_at=one.diverged_at,
        spikes_loss=one.spikes_loss,
        spikes_gradient=one.spikes_gradient,
        spikes_update=one.spikes_update,
        recovered=None if steps is None else math.isfinite(steps),
        recovery_steps=_finite(steps),
        recovery_tokens=_finite(one.recovery_tokens),
        largest_attention_logit=_finite(one.largest_attention_logit),
        largest_router_logit=_finite(one.largest_router_logit),
        largest_log_partition=_finite(one.largest_log_partition),
        dead_share=one.dead_share,
        max_violation=one.max_violation,
        balance_share=one.balance_share,
    )


def _finite(value: float | None) -> float | None:
    """Return what JSON has a number for."""
    return value if value is not None and math.isfinite(value) else None
