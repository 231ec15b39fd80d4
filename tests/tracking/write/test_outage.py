"""A real server that is killed while a real process trains: nothing is lost, nothing is there twice."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_moevlm.cli.main import main
from lightning_moevlm.tracking import metric_history
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.write.offline_log import JOURNAL, Address, OfflineLog, PendingCount
from lightning_moevlm.tracking.write.run_writer import RunWriter
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


def assert_whole(server: MlflowServer, run_id: str, steps: int = 12) -> None:
    """Every point, tag and file is there, and once: asked of the table itself, which a history would tidy."""
    with closing(sqlite3.connect(server.database.removeprefix("sqlite:///"))) as database:
        rows = database.execute("SELECT step FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step", (run_id, LOSS))
        assert [step for (step,) in rows] == list(range(steps))
    client = MlflowClient(server.address)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["sixth"]) == ("FINISHED", "seen")
    assert [one.path for one in client.list_artifacts(run_id, "notes")] == ["notes/six.txt"]
    assert len(client.list_artifacts(run_id, "images")) == 2  # whole and small, of one picture


@pytest.mark.slow
def test_a_server_killed_and_started_again_within_a_run(mortal_server: MlflowServer, tmp_path: Path) -> None:
    training = Training(mortal_server.address, tmp_path)
    training.start(waits_at=8)
    training.wait_for_step(3)
    mortal_server.kill()
    training.wait_for_step(7)
    waiting = OfflineLog(training.run_dir).count()
    assert waiting.points >= 3
    assert waiting.files == 3
    mortal_server.start()
    training.go_on()
    training.wait()
    assert not (training.run_dir / JOURNAL).exists()
    assert_whole(mortal_server, training.run_id)
    assert (tmp_path / "stderr").read_text().count("takes nothing at the moment") == 1


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
def test_a_run_killed_in_the_outage_loses_nothing_it_had_logged(
    mortal_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(mortal_server.address, tmp_path, steps=60)
    training.start()
    training.wait_for_step(3)
    mortal_server.kill()
    training.wait_for_step(20)
    os.kill(training.process.pid, signal.SIGKILL)
    training.process.wait()
    mortal_server.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mortal_server.address)
    assert main(["sync"]) == 0
    there = [point.step for point in metric_history(mortal_server.address, training.run_id, [LOSS])]
    assert there[:20] == list(range(20))


def test_a_delivery_that_is_killed_in_the_middle_is_finished_by_the_next(mlflow_server: str, tmp_path: Path) -> None:
    """The server takes a batch, and its answer does not arrive: the batch comes again, and its points are kept once."""
    client = MlflowClient(mlflow_server)
    run_id = client.create_run(client.create_experiment("twice")).info.run_id
    log = OfflineLog(tmp_path / "run", Address(mlflow_server, run_id))
    values = [float("nan"), float("inf"), 0.1]
    log.keep_points([Point("a", step, values[step % 3], 1_000 + step) for step in range(2500)])
    log.release()

    class DiesAfter(RunWriter):
        writes = 0

        def points(self, points) -> None:  # type: ignore[no-untyped-def]
            super().points(points)
            self.writes += 1
            if self.writes == 2:
                raise OSError("killed")

    for _ in range(2):
        with pytest.raises(OSError, match="killed"):
            OfflineLog(tmp_path / "run").deliver(DiesAfter(client, run_id), has_ended=True)
    OfflineLog(tmp_path / "run").deliver(RunWriter(client, run_id), has_ended=True)
    there = client.get_metric_history(run_id, "a")  # as in the table, nothing is tidied
    assert sorted(point.step for point in there) == list(range(2500))


def test_credentials_are_not_kept_and_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    OfflineLog(tmp_path / "runs/1/run", Address("http://***@127.0.0.1:9", "run")).keep_tags({"a": "b"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["sync"]) == 2
    assert "credentials are not kept on disk: set MLFLOW_TRACKING_URI" in capsys.readouterr().err
    assert main(["sync", "nowhere"]) == 2
    assert "no such folder: nowhere" in capsys.readouterr().err
    assert main(["sync", "--dry_run", "true", "--json", "-"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert (record["store"], record["points"], record["outcome"]) == ("http://***@127.0.0.1:9", 0, "kept")
    assert OfflineLog(tmp_path / "runs/1/run").count() == PendingCount(0, 0)
