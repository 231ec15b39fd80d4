"""Lists the runs of a study as flat records: `sweep plan --json` and `sweep status --json` write them."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lightning_moevlm.common.flat_config import flatten_values
from lightning_moevlm.study.compare.known_runs import KnownRuns
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.plan.solve_arms import list_solved
from lightning_moevlm.study.run.ledger import RunState
from lightning_moevlm.study.run.probe import Probe


def plan_records(
    plan: Plan,
    statuses: Mapping[str, str],
    probes: Mapping[str, Probe] = MappingProxyType({}),
    known: KnownRuns | None = None,
) -> list[dict[str, object]]:
    """Return one record per planned run.

    Args:
        plan: The runs.
        statuses: By run folder.
        probes: By arm; without one, times are None.
        known: Runs in other studies.
    """
    taken = known.taken if known else {}
    solved = list_solved(plan.comparison, plan.cards)
    minutes = plan.study.budget.minutes
    changes = {arm.name: flatten_values(arm.changes) for arm in plan.comparison.arms}
    levels = {arm.name: {here.factor: here.level for here in arm.levels} for arm in plan.comparison.arms}
    return [
        {
            **_identity(run),
            "status": statuses[run.folder],
            "known_from": taken[run.folder].text if run.folder in taken else "",  # what `sweep run` would take
            "changes": changes[run.arm],  # over the base
            "solved": dataclasses.asdict(solved[run.arm]) if run.arm in solved else None,  # among the changes
            "levels": levels[run.arm],  # by factor, in a designed study
            "max_steps": run.max_steps,  # None: the clock ends the run
            **plan.cards[run.arm]._asdict(),
            "seconds_per_step": probes[run.arm].step if run.arm in probes else None,
            "estimated_seconds": probes[run.arm].run_seconds(run, minutes) if run.arm in probes else None,
            "folder": str(plan.run_folder(run)),
        }
        for run in plan.runs
    ]


def status_records(plan: Plan, ledger: Sequence[tuple[PlannedRun, RunState]]) -> list[dict[str, object]]:
    """Return one record per planned run with its state."""
    return [
        {
            **_identity(run),
            "status": str(state.status),
            "attempts": state.attempts,
            "seconds": state.seconds,  # wall time of the latest attempt
            "run_id": state.run_id,
            "exit_code": state.exit_code,
            "reason": state.reason,
            "taken_from": state.taken_from,  # the run of another study that it copies
            "folder": str(plan.run_folder(run)),
        }
        for run, state in ledger
    ]


def _identity(run: PlannedRun) -> dict[str, object]:
    return {"study": run.study, "arm": run.arm, "seed": run.seed, "digest": run.digest}
