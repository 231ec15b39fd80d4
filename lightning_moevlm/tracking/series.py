"""Whole histories of many runs, as columns: a study of 500 runs has millions of points, too many for a record each.

Runs are read one after the other, so that what is held beside the result is one run's points, and series that were
logged at the same steps share them.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.tracking.runs import metric_histories
from lightning_moevlm.tracking.sqlite_rows import Row, points_of
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
    path = sqlite_path(uri)
    rows = _from_sqlite(path, run_ids) if path is not None else _from_server(uri, run_ids)
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    return {run_id: _columns(points, shared) for run_id, points in rows}


def _columns(rows: Sequence[Row], shared: dict[tuple[int, ...], tuple[int, ...]]) -> dict[str, Series]:
    """Return rows, ordered by key, step and time, as series."""
    series = {}
    for key, points in groupby(rows, itemgetter(0)):
        column = {step: value for _, step, value, _ in points}  # a later point takes the place of the earlier one
        steps = tuple(column)
        series[key] = Series(shared.setdefault(steps, steps), tuple(column.values()))
    return series


def _from_sqlite(path: Path, run_ids: Sequence[str]) -> Iterator[tuple[str, Sequence[Row]]]:
    return points_of(path, run_ids) if path.exists() else ((run_id, []) for run_id in run_ids)


def _from_server(uri: str, run_ids: Sequence[str]) -> Iterator[tuple[str, Sequence[Row]]]:
    for start in range(0, len(run_ids), _RUNS_PER_REQUEST):
        yield from metric_histories(uri, run_ids[start : start + _RUNS_PER_REQUEST]).items()
