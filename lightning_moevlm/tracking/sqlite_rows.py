"""Rows of MLflow's SQLite file, read past its client: that builds an object per row, and a study has millions of them.

The file is one that `store.prepare_store` has accepted, so its tables are those of the MLflow that is installed.
"""

import math
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

_POINTS = "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY key, step, timestamp"
_TAGS = (
    "SELECT tags.run_uuid, tags.key, tags.value FROM tags JOIN runs USING (run_uuid) JOIN experiments USING "
    "(experiment_id) WHERE experiments.name = ? AND runs.lifecycle_stage = 'active'"
)
_WAIT_SECONDS = 20.0
_LARGEST = sys.float_info.max

Row = tuple[str, int, float]  # key, step, value


def points_of(path: Path, run_ids: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    """Yield each run with its points, ordered by key, step and time; NaN and infinities as they were logged."""
    with closing(_opened(path)) as database:
        for run_id in run_ids:
            found = database.execute(_POINTS, (run_id,))
            yield (
                run_id,
                [
                    (key, step, value if -_LARGEST < value < _LARGEST and not is_nan else _as_logged(value, is_nan))
                    for key, step, value, is_nan in found
                ],
            )


def tags_by_run(path: Path, experiment: str) -> dict[str, dict[str, str]]:
    """Return the tags of every run of an experiment, by run id; without runs that were deleted or have no tag."""
    tags: dict[str, dict[str, str]] = {}
    with closing(_opened(path)) as database:
        for run_id, key, value in database.execute(_TAGS, (experiment,)):
            tags.setdefault(run_id, {})[key] = value
    return tags


def _opened(path: Path) -> sqlite3.Connection:
    # not read-only: what a killed writer left half done is rolled back by whoever opens the file next
    database = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=_WAIT_SECONDS)
    database.execute("PRAGMA query_only = ON")
    return database


def _as_logged(value: float, is_nan: bool) -> float:
    """Return what was logged: SQL has no infinity, MLflow keeps it as the largest float."""
    return math.nan if is_nan else math.copysign(math.inf, value)
