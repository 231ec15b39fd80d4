"""Finds the runs of a plan that still have to be executed."""

import shutil

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.engines import Engine
from lightning_moevlm.study.run.ledger import RunState, Status, find_process, read_state, write_state
from lightning_moevlm.study.run.mlflow_runs import OUTCOME, StudyRuns
from lightning_moevlm.study.run.outcome import check_logged_points, judge_ended
from lightning_moevlm.study.run.processes.child_process import PATIENCE_SECONDS, end_processes
from lightning_moevlm.study.run.processes.overrides_file import write_overrides


def find_waiting_runs(plan: Plan, experiment: StudyRuns, engine: Engine, retry: bool) -> list[PlannedRun]:
    """Return the runs that still have to run, after checking the ledger against MLflow.

    Jobs that a cluster has come first: they are waited for. Then come all arms of the first seed, then those of the
    next, so that changes of the machine during a sweep meet every arm alike.

    Orphans of a killed sweep are ended. A ledger entry whose MLflow run was deleted is dropped. A result in MLflow that
    the ledger has lost (folder removed) is entered again.

    Raises:
        UserError: Another engine has some of the runs.
    """
    _refuse_others(plan, engine)
    _end_orphans(plan)
    in_store = experiment.ids()
    judge_ended(plan, experiment, in_store)
    elsewhere, waiting = [], []
    for run in plan.runs:
        folder = plan.run_folder(run)
        state = read_state(folder)
        if state.is_elsewhere:
            if state.run_id not in in_store:
                raise UserError(
                    f"{run.name} is job {state.job or 'unknown'} of {state.engine}, but its run in MLflow was deleted; "
                    f"cancel the job and remove {folder} to run it again"
                )
            elsewhere.append(run)
            continue
        if state.run_id is not None and state.run_id not in in_store:
            state = RunState(Status.PLANNED)
            shutil.rmtree(folder, ignore_errors=True)
        if not state.status.has_result:
            state = _adopt(plan, run, experiment) or state
        over = state.status.has_result if plan.comparison.futility_stop is None else state.status.is_settled
        if not over and (state.status is not Status.FAILED or retry):
            waiting.append(run)
    waiting.sort(key=lambda run: plan.comparison.seeds.index(run.seed))  # stable: arms stay in order
    return [*elsewhere, *waiting]


def _refuse_others(plan: Plan, engine: Engine) -> None:
    """Refuse to run beside another engine that still has runs of the study."""
    for run in plan.runs:
        state = read_state(plan.run_folder(run))
        if state.is_elsewhere and state.engine != engine.name:
            raise UserError(
                f"{run.name} is with {state.engine} (job {state.job or 'unknown'}), not with {engine.name}; wait for "
                f"it with --engine {state.engine}, or cancel the job and remove {plan.run_folder(run)}"
            )


def _end_orphans(plan: Plan) -> None:
    """End children of a killed sweep. This process holds the study, so no other sweep waits for them."""
    states = [read_state(plan.run_folder(run)) for run in plan.runs]
    living = [process for state in states if (process := find_process(state)) is not None]
    end_processes([process.pid for process in living], PATIENCE_SECONDS)


def _adopt(plan: Plan, run: PlannedRun, experiment: StudyRuns) -> RunState | None:
    """Return the state of a run whose result is in MLflow but not in the ledger, and write it there."""
    folder = plan.run_folder(run)
    for row in experiment.find(run):
        outcome = row.tags.get(OUTCOME, "")
        finished = outcome == Status.FINISHED and not check_logged_points(plan, run, experiment, row.run_id)
        if finished or outcome == Status.DIVERGED:
            ended = row.end_ms / 1000 if row.end_ms else None
            state = RunState(Status(outcome), row.run_id, started=row.start_ms / 1000, ended=ended, attempts=1)
            write_overrides(run, folder)
            write_state(folder, state)
            return state
    return None
