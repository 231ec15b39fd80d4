"""`--run RUN` is all that it takes to resume a run, to measure it and to use it."""

import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from mlflow.tracking._tracking_service import utils
from safetensors import safe_open

from lightning_moevlm.tracking.read.sqlite_rows import points_of
from tests.conftest import run_in, runs
from tests.small_run import SMALL

Moevlm = Callable[..., str]
FIT = ("fit", *SMALL, "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.logger.run_name=my first")


@pytest.fixture(scope="module")
def trained(shared_workplace: Path) -> Path:
    """A workplace with one run, not to be changed."""
    run_in(shared_workplace, *FIT)
    return shared_workplace


@pytest.fixture
def project(trained: Path, tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The trained workplace, moved as a whole to another folder: the one in which it was trained is not there."""
    folder = tmp_path / "moved project"
    shutil.copytree(trained, folder, symlinks=True)
    trained.rename(trained.with_name("hidden"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        utils, "_artifact_repos_cache", OrderedDict()
    )  # MLflow keeps for the process where a run's artifacts are
    yield folder
    was_made_anew = trained.exists()
    shutil.rmtree(trained, ignore_errors=True)
    trained.with_name("hidden").rename(trained)
    assert not was_made_anew


def test_a_run_is_resumed_measured_and_used_by_its_name_id_or_folder_alone(moevlm: Moevlm, project: Path) -> None:
    """Also after its project has moved, to another place than the store and the checkpoint remember."""
    (run,) = runs(project)
    folder = project / "runs" / run.info.experiment_id / run.info.run_id

    moevlm("test", "--run", "my first")
    moevlm("validate", f"--run={run.info.run_id[:8]}", "--ckpt_path", "best")
    _, tested, validated = runs(project)
    assert tested.data.tags["evaluates"] == validated.data.tags["evaluates"] == run.info.run_id
    assert "test/task_loss" in tested.data.metrics and tested.info.run_name == "test of my first"
    assert validated.data.metrics["val/task_loss"] == pytest.approx(run.data.metrics["val/task_loss"], rel=1e-6)
    assert runs(project)[0].info.end_time == run.info.end_time  # the run itself is as it was

    moevlm("fit", "--run", str(folder), "--trainer.max_steps=6")
    moevlm("fit", "--run", run.info.run_id, "--trainer.max_steps", "8")
    assert len(runs(project)) == 3
    resolved = yaml.safe_load((folder / "config.2/config.yaml").read_text())
    # the schedule follows the larger budget, this time and the next
    assert resolved["model"]["schedule"]["init_args"]["total_steps"] == "${trainer.max_steps}"
    assert resolved["trainer"]["max_steps"] == 8
    ((_, rows),) = points_of(project / "runs/mlflow.db", [run.info.run_id], ["train/task_loss", "val/task_loss"])
    counted = Counter((key, step) for key, step, *_ in rows)
    assert counted == Counter(
        [("train/task_loss", step) for step in range(1, 9)] + [("val/task_loss", step) for step in (0, 2, 4, 6, 8)]
    )
    artifacts = project / "runs/artifacts/moevlm" / run.info.run_id / "artifacts"
    assert {path.name for path in artifacts.glob("config*")} == {"config", "config.1", "config.2"}


def test_a_second_prediction_leaves_nothing_of_the_first(moevlm: Moevlm, project: Path) -> None:
    writer = "--trainer.callbacks+=lightning_moevlm.training.callbacks.FeatureWriter"
    others = project / "runs/features/features-mine.safetensors"
    keys = {}
    for size, limit in ((4, 3), (8, 1)):
        options = (f"--data.batch_size={size}", f"--trainer.limit_predict_batches={limit}")
        moevlm("predict", "--run", "my first", writer, *options)
        files = sorted((project / "runs/features").glob("features-0*"))
        assert len(files) == limit
        keys[limit] = [key for file in files for key in safe_open(file, "pt").metadata()["keys"].splitlines()]
        others.write_text("not ours")
    assert len(set(keys[1])) == len(keys[1]) and len(set(keys[3])) == len(keys[3])
    assert others.exists()


def test_an_invalid_run_is_one_line_with_the_remedy(moevlm: Moevlm, project: Path) -> None:
    (run,) = runs(project)
    folder = project / "runs" / run.info.experiment_id / run.info.run_id
    before = sorted(path for path in project.rglob("*") if path.suffix != ".lock")
    (project / "empty").mkdir()
    for words, told in (
        (("--run", "my frist"), "no run in .* has the name 'my frist' .*my first"),
        (("--run", "empty"), "has no record of a training"),
        (("--run",), "--run needs a value: --run RUN, an id, name or folder"),
        (("--run", "my first", "--ckpt_path", "none.ckpt"), "no checkpoint at none.ckpt"),
        (("--ckpt_path", f"{folder}/checkpoints/last.ckpt"), f"; give the checkpoint's run, --run {folder}$"),
        ((*SMALL, "--ckpt_path", "best"), "give a file, or --run RUN --ckpt_path best"),
    ):
        (line,) = [line for line in moevlm("test", *words, code=2).splitlines() if line.startswith("moevlm: error")]
        assert re.search(told, line), line
    (project / "empty").rmdir()
    assert sorted(path for path in project.rglob("*") if path.suffix != ".lock") == before

    source = next((folder / "config").glob("source0_*"))
    source.write_text(source.read_text() + "api_key: '***'\n")
    assert "masks api_key: give it again, --api_key VALUE" in moevlm("test", "--run", "my first", code=2)
    shutil.rmtree(folder / "checkpoints")
    assert "has no such checkpoint; it has saved no checkpoint" in moevlm("fit", "--run", str(folder), code=2)
    shutil.rmtree(folder)
    assert "is not on this machine; copy it here and give --run FOLDER" in moevlm("fit", "--run", "my first", code=2)
