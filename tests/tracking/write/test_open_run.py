"""Which store, experiment, run and folder a logger opens, and when."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlflow
import pytest
from mlflow import MlflowClient
from PIL import Image

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking import RunLogger, find_runs
from lightning_moevlm.tracking.read.runs import has_run
from lightning_moevlm.tracking.write.open_run import find_or_create_experiment
from tests.tracking.tiny import tiny_trainer, values


def test_default_uri_is_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """`MLFlowLogger()` names a file store, which MLflow refuses, and reads the environment at import."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copyfile(uri.removeprefix("sqlite:///"), tmp_path / "runs" / "mlflow.db")
    logger = RunLogger()
    assert logger.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert RunLogger().tracking_uri == uri


def test_the_global_tracking_uri_stays(uri: str, tmp_path: Path) -> None:
    """Lightning's `logger.experiment` moves it, and a later search reads another store."""
    before = mlflow.get_tracking_uri()
    logger = RunLogger(tracking_uri=uri)
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_artifact_text("note.txt", "text")
    logger.finalize("success")
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None


def test_artifacts_lie_beside_the_database_whatever_the_directory(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow puts artifacts of SQLite runs in ./mlruns of the directory that the experiment was made in."""
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(experiment_name="a/b c", tracking_uri=uri)
    logger.log_artifact_text("notes/first.txt", "größe")
    Image.new("RGB", (8, 8), "red").save("red.png")
    logger.log_file(Path("red.png"), "figures")
    logger.finalize("success")

    folder = Path(logger.save_dir) / "artifacts" / "a_b c" / str(logger.run_id) / "artifacts"
    assert (folder / "notes" / "first.txt").read_text(encoding="utf-8") == "größe"
    assert Image.open(folder / "figures" / "red.png").size == (8, 8)
    assert not (tmp_path / "mlruns").exists()


def test_save_dir_is_given_lightning_19441(uri: str, tmp_path: Path) -> None:
    """Lightning #19441, #20273: on SQLite its logger has no save_dir; what needs `trainer.log_dir` fails."""
    logger = RunLogger(tracking_uri=uri)
    trainer = tiny_trainer(logger, tmp_path)
    assert trainer.log_dir == logger.save_dir == str(Path(uri.removeprefix("sqlite:///")).parent)


def test_nothing_is_created_before_the_first_use(tmp_path: Path) -> None:
    """Lightning's logger opens the store when it is built, on every rank and for a fast_dev_run."""
    logger = RunLogger(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    trainer = tiny_trainer(logger, tmp_path)
    assert trainer.logger is logger
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_unknown_run_and_deleted_things_are_told(uri: str) -> None:
    with pytest.raises(UserError, match="no run 'f00'"):
        RunLogger(tracking_uri=uri, run_id="f00").flush()
    logger = RunLogger(experiment_name="gone", tracking_uri=uri)
    run_id, client = str(logger.run_id), logger.experiment
    client.delete_run(run_id)
    with pytest.raises(UserError, match="restore --run-id"):
        RunLogger(tracking_uri=uri, run_id=run_id).flush()
    client.delete_experiment(logger.experiment_id)
    with pytest.raises(UserError, match="'gone' was deleted"):
        RunLogger(experiment_name="gone", tracking_uri=uri).flush()


def test_arms_that_start_together_share_one_new_experiment(uri: str) -> None:
    client = MlflowClient(uri)
    together = Barrier(4)

    def start(_: int) -> str:
        together.wait()
        return find_or_create_experiment(client, "new", None)

    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(start, range(4)))
    assert len(ids) == 1
    assert [found.name for found in client.search_experiments()].count("new") == 1


def test_the_environment_names_experiment_and_run_and_options_win(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    first = RunLogger(tracking_uri=uri)
    first.log_metrics({"a": 1.0}, 0)
    first.finalize()
    named = RunLogger(tracking_uri=uri, experiment_name="of the option")
    named.log_metrics({"a": 1.0}, 0)
    named.flush()
    assert [len(find_runs(uri, name)) for name in ("of the environment", "of the option", "moevlm")] == [1, 1, 0]

    monkeypatch.setenv("MLFLOW_RUN_ID", str(first.run_id))
    explicit = RunLogger(tracking_uri=uri, run_id=named.run_id)
    assert explicit.run_id == named.run_id
    again = RunLogger(tracking_uri=uri)
    again.log_metrics({"a": 2.0}, 1)
    again.finalize()
    assert values(uri, str(first.run_id), "a") == [(0, 1.0), (1, 2.0)]
    another = RunLogger(tracking_uri=uri)  # as in MLflow, the run of the environment is taken up once
    another.log_metrics({"a": 2.0}, 1)
    assert another.run_id not in (first.run_id, None)

    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", str(first.experiment_id))
    by_id = RunLogger(tracking_uri=uri)
    assert by_id.experiment is not None and by_id.experiment_id == first.experiment_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4711")
    with pytest.raises(UserError, match="MLFLOW_EXPERIMENT_ID is '4711', and there is no such experiment: unset it"):
        RunLogger(tracking_uri=uri).flush()


def test_a_run_is_not_continued_in_a_store_that_is_not_there(uri: str, tmp_path: Path) -> None:
    nowhere = f"sqlite:///{tmp_path / 'nowhere.db'}"
    with pytest.raises(UserError, match="there is no run '0123'"):
        RunLogger(tracking_uri=nowhere, run_id="0123").log_metrics({"a": 1.0}, 0)
    assert not has_run(nowhere, "0123") and not has_run(uri, "0123")
    assert list(tmp_path.glob("nowhere.db*")) == []
    logger = RunLogger(tracking_uri=uri)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert has_run(uri, str(logger.run_id))
