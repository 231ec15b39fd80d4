"""A sweep of 24 real trainings, two at a time: what random kills cost it (nothing), and what sweeping costs.

The cost is measured on request, on a machine that does nothing else:

    MOEVLM_MEASURE=1 python -m pytest -m slow -s tests/cli/test_sweep_soak.py -k overhead
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml

from lightning_moevlm.tracking.read.runs import find_runs
from tests.cli.small_study import SMALL, STUDY

ARMS = {
    "baseline": None,
    "no_router_z": {"model.losses.router_z": None},
    "no_load_balance": {"model.losses.load_balance": None},
    "dense_twin": {"model.backbone.init_args.sparse_modalities": []},
}
JOBS = 2
SENSIBLE_CADENCE = {"val_check_interval": 50, "log_every_n_steps": 10}


@pytest.fixture
def soak(workplace: Path) -> Path:
    """The workplace with a study of 4 arms x 6 seeds."""
    (workplace / "small.yaml").write_text(yaml.safe_dump(SMALL))
    write_study(workplace, max_steps=4)
    return workplace


def write_study(folder: Path, max_steps: int) -> None:
    study = STUDY | {"arms": ARMS, "seeds": list(range(6)), "budget": {"max_steps": max_steps}}
    (folder / "soak.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lightning_moevlm", "sweep", "run", "soak.yaml", "--jobs", str(JOBS), *more]
    with (folder / "out").open("ab") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": PROJECT})


PROJECT = str(Path(__file__).parents[2])


def states(folder: Path, study: str = "soak") -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"runs/sweeps/{study}/*/state.json"))]


def runs_of(parent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the runs at work, which are forks of the sweep's one child."""
    return [run for server in psutil.Process(parent.pid).children() for run in server.children()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_random_kills_lose_and_duplicate_nothing(soak: Path) -> None:
    rng = random.Random(os.environ.get("MOEVLM_SOAK_SEED", "7"))
    parent = start(soak)
    for whom in rng.sample(["a run", "the server that runs are forks of", "the sweep"], 3):
        done = sum(state["status"] == "finished" for state in states(soak))
        goal = done + rng.randint(1, 5)
        while sum(state["status"] == "finished" for state in states(soak)) < goal or not runs_of(parent):
            assert parent.poll() is None, (soak / "out").read_text()
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        if whom == "the sweep":
            os.kill(parent.pid, signal.SIGKILL)
            parent.wait()
            parent = start(soak)
            continue
        victims = runs_of(parent) if whom == "a run" else psutil.Process(parent.pid).children()
        rng.choice(victims).kill() if victims else pytest.fail("nobody was at work")
    assert parent.wait() in (0, 1), (soak / "out").read_text()
    assert start(soak, "--retry=true").wait() == 0, (soak / "out").read_text()
    assert len(list(soak.glob("runs/sweeps/soak/*/state.json"))) == 24
    assert {state["status"] for state in states(soak)} == {"finished"}

    uri = f"sqlite:///{soak / 'runs/mlflow.db'}"
    rows = find_runs(uri, "soak", {"role": "arm"})
    assert sorted((row.tags["arm"], int(row.tags["seed"])) for row in rows) == sorted(
        (arm, seed) for arm in ARMS for seed in range(6)
    )
    assert {row.run_id for row in rows} == {state["run_id"] for state in states(soak)}
    assert {(row.status, row.tags["outcome"]) for row in rows} == {("FINISHED", "finished")}
    with closing(sqlite3.connect(soak / "runs/mlflow.db")) as database:
        for row in rows:
            points = "SELECT step FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step"
            validated, trained = (
                [step for (step,) in database.execute(points, (row.run_id, key))]
                for key in ("val/task_loss", "train/task_loss")
            )
            assert validated == [0, 2, 4]
            assert trained == sorted(set(trained))
            assert trained[-1] == 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif("MOEVLM_MEASURE" not in os.environ, reason="needs a machine that does nothing else")
def test_overhead_of_a_sweep(soak: Path) -> None:
    """Wall time of the sweep, less its imports, over that of the same trainings alone, as many at a time.

    It validates every 50 steps and logs every 10, as people do. The other tests validate every 2 steps and log
    every one, to see much in few steps; at that cadence the figure would be of 100 checkpoints and their writes in
    200 steps, not of sweeping.
    """
    (soak / "small.yaml").write_text(yaml.safe_dump(SMALL | {"trainer": SMALL["trainer"] | SENSIBLE_CADENCE}))
    write_study(soak, max_steps=int(os.environ.get("MOEVLM_SOAK_STEPS", "200")))
    begin = time.perf_counter()
    assert start(soak).wait() == 0, (soak / "out").read_text()
    whole = time.perf_counter() - begin
    folders = sorted(file.parent for file in soak.glob("runs/sweeps/soak/*/state.json"))
    bare = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cli.bare_trainings", *map(str, folders[job::JOBS])],
            cwd=soak,
            stdout=subprocess.PIPE,
            stderr=(soak / f"bare{job}").open("w"),
            env=os.environ | {"PYTHONPATH": PROJECT, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        for job in range(JOBS)
    ]
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in bare]
    imports = sum(one["imports"] for one in told) / JOBS
    training = sum(one["training"] for one in told) / JOBS
    importing = 2 * imports  # the sweep's own, and then those of the server that the runs are forks of
    overhead = (whole - importing - training) / training
    print(
        f"\nsweep of {len(folders)} runs, {JOBS} at a time: {whole:.1f} s; imports, twice: {importing:.1f} s; "
        f"trainings alone {training:.1f} s; overhead {100 * overhead:.1f} %"
    )
    assert overhead < 0.15
