"""Finds a study's finished runs that were trained with other code than today's.

A run's digest covers its configuration, not the code behind it. So the code is compared by the tags that the run
recorded: one for this package, one per package of one's own that the configuration names. A run without a tag is taken
as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun, tracker_tags
from lightning_moevlm.study.run.ledger import Status
from lightning_moevlm.study.run.mlflow_runs import OUTCOME, ROLE, ROLE_ARM, StudyRuns
from lightning_moevlm.tracking.read.runs import tags_of_runs
from lightning_moevlm.tracking.record.foreign_code import foreign_code_tag, foreign_digest, foreign_packages
from lightning_moevlm.tracking.record.provenance import CODE_TAG, code_digest

_THIS = __name__.partition(".")[0]
_SHOWN_RUNS = 6


@dataclass(frozen=True)
class OtherCode:
    """A finished run whose code has changed since."""

    run: PlannedRun
    run_id: str
    packages: tuple[str, ...]
    """Top-level names of the code that has changed."""


def find_other_code(plan: Plan, uri: str) -> list[OtherCode]:
    """Return the finished runs that were trained with other code, in the plan's order.

    Raises:
        MlflowException: The store cannot be read.
    """
    digest_now: Callable[[str], str | None] = cache(foreign_digest)
    settled = [status for status in Status if status.is_settled]
    rows = {
        run_id: tags
        for run_id, tags in tags_of_runs(uri, plan.comparison.name, {ROLE: ROLE_ARM}).items()
        if tags.get(OUTCOME) in settled
    }
    found = []
    for run in plan.runs:
        mine = {run_id: tags for run_id, tags in rows.items() if tracker_tags(run).items() <= tags.items()}
        foreign = sorted(foreign_packages(run.resolved)) if mine else []
        for run_id, tags in mine.items():
            changed = [_THIS] if tags.get(CODE_TAG, code_digest()) != code_digest() else []
            for package in foreign:
                recorded = tags.get(foreign_code_tag(package))
                if recorded is not None and recorded != digest_now(package):
                    changed.append(package)
            if changed:
                found.append(OtherCode(run, run_id, tuple(changed)))
    return found


def describe_other_code(plan: Plan, found: Sequence[OtherCode]) -> tuple[str, ...]:
    """Return one line per package that has changed, with the runs and the command that trains them again."""
    lines = []
    for package in sorted({name for one in found for name in one.packages}):
        names = [one.run.name for one in found if package in one.packages]
        if package == _THIS:  # an upgrade concerns every run
            runs = f"{len(names)} of {len(plan.runs)} runs"
        else:
            more = f" and {len(names) - _SHOWN_RUNS} more runs" if len(names) > _SHOWN_RUNS else ""
            runs = ", ".join(names[:_SHOWN_RUNS]) + more
        verb, them = ("was", "it") if len(names) == 1 else ("were", "them")
        lines.append(
            f"{runs} {verb} trained with other code of {package}; `moevlm sweep run {plan.study.file} --retrain true` "
            f"trains {them} again"
        )
    return tuple(lines)


def replace_runs(experiment: StudyRuns, found: Sequence[OtherCode]) -> tuple[str, ...]:
    """Take runs out of their study, so that `find_waiting_runs` has them trained again; return a line for each.

    Raises:
        MlflowException: The store does not answer.
    """
    lines = []
    for one in found:
        why = f"trained with other code of {', '.join(one.packages)}"
        experiment.replace(one.run_id, why)
        lines.append(f"{one.run.name} was {why}; it is trained again, and MLflow keeps the old run {one.run_id}")
    return tuple(lines) or ("--retrain has nothing to do: no finished run was trained with other code",)
