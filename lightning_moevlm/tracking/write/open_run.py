"""Opens a run in MLflow: creates it, and its experiment if need be, or continues one that exists."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.tracking.read.runs import NO_SUCH_RUN
from lightning_moevlm.tracking.write.metric_names import safe_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

NONFINITE_TAG = "nonfinite/"


@dataclass(frozen=True)
class OpenRun:
    """A run to write to."""

    run_id: str
    experiment_id: str
    params: Mapping[str, str]
    """Those that it has."""
    nonfinite: frozenset[str]
    """Metrics that have a tag `nonfinite/`."""


def create_run(
    client: "MlflowClient",
    experiment_name: str,
    artifact_location: str | None,
    run_name: str | None,
    tags: Mapping[str, str],
) -> OpenRun:
    """Create a run, with tags of the user and the source as MLflow's own `start_run` sets them.

    A run without a name is called after its local start time. MLflow's invented names come from `random`, which a fixed
    seed has set: every run would have the same.

    Raises:
        UserError: the experiment was deleted.
    """
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

    experiment_id = find_or_create_experiment(client, experiment_name, artifact_location)
    if run_name is None and MLFLOW_RUN_NAME not in tags:
        run_name = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    run = client.create_run(experiment_id, tags=resolve_tags(dict(tags)), run_name=run_name)
    return OpenRun(run.info.run_id, experiment_id, {}, frozenset())


def experiment_of_environment(client: "MlflowClient") -> str | None:
    """Return the name of the experiment of MLFLOW_EXPERIMENT_ID; None where that is not set.

    Raises:
        UserError: there is no such experiment.
    """
    from mlflow.exceptions import MlflowException

    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not experiment_id:
        return None
    try:
        return str(client.get_experiment(experiment_id).name)
    except MlflowException as error:
        raise UserError(
            f"MLFLOW_EXPERIMENT_ID is {experiment_id!r}, and there is no such experiment: unset it, or name one with "
            "--trainer.logger.init_args.experiment_name"
        ) from error


def find_or_create_experiment(client: "MlflowClient", name: str, artifact_location: str | None) -> str:
    """Return the id of an experiment. Several processes may create the same one at once.

    Raises:
        UserError: the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # another process was faster
        assert found is not None
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment {name!r} was deleted: choose another experiment_name, "
            f"or bring it back with `mlflow experiments restore -x {found.experiment_id}`"
        )
    return str(found.experiment_id)


def reopen_run(client: "MlflowClient", run_id: str, shown_uri: str) -> OpenRun:
    """Continue a run: its status becomes RUNNING again.

    Raises:
        UserError: there is no such run, or it was deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in NO_SUCH_RUN:
            raise
        raise unknown_run(run_id, shown_uri) from error
    if run.info.lifecycle_stage == "deleted":
        raise UserError(f"run {run_id} was deleted: bring it back with `mlflow runs restore --run-id {run_id}`")
    client.update_run(run_id, status="RUNNING")
    nonfinite = {tag.removeprefix(NONFINITE_TAG) for tag in run.data.tags if tag.startswith(NONFINITE_TAG)}
    return OpenRun(run_id, run.info.experiment_id, dict(run.data.params), frozenset(nonfinite))


def unknown_run(run_id: str, shown_uri: str) -> UserError:
    """Return the error of a run to be continued that the store does not have."""
    return UserError(
        f"there is no run {run_id!r} in {mask_url_secrets(shown_uri)}: give the id of one that is there, or leave "
        "run_id out to start a new one"
    )


def local_artifacts(directory: Path, experiment_name: str) -> str:
    """Return the URI of an experiment's artifacts below a directory; a name with `/` stays one folder."""
    return (directory / "artifacts" / safe_name(experiment_name).replace("/", "_")).absolute().as_uri()
