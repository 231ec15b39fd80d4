"""Sweeps with real processes, a real SQLite store and real kills: nothing twice, nothing lost."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.run.engines import LocalEngine
from lightning_moevlm.study.run.ledger import RunState, Status, read_ledger, read_state, write_state
from lightning_moevlm.study.run.mlflow_runs import ROLE, ROLE_ARM, StudyRuns
from lightning_moevlm.study.run.processes.child_process import is_alive
from lightning_moevlm.study.run.processes.overrides_file import OVERRIDES_FILE, write_overrides
from lightning_moevlm.study.run.to_do import find_waiting_runs
from lightning_moevlm.tracking.read.runs import RunRow, find_runs
from tests.study.tiny_study import plan_of, sweep, write_project
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[3]


def tracked(experiment: StudyRuns) -> list[RunRow]:
    """Return every run of the study that MLflow has, by name."""
    rows = find_runs(experiment.uri, experiment.name, {ROLE: ROLE_ARM})
    return sorted(rows, key=lambda row: row.name)


def assert_each_once(plan: Plan, experiment: StudyRuns) -> None:
    """Every planned run is in MLflow exactly once, finished, with every step exactly once."""
    rows = tracked(experiment)
    assert [row.name for row in rows] == sorted(run.name for run in plan.runs)
    assert {row.tags["digest"] for row in rows} == {run.digest for run in plan.runs}
    assert {row.run_id for row in rows} == {state.run_id for _, state in read_ledger(plan)}
    for row in rows:
        assert row.status == "FINISHED"
        assert row.tags["outcome"] == "finished"
        steps = [point.step for point in experiment.history(row.run_id, "val/task_loss")]
        assert steps == list(range(plan.study.budget.max_steps + 1))


def by_seed(plan: Plan) -> list[RunState]:
    """Return where the runs stand in the order in which they are run."""
    return [state for _, state in sorted(read_ledger(plan), key=lambda pair: pair[0].seed)]


def start_sweep(file: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.study.tiny_study", str(file)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_place_does_not_stand_idle_while_a_run_is_judged(tmp_path, uri):
    _, _, _, watcher = sweep(write_project(tmp_path, uri, {"seeds": [0]}), jobs=1)
    assert watcher.lines == [
        "start baseline-seed0",
        "start fast-seed0",
        "finished baseline-seed0",
        "finished fast-seed0",
    ]


def test_each_run_once_and_twice_is_nothing(tmp_path, uri):
    file = write_project(tmp_path, uri)
    plan, experiment, tally, watcher = sweep(file)
    assert (tally.started, tally.stopped) == (4, "")
    assert sorted(watcher.lines) == sorted([f"{w} {r.name}" for r in plan.runs for w in ("start", "finished")])
    assert_each_once(plan, experiment)
    log = (plan.run_folder(plan.runs[0]) / "log.txt").read_text()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert f"with {threads} threads" in log

    before = {row.run_id for row in tracked(experiment)}
    _, _, again, _ = sweep(file)
    assert again.started == 0
    assert {row.run_id for row in tracked(experiment)} == before

    # A ledger that was removed is found again in MLflow ...
    shutil.rmtree(plan.folder)
    _, _, again, _ = sweep(file)
    assert again.started == 0
    assert_each_once(plan, experiment)
    # ... and a run that was deleted in MLflow is run again, alone.
    MlflowClient(uri).delete_run(next(iter(before)))
    _, _, again, _ = sweep(file)
    assert again.started == 1
    assert_each_once(plan, experiment)


def test_crash_and_divergence_are_recorded_and_the_others_continue(tmp_path, uri):
    arms = {"baseline": None, "crash": {"model.crash_at": 2}, "explode": {"model": {"nan_at": 3}}}
    file = write_project(tmp_path, uri, {"arms": arms, "seeds": [0]})
    plan, experiment, tally, _ = sweep(file)
    assert tally.started == 3
    states = {run.arm: state for run, state in read_ledger(plan)}
    assert states["baseline"].status is Status.FINISHED
    assert states["crash"].status is Status.FAILED
    assert (states["crash"].exit_code, states["crash"].reason) == (1, "exit code 1")
    assert states["crash"].log_tail[-1] == "RuntimeError: the tiny training was told to crash"
    assert states["explode"].status is Status.DIVERGED
    assert states["explode"].reason == "val/task_loss is nan at step 3"
    assert [(r.tags["arm"], r.tags["outcome"], r.status) for r in tracked(experiment)] == [
        ("baseline", "finished", "FINISHED"),
        ("crash", "failed", "FAILED"),
        ("explode", "diverged", "FINISHED"),
    ]

    _, _, again, _ = sweep(file)
    assert again.started == 0  # a crash is not repeated for nothing
    _, _, again, _ = sweep(file, retry=True)
    assert again.started == 1
    crash = {run.arm: state for run, state in read_ledger(plan)}["crash"]
    assert crash.run_id != states["crash"].run_id  # from zero, so in a run of its own
    assert [row.tags["arm"] for row in tracked(experiment)] == ["baseline", "crash", "explode"]
    assert len(experiment.history(crash.run_id, "val/task_loss")) == 3


def test_a_run_that_is_stopped_from_outside_resumes_from_its_checkpoint(tmp_path, uri):
    """A preempted node signals all its processes, the runs of a sweep and the sweep."""
    file = write_project(tmp_path, uri, {"arms": {"baseline": None}, "seeds": [0]}, {"stop_at": [1, 3]})
    plan, experiment, *_ = sweep(file)
    [state] = [state for _, state in read_ledger(plan)]
    assert (state.status, state.attempts) == (Status.FINISHED, 3)
    assert_each_once(plan, experiment)


def test_a_run_that_is_stopped_again_and_again_has_failed_and_a_retry_resumes_it(tmp_path, uri):
    """As one that was ended by --timeout_minutes: it has saved."""
    file = write_project(tmp_path, uri, {"arms": {"baseline": None}, "seeds": [0]}, {"stop_at": [0, 1, 2, 3]})
    plan, *_ = sweep(file)
    [state] = [state for _, state in read_ledger(plan)]
    assert (state.status, state.attempts, state.reason) == (Status.FAILED, 4, "ended by SIGTERM")
    plan, experiment, *_ = sweep(file, retry=True)
    [(run, again)] = read_ledger(plan)
    assert (again.status, again.attempts, again.run_id) == (Status.FINISHED, 5, state.run_id)
    assert "training from step 4 with" in (plan.run_folder(run) / "log.txt").read_text()
    assert_each_once(plan, experiment)


def test_a_busy_store_does_not_make_a_crash_go_on(tmp_path, uri, monkeypatch):
    """Resumed from its checkpoint it would pass the crash and have a result."""
    from lightning_moevlm.study.run import active_runs

    file = write_project(tmp_path, uri, {"arms": {"baseline": None, "crash": {"model.crash_at": 2}}, "seeds": [0]})
    real, busy = active_runs.record_outcome, ["crash"]

    def record_outcome(plan, run, *rest):
        if run.arm in busy:
            busy.remove(run.arm)
            raise OSError("database is locked")
        real(plan, run, *rest)

    monkeypatch.setattr(active_runs, "record_outcome", record_outcome)
    plan, _, tally, _ = sweep(file)
    states = {run.arm: (state.status, state.attempts) for run, state in read_ledger(plan)}
    assert tally.started == 2
    assert states == {"baseline": (Status.FINISHED, 1), "crash": (Status.FAILED, 1)}


def test_a_run_that_is_deleted_in_mlflow_while_it_trains_begins_again(tmp_path, uri):
    file = write_project(tmp_path, uri, {"arms": {"baseline": None}, "seeds": [0]}, {"seconds_per_step": 0.3})
    plan = plan_of(file)
    folder = plan.run_folder(plan.runs[0])

    def delete() -> None:
        wait_for(lambda: (folder / "checkpoints" / "last.ckpt").exists())
        MlflowClient(uri).delete_run(read_state(folder).run_id)

    deleting = threading.Thread(target=delete)
    deleting.start()
    _, experiment, tally, watcher = sweep(file, jobs=1, silence_seconds=20)
    deleting.join()
    assert tally.stopped == ""
    assert "baseline-seed0: its run in MLflow was deleted while it trained; it starts again from zero" in watcher.lines
    assert_each_once(plan, experiment)


def test_a_deleted_experiment_is_refused(uri):
    from lightning_moevlm.study.run.mlflow_runs import open_experiment

    experiment = open_experiment(uri, "tiny")
    MlflowClient(uri).delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match=f"was deleted in MLflow; restore it, .*-id {experiment.experiment_id}`"):
        open_experiment(uri, "tiny")


def test_sigkill_of_the_sweep_loses_and_doubles_nothing(tmp_path, uri, monkeypatch):
    # long enough that no child is done before the other, which may start late on a busy machine, has a checkpoint
    file = write_project(tmp_path, uri, {"budget": {"max_steps": 24}}, model={"seconds_per_step": 0.15})
    plan = plan_of(file)
    parent = start_sweep(file)
    first = [plan.run_folder(run) for run in plan.runs if run.seed == 0]  # both arms of a seed go together
    wait_for(lambda: all((folder / "checkpoints" / "last.ckpt").exists() for folder in first))
    children = psutil.Process(parent.pid).children()
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(map(is_alive, children)))  # the kernel ends them with their parent
    states = by_seed(plan)
    assert [s.status for s in states] == [Status.INTERRUPTED] * 2 + [Status.PLANNED] * 2

    monkeypatch.setenv("TINY_QUICK", "1")  # nobody interrupts these
    _, experiment, tally, _ = sweep(file)
    assert tally.started == 4
    assert_each_once(plan, experiment)
    after = by_seed(plan)
    assert [s.attempts for s in after] == [2, 2, 1, 1]
    assert [s.run_id for s in after[:2]] == [s.run_id for s in states[:2]]  # went on in the same run
    assert "training from step 0 " not in (first[0] / "log.txt").read_text().split("\n# ")[1]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])  # one handler
def test_signals_end_children_and_restart_from_zero_does_not_mix(tmp_path, uri, number, monkeypatch):
    model = {"seconds_per_step": 0.3, "checkpoints": False}
    file = write_project(tmp_path, uri, {"seeds": [0]}, model)
    plan = plan_of(file)
    ours = signal.signal(number, signal.SIG_DFL)  # tests may run under `nohup`, and a process inherits what is ignored
    parent = start_sweep(file)
    signal.signal(number, ours)
    logs = [plan.run_folder(run) / "log.txt" for run in plan.runs]
    wait_for(lambda: all(log.exists() and "training from" in log.read_text() for log in logs))
    children = psutil.Process(parent.pid).children()
    time.sleep(0.5)
    parent.send_signal(number)
    parent.send_signal(number)  # an impatient second one changes nothing
    out, _ = parent.communicate(timeout=30)
    assert number.name in out.splitlines()
    assert not any(map(is_alive, children))
    before = [state for _, state in read_ledger(plan)]
    assert [state.status for state in before] == [Status.INTERRUPTED] * 2
    assert {row.status for row in find_runs(uri, "tiny", {ROLE: ROLE_ARM})} == {"KILLED"}

    monkeypatch.setenv("TINY_QUICK", "1")  # nobody interrupts these
    _, experiment, tally, _ = sweep(file)
    assert tally.started == 2
    assert_each_once(plan, experiment)
    assert {s.run_id for _, s in read_ledger(plan)}.isdisjoint({s.run_id for s in before})


@pytest.mark.parametrize("has_run", [True, False])
def test_orphan_of_a_killed_sweep_is_ended(tmp_path, uri, has_run):
    from lightning_moevlm.study.run.mlflow_runs import open_experiment

    file = write_project(tmp_path, uri, {"seeds": [0]})
    plan = plan_of(file)
    experiment = open_experiment(uri, "tiny")
    run_id = experiment.create(plan.runs[0])
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    started = psutil.Process(orphan.pid).create_time()
    pid_started = started if has_run else started - 5000  # the number was given to somebody else since
    state = RunState(Status.RUNNING, run_id, orphan.pid, pid_started, time.time(), attempts=1)
    write_state(plan.run_folder(plan.runs[0]), state)
    try:
        assert read_state(plan.run_folder(plan.runs[0])).status is (Status.RUNNING if has_run else Status.INTERRUPTED)
        assert find_waiting_runs(plan, experiment, LocalEngine(), retry=False) == list(plan.runs)
        assert (orphan.poll() is not None) is has_run
    finally:
        orphan.kill()
        orphan.wait()


def test_killed_between_mlflow_and_ledger(tmp_path, uri):
    """The parent died after creating the run in MLflow, before it wrote so: the next start leaves no second one."""
    from lightning_moevlm.study.run.mlflow_runs import open_experiment

    file = write_project(tmp_path, uri, {"arms": {"baseline": None}, "seeds": [0]})
    plan = plan_of(file)
    open_experiment(uri, "tiny").create(plan.runs[0])
    _, experiment, _, _ = sweep(file, jobs=1)
    assert_each_once(plan, experiment)


def test_good_end_without_the_primary_metric_is_a_failure(tmp_path, uri):
    file = write_project(
        tmp_path, uri, {"arms": {"baseline": None}, "seeds": [0], "primary": {"metric": "test/task_loss"}}
    )
    plan, _, _, _ = sweep(file, jobs=1)
    [(_, state)] = read_ledger(plan)
    assert state.status is Status.FAILED
    assert "logged no test/task_loss" in state.reason


@pytest.mark.parametrize(
    ("every", "status", "reason"),
    [
        (2, Status.FINISHED, ""),
        (
            3,
            Status.FAILED,
            "exit code 0, but it logged val/task_loss last at step 3 of 4: no value of the trained model",
        ),
        (9, Status.FAILED, "last at step 0 of 4"),
    ],
)
def test_result_is_measured_after_the_whole_budget(tmp_path, uri, every, status, reason):
    file = write_project(tmp_path, uri, {"arms": {"baseline": None}, "seeds": [0]}, {"validate_every": every})
    plan, experiment, _, _ = sweep(file, jobs=1)
    [(_, state)] = read_ledger(plan)
    assert state.status is status
    assert reason in state.reason
    # Nor is it taken up from MLflow, where an earlier version may have called it finished.
    MlflowClient(uri).set_tag(state.run_id, "outcome", "finished")
    shutil.rmtree(plan.folder)
    assert bool(find_waiting_runs(plan, experiment, LocalEngine(), retry=False)) is (status is Status.FAILED)


def test_all_arms_of_a_seed_before_the_next_seed(tmp_path, uri):
    file = write_project(tmp_path, uri, {"seeds": [5, 0], "budget": {"max_steps": 1}})
    plan, _, _, watcher = sweep(file, jobs=1)
    starts = [line.split()[1] for line in watcher.lines if line.startswith("start")]
    assert starts == ["baseline-seed5", "fast-seed5", "baseline-seed0", "fast-seed0"]
    assert [run.name for run in plan.runs] == ["baseline-seed5", "baseline-seed0", "fast-seed5", "fast-seed0"]


def test_texts_that_look_like_numbers_stay_texts_for_the_command_line(tmp_path):
    from lightning_moevlm.configuration.resolver import ConfigResolver

    tags = {"sweep": "1e5", "arm": "0x10", "seed": "0", "digest": "632471343e91"}
    logger = {"init_args": {"experiment_name": "1e5", "run_name": "2e5", "tags": tags}}
    overrides = {"seed_everything": 3, "model": {"losses": {"router_z": None}}, "trainer": {"logger": logger}}
    run = dataclasses.replace(
        plan_of(write_project(tmp_path, "sqlite:///x.db")).runs[0], overrides=overrides, digest="632471343e91"
    )
    file = write_overrides(run, tmp_path)
    resolved = ConfigResolver()([REPOSITORY / "conf" / "quickstart.yaml", file], {})
    told = resolved["trainer"]["logger"]["init_args"]
    assert (told["experiment_name"], told["run_name"], told["tags"]) == ("1e5", "2e5", tags)
    assert resolved["seed_everything"] == resolved["model"]["seed"] == 3
    assert resolved["model"]["losses"]["router_z"] is None


def test_overrides_rerun_the_arm_by_hand(tmp_path, uri):
    file = write_project(tmp_path, uri, {"seeds": [3], "budget": {"max_steps": 1}})
    plan, _, _, _ = sweep(file)
    import yaml

    written = yaml.safe_load((plan.run_folder(plan.runs[1]) / OVERRIDES_FILE).read_text())
    assert written["model"] == {"speed": 0.9}
    assert written["seed_everything"] == 3
    assert written["trainer"]["max_steps"] == 1
    assert written["trainer"]["logger"]["init_args"] == {
        "experiment_name": "tiny",
        "run_name": "fast-seed3",
        "tags": {"sweep": "tiny", "arm": "fast", "seed": "3", "digest": plan.runs[1].digest},
    }
