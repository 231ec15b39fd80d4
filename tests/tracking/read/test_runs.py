import math
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from lightning_moevlm.tracking import Point, RunLogger, find_runs, metric_histories, metric_history
from lightning_moevlm.tracking.read import sqlite_rows
from lightning_moevlm.tracking.read.series import metric_series


def logged(uri: str, name: str, tags: dict[str, str]) -> str:
    logger = RunLogger(experiment_name="study", run_name=name, tracking_uri=uri, tags=tags)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    return str(logger.run_id)


def test_runs_are_found_by_exact_tags(uri: str) -> None:
    first = logged(uri, "a", {"sweep": "x", "arm": "no 'z'"})
    second = logged(uri, "b", {"sweep": "x", "arm": 'say "z"'})
    third = logged(uri, "c", {"sweep": "xy", "arm": "no 'z'"})
    assert [run.run_id for run in find_runs(uri, "study")] == [first, second, third]
    assert [run.run_id for run in find_runs(uri, "study", {"sweep": "x"})] == [first, second]
    assert [run.run_id for run in find_runs(uri, "study", {"arm": "no 'z'"})] == [first, third]
    assert [run.run_id for run in find_runs(uri, "study", {"sweep": "x", "arm": 'say "z"'})] == [second]
    assert find_runs(uri, "study", {"sweep": "X"}) == []
    assert find_runs(uri, "another") == []
    (run,) = find_runs(uri, "study", {"sweep": "xy"})
    assert (run.name, run.status, run.last) == ("c", "FINISHED", {"loss": 1.0})
    assert run.end_ms is not None
    assert run.start_ms <= run.end_ms
    MlflowClient(uri).delete_run(first)
    assert [run.run_id for run in find_runs(uri, "study", {"sweep": "x"})] == [second]


def test_asking_creates_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert find_runs(uri, "study") == []
    assert metric_history(uri, "f00") == []
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_not_the_end(uri: str) -> None:
    client = MlflowClient(uri)
    experiment = client.create_experiment("study")
    ids = {client.create_run(experiment, tags={"n": str(n % 2)}).info.run_id for n in range(205)}
    assert {run.run_id for run in find_runs(uri, "study")} == ids
    assert len(find_runs(uri, "study", {"n": "1"})) == 102


def test_the_later_of_two_points_counts(uri: str) -> None:
    """A run resumed from an older checkpoint logs steps again."""
    client = MlflowClient(uri)
    run_id = client.create_run("0").info.run_id
    metrics = [
        Metric("loss", 3.0, 1000, 2),
        Metric("loss", 4.0, 1000, 1),
        Metric("loss", 5.0, 2000, 2),
        Metric("accuracy", math.inf, 1000, 1),
    ]
    client.log_batch(run_id, metrics=metrics)
    assert metric_history(uri, run_id) == [
        Point("accuracy", 1, math.inf, 1000),
        Point("loss", 1, 4.0, 1000),
        Point("loss", 2, 5.0, 2000),
    ]
    assert metric_history(uri, run_id, ["accuracy", "nothing"]) == [Point("accuracy", 1, math.inf, 1000)]
    assert metric_history(uri, run_id, []) == []


@pytest.mark.slow
def test_a_study_is_read_fast(uri: str) -> None:
    """12 runs x 100 keys x 30 steps: MLflow's client needs 1,200 queries, one per run and key."""
    client = MlflowClient(uri)
    keys = [f"load/block{i}" for i in range(100)]
    run_ids = [client.create_run("0").info.run_id for _ in range(12)]
    for number, run_id in enumerate(run_ids):
        points = [Metric(key, number + step / 100, step, step) for step in range(30) for key in keys]
        for start in range(0, len(points), 1000):
            client.log_batch(run_id, metrics=points[start : start + 1000])

    start_time = time.process_time()
    histories = metric_histories(uri, run_ids, keys)
    assert time.process_time() - start_time < 3
    assert {run_id: len(points) for run_id, points in histories.items()} == dict.fromkeys(run_ids, 3000)
    start_time = time.process_time()
    one_by_one = {run_id: metric_history(uri, run_id, keys) for run_id in run_ids}
    assert time.process_time() - start_time < 3
    assert one_by_one == histories
    assert histories[run_ids[7]][29].value == pytest.approx(7.29)


def test_a_store_that_is_busy_for_too_long_is_told_as_mlflow_tells_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = logged(uri, "a", {})
    monkeypatch.setattr(sqlite_rows, "BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        for read in (metric_histories, metric_series):
            with pytest.raises(MlflowException, match="database is locked"):
                read(uri, [run_id])
