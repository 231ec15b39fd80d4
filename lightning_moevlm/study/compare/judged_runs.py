"""Judges runs by rules that need other runs: those of withdrawn arms, and those that did not learn.

A run's own outcome (finished, diverged, crashed) stands in the ledger. What depends on other runs is judged anew for
each comparison, from what they have logged.
"""

from collections.abc import Sequence
from dataclasses import replace

from msgspec import structs

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.compare.results import RunResult
from lightning_moevlm.study.declare.comparison import Comparison
from lightning_moevlm.study.run.ledger import Status
from lightning_moevlm.study.statistics.futility import STOPPED_RULE, find_withdrawals
from lightning_moevlm.study.statistics.outcomes.learning import judge_learning


def find_withdrawn(study: Comparison, results: Sequence[RunResult]) -> dict[str, str]:
    """Return the reason of each withdrawn arm: the rule now, or the one that stopped one of its runs."""
    now = find_withdrawals(study, ((r.arm, r.seed, r.series.get(study.primary.metric)) for r in results))
    before = {
        r.arm: f"stopped by rule: {r.tags.get(STOPPED_RULE, 'not logged')}"
        for r in results
        if r.state.status is Status.STOPPED
    }
    return before | {name: found.text for name, found in now.items()}


def mark_stopped(result: RunResult) -> RunResult:
    """Return a run of a withdrawn arm as stopped, also if it reached its end."""
    return _with_status(result, Status.STOPPED) if result.state.status is Status.FINISHED else result


def judge_learned(study: Comparison, results: Sequence[RunResult]) -> tuple[list[RunResult], tuple[str, ...]]:
    """Return the runs, those that did not learn marked so, and why some finished ones could not be judged yet.

    Raises:
        UserError: A finished run has not logged what the rule needs.
    """
    rule = study.did_not_learn
    if rule is None:
        return list(results), ()
    healthy = {r.seed: r.series for r in results if r.arm == rule.healthy and r.state.status is Status.FINISHED}
    judged, waiting = [], []
    for result in results:
        if result.state.status is not Status.FINISHED:
            judged.append(result)
            continue
        found = judge_learning(result.series, rule, healthy.get(result.seed))
        if found.unlogged:
            raise UserError(
                f"{study.name}: did_not_learn cannot judge {result.name}: the log has {found.unlogged}. Change or "
                "remove the rule in the study file; no run has to be trained again"
            )
        if found.unknown:
            waiting.append(f"{result.name}: {found.unknown}")
        judged.append(_with_status(result, Status.DID_NOT_LEARN, found.failure) if found.failure else result)
    return judged, tuple(waiting)


def _with_status(result: RunResult, status: Status, reason: str = "") -> RunResult:
    return replace(result, state=structs.replace(result.state, status=status, reason=reason or result.state.reason))
