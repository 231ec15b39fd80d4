"""Reads runs back: finds them, and every point that they logged.

MLflow's client fetches the history of one key of one run per call: 12 runs x 100 keys are 1,200 queries. In SQLite all
keys of a run come in one query; behind a server all runs of a key come in one, several keys at once.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.read.bulk_history import bulk_history
from lightning_moevlm.tracking.read.sqlite_rows import as_logged, points_of, tags_by_run, tags_by_run_with
from lightning_moevlm.tracking.store import describe_cause, has_store, open_client, prepare_store, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.store.entities import PagedList

_Found = TypeVar("_Found")

NO_SUCH_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Error codes of MLflow for an id that no run has, and for one that no run can have."""
_RUNS_PER_PAGE = 200
_PARALLEL_REQUESTS = 8


@dataclass(frozen=True)
class RunRow:
    """One run as MLflow knows it."""

    run_id: str
    name: str
    status: str
    """RUNNING, SCHEDULED, FINISHED, FAILED or KILLED."""
    experiment_id: str
    artifact_uri: str
    start_ms: int
    """Unix time, milliseconds."""
    end_ms: int | None
    """None while it runs."""
    tags: Mapping[str, str]
    params: Mapping[str, str]
    """By dotted keys of the resolved configuration."""
    last: Mapping[str, float]
    """Last logged value of each metric."""


def find_runs(uri: str, experiment: str, tags: Mapping[str, str] | None = None) -> list[RunRow]:
    """Return the runs of an experiment, by name, that have all of `tags`, oldest first; without deleted runs.

    A store or an experiment that does not exist yet has no runs and is not created. `uri` is everywhere here as
    `resolve_tracking_uri` returns it.

    Raises:
        MlflowException: the store cannot be read (server gone, schema of another MLflow version).
    """
    if not has_store(uri):
        return []
    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else _rows(client, [found.experiment_id], tags or {})


def tags_of_runs(uri: str, experiment: str, tags: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """Return all tags of the runs of `find_runs`, by run id, much sooner: no param is read."""
    path = sqlite_path(uri)
    if path is None:
        return {row.run_id: row.tags for row in find_runs(uri, experiment, tags)}
    found = tags_by_run(path, experiment) if path.exists() else {}
    return {run_id: own for run_id, own in found.items() if tags.items() <= own.items()}


def tags_of_runs_with(uri: str, key: str, values: Collection[str]) -> dict[str, Mapping[str, str]]:
    """Return all tags of the runs of every experiment whose tag `key` has one of the values, by run id.

    Raises:
        MlflowException: the store cannot be read.
    """
    path = sqlite_path(uri)
    if path is None:
        return {row.run_id: row.tags for value in values for row in find_runs_anywhere(uri, {key: value})}
    return dict(tags_by_run_with(path, key, values)) if path.exists() else {}


def read_run(uri: str, run_id: str) -> RunRow:
    """Return one run.

    Raises:
        MlflowException: the store cannot be read, or has no such run.
    """
    return _row(open_client(uri).get_run(run_id))


def has_run(uri: str, run_id: str) -> bool:
    """Return whether a store has a run; a store that does not exist is not created, and has none.

    Raises:
        UserError: the store cannot be read.
    """
    from mlflow.exceptions import MlflowException

    if not has_store(uri):
        return False
    prepare_store(uri)
    try:
        read_run(uri, run_id)
    except MlflowException as error:
        if error.error_code in NO_SUCH_RUN:
            return False
        raise UserError(f"{mask_url_secrets(uri)} cannot be read: {describe_cause(error)}") from error
    return True


def find_runs_anywhere(uri: str, tags: Mapping[str, str] | None = None, where: str = "") -> list[RunRow]:
    """Return the runs of every experiment as `find_runs` does; `where` is a condition in MLflow's filters."""
    if not has_store(uri):
        return []
    client = open_client(uri)
    found = _every_page(lambda token: client.search_experiments(max_results=_RUNS_PER_PAGE, page_token=token))
    return _rows(client, [each.experiment_id for each in found], tags or {}, where)


def _rows(client: "MlflowClient", experiments: list[str], wanted: Mapping[str, str], where: str = "") -> list[RunRow]:
    filter_string = " and ".join(part for part in (_tag_filter(wanted), where) if part)
    found = _every_page(
        lambda token: client.search_runs(
            experiments,
            filter_string=filter_string,
            order_by=["attributes.start_time ASC"],
            max_results=_RUNS_PER_PAGE,
            page_token=token,
        )
    )
    rows = map(_row, found)
    return [row for row in rows if all(row.tags.get(key) == value for key, value in wanted.items())]


def _row(run: "Run") -> RunRow:
    return RunRow(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        experiment_id=run.info.experiment_id,
        artifact_uri=run.info.artifact_uri,
        start_ms=run.info.start_time,
        end_ms=run.info.end_time or None,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        last={key: as_logged(value) for key, value in run.data.metrics.items()},
    )


def _every_page(search: "Callable[[str | None], PagedList[_Found]]") -> "Iterator[_Found]":
    """Yield the results of a search, which is given the token of the page."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def metric_history(uri: str, run_id: str, keys: Sequence[str] | None = None) -> list[Point]:
    """Return the points of one run under `keys` (None = every key), by key, then step.

    Where a step was logged twice (a resume from an older checkpoint), the later point counts.

    Raises:
        MlflowException: the store cannot be read, or, behind a server, there is no such run.
    """
    return metric_histories(uri, [run_id], keys)[run_id]


def metric_histories(uri: str, run_ids: Sequence[str], keys: Sequence[str] | None = None) -> dict[str, list[Point]]:
    """Return `metric_history` of several runs, by run id; a run that logged nothing has an empty list."""
    path = sqlite_path(uri)
    raw = _from_server(uri, run_ids, keys) if path is None else _from_sqlite(path, run_ids, keys)
    newest: dict[str, dict[tuple[str, int], Point]] = {run_id: {} for run_id in run_ids}
    for run_id, point in raw:
        earlier = newest[run_id].get((point.key, point.step))
        if earlier is None or point.time_ms >= earlier.time_ms:
            newest[run_id][point.key, point.step] = point
    return {run_id: sorted(points.values(), key=lambda p: (p.key, p.step)) for run_id, points in newest.items()}


def _from_sqlite(path: Path, run_ids: Sequence[str], keys: Sequence[str] | None) -> Iterable[tuple[str, Point]]:
    if path.exists():
        for run_id, rows in points_of(path, run_ids, keys):
            yield from ((run_id, Point(*row)) for row in rows)


def _from_server(uri: str, run_ids: Sequence[str], keys: Sequence[str] | None) -> Iterable[tuple[str, Point]]:
    client = open_client(uri)
    wanted = None if keys is None else set(keys)
    having: dict[str, list[str]] = {}  # runs by key
    for run_id in run_ids:
        for key in client.get_run(run_id).data.metrics:
            if wanted is None or key in wanted:
                having.setdefault(key, []).append(run_id)

    def fetch(key: str) -> list[tuple[str, Point]]:
        history = bulk_history(uri, having[key], key)
        return [(run_id, Point(m.key, m.step, as_logged(m.value), m.timestamp)) for run_id, m in history]

    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        for points in pool.map(fetch, having):
            yield from points


def _tag_filter(tags: Mapping[str, str]) -> str:
    """Return the tags as a filter; MLflow's language has no escapes, so the caller compares the others."""
    sayable = {k: v for k, v in tags.items() if not any(mark in k + v for mark in "'\"`\\")}
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in sayable.items())
