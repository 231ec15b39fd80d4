"""The record of runs that the real command line makes, not a command line of the tests'."""

import re
import shlex
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from lightning_moevlm.training.callbacks import StepProgress
from tests.conftest import runs
from tests.small_run import BACKBONE, SMALL, budget

Moevlm = Callable[..., str]


def store(workplace: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{workplace}/runs/mlflow.db")


def test_files_and_difference_of_a_fit(moevlm: Moevlm, workplace: Path) -> None:
    moevlm("fit", *SMALL, *budget(1))
    (run,) = runs(workplace)
    folder = Path(store(workplace).download_artifacts(run.info.run_id, "config"))
    source = workplace / "conf/quickstart.yaml"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "changed.yaml", "command.txt", "source0_quickstart.yaml",
    }  # fmt: skip
    assert (folder / "source0_quickstart.yaml").read_text() == source.read_text()
    assert shlex.split((folder / "command.txt").read_text()) == ["moevlm", "fit", *SMALL, *budget(1)]
    base = yaml.safe_load(source.read_text())
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    text = (folder / "changed.yaml").read_text()
    assert text.startswith("# against quickstart.yaml alone\n")
    changed = yaml.safe_load(text)
    assert changed["data.batch_size"] == {"base": str(base["data"]["batch_size"]), "now": "8"}
    assert resolved["data"]["batch_size"] == 8
    assert resolved["model"]["backbone"]["init_args"]["image_size"] == "${data.image_size}"  # for the next run
    assert run.data.params["model.backbone.init_args.image_size"] == "32"
    flags = [word.partition("=")[0].removeprefix("--") for word in (*SMALL, *budget(1)) if "=" in word]
    follow = {f"{BACKBONE}.image_size".removeprefix("--")}  # ${data.image_size}
    assert "data.image_size" in changed
    assert set(changed) <= {*flags, *follow}
    assert all(row["base"] != row["now"] for row in changed.values())


def test_runs_without_a_name_are_called_after_their_start(moevlm: Moevlm, workplace: Path) -> None:
    """A run's name is its own start to the second: two runs of one second share it."""
    for _ in range(2):
        moevlm("fit", *SMALL, *budget(1))
    recorded = runs(workplace)
    assert len(recorded) == 2
    for run in recorded:
        named = datetime.strptime(run.info.run_name, "%Y-%m-%d %H:%M:%S")
        started = datetime.fromtimestamp(run.info.start_time / 1000)
        assert abs(named - started) < timedelta(seconds=2)


def test_a_run_that_crashes_says_how_to_resume(
    moevlm: Moevlm,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(self: StepProgress, trainer: object, *_: object) -> None:
        if getattr(trainer, "global_step", 0) == 3:
            raise RuntimeError("the card fell off the bus")

    arguments = ("fit", *SMALL, *budget(4, val_every=2))
    with monkeypatch.context() as patch:
        patch.setattr(StepProgress, "on_train_batch_end", fail)
        with pytest.raises(RuntimeError, match="fell off"):
            moevlm(*arguments)
    (run,) = runs(workplace)
    found = re.search(r"^Resume with: moevlm (.*)$", capfd.readouterr().err, re.MULTILINE)
    assert found and shlex.split(found[1]) == ["fit", "--run", run.info.run_id[:8]]

    caplog.set_level("INFO", logger="lightning.pytorch")
    moevlm("fit", "--run", run.info.run_id[:8])
    assert "resumes after step 2 of 4" in caplog.messages
    (run,) = runs(workplace)
    assert run.info.status == "FINISHED"
    points = store(workplace).get_metric_history(run.info.run_id, "train/task_loss")
    assert sorted(point.step for point in points) == [1, 2, 3, 4]  # step 3 was logged by both


def test_without_a_checkpoint_there_is_nothing_to_resume(
    moevlm: Moevlm, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(self: StepProgress, *_: object) -> None:
        raise RuntimeError("the card fell off the bus")

    monkeypatch.setattr(StepProgress, "on_train_batch_end", fail)
    with pytest.raises(RuntimeError, match="fell off"):
        moevlm("fit", *SMALL, *budget(4, val_every=4))
    assert "Resume with" not in capfd.readouterr().err


def test_predict_records_nothing(moevlm: Moevlm, workplace: Path) -> None:
    moevlm("predict", *SMALL, "--trainer.limit_predict_batches=1")
    assert runs(workplace) == []
