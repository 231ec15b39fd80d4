"""Reads whole histories of many runs as columns: a study of 500 runs has millions of points.

Runs are read one after the other, so that one run's points are held beside the result. Where they make up most of
MLflow's file, it is read from end to end, which is much faster, into 24 bytes a point. Series with the same steps share
them.
"""

from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter, lt
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.tracking.read.runs import metric_histories
from lightning_moevlm.tracking.read.sqlite_rows import Row, are_most_points, every_point, points_of
from lightning_moevlm.tracking.store import sqlite_path

Steps = tuple[int, ...]

_RUNS_PER_REQUEST = 16  # behind a server; their points are held at once


class Series(NamedTuple):
    """One metric of one run."""

    steps: Steps
    """Optimiser steps, ascending."""
    values: tuple[float, ...]
    """As logged, also NaN and infinities."""


def metric_series(uri: str, run_ids: Sequence[str]) -> dict[str, dict[str, Series]]:
    """Return every series of every run, by run id and key; a run that logged nothing has an empty mapping.

    Where a step was logged twice (resume from an older checkpoint), the later point counts.

    Raises:
        MlflowException: the store cannot be read, or, behind a server, there is no such run.
    """
    path = sqlite_path(uri)
    shared: dict[Steps, Steps] = {}
    if path is None:
        return {run_id: _columns(points, shared) for run_id, points in _from_server(uri, run_ids)}
    if not path.exists():
        return {run_id: {} for run_id in run_ids}
    if are_most_points(path, run_ids):
        return _from_whole_file(path, run_ids, shared)
    return {run_id: _columns(points, shared) for run_id, points in points_of(path, run_ids)}


def _columns(rows: Sequence[Row], shared: dict[Steps, Steps]) -> dict[str, Series]:
    """Return rows, ordered by key, step and time, as series."""
    return {
        key: _series({step: value for _, step, value, _ in points}, shared)  # the later point of a step counts
        for key, points in groupby(rows, itemgetter(0))
    }


def _series(column: dict[int, float], shared: dict[Steps, Steps]) -> Series:
    steps = tuple(column)
    return Series(shared.setdefault(steps, steps), tuple(column.values()))


class _Logged(NamedTuple):
    """One metric of one run as it lies in the file."""

    steps: "array[int]"
    times: "array[int]"
    values: "array[float]"

    @property
    def column(self) -> dict[int, float]:
        """Value by step, ascending; the later point of a step counts."""
        steps, times, values = self
        if all(map(lt, steps, steps[1:])):
            return dict(zip(steps, values, strict=True))
        order = sorted(range(len(steps)), key=lambda place: (steps[place], times[place]))
        return {steps[place]: values[place] for place in order}


def _from_whole_file(path: Path, run_ids: Sequence[str], shared: dict[Steps, Steps]) -> dict[str, dict[str, Series]]:
    logged: dict[str, dict[str, _Logged]] = {run_id: {} for run_id in run_ids}
    for run_id, key, step, value, ms in every_point(path):
        try:
            steps, times, values = logged[run_id][key]
        except KeyError:
            if run_id not in logged:
                continue
            steps, times, values = logged[run_id][key] = _Logged(array("q"), array("q"), array("d"))
        steps.append(step)
        times.append(ms)
        values.append(value)
    return {
        run_id: {key: _series(of_run.pop(key).column, shared) for key in sorted(of_run)}
        for run_id, of_run in logged.items()
    }


def _from_server(uri: str, run_ids: Sequence[str]) -> Iterator[tuple[str, Sequence[Row]]]:
    for start in range(0, len(run_ids), _RUNS_PER_REQUEST):
        yield from metric_histories(uri, run_ids[start : start + _RUNS_PER_REQUEST]).items()
