"""The numbers of a study as flat records, one per row: what `--json` writes and report.json holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lightning_moevlm.study.ledger import RunState
from lightning_moevlm.study.plan import Plan, PlannedRun, flat
from lightning_moevlm.study.probe import Probe
from lightning_moevlm.study.results import ArmResult, StudyResult


@dataclass(frozen=True)
class ArmRecord:
    """One arm in numbers; None where there is none yet. Units as in keys.py; differences are arm minus baseline."""

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
    p_value: float | None
    share_better: float | None
    seeds_compared: int
    seeds_needed: int | None
    verdict: str
    note: str
    accuracy: dict[str, float]
    majority_accuracy: dict[str, float]
    also: dict[str, float]
    total_parameters: int
    active_parameters: int
    active_flops_per_sample: float
    samples_per_second: float | None
    seconds_per_run: float | None
    runs_planned: int
    runs_finished: int
    runs_diverged: int
    runs_failed: int


@dataclass(frozen=True)
class PlanRecord:
    """One planned run: identity, difference from the base, size of its model, where it stands.

    levels: of a designed study, the level of each factor. max_steps: None where the clock ends the run.
    seconds_per_step, estimated_seconds: of a whole run on this machine; None without a probe.
    """

    study: str
    arm: str
    seed: int
    digest: str
    status: str
    changes: dict[str, object]
    levels: dict[str, str]
    max_steps: int | None
    total_parameters: int
    active_parameters: int
    active_flops_per_sample: float
    seconds_per_step: float | None
    estimated_seconds: float | None
    folder: str


@dataclass(frozen=True)
class StatusRecord:
    """Where one run stands. seconds: wall time of its latest attempt."""

    study: str
    arm: str
    seed: int
    digest: str
    status: str
    attempts: int
    seconds: float | None
    run_id: str | None
    exit_code: int | None
    reason: str
    folder: str


def arm_record(study: StudyResult, arm: ArmResult) -> ArmRecord:
    """Return an arm's record."""
    effect = arm.effect
    interval = effect.interval if effect else None
    bootstrap = effect.bootstrap if effect else None
    return ArmRecord(
        study=study.study.name,
        arm=arm.arm.name,
        metric=study.study.primary.metric,
        final_mean=arm.final.mean if arm.final else None,
        final_deviation=arm.final.deviation if arm.final else None,
        untrained=arm.untrained.mean if arm.untrained else None,
        seeds_learned=arm.learned,
        effect=effect.mean if effect else None,
        effect_low=interval.low if interval else None,
        effect_high=interval.high if interval else None,
        interval_method=interval.method if interval else None,
        bootstrap_low=bootstrap.low if bootstrap else None,
        bootstrap_high=bootstrap.high if bootstrap else None,
        p_value=effect.p_value if effect else None,
        share_better=effect.share_better if effect else None,
        seeds_compared=len(effect.seeds) if effect else 0,
        seeds_needed=effect.seeds_needed if effect else None,
        verdict=str(arm.verdict),
        note=effect.note if effect else "",
        accuracy={term: mean.mean for term, mean in arm.accuracy.items()},
        majority_accuracy={term: mean.mean for term, mean in arm.majority.items()},
        also={key: mean.mean for key, mean in arm.also.items()},
        total_parameters=arm.card.total_parameters,
        active_parameters=arm.card.active_parameters,
        active_flops_per_sample=arm.card.active_flops_per_sample,
        samples_per_second=arm.samples_per_second.mean if arm.samples_per_second else None,
        seconds_per_run=arm.seconds.mean if arm.seconds else None,
        runs_planned=arm.planned,
        runs_finished=arm.finished,
        runs_diverged=arm.diverged,
        runs_failed=arm.failed,
    )


def plan_records(
    plan: Plan, statuses: dict[str, str], probes: Mapping[str, Probe] = MappingProxyType({})
) -> list[PlanRecord]:
    """Return one record per planned run. statuses: by run folder; probes: by arm, if any."""
    minutes = plan.study.budget.minutes
    changes = {arm.name: flat(arm.changes) for arm in plan.study.arms}
    levels = {arm.name: {here.factor: here.level for here in arm.levels} for arm in plan.study.arms}
    return [
        PlanRecord(
            study=run.study,
            arm=run.arm,
            seed=run.seed,
            digest=run.digest,
            status=statuses[run.folder],
            changes=changes[run.arm],
            levels=levels[run.arm],
            max_steps=run.max_steps,
            total_parameters=plan.cards[run.arm].total_parameters,
            active_parameters=plan.cards[run.arm].active_parameters,
            active_flops_per_sample=plan.cards[run.arm].active_flops_per_sample,
            seconds_per_step=probes[run.arm].step if run.arm in probes else None,
            estimated_seconds=probes[run.arm].run_seconds(run, minutes) if run.arm in probes else None,
            folder=str(plan.run_folder(run)),
        )
        for run in plan.runs
    ]


def status_records(plan: Plan, ledger: Sequence[tuple[PlannedRun, RunState]]) -> list[StatusRecord]:
    """Return one record per planned run: where it stands."""
    return [
        StatusRecord(
            study=run.study,
            arm=run.arm,
            seed=run.seed,
            digest=run.digest,
            status=str(state.status),
            attempts=state.attempts,
            seconds=state.seconds,
            run_id=state.run_id,
            exit_code=state.exit_code,
            reason=state.reason,
            folder=str(plan.run_folder(run)),
        )
        for run, state in ledger
    ]
