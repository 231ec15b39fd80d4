"""Reads rows of MLflow's SQLite file past its client, which builds an object per row; a study has millions of them.

The file is one that `store.prepare_store` has accepted, so its tables are those of the MLflow that is installed.
"""

import math
import sqlite3
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

BUSY_SECONDS = 20.0
"""How long a writer may keep a reader out; MLflow's own patience."""
_LARGEST = sys.float_info.max
# SQL has no NaN: MLflow keeps a flag. It keeps infinities as the largest float; 9e999 overflows to one.
_VALUE = (
    f"CASE WHEN is_nan THEN NULL WHEN value >= {_LARGEST!r} THEN 9e999 WHEN value <= -{_LARGEST!r} THEN -9e999 "
    "ELSE value END"
)
_POINTS = f"SELECT key, step, {_VALUE}, timestamp FROM metrics WHERE run_uuid = ? ORDER BY key, step, timestamp"
_EVERY_POINT = f"SELECT run_uuid, key, step, {_VALUE}, timestamp FROM metrics"
_COUNT = "SELECT count(*) FROM metrics WHERE run_uuid = ?"
_COUNT_ALL = "SELECT coalesce(max(rowid), 0) FROM metrics"
_LOOKED_UP_OVER_SCANNED = 4
"""A point of one run takes so many times as long as one of the whole file: those of a run lie all over it."""
_TAGS = (
    "SELECT tags.run_uuid, tags.key, tags.value FROM tags JOIN runs USING (run_uuid) JOIN experiments USING "
    "(experiment_id) WHERE experiments.name = ? AND runs.lifecycle_stage = 'active'"
)
_WITH_TAG = (
    "SELECT tags.run_uuid FROM tags JOIN runs USING (run_uuid) JOIN experiments USING (experiment_id) WHERE "
    "tags.key = ? AND tags.value = ? AND runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'"
)
_TAGS_OF = "SELECT key, value FROM tags WHERE run_uuid = ?"

Row = tuple[str, int, float, int]  # key, step, value, time in ms


def points_of(path: Path, run_ids: Sequence[str], keys: Sequence[str] | None = None) -> Iterator[tuple[str, list[Row]]]:
    """Yield each run with its points of some metrics (None: of all), by key, step and time; values as logged.

    Raises:
        MlflowException: see `reading`, for all functions here.
    """
    wanted = None if keys is None else set(keys)
    with reading(path) as database:
        for run_id in run_ids:
            found = database.execute(_POINTS, (run_id,))
            yield (
                run_id,
                [
                    (key, step, math.nan if value is None else value, ms)
                    for key, step, value, ms in found
                    if wanted is None or key in wanted
                ],
            )


def every_point(path: Path) -> Iterator[tuple[str, str, int, float, int]]:
    """Yield run, key, step, value and time in ms of every point in the file, in no order; values as logged."""
    with reading(path) as database:
        for run_id, key, step, value, ms in database.execute(_EVERY_POINT):
            yield run_id, key, step, math.nan if value is None else value, ms


def are_most_points(path: Path, run_ids: Sequence[str]) -> bool:
    """Return whether these runs have so many of the file's points that reading all of them takes less time."""
    with reading(path) as database:
        wanted = sum(database.execute(_COUNT, (run_id,)).fetchone()[0] for run_id in run_ids)
        return bool(_LOOKED_UP_OVER_SCANNED * wanted > database.execute(_COUNT_ALL).fetchone()[0])


def tags_by_run(path: Path, experiment: str) -> dict[str, dict[str, str]]:
    """Return the tags of every run of an experiment, by run id; without runs that were deleted or have no tag."""
    tags: dict[str, dict[str, str]] = {}
    with reading(path) as database:
        for run_id, key, value in database.execute(_TAGS, (experiment,)):
            tags.setdefault(run_id, {})[key] = value
    return tags


def tags_by_run_with(path: Path, key: str, values: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the tags of every run, of any experiment, whose tag `key` has one of the values; by run id."""
    tags: dict[str, dict[str, str]] = {}
    with reading(path) as database:
        for value in values:
            for (run_id,) in database.execute(_WITH_TAG, (key, value)).fetchall():
                tags[run_id] = dict(database.execute(_TAGS_OF, (run_id,)))
    return tags


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold a connection that writes nothing.

    Raises:
        MlflowException: the file is busy for too long, or not a database: MLflow's own error for such a file.
    """
    try:
        # not read-only: the next process that opens the file rolls back what a killed writer left half done
        address = f"{path.as_uri()}?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as database:
            database.execute("PRAGMA query_only = ON")
            yield database
    except sqlite3.DatabaseError as error:
        from mlflow.exceptions import MlflowException

        raise MlflowException(f"{path} cannot be read: {error}") from error


def as_logged(value: float) -> float:
    """Return the value that was logged where MLflow's client gives the largest float for an infinity."""
    return value if abs(value) != _LARGEST else math.copysign(math.inf, value)
