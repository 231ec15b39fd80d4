"""Drops the points beyond a step for a run that is resumed there, so that no step has two points.

MLflow cannot delete a point. The rows can be removed from its SQLite file. A server keeps them, so a resumed run's
points for the same steps are left out: they are equal, unless its options have changed.
"""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm.tracking.read.sqlite_rows import BUSY_SECONDS
from lightning_moevlm.tracking.store import sqlite_path
from lightning_moevlm.tracking.write.open_run import NONFINITE_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

_BEYOND = "run_uuid = ? AND step > ? AND key NOT LIKE 'system/%'"  # the steps of those are seconds
_COLUMNS = "key, value, timestamp, step, is_nan, run_uuid"
_NEWEST = (
    f"INSERT INTO latest_metrics ({_COLUMNS}) SELECT {_COLUMNS} FROM (SELECT {_COLUMNS}, row_number() OVER (PARTITION "
    "BY key ORDER BY step DESC, timestamp DESC, value DESC) AS place FROM metrics WHERE run_uuid = ?) WHERE place = 1 "
    "AND key NOT IN (SELECT key FROM latest_metrics WHERE run_uuid = ?)"
)


def drop_points(client: "MlflowClient", uri: str, run_id: str, step: int) -> Mapping[str, int]:
    """Remove the points of a run beyond an optimiser step, the last to keep, and their tags `nonfinite/`.

    Returns:
        For a server, which keeps its points, the last step of every metric that has some beyond.

    Raises:
        MlflowException: the store does not answer, or is busy for too long.
    """
    run, path = client.get_run(run_id), sqlite_path(uri)
    if path is None:
        beyond = {metric.key: metric.step for metric in run.data._metric_objs if metric.step > step}
        return {key: last for key, last in beyond.items() if not key.startswith("system/")}
    _drop_rows(path, run_id, step)
    for tag, text in run.data.tags.items():
        if tag.startswith(NONFINITE_TAG) and int(text.rpartition(" ")[2]) > step:
            client.delete_tag(run_id, tag)
    return {}


def _drop_rows(path: Path, run_id: str, step: int) -> None:
    from mlflow.exceptions import MlflowException

    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)) as store, store:
            for table in ("metrics", "latest_metrics"):
                store.execute(f"DELETE FROM {table} WHERE {_BEYOND}", (run_id, step))
            store.execute(_NEWEST, (run_id, run_id))
    except sqlite3.DatabaseError as error:
        raise MlflowException(f"points of run {run_id} beyond step {step} cannot be removed: {error}") from error
