"""A sweep's runs as forks of the true server: the same content as programs of their own, and the same clean ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from lightning_moevlm.study.run.engines.local import SERVER_LOG
from lightning_moevlm.study.run.processes.child_process import is_alive
from lightning_moevlm.tracking.read.runs import find_runs
from tests.cli.small_study import SMALL, Moevlm, Study
from tests.cli.test_sweep_engines import content
from tests.study.run.test_execute import REPOSITORY
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="forks that end with their server are of Linux"),
]


def test_forks_write_what_programs_write(
    moevlm: Moevlm, study: Study, workplace: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with several threads, and with processes that read the data."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    small = SMALL | {"data": SMALL["data"] | {"num_workers": 1}}
    (workplace / "small.yaml").write_text(yaml.safe_dump(small))
    contents = {}
    for fork in ("true", "false"):
        store = workplace / fork / "mlflow.db"
        store.parent.mkdir()
        shutil.copyfile(migrated_database, store)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        moevlm("sweep", "run", study(), "--jobs", "1", "--engine", "local", "--engine.fork", fork)
        contents[fork] = {
            row.name: content(MlflowClient(f"sqlite:///{store}"), row.run_id)
            for row in find_runs(f"sqlite:///{store}", "line", {"role": "arm"})
        }
        changed = [file.read_text() for file in sorted(store.parent.rglob("changed.yaml"))]
        assert len(changed) == 4  # of each run in its folder and among its artifacts
        assert all(text.startswith("# against quickstart.yaml alone\n") for text in changed)
        assert (workplace / "runs/sweeps/line/jobs" / SERVER_LOG).exists() is (fork == "true")
        # the next one uses the same paths: they are part of the params
        shutil.move(workplace / "runs", workplace / fork / "runs")
    assert len(contents["true"]) == 2
    assert contents["true"] == contents["false"]


def test_a_fork_starts_further_ranks(moevlm: Moevlm, study: Study, workplace: Path) -> None:
    (workplace / "two.yaml").write_text("trainer: {devices: 2}")
    moevlm("sweep", "run", study(base=["conf/quickstart.yaml", "small.yaml", "two.yaml"]), "--only", "arm=baseline")
    [log] = (workplace / "runs/sweeps/line").glob("baseline*/log.txt")
    assert "MEMBER: 2/2" in log.read_text()


def test_a_stopped_sweep_closes_its_forks_and_resumes(study: Study, workplace: Path) -> None:
    command = [sys.executable, "-m", "lightning_moevlm", "sweep", "run", study(budget={"max_steps": 60}), "--jobs", "2"]
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a process inherits what is ignored
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (workplace / "out").open("wb") as out:
        sweep = subprocess.Popen(command, cwd=workplace, env=env, stdout=out, stderr=out)
    signal.signal(signal.SIGINT, ours)
    wait_for(lambda: len(list(workplace.glob("runs/**/last.ckpt"))) == 2, 300)
    [server] = psutil.Process(sweep.pid).children()
    runs = server.children()
    assert len(runs) == 2
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(60) == 130
    wait_for(lambda: not any(map(is_alive, (server, *runs))))
    assert set(statuses(workplace)) == {("interrupted", "KILLED")}

    assert subprocess.run(command, cwd=workplace, env=env, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert set(statuses(workplace)) == {("finished", "FINISHED")}
    assert len(statuses(workplace)) == 2
    for log in workplace.glob("runs/sweeps/line/*/log.txt"):
        assert log.read_text().split("\n# ")[1].count("--ckpt_path") == 1


def statuses(workplace: Path) -> list[tuple[str, str]]:
    """Return what ledger and MLflow say of every run."""
    files = sorted(workplace.glob("runs/sweeps/line/*/state.json"))
    states = {state["run_id"]: state["status"] for state in map(json.loads, (file.read_text() for file in files))}
    rows = find_runs(f"sqlite:///{workplace / 'runs/mlflow.db'}", "line", {"role": "arm"})
    assert {row.run_id for row in rows} == states.keys()
    return [(states[row.run_id], row.status) for row in rows]
