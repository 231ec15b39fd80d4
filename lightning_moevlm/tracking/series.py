"""Whole histories of many runs, as columns: a study of 500 runs has millions of points, too many for a record each.

Runs are read one after the other, so that what is held beside the result is one run's points, and series that were
logged at the same steps share them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lightning_moevlm.tracking.runs import as_logged, metric_histories
from lightning_moevlm.tracking.sqlite_tables import reading
from lightning_moevlm.tracking.store import sqlite_path

_RUNS_PER_REQUEST = 16  # behind a server: what is held at once is their points


class Series(NamedTuple):
    """One metric of one run. steps: optimiser steps, ascending; values: as logged, also NaN and infinities."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


def metric_series(uri: str, run_ids: Sequence[str]) -> dict[str, dict[str, Series]]:
    """Return every series of every run, by run id and key; a run that logged nothing has an empty mapping.

    Where a step was logged twice (resume from an older checkpoint), the later point counts.

    Raises:
        MlflowException: the store cannot be read, or, behind a server, there is no such run.
    """
    rows = _from_sqlite(uri, run_ids) if sqlite_path(uri) is not None else _from_server(uri, run_ids)
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    return {run_id: _columns(points, shared) for run_id, points in rows}


Row = tuple[str, int, float]  # key, step, value


def _columns(rows: Sequence[Row], shared: dict[tuple[int, ...], tuple[int, ...]]) -> dict[str, Series]:
    """Return rows, ordered by key, step and time, as series."""
    columns: dict[str, dict[int, float]] = {}
    for key, step, value in rows:
        columns.setdefault(key, {})[step] = value  # a later point takes the place of the earlier one
    series = {}
    for key, column in columns.items():
        steps = tuple(column)
        series[key] = Series(shared.setdefault(steps, steps), tuple(column.values()))
    return series


def _from_sqlite(uri: str, run_ids: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    import sqlalchemy
    from mlflow.store.tracking.dbmodels.models import SqlMetric

    path = sqlite_path(uri)
    assert path is not None
    if not path.exists():
        yield from ((run_id, []) for run_id in run_ids)
        return
    asked: Any = (
        sqlalchemy.select(SqlMetric.key, SqlMetric.step, SqlMetric.value, SqlMetric.is_nan)
        .where(SqlMetric.run_uuid == sqlalchemy.bindparam("run_id"))
        .order_by(SqlMetric.key, SqlMetric.step, SqlMetric.timestamp)
    )
    with reading(path) as connection:
        for run_id in run_ids:
            found = connection.execute(asked, {"run_id": run_id})
            yield run_id, [(key, step, math.nan if is_nan else as_logged(value)) for key, step, value, is_nan in found]


def _from_server(uri: str, run_ids: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    for start in range(0, len(run_ids), _RUNS_PER_REQUEST):
        for run_id, points in metric_histories(uri, run_ids[start : start + _RUNS_PER_REQUEST]).items():
            yield run_id, [(point.key, point.step, point.value) for point in points]
