"""The runs of a study as flat records, one per row: what `sweep plan --json` and `sweep status --json` write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.compare.known_runs import KnownRuns
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.ledger import RunState
from lightning_moevlm.study.run.probe import Probe


@dataclass(frozen=True)
class PlanRecord:
    """One planned run: identity, difference from the base, size of its model, where it stands.

    levels: of a designed study, the level of each factor. max_steps: None where the clock ends the run.
    known_from: the run of another study that `sweep run` would take, or "". seconds_per_step, estimated_seconds: of a
    whole run on this machine; None without a probe.
    """

    study: str
    arm: str
    seed: int
    digest: str
    status: str
    known_from: str
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
    """Where one run stands. seconds: wall time of its latest attempt. taken_from: the run that it copies, or ""."""

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
    taken_from: str
    folder: str


def plan_records(
    plan: Plan,
    statuses: dict[str, str],
    probes: Mapping[str, Probe] = MappingProxyType({}),
    known: KnownRuns | None = None,
) -> list[PlanRecord]:
    """Return one record per planned run. statuses: by run folder; probes: by arm, if any; known: in other studies."""
    taken = known.taken if known else {}
    minutes = plan.study.budget.minutes
    changes = {arm.name: flatten_values(arm.changes) for arm in plan.comparison.arms}
    levels = {arm.name: {here.factor: here.level for here in arm.levels} for arm in plan.comparison.arms}
    return [
        PlanRecord(
            study=run.study,
            arm=run.arm,
            seed=run.seed,
            digest=run.digest,
            status=statuses[run.folder],
            known_from=taken[run.folder].text if run.folder in taken else "",
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
            taken_from=state.taken_from,
            folder=str(plan.run_folder(run)),
        )
        for run, state in ledger
    ]
