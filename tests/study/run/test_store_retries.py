"""A sweep whose real MLflow server is killed in the middle. Its runs write into the server's database themselves."""

import threading
import time
from pathlib import Path

import pytest

from lightning_moevlm.study.run.active_runs import UNREACHABLE
from lightning_moevlm.study.run.ledger import Status, read_ledger
from lightning_moevlm.study.run.store_retries import StoreRetries
from tests.mlflow_server import MlflowServer
from tests.study.run.test_execute import assert_each_once, wait_for
from tests.study.tiny_study import plan_of, sweep, write_project


def statuses(file: Path) -> list[Status]:
    return [state.status for _, state in read_ledger(plan_of(file))]


def kill_when(server: MlflowServer, file: Path, condition) -> threading.Thread:
    """Kill the server as soon as the ledger of the sweep, which runs in this process, says so."""

    def act() -> None:
        wait_for(lambda: condition(statuses(file)), seconds=240)
        server.kill()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_sweep_outlives_its_server(
    mortal_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINY_STORE", mortal_server.database)
    file = write_project(tmp_path, mortal_server.address, model={"seconds_per_step": 0.5})
    killer = kill_when(mortal_server, file, lambda found: found.count(Status.RUNNING) == 2)

    def revive() -> None:
        wait_for(lambda: statuses(file).count(Status.ENDED) == 2, seconds=240)
        time.sleep(1)
        mortal_server.start()

    reviver = threading.Thread(target=revive)
    reviver.start()
    plan, experiment, tally, watcher = sweep(file)
    killer.join()
    reviver.join()
    assert (tally.started, tally.stopped) == (4, "")
    assert_each_once(plan, experiment)
    assert sum("is unavailable" in line for line in watcher.lines) == 1


@pytest.mark.slow
def test_a_sweep_whose_server_stays_away_stops_and_resumes(
    mortal_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINY_STORE", mortal_server.database)
    file = write_project(tmp_path, mortal_server.address, model={"seconds_per_step": 0.5})
    killer = kill_when(mortal_server, file, lambda found: found.count(Status.RUNNING) == 2)
    _, _, tally, _ = sweep(file, silence_seconds=1.0)
    killer.join()
    assert (tally.started, tally.stopped) == (2, UNREACHABLE)
    assert sorted(statuses(file)) == [Status.ENDED] * 2 + [Status.PLANNED] * 2
    mortal_server.start()
    plan, experiment, tally, _ = sweep(file)
    assert (tally.started, tally.stopped) == (2, "")  # ended runs are judged, not run again
    assert_each_once(plan, experiment)


def test_an_unreachable_store_is_tried_again_after_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told: list[str] = []
    store = StoreRetries("http://user:secret@127.0.0.1:9", told.append)

    def fail() -> None:
        raise OSError("gone")

    pauses = []
    for _ in range(7):
        assert not store.attempt(fail)
        pause = 0
        while not store.is_ready:
            now[0] += 1
            pause += 1
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    assert store.outage_seconds == sum(pauses)
    assert store.attempt(lambda: None)
    assert (store.is_ready, store.outage_seconds) == (True, 0.0)
    assert told == [
        "MLflow at http://***@127.0.0.1:9 is unavailable; running runs continue; others are judged or "
        "begin once it answers: gone"
    ]
