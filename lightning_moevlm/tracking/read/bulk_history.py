"""Reads one metric of many runs in one request, as MLflow's own pages do.

MLflow's documented interface has one request per run and key (45,000 for 500 runs of 90 keys), and
`get-history-bulk-interval`, which silently thins more than 2,500 points and may leave out a spike. The pages'
`get-history-bulk` gives every point up to a limit; an answer that reaches the limit is asked again with fewer runs. A
server that does not know it is asked as documented.
"""

from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from lightning_moevlm.tracking.store import open_client

if TYPE_CHECKING:
    from mlflow.entities import Metric

_ENDPOINT = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
_MOST_POINTS = 25_000  # of one answer
_MOST_RUNS = 100  # in one request
_UNKNOWN = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


def bulk_history(uri: str, run_ids: Sequence[str], key: str) -> "Iterator[tuple[str, Metric]]":
    """Yield every point of one metric of a server's runs that have logged it, with its run, in no order.

    Raises:
        MlflowException: the server does not answer, or there is no such run.
    """
    for start in range(0, len(run_ids), _MOST_RUNS):
        yield from _read_runs(uri, run_ids[start : start + _MOST_RUNS], key)


def _read_runs(uri: str, run_ids: Sequence[str], key: str) -> "Iterator[tuple[str, Metric]]":
    found = _request(uri, run_ids, key) if len(run_ids) > 1 else None
    if found is not None and len(found) < _MOST_POINTS:
        yield from found
    elif found is not None:
        half = len(run_ids) // 2
        yield from _read_runs(uri, run_ids[:half], key)
        yield from _read_runs(uri, run_ids[half:], key)
    else:
        client = open_client(uri)
        for run_id in run_ids:
            yield from ((run_id, metric) for metric in client.get_metric_history(run_id, key))


def _request(uri: str, run_ids: Sequence[str], key: str) -> "list[tuple[str, Metric]] | None":
    """Return the answer, or None where the server does not know the request."""
    from mlflow.entities import Metric
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    query = {"run_id": list(run_ids), "metric_key": key, "max_results": _MOST_POINTS}
    response = http_request(get_default_host_creds(uri), _ENDPOINT, "GET", params=query)
    if response.status_code in _UNKNOWN:
        return None
    rows: list[dict[str, Any]] = verify_rest_response(response, _ENDPOINT).json()["metrics"]
    return [(row["run_id"], Metric(row["key"], row["value"], row["timestamp"], row["step"])) for row in rows]
