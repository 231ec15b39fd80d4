"""`moevlm sweep run` on every engine with real training: the same study file, the same runs in MLflow."""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_moevlm.tracking.read.runs import find_runs
from tests.study.fake_slurm import LIMIT, install

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


@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed: pip install '.[slurm]'")
def test_every_option_of_the_line_for_a_cluster_reaches_sbatch(
    moevlm: Callable[..., str], study: Callable[..., str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of conf/hugging_face/README.md, with an account and a quality of service, against a full queue."""
    monkeypatch.setenv("PATH", f"{install(workplace / 'slurm')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(LIMIT, "0")
    options = {"partition": "gpu", "gpus": "1", "cpus": "8", "mem_gb": "200", "minutes": "600"}
    words = [word for name, value in options.items() for word in (f"--engine.{name}", value)]
    words += ["--engine.account", "lab", "--engine.qos", "long"]
    told = moevlm("sweep", "run", study(), "--engine", "slurm", *words, code=2)
    assert "sbatch refused the job" in told
    lines = (workplace / "slurm/refused").read_text().splitlines()
    for option in (
        "--partition=gpu", "--gpus-per-node=1", "--cpus-per-task=8", "--mem=200GB", "--time=600", "--account=lab",
        "--qos=long", "--requeue", "--job-name=line/baseline-seed0",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in lines
    assert "--cpus-per-task=8" in next(line for line in lines if line.startswith("srun ")).split()


def content(client: MlflowClient, run_id: str) -> tuple[dict[str, str], dict[str, list[tuple[int, float]]]]:
    """Return the params and every point of every metric that no clock or other process has a part in."""
    run = client.get_run(run_id)
    keys = [key for key in run.data.metrics if not key.startswith(BY_THE_CLOCK)]
    points = {key: [(each.step, each.value) for each in client.get_metric_history(run_id, key)] for key in keys}
    return {name: value for name, value in run.data.params.items() if run_id not in value}, points
