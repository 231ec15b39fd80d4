"""Keeps exactly one MLflow run per planned run, however often the sweep is killed.

The sweep creates the run and hands its id to the child. It finds the run again by its tags: sweep, arm, seed, digest,
and role=arm, which a rerun by hand does not have. So a crash between "created in MLflow" and "written to the ledger"
leaves nothing that the next start would not find. A run that starts from zero gets a new MLflow run and the old one is
deleted: points of two attempts never mix.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun, tracker_tags
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.read.runs import RunRow, find_runs, metric_history, read_run
from lightning_moevlm.tracking.store import open_client, prepare_store, resolve_tracking_uri, runs_dir, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

_Item = TypeVar("_Item")

ROLE = "role"
ROLE_ARM = "arm"
ROLE_REPLACED = "replaced"
"""Of a run that was trained again: it stays in MLflow, and neither a sweep nor a report reads it."""
OUTCOME = "outcome"
TAKEN_FROM = "taken_from"
"""Tag of a run that was not trained for its study: "study/run (id)" of the one that was."""
_OF_ONE_RUN = ("mlflow.runName", "mlflow.loggedArtifacts", "mlflow.log-model")
_TEXTS_AT_ONCE, _POINTS_AT_ONCE = 100, 1000  # the most that MLflow takes


@dataclass(frozen=True)
class StudyRuns:
    """The MLflow experiment of one study."""

    uri: str  # as `resolve_tracking_uri` returns it
    name: str
    experiment_id: str

    def find(self, run: PlannedRun) -> list[RunRow]:
        """Return the runs that a sweep created for a planned run, oldest first; at most one is expected."""
        return find_runs(self.uri, self.name, {**tracker_tags(run), ROLE: ROLE_ARM})

    def ids(self) -> set[str]:
        """Return the ids of all runs that a sweep created in this experiment."""
        return {row.run_id for row in find_runs(self.uri, self.name, {ROLE: ROLE_ARM})}

    def create(self, run: PlannedRun, start_ms: int | None = None) -> str:
        """Delete earlier attempts, create the run and return its id. start_ms: by default now."""
        client = open_client(self.uri)
        for row in self.find(run):
            client.delete_run(row.run_id)
            shutil.rmtree(self.folder(row.run_id), ignore_errors=True)
        tags = {**tracker_tags(run), ROLE: ROLE_ARM}
        created = client.create_run(self.experiment_id, start_time=start_ms, tags=tags, run_name=run.name)
        return str(created.info.run_id)

    def copy(self, run: PlannedRun, source: str, tags: Mapping[str, str]) -> RunRow:
        """Create the run of a planned run with the points, params and tags of another run; return it.

        Earlier attempts are deleted first. Files are not copied. tags: set beside those of the other run.
        """
        from mlflow.entities import Metric, Param, RunTag

        client, row = open_client(self.uri), read_run(self.uri, source)
        run_id = self.create(run, row.start_ms)
        kept = {key: value for key, value in row.tags.items() if not key.startswith(_OF_ONE_RUN)}
        own = {**kept, **tracker_tags(run), ROLE: ROLE_ARM, **tags}
        own.pop(OUTCOME, None)
        points = [Metric(p.key, p.value, p.time_ms, p.step) for p in metric_history(self.uri, source)]
        for part in _parts([RunTag(*pair) for pair in own.items()], _TEXTS_AT_ONCE):
            client.log_batch(run_id, tags=part)
        for params in _parts([Param(*pair) for pair in row.params.items()], _TEXTS_AT_ONCE):
            client.log_batch(run_id, params=params)
        for metrics in _parts(points, _POINTS_AT_ONCE):
            client.log_batch(run_id, metrics=metrics)
        client.set_terminated(run_id, "FINISHED", row.end_ms)
        return read_run(self.uri, run_id)

    def folder(self, run_id: str) -> Path:
        """Return the folder of a run's checkpoints and configurations."""
        return runs_dir(self.uri) / self.experiment_id / run_id

    def reopen(self, run_id: str) -> None:
        """Mark a run as running again, before it resumes from a checkpoint."""
        open_client(self.uri).update_run(run_id, status="RUNNING")

    def close(self, run_id: str, outcome: str, finished: bool) -> None:
        """Tag a run with its outcome and set its status: a result is never FAILED, no run stays RUNNING."""
        client = open_client(self.uri)
        client.set_tag(run_id, OUTCOME, outcome)
        _end(client, run_id, "FINISHED" if finished else "FAILED", even_if_failed=finished)

    def interrupt(self, run_ids: Iterable[str]) -> None:
        """Mark runs as KILLED that were ended before they could set their status."""
        client = open_client(self.uri)
        for run_id in run_ids:
            _end(client, run_id, "KILLED")

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        client = open_client(self.uri)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)

    def replace(self, run_id: str, reason: str) -> None:
        """Take a run out of the study, so that it is trained again; it stays in MLflow with the reason as a tag."""
        self.tag(run_id, {"replaced_because": reason, ROLE: ROLE_REPLACED})  # in this order: the role decides

    def history(self, run_id: str, *keys: str) -> list[Point]:
        """Return the points of some metrics of one run, by key, then step."""
        return metric_history(self.uri, run_id, keys)


def find_tracking_uri(plan: Plan) -> str:
    """Return the tracking URI of the plan's runs: that of the base's logger, of the environment, or SQLite.

    Raises:
        UserError: The URI cannot be used, or the base has no MLflow logger.
    """
    logger = plan.runs[0].resolved.get("trainer", {}).get("logger")
    if not isinstance(logger, dict):
        raise UserError(
            f"{plan.study.file}: trainer.logger of the base is {logger!r}; a study needs one that writes to MLflow: "
            "remove the key to get the default"
        )
    return resolve_tracking_uri((logger.get("init_args") or {}).get("tracking_uri"))


def open_experiment(uri: str, name: str) -> StudyRuns:
    """Return the experiment of a study; store and experiment are created here, before the children could race.

    Raises:
        UserError: The store does not answer or belongs to another MLflow version, or the experiment was deleted.
    """
    prepare_store(uri)
    client = open_client(uri)
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {name!r} was deleted in MLflow; restore it, `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`, or delete it for good with `mlflow gc`, or give the study file another name"
        )
    if found is not None:
        return StudyRuns(uri, name, str(found.experiment_id))
    # A client on SQLite would put artifacts below the working directory of the moment.
    local = (runs_dir(uri) / "artifacts" / name).as_uri() if sqlite_path(uri) is not None else None
    return StudyRuns(uri, name, str(client.create_experiment(name, artifact_location=local)))


def _parts(items: Sequence[_Item], most: int) -> Iterator[Sequence[_Item]]:
    """Yield items in parts of at most `most`."""
    yield from (items[start : start + most] for start in range(0, len(items), most))


def _end(client: "MlflowClient", run_id: str, status: str, even_if_failed: bool = False) -> None:
    """Set the status of a run that has no final one yet, or that failed and is a result all the same (diverged)."""
    info = client.get_run(run_id).info
    if info.status == "RUNNING" or (even_if_failed and info.status != status):
        client.set_terminated(run_id, status, end_time=info.end_time or None)
