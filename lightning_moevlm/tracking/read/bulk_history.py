"""One metric of many runs in one request, as MLflow's own pages ask for it.

MLflow's documented interface has one request per run and key, 45,000 for 500 runs of 90 keys, and `get-history-bulk-
interval`, which thins what is longer than 2,500 points without a word: a spike could be among what it leaves out. So
`get-history-bulk` is asked, which is there for the pages of MLflow's interface, gives every point, and cuts at a number
that shows: an answer of that length is asked again with fewer runs. A server that does not know it answers 404, and is
asked as documented.
"""

from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Metric

_ENDPOINT = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
_MOST_POINTS = 25_000  # of one answer
_MOST_RUNS = 100  # in one question
_UNKNOWN = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


def bulk_history(uri: str, run_ids: Sequence[str], key: str) -> "Iterator[tuple[str, Metric]]":
    """Yield every point of one metric with its run, in no order that counts.

    Args:
        uri: of a server.
        run_ids: runs that have logged the metric.
        key: the metric's.

    Raises:
        MlflowException: the server does not answer, or there is no such run.
    """
    for start in range(0, len(run_ids), _MOST_RUNS):
        yield from _of_some(uri, run_ids[start : start + _MOST_RUNS], key)


def _of_some(uri: str, run_ids: Sequence[str], key: str) -> "Iterator[tuple[str, Metric]]":
    found = _asked(uri, run_ids, key) if len(run_ids) > 1 else None
    if found is not None and len(found) < _MOST_POINTS:
        yield from found
    elif found is not None:
        half = len(run_ids) // 2
        yield from _of_some(uri, run_ids[:half], key)
        yield from _of_some(uri, run_ids[half:], key)
    else:
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        for run_id in run_ids:
            yield from ((run_id, metric) for metric in client.get_metric_history(run_id, key))


def _asked(uri: str, run_ids: Sequence[str], key: str) -> "list[tuple[str, Metric]] | None":
    """Return the answer, or None of a server that does not know the question."""
    from mlflow.entities import Metric
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    asked = {"run_id": list(run_ids), "metric_key": key, "max_results": _MOST_POINTS}
    response = http_request(get_default_host_creds(uri), _ENDPOINT, "GET", params=asked)
    if response.status_code in _UNKNOWN:
        return None
    rows: list[dict[str, Any]] = verify_rest_response(response, _ENDPOINT).json()["metrics"]
    return [(row["run_id"], Metric(row["key"], row["value"], row["timestamp"], row["step"])) for row in rows]
