"""Every engine: the same runs and numbers, nothing twice, nothing lost. Processes, Ray and submitit are real."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.run.engines import CHECKPOINT, JOBS_FOLDER, Job, LocalEngine, RayEngine, SlurmEngine
from lightning_moevlm.study.run.engines.tickets import NO_OWNER, Tickets
from lightning_moevlm.study.run.engines.worker import NO_CHECKPOINT, run_job
from lightning_moevlm.study.run.ledger import RunState, Status, read_ledger, read_state, write_state
from lightning_moevlm.study.run.mlflow_runs import open_experiment
from lightning_moevlm.study.run.processes.child_process import Child, ProcessEnd, is_alive
from lightning_moevlm.study.run.to_do import find_waiting_runs
from tests.study.run.test_execute import REPOSITORY, assert_each_once, by_seed, tracked, wait_for
from tests.study.tiny_study import engine_of, plan_of, sweep, write_project

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install '.[ray]'")
needs_submitit = pytest.mark.skipif(
    find_spec("submitit") is None, reason="submitit is not installed: pip install '.[slurm]'"
)
CLUSTERS = [
    pytest.param("slurm", marks=needs_submitit),
    pytest.param("ray", marks=[needs_ray, pytest.mark.slow]),  # starting Ray takes seconds
]
SLOW = {"seconds_per_step": 0.2}


def start_sweep(file: Path, engine: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.study.tiny_study", str(file), engine],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def processes(text: str) -> list[psutil.Process]:
    """Return the living processes whose command line holds a text."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if text in words and is_alive(process):
            found.append(process)
    return found


def trainings(folder: Path) -> list[psutil.Process]:
    return [process for process in processes(f"{folder}/") if "tiny_training.py" in " ".join(process.cmdline())]


def wait_for_checkpoints(plan, seed: int = 0) -> None:
    folders = [plan.run_folder(run) for run in plan.runs if run.seed == seed]
    wait_for(lambda: all((folder / "checkpoints" / "last.ckpt").exists() for folder in folders), 120)


def job_of(folder: Path, code: str, again: str = "", timeout_seconds: float | None = None, ticket: str = "t") -> Job:
    """Return a job that runs Python code."""
    return Job(
        ticket=ticket,
        name="job",
        command=(sys.executable, "-c", code),
        again=(sys.executable, "-c", again, CHECKPOINT),
        environment={"TOLD": "this"},
        folder=folder,
        log=folder / "log.txt",
        checkpoints=(folder,),
        timeout_seconds=timeout_seconds,
    )


@pytest.mark.parametrize("engine", CLUSTERS)
def test_same_study_same_numbers(tmp_path, migrated_database, engine):
    """Digests, metrics and steps are those of the local engine, bit for bit."""
    contents = []
    for name in ("local", engine):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(migrated_database, folder / "mlflow.db")
        file = write_project(folder, f"sqlite:///{folder / 'mlflow.db'}", {"seeds": [0], "budget": {"max_steps": 2}})
        plan, experiment, _, _ = sweep(file, engine=engine_of(name))
        assert_each_once(plan, experiment)
        keys = ("val/task_loss", "val/accuracy_text", "load/block1/text/expert0")
        contents.append(
            {
                (row.name, row.tags["digest"], key, point.step): point.value
                for row in tracked(experiment)
                for key in keys
                for point in experiment.history(row.run_id, key)
            }
        )
        assert all(state.seconds > 0 and state.engine == name for _, state in read_ledger(plan))
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2 * 3 * 3  # arms x keys x steps


@needs_submitit
@pytest.mark.slow
def test_jobs_of_a_killed_sweep_go_on_in_the_cluster_and_are_waited_for(tmp_path, uri):
    file = write_project(tmp_path, uri, {"budget": {"max_steps": 24}}, SLOW)
    plan = plan_of(file)
    parent = start_sweep(file, "slurm")
    wait_for_checkpoints(plan)
    parent.kill()
    parent.wait()
    assert len(trainings(tmp_path)) == 2
    before = by_seed(plan)
    assert [s.status for s in before] == [Status.RUNNING] * 2 + [Status.PLANNED] * 2
    assert all(s.is_elsewhere and s.job and s.pid is None for s in before[:2])

    experiment = open_experiment(uri, "tiny")
    with pytest.raises(UserError, match=rf"is with slurm \(job {before[0].job}\), not with local; wait for it"):
        find_waiting_runs(plan, experiment, LocalEngine(), retry=False)
    _, experiment, tally, _ = sweep(file, engine=engine_of("slurm"))
    assert tally.started == 2
    assert_each_once(plan, experiment)
    after = by_seed(plan)
    assert [s.attempts for s in after] == [1] * 4
    assert [(s.run_id, s.job) for s in after[:2]] == [(s.run_id, s.job) for s in before[:2]]


@needs_ray
@pytest.mark.slow
def test_jobs_of_a_killed_sweep_end_in_ray_and_are_gone_on_with(tmp_path, uri):
    file = write_project(tmp_path, uri, {"budget": {"max_steps": 24}}, SLOW)
    plan = plan_of(file)
    parent = start_sweep(file, "ray")
    wait_for_checkpoints(plan)
    parent.kill()
    parent.wait()
    wait_for(lambda: not trainings(tmp_path), 30)
    before = by_seed(plan)
    assert [s.status for s in before] == [Status.INTERRUPTED] * 2 + [Status.PLANNED] * 2
    _, experiment, tally, _ = sweep(file, engine=engine_of("ray"))
    assert tally.started == 4
    assert_each_once(plan, experiment)
    after = by_seed(plan)
    assert [s.attempts for s in after] == [2, 2, 1, 1]
    assert [s.run_id for s in after[:2]] == [s.run_id for s in before[:2]]


@pytest.mark.slow
@pytest.mark.parametrize("engine", CLUSTERS)
def test_sigint_ends_the_jobs_and_the_next_sweep_resumes(tmp_path, uri, engine):
    file = write_project(tmp_path, uri, {"seeds": [0], "budget": {"max_steps": 24}}, SLOW)
    plan = plan_of(file)
    parent = start_sweep(file, engine)
    wait_for_checkpoints(plan)
    parent.send_signal(signal.SIGINT)
    out, _ = parent.communicate(timeout=120)
    assert "SIGINT" in out.splitlines()
    assert not trainings(tmp_path)
    before = by_seed(plan)
    assert [s.status for s in before] == [Status.INTERRUPTED] * 2
    _, experiment, tally, _ = sweep(file, engine=engine_of("local"))  # another engine may go on
    assert tally.started == 2
    assert_each_once(plan, experiment)
    assert [s.run_id for s in by_seed(plan)] == [s.run_id for s in before]


@needs_submitit
@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [True, False])
def test_job_that_the_cluster_stops_comes_back(tmp_path, uri, checkpoints):
    """With a checkpoint it resumes in the same MLflow run, without one it starts in a new one: no point twice."""
    study = {"arms": {"baseline": None}, "seeds": [0], "budget": {"max_steps": 16}}
    file = write_project(tmp_path, uri, study, SLOW | {"checkpoints": checkpoints})
    plan = plan_of(file)
    folder = plan.run_folder(plan.runs[0])
    parent = start_sweep(file, "slurm")
    if checkpoints:
        wait_for_checkpoints(plan)
    else:
        wait_for(lambda: (folder / "log.txt").exists() and "training from" in (folder / "log.txt").read_text())
    before = read_state(folder)
    [job] = [p for p in processes(str(tmp_path)) if "submitit.core._submit" in " ".join(p.cmdline())]
    job.send_signal(signal.SIGUSR2)  # what SLURM sends before it stops a job
    out, _ = parent.communicate(timeout=120)
    assert "finished baseline-seed0" in out.splitlines()
    assert_each_once(plan, open_experiment(uri, "tiny"))
    after = read_state(folder)
    starts = [line.split()[3] for line in (folder / "log.txt").read_text().splitlines() if "training from" in line]
    if checkpoints:
        assert (after.run_id, after.attempts, after.job) == (before.run_id, 1, before.job)
        assert starts[0] == "0"
        assert int(starts[1]) > 0
    else:
        assert after.run_id != before.run_id
        assert (after.attempts, starts) == (2, ["0"])


@needs_submitit
@pytest.mark.parametrize("has_begun", [True, False])
def test_sweep_killed_before_the_ledger_knew_the_job(tmp_path, uri, has_begun):
    """A job that has begun owns its ticket; one that has not finds it taken and leaves."""
    file = write_project(tmp_path, uri, {"arms": {"baseline": None}, "seeds": [0]})
    plan = plan_of(file)
    [run] = plan.runs
    run_id = open_experiment(uri, "tiny").create(run)
    write_state(plan.run_folder(run), RunState(Status.RUNNING, run_id, attempts=1, engine="slurm", ticket="t"))
    assert read_state(plan.run_folder(run)).is_elsewhere
    job = job_of(tmp_path, "import pathlib, time; time.sleep(3); pathlib.Path('ran').touch()")
    tickets = plan.folder / JOBS_FOLDER
    if has_begun:
        engine = engine_of("slurm")
        engine.open(tickets, None, 1)
        engine.submit(job)
        wait_for(lambda: (tickets / "t.taken").exists())
    _, experiment, tally, _ = sweep(file, engine=engine_of("slurm"))
    state = read_state(plan.run_folder(run))
    if has_begun:
        assert tally.started == 0
        assert (tmp_path / "ran").exists()
        assert state.run_id == run_id
        assert "logged no val/task_loss" in state.reason
    else:
        assert tally.started == 1
        assert_each_once(plan, experiment)
        assert (tickets / "t.taken").read_text() == NO_OWNER
        run_job(job, tickets, "123")
        assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_run_over_its_time_has_failed_and_the_others_continue(tmp_path, uri):
    file = write_project(tmp_path, uri, {"budget": {"max_steps": 1}}, {"seconds_per_step": 1.5})
    plan, _, tally, _ = sweep(file, jobs=2, timeout_minutes=0.02)  # 1.2 s, and two steps take 3 s
    assert tally.started == 4
    states = [state for _, state in read_ledger(plan)]
    assert [state.status for state in states] == [Status.FAILED] * 4
    assert {state.reason for state in states} == {"not done after 0.02 minutes (timeout_minutes), so it was ended"}
    assert {state.exit_code for state in states} == {-signal.SIGTERM}
    _, _, tally, _ = sweep(file)
    assert tally.started == 0
    plan, experiment, tally, _ = sweep(file, jobs=4, retry=True)
    assert tally.started == 4
    assert_each_once(plan, experiment)


def test_a_run_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_moevlm.study.run.processes.child_process.PATIENCE_SECONDS", 0.2)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    log = tmp_path / "log.txt"
    child = Child.start([sys.executable, "-c", code], os.environ, log, timeout_seconds=0.0)
    wait_for(lambda: "\ndeaf" in log.read_text())  # its first line is the command
    assert child.poll().code == -signal.SIGKILL


def test_cancelled_jobs_report_the_signal_that_ended_them(tmp_path):
    engine = LocalEngine(num_gpus=0)
    engine.open(tmp_path, 2, 2)
    for ticket in ("a", "b"):
        engine.submit(job_of(tmp_path, "import time; time.sleep(60)", ticket=ticket))
    engine.cancel(["a", "b"])
    assert [engine.poll(ticket).code for ticket in ("a", "b")] == [-signal.SIGTERM] * 2


def test_worker_writes_down_how_the_run_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    code = "import os; print(os.environ['TOLD'], os.environ.get('SLURM_NTASKS')); raise SystemExit(3)"
    before = time.time()
    run_job(job_of(tmp_path, code), tmp_path / "jobs", "7")
    ended = Tickets(tmp_path / "jobs").read_end("t")
    assert (ended.code, ended.reason) == (3, "")
    assert before <= ended.started <= ended.ended <= time.time()
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == "this None"  # it is no rank of the cluster's job


def test_worker_ends_a_run_that_is_over_its_time(tmp_path):
    run_job(job_of(tmp_path, "import time; time.sleep(60)", timeout_seconds=0.3), tmp_path / "jobs", "7")
    ended = Tickets(tmp_path / "jobs").read_end("t")
    assert (ended.code, ended.reason) == (
        -signal.SIGTERM,
        "not done after 0.005 minutes (timeout_minutes), so it was ended",
    )


def test_worker_that_is_started_again(tmp_path):
    import zipfile

    tickets = Tickets(tmp_path / "jobs")
    job = job_of(tmp_path, "print('from zero')", again="import sys; print('from', sys.argv[1])")
    assert tickets.take("t", "7") is None  # the first start, which was killed
    run_job(job, tickets.folder, "8")  # another job with the same ticket: there may be only one
    assert tickets.read_end("t") is None
    run_job(job, tickets.folder, "7")
    assert tickets.read_end("t") == NO_CHECKPOINT
    assert not job.log.exists()
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as archive:
        archive.writestr("step", "3")
    run_job(job, tickets.folder, "7")
    assert tickets.read_end("t").code == 0
    assert job.log.read_text().splitlines()[-1] == f"from {tmp_path / 'last.ckpt'}"


def test_ticket_is_taken_once(tmp_path):
    tickets = Tickets(tmp_path / "jobs")
    assert tickets.read_end("a") is None
    assert [tickets.take("a", owner) for owner in ("1", "2", "1")] == [None, "1", "1"]
    tickets.write_end("a", ProcessEnd(-9, "why", 1.0, 2.5))
    assert tickets.read_end("a") == ProcessEnd(-9, "why", 1.0, 2.5)
    assert sorted(file.name for file in tickets.folder.iterdir()) == ["a.json", "a.taken"]


def test_mistakes_are_one_line(monkeypatch):
    monkeypatch.setattr("lightning_moevlm.study.run.engines.engine.find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"needs ray, which is not installed: pip install 'lightning-moevlm\[ray\]'"):
        RayEngine()
    with pytest.raises(UserError, match=r"needs submitit.*pip install 'lightning-moevlm\[slurm\]'"):
        SlurmEngine()
    monkeypatch.setattr("lightning_moevlm.study.run.engines.engine.find_spec", lambda package: object())
    with pytest.raises(UserError, match=r"--engine\.num_gpus is -1; give at least 0"):
        RayEngine(num_gpus=-1)
    monkeypatch.setattr("lightning_moevlm.study.run.engines.local._visible_gpus", lambda: 1)
    LocalEngine(num_gpus=1)
    with pytest.raises(
        UserError, match=r"--engine\.num_gpus is 4, but the number of visible GPUs is 1; give at most 1"
    ):
        LocalEngine(num_gpus=4)
    with pytest.raises(UserError, match=r"--engine\.minutes is 0; give at least 1"):
        SlurmEngine(minutes=0, cluster="local")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"has no srun.*--engine\.cluster local"):
        SlurmEngine()


@needs_ray
def test_ray_without_a_listener(tmp_path):
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:9 \(.*refused\): start one"):
        RayEngine("127.0.0.1:9").open(tmp_path, None, 1)


@needs_ray
@pytest.mark.slow
def test_ray_without_room_says_so(tmp_path):
    with pytest.raises(UserError, match=r"has \d+ cores and 0 GPUs, but one run needs 1 and 1;"):
        RayEngine(num_gpus=1).open(tmp_path, None, 1)


@needs_ray
@pytest.mark.slow
def test_own_ray_cluster_turns_strangers_away(tmp_path):
    """It runs any code that it is sent: only this machine reaches it, and only with the secret."""
    engine = RayEngine()
    engine.open(tmp_path, 1, 1)
    try:
        import ray

        ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
        heard = {(p.name(), c.laddr.ip) for p in ours for c in p.net_connections("inet") if c.status == "LISTEN"}
        assert {"gcs_server", "raylet"} <= {name for name, _ in heard}
        assert {ip.removeprefix("::ffff:") for _, ip in heard} == {"127.0.0.1"}
        address = ray.get_runtime_context().gcs_address
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        code = f"import ray; ray.init(address={address!r}); print('inside')"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    finally:
        engine.close()
    assert (done.returncode, done.stdout) == (1, "")
    assert "token" in done.stderr.lower()
