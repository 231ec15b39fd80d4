"""With a real MLflow server on loopback, and a door in front of it that can be shut."""

import json
import math
import time
from pathlib import Path

import pytest
import requests

from lightning_moevlm.tracking import RunLogger, find_runs, metric_history, prepare_store, run_link
from tests.tracking.conftest import Relay
from tests.tracking.tiny import TinyData, TinyModule, tiny_trainer


def test_a_run_over_http(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_store(mlflow_server)
    logger = RunLogger(experiment_name="http", tracking_uri=mlflow_server, tags={"sweep": "s", "it's": 'a "quote"'})
    logger.log_hyperparams({"dim": 8})
    tiny_trainer(logger, tmp_path, max_steps=4).fit(TinyModule(poison_at=1), TinyData())
    logger.log_artifact_text("notes/a.txt", "text")

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


def test_a_server_that_comes_back_gets_everything(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(experiment_name="door", tracking_uri=relay.uri, flush_points=1, flush_seconds=0.05)
    logger.log_metrics({"a": 0.0}, 0)
    relay.shut()
    start = time.perf_counter()
    with pytest.warns(RuntimeWarning, match="takes nothing at the moment") as told:
        for step in range(1, 6):
            logger.log_metrics({"a": float(step)}, step)
            time.sleep(0.06)
    assert time.perf_counter() - start < 10  # MLflow by itself retries for minutes
    assert len([warning for warning in told if "takes nothing" in str(warning.message)]) == 1
    relay.open()
    logger.finalize("success")
    assert [(p.step, p.value) for p in metric_history(relay.uri, str(logger.run_id), ["a"])] == [
        (step, float(step)) for step in range(6)
    ]


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
    assert len([m for m in messages if "takes nothing at the moment" in m]) == 1
    run_dir = tmp_path / "runs" / str(logger.experiment_id) / str(logger.run_id)
    (final,) = [m for m in messages if "were not delivered" in m]
    assert str(run_dir / "undelivered.jsonl") in final
    assert (run_dir / "undelivered" / "notes" / "late.txt").read_text() == "kept"
    kept = [json.loads(line) for line in (run_dir / "undelivered.jsonl").read_text().splitlines()]
    there = metric_history(mlflow_server, str(logger.run_id), ["train/task_loss"])
    steps = [point.step for point in there] + [row["step"] for row in kept if row.get("key") == "train/task_loss"]
    assert steps == [0, 1, 2, 3, 4]
    assert [float(row["value"]) for row in kept if row.get("key") == "train/inf"] == [math.inf]
    assert kept[-1]["status"] == "FINISHED"
