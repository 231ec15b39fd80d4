"""A run stopped by a signal saves, says how to resume, and resumed equals an uninterrupted one."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from lightning_moevlm.configuration.run_option import expand_run_option
from lightning_moevlm.tracking.read.runs import metric_history
from lightning_moevlm.tracking.read.sqlite_rows import points_of, reading
from lightning_moevlm.training.callbacks import StepProgress
from tests.conftest import PROJECT, run_in, step_of
from tests.small_run import SMALL, budget

Moevlm = Callable[..., str]
Points = dict[tuple[str, int], float]
ARGUMENTS = (*SMALL, *budget(6, val_every=2), "--trainer.limit_val_batches=2")
# what measures the machine, and what is asked before the first step of every process
_OF_THE_PROCESS = ("system/", "throughput/", "memory/", "time/", "liveness/", "balance_gradient_share/")


def the_run(workplace: Path) -> Run:
    client = MlflowClient(f"sqlite:///{workplace}/runs/mlflow.db")
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return run


def points(workplace: Path) -> Points:
    uri = f"sqlite:///{workplace}/runs/mlflow.db"
    found = metric_history(uri, the_run(workplace).info.run_id)
    return {(p.key, p.step): p.value for p in found if not p.key.startswith(_OF_THE_PROCESS)}


def has_trained(workplace: Path) -> bool:
    with reading(workplace / "runs/mlflow.db") as store:
        return bool(store.execute("SELECT count(*) FROM metrics WHERE key = 'train/task_loss'").fetchone()[0])


def assert_each_point_once(workplace: Path) -> None:
    ((_, rows),) = points_of(workplace / "runs/mlflow.db", [the_run(workplace).info.run_id])
    twice = [point for point, count in Counter((key, step) for key, step, *_ in rows).items() if count > 1]
    assert [point for point in twice if not point[0].startswith("system/")] == []


def last(workplace: Path) -> Path:
    run = the_run(workplace).info
    return workplace / "runs" / run.experiment_id / run.run_id / "checkpoints/last.ckpt"


def resume_words(told: str) -> list[str]:
    (line,) = re.findall(r"^Resume with: moevlm (.*)$", told, re.MULTILINE)
    return shlex.split(line)


@pytest.fixture(scope="module")
def whole(shared_workplace: Path) -> Points:
    """The points of an uninterrupted run."""
    run_in(shared_workplace, "fit", *ARGUMENTS)
    return points(shared_workplace)


@pytest.fixture
def handlers_restored() -> Iterator[None]:
    """Lightning leaves Ctrl-C ignored when it was interrupted."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def send(number: signal.Signals, at_step: int, hook: str, patch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Have this process get a signal in a hook of a callback, at a step."""

    def kill(self: StepProgress, trainer: object, *_: object) -> None:
        if getattr(trainer, "global_step", 0) == at_step and not getattr(trainer, "sanity_checking", False):
            for _once in range(times):
                os.kill(os.getpid(), number)

    patch.setattr(StepProgress, hook, kill)


@pytest.mark.parametrize(
    ("number", "at_step", "hook"),
    [
        (signal.SIGTERM, 3, "on_train_batch_end"),
        (signal.SIGINT, 2, "on_train_batch_end"),  # its validation is due
        (signal.SIGHUP, 4, "on_validation_start"),
        pytest.param(signal.SIGUSR1, 1, "on_train_batch_end", marks=pytest.mark.slow),  # as SIGTERM
    ],
)
@pytest.mark.usefixtures("handlers_restored")
def test_a_stopped_run_saves_and_resumes_exactly(
    number: signal.Signals,
    at_step: int,
    hook: str,
    whole: Points,
    moevlm: Moevlm,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        send(number, at_step, hook, patch)
        told = moevlm("fit", *ARGUMENTS, code=128 + number)
    assert told.splitlines()[-1] == f"moevlm: stopped by {number.name} at step {at_step}"
    assert the_run(workplace).info.status == "KILLED"
    assert step_of(last(workplace)) == at_step
    moevlm(*resume_words(told))
    assert the_run(workplace).info.status == "FINISHED"
    assert step_of(last(workplace)) == 6
    assert_each_point_once(workplace)
    assert points(workplace) == whole


@pytest.mark.usefixtures("handlers_restored")
def test_a_job_that_slurm_restarts_resumes_its_run(
    whole: Points,
    moevlm: Moevlm,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with monkeypatch.context() as patch:
        send(signal.SIGTERM, 3, "on_train_batch_end", patch)
        moevlm("fit", *ARGUMENTS, code=143)
    assert the_run(workplace).data.tags["slurm_job"] == "77"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    moevlm("fit", *ARGUMENTS)
    assert f"SLURM has restarted this job; it resumes run {last(workplace).parents[1]}" in caplog.messages
    assert the_run(workplace).info.status == "FINISHED"
    assert points(workplace) == whole
    monkeypatch.setenv("SLURM_JOB_ID", "78")  # another job has no run yet
    assert expand_run_option(["fit", *ARGUMENTS]) == ["fit", *ARGUMENTS]


@pytest.mark.usefixtures("handlers_restored")
def test_a_signal_in_the_last_step_lets_the_run_end(
    whole: Points, moevlm: Moevlm, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    def look(self: StepProgress, trainer: object, *_: object) -> None:
        if getattr(trainer, "global_step", 0) == 6:
            saved.append(step_of(last(workplace)))

    send(signal.SIGTERM, 6, "on_train_batch_end", monkeypatch)
    monkeypatch.setattr(StepProgress, "on_validation_start", look)
    moevlm("fit", *ARGUMENTS)
    assert saved == [6]  # before the validation, which a node that goes away may cut short
    assert points(workplace) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("handlers_restored")
def test_a_second_signal_ends_at_once_and_keeps_the_last_checkpoint(
    number: signal.Signals, moevlm: Moevlm, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(number, 5, "on_train_batch_end", monkeypatch, times=2)
    told = moevlm("fit", *ARGUMENTS, code=128 + number)
    assert told.splitlines()[-1] == f"moevlm: stopped at once by {number.name}"
    assert the_run(workplace).info.status == "KILLED"
    assert step_of(last(workplace)) == 4  # of the last validation
    assert resume_words(told) == ["fit", "--run", the_run(workplace).info.run_id[:8]]


@pytest.mark.parametrize(("times", "saved"), [(1, 5), (2, 2)])
@pytest.mark.usefixtures("handlers_restored")
def test_a_signal_while_a_checkpoint_is_saved_leaves_a_whole_one(
    times: int, saved: int, moevlm: Moevlm, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One signal lets the file and the next step be finished; a second one leaves the file of step 2."""

    sent: list[int] = []

    def kill(number: int) -> None:
        is_amid = any(workplace.glob("runs/*/*/checkpoints/*.part")) and any(workplace.glob("runs/*/*/*/last.ckpt"))
        if is_amid and not sent and step_of(last(workplace)) == 2:
            for _once in range(times):
                sent.append(number)
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("lightning_moevlm.training.checkpoints.atomic_checkpoint.os.fsync", kill)
    moevlm("fit", *ARGUMENTS, code=143)
    assert len(sent) == times
    assert step_of(last(workplace)) == saved
    assert not list(workplace.glob("runs/*/*/checkpoints/*.part"))


@pytest.mark.slow  # the tests above get their signals in this process
def test_a_preempted_process_without_validation_can_be_resumed(moevlm: Moevlm, workplace: Path) -> None:
    """The real process, with workers that read, and a real signal from outside."""
    arguments = (*SMALL, *budget(2000), "--trainer.limit_val_batches=0", "--data.num_workers=1")
    arguments += ("--trainer.logger.init_args.flush_seconds=0.1",)
    command = [sys.executable, "-m", "lightning_moevlm", "fit", *arguments]
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, cwd=workplace, env=env, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not has_trained(workplace) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    where = re.search(r"^moevlm: stopped by SIGTERM at step (\d+)$", told, re.MULTILINE)
    assert where and step_of(last(workplace)) == int(where[1]) > 0
    moevlm(*resume_words(told), f"--trainer.max_steps={int(where[1]) + 1}")
    assert_each_point_once(workplace)


def test_a_run_that_diverges_keeps_the_checkpoint_from_before(
    moevlm: Moevlm, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: StepProgress, trainer: object, module: torch.nn.Module, *_: object) -> None:
        if getattr(trainer, "global_step", 0) == 2:
            with torch.no_grad():
                next(module.parameters()).fill_(torch.inf)

    monkeypatch.setattr(StepProgress, "on_train_batch_start", spoil)
    told = moevlm("fit", *ARGUMENTS, code=3)
    assert told.splitlines()[-1] == "moevlm: diverged: the training loss is not finite at step 3"
    assert step_of(last(workplace)) == 2  # step 4 was validated too
    assert resume_words(told) == ["fit", "--run", the_run(workplace).info.run_id[:8]]
