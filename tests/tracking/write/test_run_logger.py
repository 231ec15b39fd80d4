import math
import pickle
import shutil
import sqlite3
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier

import mlflow
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow import MlflowClient
from PIL import Image

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking import RunLogger, find_runs, metric_history, prepare_store
from lightning_moevlm.tracking.write.offline_log import find_offline_logs
from lightning_moevlm.tracking.write.open_run import find_or_create_experiment
from lightning_moevlm.tracking.write.run_params import LONGEST_VALUE
from lightning_moevlm.tracking.write.sync_offline_logs import sync_offline_logs
from tests.tracking.tiny import TinyData, TinyModule, short_files, tiny_trainer
from tests.tracking.write.test_sender import wait_until


def values(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in metric_history(uri, run_id, [key])]


def test_every_point_of_a_training_is_in_the_store(uri: str, tmp_path: Path) -> None:
    logger = RunLogger(tracking_uri=uri, run_name="one", tags={"arm": "baseline"})
    tiny_trainer(logger, tmp_path).fit(TinyModule(), TinyData())

    (run,) = find_runs(uri, "moevlm", {"arm": "baseline"})
    assert (run.run_id, run.name, run.status) == (logger.run_id, "one", "FINISHED")
    # weight 1, inputs 1, SGD 0.01 on w^2: w -> 0.98 w, loss = w^2
    steps = values(uri, run.run_id, "train/task_loss")
    assert [step for step, _ in steps] == [0, 1, 2]
    assert [value for _, value in steps] == pytest.approx([1.0, 0.98**2, 0.98**4])


def test_recall_at_1_keeps_its_name(uri: str, tmp_path: Path) -> None:
    """Lightning's logger drops the @ that MLflow refuses; `recall1` is another metric."""
    logger = RunLogger(tracking_uri=uri)
    tiny_trainer(logger, tmp_path, max_steps=1).fit(TinyModule(), TinyData())
    assert values(uri, str(logger.run_id), "recall_at_1") == [(0, 0.0)]


def test_what_is_not_finite_is_recorded_as_it_was(uri: str, tmp_path: Path) -> None:
    logger = RunLogger(tracking_uri=uri)
    tiny_trainer(logger, tmp_path, max_steps=4).fit(TinyModule(poison_at=2), TinyData())

    ((step, value),) = values(uri, str(logger.run_id), "train/nan")
    assert step == 2
    assert math.isnan(value)
    assert values(uri, str(logger.run_id), "train/inf") == [(2, math.inf)]
    assert values(uri, str(logger.run_id), "train/minus") == [(2, -math.inf)]
    (run,) = find_runs(uri, "moevlm")
    assert run.tags["nonfinite/train/nan"] == "nan first at step 2"
    assert run.tags["nonfinite/train/inf"] == "inf first at step 2"
    assert run.last["train/inf"] == math.inf


@pytest.mark.parametrize(
    ("failure", "status", "leaves_with"),
    [
        (RuntimeError("the step failed"), "FAILED", RuntimeError),
        (KeyboardInterrupt(), "KILLED", SystemExit),
        (SIGTERMException(), "KILLED", SystemExit),
    ],
)
def test_a_crash_loses_no_point_and_tells_its_kind(
    uri: str, tmp_path: Path, failure: BaseException, status: str, leaves_with: type[BaseException]
) -> None:
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    with pytest.raises(leaves_with):
        tiny_trainer(logger, tmp_path, max_steps=5).fit(TinyModule(fail_at=3, failure=failure), TinyData())

    (run,) = find_runs(uri, "moevlm")
    assert run.status == status
    assert [step for step, _ in values(uri, run.run_id, "train/task_loss")] == [0, 1, 2]


def test_every_point_is_on_disk_once_it_is_logged(uri: str, tmp_path: Path) -> None:
    """So a checkpoint and the points from before it are kept together, and training waits for no store."""
    seen: list[int] = []

    class Spy(ModelCheckpoint):
        def on_train_batch_end(self, trainer, *rest) -> None:  # type: ignore[no-untyped-def]
            super().on_train_batch_end(trainer, *rest)
            [log] = find_offline_logs(trainer.logger.run_dir)
            seen.append(log.count().points)

    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.flush()
    tiny_trainer(logger, tmp_path, max_steps=4, callbacks=[Spy(every_n_train_steps=2)]).fit(TinyModule(), TinyData())
    assert seen == [2, 4, 6, 8]
    assert [path.name for path in logger.run_dir.iterdir()] == ["checkpoints"]
    assert list((logger.run_dir / "checkpoints").glob("*.ckpt"))


def test_writes_come_by_number_and_by_time(uri: str) -> None:
    by_number = RunLogger(tracking_uri=uri, run_name="number", flush_points=4, flush_seconds=3600)
    by_time = RunLogger(tracking_uri=uri, run_name="time", flush_points=10_000, flush_seconds=0.2)
    for step in range(2):
        by_number.log_metrics({"a": 1.0, "b": 2.0}, step)
        by_time.log_metrics({"a": 1.0}, step)
    wait_until(lambda: values(uri, str(by_number.run_id), "a") == [(0, 1.0), (1, 1.0)])
    wait_until(lambda: len(values(uri, str(by_time.run_id), "a")) == 2)
    by_number.log_metrics({"a": 1.0, "b": 2.0}, 2)
    time.sleep(0.3)
    assert len(values(uri, str(by_number.run_id), "a")) == 2
    for logger in (by_number, by_time):
        logger.finalize()
    assert len(values(uri, str(by_number.run_id), "a")) == 3


def test_more_points_than_one_batch_may_hold(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.log_metrics({f"load/expert{i}": float(i) for i in range(2345)}, step=7)
    logger.finalize("success")
    points = metric_history(uri, str(logger.run_id))
    assert sorted(point.value for point in points) == [float(i) for i in range(2345)]


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
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1])
    logger.log_figure("figures/line.png", figure)
    plt.close(figure)
    logger.log_image("val/picture", Image.new("RGB", (8, 8), "red"), step=3)
    logger.finalize("success")

    folder = Path(logger.save_dir) / "artifacts" / "a_b c" / str(logger.run_id) / "artifacts"
    assert (folder / "notes" / "first.txt").read_text(encoding="utf-8") == "größe"
    assert Image.open(folder / "figures" / "line.png").size[0] > 100
    assert list((folder / "images").glob("*.png"))
    assert not (tmp_path / "mlruns").exists()


def test_save_dir_is_given_lightning_19441(uri: str, tmp_path: Path) -> None:
    """Lightning #19441, #20273: on SQLite its logger has no save_dir; what needs `trainer.log_dir` fails."""
    logger = RunLogger(tracking_uri=uri)
    trainer = tiny_trainer(logger, tmp_path)
    assert trainer.log_dir == logger.save_dir == str(Path(uri.removeprefix("sqlite:///")).parent)


def test_resume_with_changed_params(uri: str) -> None:
    """Params are immutable: a resume with one changed value raised `Changing param values ...`."""
    first = RunLogger(tracking_uri=uri)
    first.log_hyperparams({"model": {"dim": 8, "top_k": 1}})
    first.log_metrics({"a": 1.0}, 0)
    first.finalize("failed")
    second = RunLogger(tracking_uri=uri, run_id=first.run_id, tags={"attempt": "2"})
    second.log_hyperparams({"model": {"dim": 8, "top_k": 2}, "trainer": {"max_steps": 5}})
    second.log_metrics({"a": 2.0}, 1)
    (run,) = find_runs(uri, "moevlm")
    assert run.status == "RUNNING"
    second.finalize("success")

    (run,) = find_runs(uri, "moevlm")
    assert run.status == "FINISHED"
    assert run.params == {"model.dim": "8", "model.top_k": "1", "trainer.max_steps": "5"}
    assert run.tags["changed_param/model.top_k"] == "2"
    assert run.tags["attempt"] == "2"
    assert "changed_param/model.dim" not in run.tags
    assert values(uri, run.run_id, "a") == [(0, 1.0), (1, 2.0)]


def test_long_params_are_whole(uri: str) -> None:
    """Lightning's logger cuts params at 250 characters."""
    logger = RunLogger(tracking_uri=uri)
    logger.log_hyperparams({"note": "x" * 4000, "vocabulary": "y" * 7000} | {f"p{i}": i for i in range(250)})
    logger.finalize()
    (run,) = find_runs(uri, "moevlm")
    assert run.params["note"] == "x" * 4000
    assert run.params["vocabulary"] == "y" * LONGEST_VALUE
    assert len(run.params) == 252
    artifact = MlflowClient(uri).download_artifacts(run.run_id, "params/vocabulary.txt")
    assert Path(artifact).read_text() == "y" * 7000


def test_secrets_are_masked_in_params(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "tok-123456789")
    logger = RunLogger(tracking_uri=uri)
    logger.log_hyperparams({"hub": {"api_key": "k-1"}, "path": "s3://x?tok-123456789", "num_tokens": 7})
    assert "tok-123456789" not in "".join(log.journal.read_text() for log in find_offline_logs(logger.run_dir))
    logger.finalize()
    (run,) = find_runs(uri, "moevlm")
    assert run.params == {"hub.api_key": "***", "path": "s3://x?***", "num_tokens": "7"}


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


@pytest.mark.parametrize("arguments", [{"flush_points": 0}, {"flush_seconds": -1.0}])
def test_nonsense_is_refused(uri: str, arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        RunLogger(tracking_uri=uri, **arguments)  # type: ignore[arg-type]


def test_a_text_is_no_metric(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri)
    with pytest.warns(RuntimeWarning, match="metric a is the text 'x'"):
        logger.log_metrics({"a": "x", "b": torch.tensor(2.0)}, 0)  # type: ignore[dict-item]
    logger.finalize("success")
    assert [point.key for point in metric_history(uri, str(logger.run_id))] == ["b"]


def test_points_wait_for_a_database_that_is_away(uri: str) -> None:
    """The database file is moved away and back."""
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.log_metrics({"a": 0.0}, 0)
    logger.flush()
    path = Path(uri.removeprefix("sqlite:///"))
    away = path.with_name("away.db")
    logger.experiment._tracking_client.store.engine.dispose()
    path.rename(away)
    logger.log_metrics({"a": 1.0}, 1)
    with pytest.warns(RuntimeWarning, match="is unavailable; training continues, its log is kept on disk"):
        logger.flush()
    logger.experiment._tracking_client.store.engine.dispose()
    path.unlink(missing_ok=True)
    away.rename(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"a": 2.0}, 2)
        logger.finalize("success")
    assert values(uri, str(logger.run_id), "a") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_database_on_a_full_disk_stops_no_training(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.flush()
    with pytest.warns(RuntimeWarning) as told, short_files(4096):
        for step in range(200):
            logger.log_metrics({"a": 1.0}, step)
        logger.flush()
    lines = [str(warning.message) for warning in told]
    assert sum(line.startswith("MLflow at sqlite:///") and "is unavailable" in line for line in lines) == 1
    assert (
        sum("cannot be kept in" in line and "(No space left on device): free disk space" in line for line in lines) == 1
    )
    logger.log_metrics({"a": 1.0}, 200)  # there is room again
    logger.finalize()
    assert [step for step, _ in values(uri, str(logger.run_id), "a")] == list(range(201))
    assert list(logger.run_dir.iterdir()) == []


def test_a_disk_that_stays_full_to_the_end_keeps_what_it_took_and_says_what_is_lost(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.flush()
    with (
        pytest.warns(RuntimeWarning, match=r"\d+ points and 0 files .* \d+ more lines found no room"),
        short_files(4096),
    ):
        for step in range(200):
            logger.log_metrics({"a": 1.0}, step)
        logger.finalize()
    [log] = find_offline_logs(logger.run_dir)
    kept = log.count().points
    assert 0 < kept < 200
    [result] = sync_offline_logs([log], uri)
    assert result.reason == ""
    assert [step for step, _ in values(uri, str(logger.run_id), "a")] == list(range(kept))


def test_a_full_disk_at_the_start_is_one_line(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(tracking_uri=uri)
    prepare_store(uri)
    with short_files(4096), pytest.raises(UserError, match=r"cannot create or resume the run \(.*\): free disk space"):
        logger.flush()
    assert "Traceback" not in "".join(capfd.readouterr())
    logger.log_metrics({"a": 1.0}, 0)  # the same call works once there is room
    logger.finalize()


def test_a_log_that_is_deleted_ends_no_training(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri, flush_points=10_000, flush_seconds=3600)
    logger.log_metrics({"a": 1.0}, 0)
    [log] = find_offline_logs(logger.run_dir)
    shutil.rmtree(log.folder)
    logger.log_metrics({"a": 1.0}, 1)
    with pytest.warns(RuntimeWarning, match="0 points and 0 files of run .* were not uploaded"):
        logger.finalize()


def test_a_folder_of_runs_that_cannot_be_written_is_one_line(uri: str) -> None:
    logger = RunLogger(tracking_uri=uri)
    folder = Path(logger.save_dir) / "1"
    folder.touch()
    with pytest.raises(
        UserError, match=r"could not be written \(Not a directory\); free disk space or grant write permission"
    ):
        logger.flush()
    assert [run.status for run in find_runs(uri, "moevlm")] == ["FAILED"]


def test_a_database_that_another_process_has_locked_is_waited_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sender: no call of the training waits."""
    logger = RunLogger(tracking_uri=uri, flush_points=1, flush_seconds=0.01)
    logger.flush()
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as other:
        other.execute("BEGIN EXCLUSIVE")
        start = time.perf_counter()
        for step in range(20):
            logger.log_metrics({"a": 1.0}, step)
            logger.log_tags({"step": str(step)})
        assert time.perf_counter() - start < 2.0
        other.rollback()
    logger.finalize()
    assert [step for step, _ in values(uri, str(logger.run_id), "a")] == list(range(20))


def test_what_is_logged_after_the_end_is_sent_too(uri: str) -> None:
    """As in `trainer.fit()`, then `trainer.test()`."""
    logger = RunLogger(tracking_uri=uri)
    for step in range(2):
        logger.log_metrics({"a": 1.0}, step)
        logger.finalize()
        assert list(logger.run_dir.iterdir()) == []
    (run,) = find_runs(uri, "moevlm")
    assert (run.status, values(uri, run.run_id, "a")) == ("FINISHED", [(0, 1.0), (1, 1.0)])


@pytest.mark.slow
def test_a_script_that_ends_without_finalize_sends_what_it_logged(uri: str) -> None:
    program = f"""
from lightning_moevlm.tracking import RunLogger
logger = RunLogger(tracking_uri={uri!r}, flush_seconds=3600.0)
logger.log_artifact_text("late.txt", "late")
logger.log_metrics({{"a": 3.0}}, 2)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    (run,) = find_runs(uri, "moevlm")
    assert (run.status, values(uri, run.run_id, "a")) == ("RUNNING", [(2, 3.0)])
    assert [one.path for one in MlflowClient(uri).list_artifacts(run.run_id)] == ["late.txt"]
    assert list((Path(uri.removeprefix("sqlite:///")).parent / run.experiment_id / run.run_id).iterdir()) == []


def test_a_logger_travels_to_other_processes_until_it_is_opened(uri: str) -> None:
    """As strategies that spawn need it."""
    logger = pickle.loads(pickle.dumps(RunLogger(tracking_uri=uri, run_name="spawned")))
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize()
    assert [run.name for run in find_runs(uri, "moevlm")] == ["spawned"]


def test_a_call_costs_little(uri: str) -> None:
    """The bound is loose for busy machines; about 0.02 ms per call of 50 metrics is usual."""
    logger = RunLogger(tracking_uri=uri, flush_points=10**9, flush_seconds=3600)
    metrics = {f"load/block{i}": float(i) for i in range(50)}
    logger.log_metrics(metrics, 0)
    start = time.thread_time()
    for step in range(200):
        logger.log_metrics(metrics, step)
    assert (time.thread_time() - start) / 200 < 0.5e-3
    logger.finalize()


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


def test_a_resumed_run_forgets_what_lies_beyond_its_checkpoint(uri: str) -> None:
    first = RunLogger(tracking_uri=uri)
    for step, value in enumerate((1.0, 2.0, math.inf, 4.0)):
        first.log_metrics({"a": value, "b": 0.5} if step < 2 else {"a": value}, step)
    first.log_metrics({"system/cpu": 50.0}, 30)
    first.finalize("failed")
    again = RunLogger(tracking_uri=uri, run_id=first.run_id)
    again.rewind(1)
    (run,) = find_runs(uri, "moevlm")
    assert run.last == {"a": 2.0, "b": 0.5, "system/cpu": 50.0}  # its steps are seconds
    assert "nonfinite/a" not in run.tags
    again.log_metrics({"a": math.inf}, 3)
    again.finalize()
    assert values(uri, str(first.run_id), "a") == [(0, 1.0), (1, 2.0), (3, math.inf)]
    (run,) = find_runs(uri, "moevlm")
    assert run.tags["nonfinite/a"] == "inf first at step 3" and run.last["a"] == math.inf
