"""Finds runs that another study of the same store has finished, and reuses them instead of training.

Two runs are the same if all of this agrees: the digest of the whole resolved configuration (model, data, seed, budget),
the digest of the data's manifest, the digest of this package's code, and the versions of its dependencies. The run
must have finished, without a resume that changed values, and without code or files that no digest covers. A budget of
minutes gives another run each time, so such runs are never reused.

Points, params and tags are copied into a run of the study's own, with a tag that names the origin. So the study stays
whole if the other one is deleted. Its verdict is reached anew, by this study's rules.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.ledger import RunState, Status, read_state, write_state
from lightning_moevlm.study.run.mlflow_runs import OUTCOME, ROLE, ROLE_ARM, TAKEN_FROM, StudyRuns
from lightning_moevlm.study.run.outcome import check_points
from lightning_moevlm.study.run.processes.overrides_file import write_overrides
from lightning_moevlm.study.statistics.outcomes.divergence import NONFINITE_STEP, explain_divergence
from lightning_moevlm.tracking.read.runs import metric_histories, tags_of_runs_with
from lightning_moevlm.tracking.record.dataset_input import DIGEST_TAG
from lightning_moevlm.tracking.record.foreign_code import is_foreign_code, named_texts
from lightning_moevlm.tracking.record.provenance import CODE_TAG, code_digest, versions
from lightning_moevlm.tracking.write.run_params import CHANGED_TAG


@dataclass(frozen=True)
class Known:
    """A finished run of another study."""

    study: str
    name: str
    """Of the run there."""
    run_id: str

    @property
    def text(self) -> str:
        """Study, name and id."""
        return f"{self.study}/{self.name} ({self.run_id})"


@dataclass(frozen=True)
class KnownRuns:
    """Runs of other studies with the digests of planned ones."""

    taken: Mapping[str, Known] = field(default_factory=dict)
    """Those to reuse, by folder of the planned run."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Number of planned runs by reason for not reusing another study's."""

    def describe(self, total: int) -> tuple[str, ...]:
        """Return one line per study that has planned runs, and one per reason for refusing."""
        counts = Counter(known.study for known in self.taken.values())
        return (
            *(f"{count} of {total} known from study {study}" for study, count in counts.items()),
            *(
                f"{count} of {total} have run in another study and are not taken: {why}"
                for why, count in self.refused.items()
            ),
        )


def find_known(plan: Plan, uri: str, data_digest: Callable[[Mapping[str, Any]], str]) -> KnownRuns:
    """Find the runs of a plan that have not been started here, and that another study has finished.

    Args:
        plan: All runs.
        uri: Of the store.
        data_digest: Returns the digest of the manifest that a data configuration reads; may raise UserError.

    Raises:
        MlflowException: The store cannot be read.
    """
    waiting = [run for run in plan.runs if run.max_steps is not None and _is_untouched(plan, run)]
    found = tags_of_runs_with(uri, "digest", {run.digest for run in waiting})
    others = {run_id: tags for run_id, tags in found.items() if _is_of_another(tags, plan)}
    counts = Counter(tags["sweep"] for tags in others.values())
    taken: dict[str, Known] = {}
    refused: Counter[str] = Counter()
    for run in waiting:
        mine = {run_id: tags for run_id, tags in others.items() if tags["digest"] == run.digest}
        if not mine:
            continue
        here = _identity(run, data_digest)
        # the study that has most of them first: runs of one study were made under like conditions
        ordered = sorted(mine, key=lambda run_id: (-counts[mine[run_id]["sweep"]], mine[run_id]["sweep"], run_id))
        reasons = {run_id: _why_not(mine[run_id], here, run) for run_id in ordered}
        fit = [run_id for run_id in ordered if not reasons[run_id]]
        lacks = {run_id: _lack(plan, run, uri, run_id) for run_id in fit}
        chosen = next((run_id for run_id in fit if not lacks[run_id]), None)
        if chosen is None:
            refused[next(iter(lacks.values()), reasons[ordered[0]])] += 1
            continue
        tags = mine[chosen]
        taken[run.folder] = Known(tags["sweep"], f"{tags['arm']}-seed{tags['seed']}", chosen)
    return KnownRuns(taken, dict(refused))


def take_known(plan: Plan, experiment: StudyRuns, known: KnownRuns) -> list[PlannedRun]:
    """Copy known runs into the study's experiment, judge them by its rules and write the ledger; return them.

    The caller holds the study. A run with a result in the study's own experiment is left for `find_waiting_runs`.

    Raises:
        MlflowException: The store does not answer.
    """
    taken = []
    for run in plan.runs:
        source = known.taken.get(run.folder)
        if source is None or any(OUTCOME in row.tags for row in experiment.find(run)):
            continue
        row = experiment.copy(run, source.run_id, {TAKEN_FROM: source.text})
        rule = plan.comparison.diverged
        why = explain_divergence(experiment.history(row.run_id, rule.metric, NONFINITE_STEP), rule)
        status = Status.DIVERGED if why else Status.FINISHED
        ended = row.end_ms / 1000 if row.end_ms else None
        state = RunState(
            status, row.run_id, started=row.start_ms / 1000, ended=ended, reason=why, taken_from=source.text
        )
        experiment.close(row.run_id, str(status), finished=True)
        folder = plan.run_folder(run)
        write_overrides(run, folder)
        write_state(folder, state)
        taken.append(run)
    return taken


def _is_untouched(plan: Plan, run: PlannedRun) -> bool:
    return read_state(plan.run_folder(run)).status is Status.PLANNED


def _is_of_another(tags: Mapping[str, str], plan: Plan) -> bool:
    """Whether a run was trained for another study, by the sweep itself."""
    return (
        tags.get(ROLE) == ROLE_ARM
        and TAKEN_FROM not in tags
        and {"arm", "seed"} <= tags.keys()
        and tags.get("sweep", plan.comparison.name) != plan.comparison.name
    )


def _identity(run: PlannedRun, data_digest: Callable[[Mapping[str, Any]], str]) -> dict[str, tuple[str, str]]:
    """Return the tags that a run made here would have, each with the reason if another run's differs."""
    data = {name: value for name, value in run.resolved.get("data", {}).items() if name != "seed"}
    return {
        DIGEST_TAG: (data_digest(data), "the data has changed since"),
        CODE_TAG: (code_digest(), "this package's code has changed since"),
        **{f"version/{name}": (number, f"{name} has another version") for name, number in versions().items()},
    }


def _why_not(tags: Mapping[str, str], here: Mapping[str, tuple[str, str]], run: PlannedRun) -> str:
    """Return why a run of another study differs from the one that would be made here; empty if it does not."""
    if tags.get(OUTCOME) != Status.FINISHED:
        return f"there it has {tags.get(OUTCOME, 'not ended')}"
    if any(tag.startswith(CHANGED_TAG) for tag in tags):
        return "it was resumed with other values"
    for tag, (value, why) in here.items():
        if tags.get(tag) != value:
            return why if tag in tags else f"its {tag} is not known"
    for text in named_texts(run.resolved):
        if is_foreign_code(text):
            return f"it uses {text}, whose code is not known to be the same"
        if Path(text).is_file():
            return f"it reads {text}, whose content is not known to be the same"
    return ""


def _lack(plan: Plan, run: PlannedRun, uri: str, run_id: str) -> str:
    primary = plan.comparison.primary.metric
    return check_points(metric_histories(uri, [run_id], [primary])[run_id], primary, run.max_steps)
