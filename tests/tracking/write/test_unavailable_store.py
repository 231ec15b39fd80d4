"""A store, disk or log that is away, full or locked: training continues, and a warning says what is lost."""

import shutil
import sqlite3
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking import RunLogger, find_runs, prepare_store
from lightning_moevlm.tracking.write.offline_log import find_offline_logs
from lightning_moevlm.tracking.write.sync_offline_logs import sync_offline_logs
from tests.tracking.tiny import short_files, values


def test_points_wait_for_a_database_that_is_away(uri: str) -> None:
    """The database file is moved away and back."""
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.log_metrics({"a": 0.0}, 0)
    logger.flush()
    path = Path(uri.removeprefix("sqlite:///"))
    away = path.with_name("away.db")
    logger.experiment._tracking_client.store.engine.dispose()
    path.rename(away)
    logger.log_metrics({"a": 1.0}, 1)
    with pytest.warns(RuntimeWarning, match="is unavailable; training continues, its log is kept on disk"):
        logger.flush()
    logger.experiment._tracking_client.store.engine.dispose()
    path.unlink(missing_ok=True)
    away.rename(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"a": 2.0}, 2)
        logger.finalize("success")
    assert values(uri, str(logger.run_id), "a") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_database_on_a_full_disk_stops_no_training(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.flush()
    with pytest.warns(RuntimeWarning) as told, short_files(4096):
        for step in range(200):
            logger.log_metrics({"a": 1.0}, step)
        logger.flush()
    lines = [str(warning.message) for warning in told]
    assert sum(line.startswith("MLflow at sqlite:///") and "is unavailable" in line for line in lines) == 1
    assert (
        sum("cannot be kept in" in line and "(No space left on device): free disk space" in line for line in lines) == 1
    )
    logger.log_metrics({"a": 1.0}, 200)  # there is room again
    logger.finalize()
    assert [step for step, _ in values(uri, str(logger.run_id), "a")] == list(range(201))
    assert list(logger.run_dir.iterdir()) == []


def test_a_disk_that_stays_full_to_the_end_keeps_what_it_took_and_says_what_is_lost(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.flush()
    with (
        pytest.warns(RuntimeWarning, match=r"\d+ points and 0 files .* \d+ more lines found no room"),
        short_files(4096),
    ):
        for step in range(200):
            logger.log_metrics({"a": 1.0}, step)
        logger.finalize()
    [log] = find_offline_logs(logger.run_dir)
    kept = log.count().points
    assert 0 < kept < 200
    [result] = sync_offline_logs([log], uri)
    assert result.reason == ""
    assert [step for step, _ in values(uri, str(logger.run_id), "a")] == list(range(kept))


def test_a_full_disk_at_the_start_is_one_line(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(tracking_uri=uri)
    prepare_store(uri)
    with short_files(4096), pytest.raises(UserError, match=r"cannot create or resume the run \(.*\): free disk space"):
        logger.flush()
    assert "Traceback" not in "".join(capfd.readouterr())
    logger.log_metrics({"a": 1.0}, 0)  # the same call works once there is room
    logger.finalize()


def test_a_log_that_is_deleted_ends_no_training(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.log_metrics({"a": 1.0}, 0)
    [log] = find_offline_logs(logger.run_dir)
    shutil.rmtree(log.folder)
    logger.log_metrics({"a": 1.0}, 1)
    with pytest.warns(RuntimeWarning, match="0 points and 0 files of run .* were not uploaded"):
        logger.finalize()


def test_a_folder_of_runs_that_cannot_be_written_is_one_line(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri)
    folder = Path(logger.save_dir) / "1"
    folder.touch()
    with pytest.raises(
        UserError, match=r"could not be written \(Not a directory\); free disk space or grant write permission"
    ):
        logger.flush()
    assert [run.status for run in find_runs(uri, "moevlm")] == ["FAILED"]


def test_a_database_that_another_process_has_locked_is_waited_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sender: no call of the training waits."""
    logger = RunLogger(tracking_uri=uri, flush_points=1, flush_seconds=0.01)
    logger.flush()
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as other:
        other.execute("BEGIN EXCLUSIVE")
        start = time.perf_counter()
        for step in range(20):
            logger.log_metrics({"a": 1.0}, step)
            logger.log_tags({"step": str(step)})
        assert time.perf_counter() - start < 2.0
        other.rollback()
    logger.finalize()
    assert [step for step, _ in values(uri, str(logger.run_id), "a")] == list(range(20))
