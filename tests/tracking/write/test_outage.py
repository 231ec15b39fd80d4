"""A real server that is killed while a real process trains: nothing is lost, nothing is there twice."""

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lightning_moevlm.cli.main import main
from lightning_moevlm.tracking import RunLogger, metric_history
from lightning_moevlm.tracking.write.offline_log import Address, OfflineLog, PendingCount, find_offline_logs
from lightning_moevlm.tracking.write.run_writer import RunWriter
from lightning_moevlm.tracking.write.sync_offline_logs import sync_offline_logs
from tests.mlflow_server import MlflowServer

REPOSITORY = Path(__file__).parents[3]
LOSS = "train/task_loss"


class Training:
    """The training in a process of its own, its standard output watched."""

    def __init__(self, uri: str, folder: Path, steps: int = 12, seconds_per_step: float = 0.05) -> None:
        client = MlflowClient(uri)
        self.run_id = client.create_run(client.create_experiment("outage")).info.run_id
        self._command = [sys.executable, "-m", "tests.tracking.outage_training", uri, self.run_id, str(steps)]
        self._command.append(str(seconds_per_step))
        self._folder = folder
        self._said: list[str] = []
        self.run_dir = folder / "runs" / client.get_run(self.run_id).info.experiment_id / self.run_id

    def start(self, waits_at: int = -1) -> None:
        self.process = subprocess.Popen(
            self._command,
            cwd=self._folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "WAITS_AT": str(waits_at)},
            stdout=subprocess.PIPE,
            stderr=(self._folder / "stderr").open("w"),
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == f"step {step}\n":
                return
        raise AssertionError((self._folder / "stderr").read_text())

    def go_on(self) -> None:
        (self._folder / "go_on").touch()

    def wait(self) -> None:
        assert self.process.wait(timeout=120) == 0, (self._folder / "stderr").read_text()


def steps_in_table(uri: str, run_id: str) -> list[int]:
    """Return every row's step, also where a history would show one of two."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        rows = database.execute("SELECT step FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step", (run_id, LOSS))
        return [step for (step,) in rows]


def assert_whole(server: MlflowServer, run_id: str, steps: int = 12) -> None:
    """Every point, tag and file is there, and once: asked of the table itself, which a history would tidy."""
    assert steps_in_table(server.database, run_id) == list(range(steps))
    client = MlflowClient(server.address)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["sixth"]) == ("FINISHED", "seen")
    assert [one.path for one in client.list_artifacts(run_id, "notes")] == ["notes/six.txt"]
    assert [each.path for each in client.list_artifacts(run_id, "files")] == ["files/six.bin"]


@pytest.mark.slow
def test_a_server_killed_and_started_again_within_a_run(mortal_server: MlflowServer, tmp_path: Path) -> None:
    training = Training(mortal_server.address, tmp_path)
    training.start(waits_at=8)
    training.wait_for_step(3)
    mortal_server.kill()
    training.wait_for_step(7)
    [log] = find_offline_logs(training.run_dir)
    assert log.count().points >= 3
    assert log.count().files == 3
    mortal_server.start()
    training.go_on()
    training.wait()
    assert find_offline_logs(training.run_dir) == []
    assert_whole(mortal_server, training.run_id)
    assert (tmp_path / "stderr").read_text().count("is unavailable") == 1


@pytest.mark.slow
def test_a_server_that_stays_away_for_the_rest_of_a_run(
    mortal_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(mortal_server.address, tmp_path)
    training.start()
    training.wait_for_step(3)
    mortal_server.kill()
    training.wait()
    told = (tmp_path / "stderr").read_text()
    assert f"moevlm sync {training.run_dir}" in told.replace("\n", "")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mortal_server.address)
    assert main(["sync"]) == 1  # it never comes back: nothing is lost by asking
    assert "kept" in capsys.readouterr().out
    mortal_server.start()
    assert main(["sync", "--json", "told.json"]) == 0
    [record] = json.loads(Path("told.json").read_text())
    assert (record["run_id"], record["outcome"], record["files"]) == (training.run_id, "uploaded", 3)
    assert record["store"] == mortal_server.address
    assert_whole(mortal_server, training.run_id)
    assert main(["sync", str(training.run_dir)]) == 0
    assert "Nothing to upload" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True])
def test_a_killed_run_loses_nothing_it_had_logged(
    mortal_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    training = Training(mortal_server.address, tmp_path, steps=60)
    training.start()
    training.wait_for_step(3)
    if not answers:
        mortal_server.kill()
    training.wait_for_step(20)
    os.kill(training.process.pid, signal.SIGKILL)
    training.process.wait()
    if not answers:
        mortal_server.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mortal_server.address)
    assert main(["sync"]) == 0
    steps = steps_in_table(mortal_server.database, training.run_id)
    assert steps == list(range(len(steps))) and len(steps) >= 20
    assert find_offline_logs(tmp_path) == []


def test_an_upload_that_is_killed_in_the_middle_is_finished_by_the_next(mlflow_server: str, tmp_path: Path) -> None:
    """The server takes a batch, and its answer does not arrive: the batch comes again, and its points are kept once."""
    client = MlflowClient(mlflow_server)
    run_id = client.create_run(client.create_experiment("twice")).info.run_id
    log = OfflineLog.begin(tmp_path / "run", Address(mlflow_server, run_id))
    values = [float("nan"), float("inf"), 0.1]
    for step in range(2500):
        log.append(metrics={"a": values[step % 3]}, step=step, time_ms=1_000 + step)
    log.release()

    class DiesAfter(RunWriter):
        writes = 0

        def write_points(self, points) -> None:  # type: ignore[no-untyped-def]
            super().write_points(points)
            self.writes += 1
            if self.writes == 2:
                raise OSError("killed")

    for _ in range(2):
        with pytest.raises(OSError, match="killed"):
            OfflineLog(log.folder).upload(DiesAfter(client, mlflow_server, run_id, pytest.fail), has_ended=True)
    OfflineLog(log.folder).upload(RunWriter(client, mlflow_server, run_id, pytest.fail), has_ended=True)
    there = client.get_metric_history(run_id, "a")  # as in the table, nothing is tidied
    assert sorted(point.step for point in there) == list(range(2500))


def train_and_die(uri: str, run_id: str | None, steps: range, answer: Any) -> None:
    """Log some steps, of which MLflow gets the first half, and die."""
    logger = RunLogger(tracking_uri=uri, run_id=run_id, flush_points=10_000, flush_seconds=3600)
    logger.rewind(steps.start - 1)
    for step in steps:
        logger.log_metrics({LOSS: float(steps.start)}, step)
        if step == steps.start + len(steps) // 2 - 1:
            logger.flush()
    answer.send(logger.run_id)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_and_resumed_twice_has_one_point_per_step(uri: str) -> None:
    """Each attempt takes what the one before left on disk, then drops what lies beyond its checkpoint."""
    here, there = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")  # what they import takes longer than what they do
    run_id = None
    for steps in (range(8), range(6, 16), range(10, 20)):
        attempt = fork.Process(target=train_and_die, args=(uri, run_id, steps, there))
        attempt.start()
        run_id = here.recv()
        attempt.join()
    assert run_id is not None
    logs = find_offline_logs(Path(uri.removeprefix("sqlite:///")).parent)
    assert [result.reason for result in sync_offline_logs(logs, uri)] == [""]
    assert steps_in_table(uri, run_id) == list(range(20))
    expected = [0.0] * 6 + [6.0] * 4 + [10.0] * 10
    assert [point.value for point in metric_history(uri, run_id, [LOSS])] == expected


def test_credentials_are_not_kept_and_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = OfflineLog.begin(tmp_path / "runs/1/run", Address("http://***@127.0.0.1:9", "run"))
    log.append(tags={"a": "b"})
    log.release()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["sync"]) == 2
    assert "credentials are not kept on disk: set MLFLOW_TRACKING_URI" in capsys.readouterr().err
    assert main(["sync", "nowhere"]) == 2
    assert "no such folder: nowhere" in capsys.readouterr().err
    assert main(["sync", "--dry_run", "true", "--json", "-"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert (record["store"], record["points"], record["outcome"]) == ("http://***@127.0.0.1:9", 0, "kept")
    assert log.count() == PendingCount(0, 0)
