"""Tells the states of a study's runs as its report does: a finished run may not have learned, by the study's rule.

The ledger knows nothing of it, since the rule needs the healthy arm and may change.
"""

from collections.abc import Sequence

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.compare.collect_results import fetch_results
from lightning_moevlm.study.compare.judged_runs import judge_learned
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.ledger import RunState, Status

States = Sequence[tuple[PlannedRun, RunState]]


def judge_states(plan: Plan, ledger: States, uri: str) -> tuple[States, tuple[str, ...]]:
    """Return the ledger with the runs that did not learn marked, and notes on those that cannot be judged.

    Args:
        plan: All runs of the study: a healthy one may judge any other.
        ledger: Of these runs.
        uri: The store.

    Raises:
        MlflowException: The store cannot be read.
    """
    if plan.comparison.did_not_learn is None or not any(state.status is Status.FINISHED for _, state in ledger):
        return ledger, ()
    try:
        results, waiting = judge_learned(plan.comparison, fetch_results(plan, ledger, uri))
    except UserError as error:  # the log lacks what the rule needs: the states themselves are known
        return ledger, (str(error),)
    states = {(result.arm, result.seed): result.state for result in results}
    judged = [(run, states[run.arm, run.seed]) for run, _ in ledger]
    return judged, tuple(f"whether it learned is not known yet: {reason}" for reason in waiting)
