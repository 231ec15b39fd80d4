"""Exactly one MLflow run per planned run, whatever was killed when.

The parent creates the run before the child starts and hands its id to the child. A run is found again by its tags
(sweep, arm, seed, digest, and role=arm, which only the parent sets: a rerun by hand is another run), so that a crash
between "created in MLflow" and "written to the ledger" leaves nothing behind that the next start would not find.
A run that has to start from zero gets a new MLflow run and the old one is deleted: points of two attempts never mix.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm.errors import UserError
from lightning_moevlm.study.plan import Plan, PlannedRun, tags_of
from lightning_moevlm.tracking.runs import Point, RunRow, find_runs, metric_history
from lightning_moevlm.tracking.store import prepare_store, resolve_tracking_uri, runs_dir, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROLE = "role"
ROLE_ARM = "arm"
OUTCOME = "outcome"


@dataclass(frozen=True)
class Experiment:
    """The MLflow experiment of one study. uri: as `resolve_tracking_uri` returns it."""

    uri: str
    name: str
    experiment_id: str

    def find(self, run: PlannedRun) -> list[RunRow]:
        """Return the runs that the parent created for a planned run, oldest first; there should be at most one."""
        return find_runs(self.uri, self.name, {**tags_of(run), ROLE: ROLE_ARM})

    def ids(self) -> set[str]:
        """Return the ids of all runs that a parent created in this experiment."""
        return {row.run_id for row in find_runs(self.uri, self.name, {ROLE: ROLE_ARM})}

    def create(self, run: PlannedRun) -> str:
        """Delete what earlier attempts left in MLflow, create the one run, return its id."""
        client = _client(self.uri)
        for row in self.find(run):
            client.delete_run(row.run_id)
            shutil.rmtree(self.folder(row.run_id), ignore_errors=True)
        tags = {**tags_of(run), ROLE: ROLE_ARM}
        return str(client.create_run(self.experiment_id, tags=tags, run_name=run.name).info.run_id)

    def folder(self, run_id: str) -> Path:
        """Return where the tracking logger keeps a run's checkpoints and copies of its configs."""
        return runs_dir(self.uri) / self.experiment_id / run_id

    def reopen(self, run_id: str) -> None:
        """Mark a run as running again, before it goes on from a checkpoint."""
        _client(self.uri).update_run(run_id, status="RUNNING")

    def close(self, run_id: str, outcome: str, finished: bool) -> None:
        """Tag a run with its outcome; none looks as if it were still running, and a result not as if it had failed."""
        client = _client(self.uri)
        client.set_tag(run_id, OUTCOME, outcome)
        _end(client, run_id, "FINISHED" if finished else "FAILED", even_if_failed=finished)

    def interrupt(self, run_ids: Iterable[str]) -> None:
        """See to it that runs which were ended before they could say so do not look as if they were still running."""
        client = _client(self.uri)
        for run_id in run_ids:
            _end(client, run_id, "KILLED")

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        client = _client(self.uri)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)

    def history(self, run_id: str, *keys: str) -> list[Point]:
        """Return the points of some metrics of one run, by key, then step."""
        return metric_history(self.uri, run_id, keys)


def tracking_uri_of(plan: Plan) -> str:
    """Return the tracking URI that the plan's runs will use: what the base's logger says, the environment, or SQLite.

    Raises:
        UserError: where the URI cannot be used, or the base has no MLflow logger to hand a run to.
    """
    logger = plan.runs[0].resolved.get("trainer", {}).get("logger")
    if not isinstance(logger, dict):
        raise UserError(
            f"{plan.study.file}: the base's trainer.logger is {logger!r}; a study needs one that writes to MLflow, "
            "remove the key to get the default"
        )
    return resolve_tracking_uri((logger.get("init_args") or {}).get("tracking_uri"))


def open_experiment(uri: str, name: str) -> Experiment:
    """Return the experiment of a study; store and experiment are created here, once, before any child could race.

    Raises:
        UserError: where the store does not answer or belongs to another MLflow version, or the experiment was deleted.
    """
    prepare_store(uri)
    client = _client(uri)
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {name!r} was deleted in MLflow; restore it, `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`, or delete it for good with `mlflow gc`, or give the study file another name"
        )
    if found is not None:
        return Experiment(uri, name, str(found.experiment_id))
    # A client on SQLite would put artifacts below the working directory of the moment.
    local = (runs_dir(uri) / "artifacts" / name).as_uri() if sqlite_path(uri) is not None else None
    return Experiment(uri, name, str(client.create_experiment(name, artifact_location=local)))


def _end(client: "MlflowClient", run_id: str, status: str, even_if_failed: bool = False) -> None:
    """Set the status of a run that does not have a last one yet; or says that it failed, when it has diverged."""
    info = client.get_run(run_id).info
    if info.status == "RUNNING" or (even_if_failed and info.status != status):
        client.set_terminated(run_id, status, end_time=info.end_time or None)


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(uri)
