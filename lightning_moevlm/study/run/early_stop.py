"""Finds running runs to end before their budget: those that have diverged, and those of withdrawn arms.

The rules are those that judge the runs in the end, applied to the points logged so far.
"""

import time
from collections.abc import Iterable

from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.ledger import read_state
from lightning_moevlm.study.run.mlflow_runs import StudyRuns
from lightning_moevlm.study.statistics.futility import Withdrawal, check_futility
from lightning_moevlm.study.statistics.outcomes.divergence import NONFINITE_STEP, explain_early_divergence

_LOOK_SECONDS = 2.0


class EarlyStop:
    """Checks the running runs every two seconds."""

    def __init__(self, plan: Plan, experiment: StudyRuns) -> None:
        self._plan = plan
        self._experiment = experiment
        self._next = time.monotonic() + _LOOK_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether it is time for a check."""
        return time.monotonic() >= self._next

    def find_runs_to_end(self, runs: Iterable[PlannedRun]) -> list[PlannedRun]:
        """Return the running runs that are to be ended now.

        Raises:
            MlflowException, OSError: The store does not answer.
        """
        self._next = time.monotonic() + _LOOK_SECONDS
        rule, found = self._plan.comparison.diverged, []
        withdrawn = {arm: find_withdrawal(self._plan, arm, self._experiment) for arm in {run.arm for run in runs}}
        for run in runs:
            run_id = read_state(self._plan.run_folder(run)).run_id
            assert run_id is not None
            points = self._experiment.history(run_id, rule.metric, NONFINITE_STEP)
            is_futile = withdrawn[run.arm] is not None and has_reached(self._plan, run, self._experiment)
            if is_futile or explain_early_divergence(points, rule):
                found.append(run)
        return found


def find_withdrawal(plan: Plan, arm: str, experiment: StudyRuns) -> Withdrawal | None:
    """Return the withdrawal of an arm by the study's futility rule, from the points so far; None without one."""
    study = plan.comparison
    rule = study.futility_stop
    if rule is None or arm == study.baseline:
        return None
    values = {name: _at_step(plan, name, experiment, rule.at_step) for name in (arm, study.baseline)}
    return check_futility(rule, study.primary, values[arm], values[study.baseline], study.seeds)


def has_reached(plan: Plan, run: PlannedRun, experiment: StudyRuns) -> bool:
    """Whether a run has logged the primary metric at the rule's step or later."""
    rule, run_id = plan.comparison.futility_stop, read_state(plan.run_folder(run)).run_id
    if rule is None or run_id is None:
        return False
    return any(point.step >= rule.at_step for point in experiment.history(run_id, plan.comparison.primary.metric))


def _at_step(plan: Plan, arm: str, experiment: StudyRuns, step: int) -> dict[int, float]:
    values = {}
    for run in plan.runs:
        run_id = read_state(plan.run_folder(run)).run_id if run.arm == arm else None
        for point in experiment.history(run_id, plan.comparison.primary.metric) if run_id is not None else ():
            if point.step == step:
                values[run.seed] = point.value
    return values
