"""Records the outcome of a run that has ended: a result, a divergence or a crash, by its exit and its points.

Points that the run kept on disk while the store was unreachable are uploaded first.
"""

import signal
import time
from collections.abc import Container, Sequence

from msgspec.structs import replace

from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.early_stop import find_withdrawal, has_reached
from lightning_moevlm.study.run.ledger import RunState, Status, read_state, write_state
from lightning_moevlm.study.run.mlflow_runs import StudyRuns
from lightning_moevlm.study.run.processes.child_process import ProcessEnd
from lightning_moevlm.study.run.processes.run_files import LOG_FILE, log_tail
from lightning_moevlm.study.run.store_retries import upload_first
from lightning_moevlm.study.statistics.outcomes.divergence import NONFINITE_STEP, explain_divergence
from lightning_moevlm.tracking.point import Point

MOST_STARTS = 4  # of one run by one sweep: a cluster may keep stopping it
_MISTAKE = "moevlm: error: "  # how the command line begins its one line on a mistake


def judge_ended(plan: Plan, experiment: StudyRuns, in_store: Container[str]) -> None:
    """Judge the runs that ended while the store was unreachable. Call it holding the study.

    Raises:
        MlflowException, OSError: It still is.
    """
    for run in plan.runs:
        state = read_state(plan.run_folder(run))
        if state.status is Status.ENDED and state.run_id in in_store:
            record_outcome(plan, run, experiment, ProcessEnd(state.exit_code, state.reason, state.started, state.ended))


def record_outcome(plan: Plan, run: PlannedRun, experiment: StudyRuns, ended: ProcessEnd) -> None:
    """Write the outcome of a run that has ended into the ledger and into MLflow."""
    folder = plan.run_folder(run)
    run_id = read_state(folder).run_id
    assert run_id is not None
    upload_first(experiment, run_id)
    state = _judge(plan, run, experiment, ended)
    withdrawn = find_withdrawal(plan, run.arm, experiment) if state.status is Status.FAILED else None
    if withdrawn is not None and has_reached(plan, run, experiment):
        state = replace(state, status=Status.STOPPED, reason=withdrawn.why, log_tail=())
        experiment.tag(run_id, withdrawn.tags)
    experiment.close(run_id, str(state.status), finished=state.status.is_settled)
    write_state(folder, state)


def mark_ended(state: RunState, ended: ProcessEnd) -> RunState:
    """Return the state of a run whose process is gone and that is to be judged."""
    return replace(
        state,
        status=Status.ENDED,
        started=ended.started or state.started,
        ended=ended.ended or time.time(),
        exit_code=ended.code,
        reason=ended.reason,
        pid=None,
        pid_started=None,
    )


def _judge(plan: Plan, run: PlannedRun, experiment: StudyRuns, ended: ProcessEnd) -> RunState:
    """Return the final state of a run. A run that stopped because its loss is not finite has diverged, not crashed."""
    folder = plan.run_folder(run)
    state = replace(mark_ended(read_state(folder), ended), reason="")
    assert state.run_id is not None
    rule = plan.comparison.diverged
    why = (
        "" if ended.reason else explain_divergence(experiment.history(state.run_id, rule.metric, NONFINITE_STEP), rule)
    )
    if why:
        return replace(state, status=Status.DIVERGED, reason=why)
    lack = check_logged_points(plan, run, experiment, state.run_id)
    if ended.code == 0 and not lack:
        return replace(state, status=Status.FINISHED)
    tail = log_tail(folder / LOG_FILE)
    return replace(state, status=Status.FAILED, reason=_why_failed(ended, lack, tail), log_tail=tail)


def _why_failed(ended: ProcessEnd, lack: str, tail: Sequence[str]) -> str:
    if ended.code is None:
        return f"interrupted {MOST_STARTS} times: {ended.reason}"
    if ended.code == 0:
        return f"exit code 0, but it {lack}"
    if ended.reason:
        return ended.reason
    mistakes = [line.removeprefix(_MISTAKE) for line in tail if line.startswith(_MISTAKE)]
    killer = signal.Signals(-ended.code) if ended.code < 0 else ended.stop_signal
    why = f"ended by {killer.name}" if killer else f"exit code {ended.code}"
    return f"{why}, {mistakes[-1]}" if mistakes else why


def check_logged_points(plan: Plan, run: PlannedRun, experiment: StudyRuns, run_id: str) -> str:
    """Return what a run lacks to be a result, or "": the primary metric after the whole budget."""
    primary = plan.comparison.primary.metric
    return check_points(experiment.history(run_id, primary), primary, run.max_steps)


def check_points(points: Sequence[Point], primary: str, budget: int | None) -> str:
    """Return what points of the primary metric lack to be a result, or "". budget: in steps, None for minutes."""
    if not points:
        return f"logged no {primary}: the study has nothing to compare"
    last = max(point.step for point in points)
    if budget is None:
        return "" if last > 0 else f"logged {primary} of the untrained model alone; give it more minutes"
    if last != budget:
        return f"logged {primary} last at step {last} of {budget}: no value of the trained model; validate at the end"
    return ""
