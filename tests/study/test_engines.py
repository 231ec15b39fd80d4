"""Every engine: the same runs, the same numbers, nothing twice and nothing lost. Processes, Ray and submitit are real."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from lightning_moevlm.errors import UserError
from lightning_moevlm.study.child import Ended
from lightning_moevlm.study.engines import CHECKPOINT, JOBS_FOLDER, Engine, Job, LocalEngine, RayEngine, SlurmEngine
from lightning_moevlm.study.engines.tickets import NOBODY, Tickets
from lightning_moevlm.study.engines.worker import NO_CHECKPOINT, carry_out
from lightning_moevlm.study.execute import to_do
from lightning_moevlm.study.ledger import RunState, Status, read_ledger, read_state, write_state
from tests.study.test_execute import assert_each_once, by_seed, tracked, wait_for
from tests.study.tiny_study import engine_of, plan_of, sweep, write_project

REPOSITORY = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install '.[ray]'")
needs_submitit = pytest.mark.skipif(
    find_spec("submitit") is None, reason="submitit is not installed: pip install '.[slurm]'"
)
CLUSTERS = [
    pytest.param("slurm", marks=needs_submitit),
    pytest.param("ray", marks=[needs_ray, pytest.mark.slow]),  # starting Ray takes seconds
]


def start_sweep(file: Path, engine: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.study.tiny_study", str(file), engine],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def content(file: Path, engine: str) -> dict[str, list[tuple[str, int, float]]]:
    """Run a study and return every point of every run, bit for bit."""
    plan, experiment, _, _ = sweep(file, engine=engine_of(engine))
    assert_each_once(plan, experiment)
    keys = ("val/task_loss", "val/accuracy_text", "load/block1/text/expert0")
    return {
        row.name + row.tags["digest"]: [(p.key, p.step, p.value) for p in experiment.history(row.run_id, *keys)]
        for row in tracked(experiment)
    }


@pytest.mark.parametrize("engine", CLUSTERS)
def test_same_study_same_numbers(tmp_path, uri, engine, migrated_database):
    import shutil

    contents = []
    for name in ("local", engine):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(migrated_database, folder / "mlflow.db")
        contents.append(content(write_project(folder, f"sqlite:///{folder / 'mlflow.db'}"), name))
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4
