"""With a real MLflow server on loopback, and a door in front of it that can be shut."""

import json
import math
import time
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.utils import rest_utils

from lightning_moevlm.tracking import (
    RunLogger,
    find_runs,
    metric_histories,
    metric_history,
    prepare_store,
    run_link,
    store,
)
from lightning_moevlm.tracking.read import bulk_history
from lightning_moevlm.tracking.write.offline_log import find_offline_logs
from tests.tracking.conftest import Relay
from tests.tracking.tiny import TinyData, TinyModule, tiny_trainer


def test_a_run_over_http(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_store(mlflow_server)
    logger = RunLogger(experiment_name="http", tracking_uri=mlflow_server, tags={"sweep": "s", "it's": 'a "quote"'})
    logger.log_hyperparams({"dim": 8})
    tiny_trainer(logger, tmp_path, max_steps=4).fit(TinyModule(poison_at=1), TinyData())
    logger.log_artifact_text("notes/a.txt", "text")
    logger.finalize()

    (run,) = find_runs(mlflow_server, "http", {"sweep": "s", "it's": 'a "quote"'})
    assert (run.status, run.params) == ("FINISHED", {"dim": "8"})
    points = {(p.key, p.step): p.value for p in metric_history(mlflow_server, run.run_id)}
    assert points["train/task_loss", 3] == pytest.approx(0.98**6)
    assert math.isnan(points["train/nan", 1])
    assert points["train/inf", 1] == math.inf
    assert points["train/minus", 1] == -math.inf
    assert logger.run_dir == tmp_path / "runs" / run.experiment_id / run.run_id
    assert (logger.run_dir / "checkpoints").is_dir()
    page = requests.get(run_link(mlflow_server, run.experiment_id, run.run_id), timeout=10)
    assert page.status_code == 200
    assert "<title>MLflow</title>" in page.text
    text = requests.get(f"{mlflow_server}/get-artifact?path=notes/a.txt&run_uuid={run.run_id}", timeout=10).text
    assert text == "text"


def test_behind_a_server_a_resumed_run_leaves_out_what_it_logged_before(
    mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server forgets no point."""
    monkeypatch.chdir(tmp_path)
    first = RunLogger(experiment_name="again", tracking_uri=mlflow_server)
    for step in range(4):
        first.log_metrics({"a": float(step)}, step)
    first.finalize("failed")
    again = RunLogger(tracking_uri=mlflow_server, run_id=first.run_id)
    with pytest.warns(RuntimeWarning, match="is resumed at step 1 and has points up to step 3: a server forgets none"):
        again.rewind(1)
    for step in range(2, 6):
        again.log_metrics({"a": float(step)}, step)
    again.finalize()
    history = MlflowClient(mlflow_server).get_metric_history(str(first.run_id), "a")
    assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(6)]


def test_a_server_that_comes_back_gets_everything(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(experiment_name="door", tracking_uri=relay.uri, flush_points=1, flush_seconds=0.05)
    logger.log_metrics({"a": 0.0}, 0)
    logger.flush()
    relay.shut()
    with pytest.warns(RuntimeWarning, match="is unavailable") as told:
        start = time.perf_counter()
        for step in range(1, 6):
            logger.log_metrics({"a": float(step)}, step)
        assert time.perf_counter() - start < 1  # no call waits for the server
        logger.flush()
        logger.flush()
        assert time.perf_counter() - start < 60  # MLflow by itself retries for minutes
    assert len([warning for warning in told if "is unavailable" in str(warning.message)]) == 1
    relay.open()
    logger.finalize("success")
    assert [(p.step, p.value) for p in metric_history(relay.uri, str(logger.run_id), ["a"])] == [
        (step, float(step)) for step in range(6)
    ]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", b""])
def test_a_server_that_is_sick_or_silent_stops_no_training(
    relay: Relay, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """It answers 503, or takes requests and says nothing. Once it is well it gets everything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(store._LIMITS, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    logger = RunLogger(experiment_name="sick", tracking_uri=relay.uri, flush_points=1, flush_seconds=0.05)
    logger.flush()
    relay.shut(answer)
    with pytest.warns(RuntimeWarning, match="is unavailable"):
        start = time.perf_counter()
        for step in range(20):
            logger.log_metrics({"a": float(step)}, step)
            logger.log_tags({"step": str(step)})
            if step % 5 == 0:  # an upload takes the server longest
                logger.log_artifact_text(f"{step}.txt", "text")
        assert time.perf_counter() - start < 2
        logger.flush()
    assert relay.num_refused > 0
    relay.open()
    logger.finalize()
    assert len(metric_history(mlflow_server, str(logger.run_id), ["a"])) == 20
    assert len(MlflowClient(mlflow_server).list_artifacts(str(logger.run_id))) == 4
    assert find_offline_logs(tmp_path) == []


def test_training_outlives_its_server(
    relay: Relay, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(experiment_name="dead", tracking_uri=relay.uri, flush_points=1, flush_seconds=0.01)

    class Leaving(TinyModule):
        def on_train_batch_end(self, *_: object) -> None:
            if self.global_step == 2:
                relay.shut()
                self.trainer.logger.log_artifact_text("notes/late.txt", "kept")

    with pytest.warns(RuntimeWarning) as told:
        tiny_trainer(logger, tmp_path, max_steps=5).fit(Leaving(poison_at=3), TinyData())

    messages = [str(warning.message) for warning in told if issubclass(warning.category, RuntimeWarning)]
    assert len([m for m in messages if "is unavailable" in m]) == 1
    run_dir = tmp_path / "runs" / str(logger.experiment_id) / str(logger.run_id)
    (final,) = [m for m in messages if "were not uploaded" in m]
    [log] = find_offline_logs(run_dir)
    assert str(log.folder) in final
    [late] = log.folder.rglob("notes/late.txt")
    assert late.read_text() == "kept"
    kept = [json.loads(line) for line in log.journal.read_text().splitlines()]
    points = [(key, row["step"], value) for row in kept for key, value in row.get("metrics", {}).items()]
    there = metric_history(mlflow_server, str(logger.run_id), ["train/task_loss"])
    steps = {point.step for point in there} | {step for key, step, _ in points if key == "train/task_loss"}
    assert steps == {0, 1, 2, 3, 4}
    assert [float(value) for key, _, value in points if key == "train/inf"] == [math.inf]
    assert kept[-1]["status"] == "FINISHED"


def test_one_request_per_key_whatever_the_number_of_runs(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are those that the documented interface gives one by one, also where an answer had to be cut."""
    client = MlflowClient(mlflow_server)
    experiment = client.create_experiment("bulk")
    ids = [client.create_run(experiment).info.run_id for _ in range(5)]
    for n, run_id in enumerate(ids):
        values = (math.nan, math.inf, -math.inf, *(float(n + step) for step in range(n + 4)))
        metrics = [Metric("a", value, 1000 + step, step) for step, value in enumerate(values)]
        client.log_batch(run_id, [*metrics, Metric("b", 1.0, 5, 2)])
    expected = {
        run_id: [(m.key, m.step, m.value) for key in "ab" for m in client.get_metric_history(run_id, key)]
        for run_id in ids
    }
    asked = []
    real = rest_utils.http_request

    def counted(*args: object, **kwargs: object) -> object:
        asked.append(str(kwargs.get("endpoint", args[1:2])))
        return real(*args, **kwargs)

    monkeypatch.setattr(rest_utils, "http_request", counted)
    for most, requests_made in ((25_000, 2), (12, 5)):  # 7 + 8 + 9 + 10 + 11 points of a, 5 of b
        monkeypatch.setattr(bulk_history, "_MOST_POINTS", most)
        asked.clear()
        found = metric_histories(mlflow_server, ids)
        got = {run_id: [(p.key, p.step, p.value) for p in points] for run_id, points in found.items()}
        assert repr(got) == repr(expected).replace("1.7976931348623157e+308", "inf")
        # 12 points at most: of a, 5 runs, 2 and 3 of them, and 2 of those 3 are too many; then one by one
        assert sum("get-history-bulk" in one for one in asked) == requests_made
    monkeypatch.setattr(bulk_history, "_ENDPOINT", "/ajax-api/2.0/mlflow/metrics/not-there")
    assert repr(metric_histories(mlflow_server, ids)) == repr(found)
    with pytest.raises(MlflowException, match="not found"):
        metric_histories(mlflow_server, ["0" * 32])
