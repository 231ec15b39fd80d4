"""The engine slurm against SLURM's own commands, as `fake_slurm.py` answers them."""

import os
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.run.engines import JOBS_FOLDER
from lightning_moevlm.study.run.ledger import Status, read_ledger, read_state
from tests.study.fake_slurm import LIMIT, install
from tests.study.run.engines.test_engines import SLOW, processes, start_sweep, trainings, wait_for_checkpoints
from tests.study.run.test_execute import assert_each_once, by_seed, wait_for
from tests.study.tiny_study import engine_of, plan_of, sweep, write_project

pytestmark = pytest.mark.skipif(
    find_spec("submitit") is None, reason="submitit is not installed: pip install '.[slurm]'"
)


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster of the test's own; returns the folder of its jobs."""
    import submitit

    submitit.SlurmJob.watcher.clear()  # it remembers the jobs of the test before, which had the same numbers
    home = tmp_path / "slurm"
    home.mkdir()
    monkeypatch.setenv("PATH", f"{install(home)}{os.pathsep}{os.environ['PATH']}")
    return home / "jobs"


def test_a_cluster_that_takes_one_job_at_a_time(tmp_path, uri, cluster, monkeypatch):
    monkeypatch.setenv(LIMIT, "1")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "swordfish")
    file = write_project(tmp_path, uri, {"seeds": [0], "budget": {"max_steps": 1}})
    plan, experiment, tally, _ = sweep(file, engine=engine_of("fake_slurm"))
    assert (tally.started, tally.stopped) == (2, "")
    assert_each_once(plan, experiment)
    assert [state.job for _, state in read_ledger(plan)] == ["1", "2"]
    script = (cluster / "1" / "script").read_text()
    for line in ("--time=5", "--cpus-per-task=1", "--requeue", "--signal=USR2@90", "--job-name=tiny/baseline-seed0"):
        assert f"#SBATCH {line}\n" in script
    assert " --cpus-per-task=1 " in next(line for line in script.splitlines() if line.startswith("srun "))
    for kept in (plan.folder / JOBS_FOLDER).rglob("*"):
        assert kept.is_dir() or b"swordfish" not in kept.read_bytes()


def test_a_cluster_that_refuses_every_job(tmp_path, uri, monkeypatch):
    monkeypatch.setenv(LIMIT, "0")
    file = write_project(tmp_path, uri, {"seeds": [0]})
    with pytest.raises(
        UserError,
        match=r"^sbatch refused the job \(sbatch: error: QOSMaxSubmitJobPerUserLimit\): correct the --engine options",
    ):
        sweep(file, engine=engine_of("fake_slurm"))
    assert [s.status for s in by_seed(plan_of(file))] == [Status.INTERRUPTED, Status.PLANNED]


@pytest.mark.slow
def test_killed_sweep_preempted_job_and_cancelled_job(tmp_path, uri, cluster):
    """The sweep is killed, then SLURM preempts one of its jobs and somebody cancels the other."""
    file = write_project(tmp_path, uri, {"seeds": [0], "budget": {"max_steps": 40}}, SLOW)
    plan = plan_of(file)
    parent = start_sweep(file, "fake_slurm")
    wait_for_checkpoints(plan)
    parent.kill()
    parent.wait()
    assert len(trainings(tmp_path)) == 2
    before = by_seed(plan)
    assert [(s.status, s.is_elsewhere) for s in before] == [(Status.RUNNING, True)] * 2
    pids = [int((cluster / s.job / "group").read_text()) for s in before]
    [work] = [p for p in processes("submitit.core._submit") if os.getpgid(p.pid) == pids[0] and p.name() != "bash"]
    work.send_signal(signal.SIGUSR2)
    wait_for(lambda: int((cluster / before[0].job / "group").read_text()) != pids[0])  # SLURM has started it again
    subprocess.run(["scancel", before[1].job], check=True)

    _, experiment, tally, _ = sweep(file, engine=engine_of("fake_slurm"))
    assert tally.started == 1  # the one that was cancelled
    assert_each_once(plan, experiment)
    after = by_seed(plan)
    assert [s.run_id for s in after] == [s.run_id for s in before]
    assert [s.attempts for s in after] == [1, 2]
    starts = [(plan.run_folder(run) / "log.txt").read_text().count("training from step") for run in plan.runs]
    assert starts == [2, 2]


@pytest.mark.slow
def test_sigint_cancels_the_jobs(tmp_path, uri, cluster):
    file = write_project(tmp_path, uri, {"arms": {"baseline": None}, "seeds": [0], "budget": {"max_steps": 40}}, SLOW)
    plan = plan_of(file)
    parent = start_sweep(file, "fake_slurm")
    wait_for_checkpoints(plan)
    parent.send_signal(signal.SIGINT)
    out, _ = parent.communicate(timeout=120)
    assert "SIGINT" in out.splitlines()
    assert not trainings(tmp_path)
    state = read_state(plan.run_folder(plan.runs[0]))
    assert state.status is Status.INTERRUPTED
    assert (cluster / state.job / "state").read_text() == "CANCELLED"


@pytest.mark.slow
def test_job_that_crashes_and_job_whose_node_dies(tmp_path, uri, cluster):
    """The first has failed, with its last lines and no second try; the second resumes from its checkpoint."""
    study = {
        "seeds": [0], "budget": {"max_steps": 40},
        "arms": {"baseline": None, "crash": {"model.crash_at": 2}},
    }  # fmt: skip
    file = write_project(tmp_path, uri, study, SLOW)
    plan = plan_of(file)
    parent = start_sweep(file, "fake_slurm")
    wait_for(lambda: by_seed(plan)[1].status is Status.FAILED)
    crashed = by_seed(plan)[1]
    assert (crashed.attempts, crashed.exit_code) == (1, 1)
    assert any("told to crash" in line for line in crashed.log_tail)
    wait_for(lambda: (cluster / crashed.job / "state").read_text() == "COMPLETED")  # the job itself did its work
    wait_for_checkpoints(plan)
    first = by_seed(plan)[0]
    work = [p for p in processes("submitit.core._submit") if str(tmp_path) in " ".join(p.cmdline())]
    for process in (*work, *trainings(tmp_path)):  # the first would write down how the second ended
        process.kill()
    wait_for(lambda: (cluster / first.job / "state").read_text() == "FAILED")
    out, _ = parent.communicate(timeout=120)
    assert out.splitlines().count("start baseline-seed0") == 2
    done = by_seed(plan)[0]
    assert (done.status, done.attempts, done.run_id) == (Status.FINISHED, 2, first.run_id)
    assert (plan.run_folder(plan.runs[0]) / "log.txt").read_text().count("training from step") == 2
