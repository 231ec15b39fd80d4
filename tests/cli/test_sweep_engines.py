"""`moevlm sweep run` on every engine with real training: the same study file, the same runs in MLflow."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_moevlm.tracking.read.runs import find_runs

ENGINES = {"local": (), "slurm": ("--engine.cluster", "local", "--engine.cpus", "1"), "ray": ()}
BY_THE_CLOCK = ("throughput/", "time/", "system/", "memory/")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not (find_spec("ray") and find_spec("submitit")), reason="needs both engines: pip install '.[ray,slurm]'"
)
def test_same_study_same_content(
    moevlm: Callable[..., str],
    study: Callable[..., str],
    workplace: Path,
    migrated_database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file, contents = study(), {}
    for engine, options in ENGINES.items():
        store = workplace / engine / "mlflow.db"
        store.parent.mkdir()
        shutil.copyfile(migrated_database, store)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        moevlm("sweep", "run", file, "--jobs", "2", "--engine", engine, *options)
        contents[engine] = {
            (row.name, row.tags["digest"]): content(MlflowClient(f"sqlite:///{store}"), row.run_id)
            for row in find_runs(f"sqlite:///{store}", "line", {"role": "arm"})
        }
        # the next one uses the same paths: they are part of the params
        shutil.move(workplace / "runs/sweeps", workplace / engine / "sweeps")
    assert len(contents["local"]) == 2
    params, points = next(iter(contents["local"].values()))
    assert len(params) > 50
    assert {"val/task_loss", "train/task_loss"} <= points.keys()
    assert len(points) > 20
    assert contents["slurm"] == contents["local"]
    assert contents["ray"] == contents["local"]


def content(client: MlflowClient, run_id: str) -> tuple[dict[str, str], dict[str, list[tuple[int, float]]]]:
    """Return the params and every point of every metric that no clock or other process has a part in."""
    run = client.get_run(run_id)
    keys = [key for key in run.data.metrics if not key.startswith(BY_THE_CLOCK)]
    points = {key: [(each.step, each.value) for each in client.get_metric_history(run_id, key)] for key in keys}
    return {name: value for name, value in run.data.params.items() if run_id not in value}, points
