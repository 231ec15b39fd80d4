"""Everything that a training logs is in the store: by points, by time, after a crash, in a resumed run."""

import math
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow import MlflowClient

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking import RunLogger, find_runs, metric_history
from lightning_moevlm.tracking.write.offline_log import find_offline_logs
from tests.tracking.tiny import TinyData, TinyModule, tiny_trainer, values
from tests.tracking.write.test_sender import wait_until


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
