"""The ledger: whole after any crash, honest about dead processes, one sweep at a time."""

import errno
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.declare.comparison import Divergence
from lightning_moevlm.study.run.ledger import (
    STATE_FILE,
    RunState,
    Status,
    check_store,
    hold_study,
    read_state,
    remember_store,
    write_state,
)
from lightning_moevlm.study.run.processes.child_process import Child, end_processes, is_alive
from lightning_moevlm.study.run.processes.command_line import share_environment
from lightning_moevlm.study.run.processes.run_files import last_checkpoint
from lightning_moevlm.study.statistics.outcomes.divergence import NONFINITE_STEP, explain_divergence
from lightning_moevlm.tracking.point import Point
from tests.waiting import wait_for


def test_state_survives_the_way_to_disk_and_back(tmp_path):
    assert read_state(tmp_path) == RunState(Status.PLANNED)
    state = RunState(Status.FAILED, "abc", None, None, 10.0, 12.5, 2, 1, "exit code 1", ("last", "lines"))
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert state.seconds == 2.5
    assert [file.name for file in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    ("edited", "told"),
    [
        ({"pid": "12a"}, r"Expected `int \| null`, got `str` - at `\$.pid`"),
        ({"started": "yesterday"}, r"Expected `float \| null`, got `str` - at `\$.started`"),
        ({"attempts": None}, r"Expected `int`, got `null` - at `\$.attempts`"),
        ({"log_tail": [1]}, r"Expected `str`, got `int` - at `\$.log_tail\[0\]`"),
        ({"status": "done"}, r"Invalid enum value 'done' - at `\$.status`"),
        ({"note": "mine"}, "contains unknown field `note`"),
    ],
)
def test_an_edited_state_is_refused_before_it_is_used(tmp_path, edited, told):
    write_state(tmp_path, RunState(Status.FINISHED, "abc", 12, 9, started=10, ended=12.5))  # whole numbers are numbers
    assert read_state(tmp_path).seconds == 2.5
    raw = json.loads((tmp_path / STATE_FILE).read_text())
    (tmp_path / STATE_FILE).write_text(json.dumps(raw | edited))
    with pytest.raises(UserError, match=f"not a run's state .*{told}.*remove the folder"):
        read_state(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_the_old_text(tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    write_atomically(file, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"state\.json could not be written \(No space left on device\); free disk space"
    ):
        write_atomically(file, "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("state.json", "old")]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "sweeps").write_text("a file")
    with (
        pytest.raises(UserError, match=r"tiny cannot be written: Not a directory"),
        hold_study(tmp_path / "sweeps/tiny"),
    ):
        pass
    (tmp_path / STATE_FILE).mkdir()
    with pytest.raises(UserError, match=r"state\.json cannot be read: Is a directory"):
        read_state(tmp_path)


def test_a_process_that_has_ended_is_not_alive_even_if_never_reaped():
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert process.is_running()  # what psutil says of it
    assert not is_alive(process)
    before = time.monotonic()
    end_processes([child.pid], 60.0)
    assert time.monotonic() - before < 60.0
    assert child.returncode is None and child.wait() == 0  # whoever started it is still told how it ended


def test_a_clock_that_is_set_ends_no_run(tmp_path, monkeypatch):
    child = Child.start([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "log", 30.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    try:
        assert child.poll() is None
    finally:
        child.end()


def test_running_without_its_process_is_interrupted(tmp_path):
    me = psutil.Process()
    alive = RunState(Status.RUNNING, "abc", me.pid, me.create_time())
    write_state(tmp_path, alive)
    assert read_state(tmp_path).status is Status.RUNNING
    write_state(tmp_path, replace(alive, pid_started=me.create_time() - 60))
    assert read_state(tmp_path).status is Status.INTERRUPTED  # the same number, another process
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_state(tmp_path, replace(alive, pid=gone.pid))
    assert read_state(tmp_path).status is Status.INTERRUPTED
    write_state(tmp_path, replace(alive, pid=None, pid_started=None))
    assert read_state(tmp_path).status is Status.INTERRUPTED  # killed between claim and start


def test_what_a_cluster_runs_needs_no_process_here(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    state = RunState(Status.RUNNING, "abc", engine="slurm", ticket="t", job="17")
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert state.is_elsewhere
    write_state(tmp_path, replace(state, engine="ray", pid=gone.pid, pid_started=1.0))
    assert read_state(tmp_path).status is Status.INTERRUPTED  # Ray ends its jobs with the sweep, and that is gone
    (tmp_path / STATE_FILE).write_text('{"status": "running", "log_tail": []}')  # written before there were engines
    assert read_state(tmp_path).status is Status.INTERRUPTED


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "odd", "log_tail": []}', '{"log_tail": []}'])
def test_state_that_was_edited_by_hand(tmp_path, text):
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(UserError, match=r"state\.json.*remove the folder"):
        read_state(tmp_path)


def test_unfinished_write_leaves_the_old_state(tmp_path, monkeypatch):
    write_state(tmp_path, RunState(Status.FINISHED, "abc"))

    def die(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path, RunState(Status.FAILED, "abc"))
    assert read_state(tmp_path).status is Status.FINISHED


def test_one_sweep_at_a_time_and_the_error_names_the_first(tmp_path):
    code = "import sys, pathlib, time\nfrom lightning_moevlm.study.run.ledger import hold_study\n"
    code += "with hold_study(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"running \(process {other.pid} on .* since "),
            hold_study(tmp_path),
        ):
            pass
    finally:
        other.kill()  # no clean-up: the system frees the lock
        other.wait()
    with hold_study(tmp_path):
        owner = json.loads((tmp_path / "owner.json").read_text())
        assert owner["pid"] == os.getpid()
    assert not (tmp_path / "owner.json").exists()


def test_another_store_does_not_make_results_look_lost(tmp_path):
    check_store(tmp_path, "http://dead")  # nothing has run: any store will do
    remember_store(tmp_path, "sqlite:////a/mlflow.db")
    check_store(tmp_path, "sqlite:////a/mlflow.db")
    with pytest.raises(UserError, match=r"are in sqlite:////a/mlflow\.db, but the tracking URI is now http://b"):
        check_store(tmp_path, "http://b")


def test_a_project_that_was_moved_keeps_its_results(tmp_path):
    for name in ("here", "study"):
        (tmp_path / name).mkdir()
    database, elsewhere = tmp_path / "here/mlflow.db", tmp_path / "there/mlflow.db"
    with closing(sqlite3.connect(database)) as store, store:
        store.execute("CREATE TABLE runs (run_uuid TEXT)")
        store.execute("INSERT INTO runs VALUES ('abc')")
    remember_store(tmp_path / "study", f"sqlite:///{database}")
    write_state(tmp_path / "study/run", RunState(Status.FINISHED, "abc"))
    with pytest.raises(UserError, match="but the tracking URI is now") as refused:  # the old one is there still
        check_store(tmp_path / "study", f"sqlite:///{elsewhere}")
    assert f"set MLFLOW_TRACKING_URI=sqlite:///{database}." in str(refused.value)
    told = re.search(r"write its URI into (\S+tracking.txt)", str(refused.value))
    assert told is not None
    before = Path(told[1]).read_text()
    Path(told[1]).write_text(f"sqlite:///{elsewhere}\n")  # as it says, of a copy
    check_store(tmp_path / "study", f"sqlite:///{elsewhere}")
    Path(told[1]).write_text(before)
    (tmp_path / "here").rename(tmp_path / "there")
    check_store(tmp_path / "study", f"sqlite:///{elsewhere}")
    write_state(tmp_path / "study/other", RunState(Status.FINISHED, "def"))
    with pytest.raises(UserError, match="but the tracking URI is now"):  # it has not all of its runs
        check_store(tmp_path / "study", f"sqlite:///{elsewhere}")


def test_secrets_of_an_address_are_not_written(tmp_path):
    remember_store(tmp_path, "https://me:swordfish@host")
    assert "swordfish" not in (tmp_path / "tracking.txt").read_text()


def test_divergence_rule():
    rule = Divergence("val/task_loss", times_untrained=1.5)

    def points(*values: float, key: str = "val/task_loss") -> list[Point]:
        return [Point(key, 10 * i, value, 0) for i, value in enumerate(values)]

    assert explain_divergence(points(4.0, 9.0, 3.0), rule) == ""  # a spike that recovered
    assert explain_divergence(points(4.0, 5.9), rule) == ""
    assert (
        explain_divergence(points(4.0, 6.1), rule) == "val/task_loss ended at 6.1, above 1.5 x 4 of the untrained model"
    )
    assert explain_divergence(points(4.0, float("nan"), 3.0), rule) == "val/task_loss is nan at step 10"
    assert explain_divergence(points(4.0, float("inf")), rule) == "val/task_loss is inf at step 10"
    assert explain_divergence(points(4.0), rule) == ""
    assert explain_divergence([], rule) == ""
    assert explain_divergence(points(4.0, 99.0, key="val/total_loss"), rule) == ""
    guard = [Point(NONFINITE_STEP, 37, 37.0, 0)]
    assert explain_divergence(points(4.0, 3.0) + guard, rule) == "the training loss was not finite at step 37"


def test_share_of_the_machine():
    env = share_environment({"PATH": "p"}, jobs=2, cores=8, slot=1, num_gpus=0)
    assert env["OMP_NUM_THREADS"] == "4"
    assert env["PATH"] == "p"
    assert "CUDA_VISIBLE_DEVICES" not in env
    assert int(env["MALLOC_MMAP_THRESHOLD_"]) > 2**31
    assert share_environment({}, jobs=8, cores=2, slot=0, num_gpus=0)["OMP_NUM_THREADS"] == "1"
    assert share_environment({"OMP_NUM_THREADS": "3"}, 2, 8, 0, 0)["OMP_NUM_THREADS"] == "3"  # the user's word
    gpus = [share_environment({}, 4, 8, slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert gpus == ["0", "1", "0", "1"]
    chosen = [share_environment({"CUDA_VISIBLE_DEVICES": "5,7"}, 2, 8, s, 2)["CUDA_VISIBLE_DEVICES"] for s in (0, 1)]
    assert chosen == ["5", "7"]


def test_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    import zipfile

    for number, name in enumerate(("old", "new")):
        with zipfile.ZipFile(tmp_path / f"{name}.ckpt", "w") as archive:
            archive.writestr("data", b"x" * 5000)
        os.utime(tmp_path / f"{name}.ckpt", (1000 + number, 1000 + number))
    assert last_checkpoint(tmp_path, tmp_path / "absent") == tmp_path / "new.ckpt"
    whole = (tmp_path / "new.ckpt").read_bytes()
    (tmp_path / "new.ckpt").write_bytes(whole[: len(whole) // 2])
    os.utime(tmp_path / "new.ckpt", (2000, 2000))
    assert last_checkpoint(tmp_path) == tmp_path / "old.ckpt"
    assert last_checkpoint(tmp_path / "absent") is None


def test_write_whole_makes_folders(tmp_path):
    write_atomically(tmp_path / "a" / "b", "text")
    assert (tmp_path / "a" / "b").read_text() == "text"
