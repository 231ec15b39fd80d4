"""Adds files to a finished run as artifacts."""

from collections.abc import Sequence
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.store import describe_cause, open_client, prepare_store


def add_files(store: str, run_id: str, files: Sequence[Path], where: str) -> None:
    """Log files to a folder of a run's artifacts.

    Raises:
        UserError: the store does not answer or refuses them; the files stay where they are.
    """
    from mlflow.exceptions import MlflowException

    prepare_store(store)
    client = open_client(store)
    try:
        for file in files:
            client.log_artifact(run_id, str(file), where)
    except MlflowException as error:
        raise UserError(
            f"{files[0].parent} is written, but run {run_id} did not take it as an artifact ({describe_cause(error)}): "
            "repeat the command when the store answers, or give --tracking_uri"
        ) from error
