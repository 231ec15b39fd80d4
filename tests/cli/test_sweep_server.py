"""The same small sweep into SQLite and into a real server that is killed in the middle: equal content."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_moevlm.tracking.read.runs import RunRow, find_runs, metric_histories
from lightning_moevlm.tracking.write.offline_log import JOURNAL
from tests.cli.small_study import Moevlm, Study
from tests.cli.test_sweep_soak import PROJECT, states
from tests.mlflow_server import MlflowServer

WHERE = ("trainer.logger", "trainer.default_root_dir")  # of params: not the same, and not meant to be
MEASURED = ("train/", "val/", "loss", "load/", "drop_rate/")  # of metrics: what is computed, and not timed


def content(uri: str) -> dict[str, tuple[dict[str, str], dict[tuple[str, int], float], set[str]]]:
    """Return params, computed points and all names of metrics of every arm."""
    rows: list[RunRow] = find_runs(uri, "line", {"role": "arm"})
    histories = metric_histories(uri, [row.run_id for row in rows])
    return {
        row.tags["arm"]: (
            {key: value for key, value in row.params.items() if not key.startswith(WHERE)},
            {(p.key, p.step): p.value for p in histories[row.run_id] if p.key.startswith(MEASURED)},
            {p.key for p in histories[row.run_id] if not p.key.startswith("system/")},
        )
        for row in rows
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_server_ends_with_the_same_content_as_sqlite(
    moevlm: Moevlm, study: Study, workplace: Path, mortal_server: MlflowServer
) -> None:
    file = study(budget={"max_steps": 6})
    moevlm("sweep", "run", file, "--jobs", "1")
    expected = content(f"sqlite:///{workplace / 'runs/mlflow.db'}")
    (workplace / "runs").rename(workplace / "runs_sqlite")

    command = [sys.executable, "-m", "lightning_moevlm", "sweep", "run", file, "--jobs", "1"]
    environment = os.environ | {"PYTHONPATH": PROJECT, "MLFLOW_TRACKING_URI": mortal_server.address}
    with (workplace / "out").open("wb") as out:
        sweep = subprocess.Popen(command, cwd=workplace, stdout=out, stderr=out, env=environment)
    while not any("checkpoints" in str(path) for path in workplace.glob("runs/sweeps/line/*/log.txt")) and not any(
        b"step" in log.read_bytes() for log in workplace.glob("runs/sweeps/line/*/log.txt")
    ):
        assert sweep.poll() is None, (workplace / "out").read_text()
        time.sleep(0.05)
    mortal_server.kill()
    time.sleep(1)
    mortal_server.start()
    assert sweep.wait() == 0, (workplace / "out").read_text()
    assert {state["status"] for state in states(workplace, "line")} == {"finished"}
    assert not list(workplace.rglob(JOURNAL))
    got = content(mortal_server.address)
    assert got.keys() == expected.keys()
    for arm, (params, points, names) in expected.items():
        assert got[arm] == (params, points, names)
        assert len(points) > 20
