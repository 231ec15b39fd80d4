"""Run what a plan still lacks: a bounded pool of child processes, a ledger that survives any kill, one MLflow run each.

Running twice does nothing. An interrupted run goes on from its last whole checkpoint in the same MLflow run, or starts
again in a new one. A crash is recorded and the rest goes on; a divergence is a result. A crashed run is left alone
until it is asked for again (`retry`).
"""

import dataclasses
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

import yaml

from lightning_moevlm.study.child import (
    LOG_FILE,
    Child,
    end_all,
    last_checkpoint,
    log_tail,
    share_environment,
    usable_cores,
)
from lightning_moevlm.study.claim import OUTCOME, Experiment
from lightning_moevlm.study.divergence import NONFINITE_STEP, divergence
from lightning_moevlm.study.ledger import (
    RunState,
    Status,
    living_process,
    read_state,
    write_state,
    write_whole,
)
from lightning_moevlm.study.plan import Plan, PlannedRun

OVERRIDES_FILE = "overrides.yaml"
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 10.0
_MISTAKE = "moevlm: error: "  # how the command line begins the one line that says what to mend

# (overrides file, id of the MLflow run to write to, checkpoint to go on from) -> command line
Command = Callable[[Path, str, Path | None], list[str]]


class _QuotingDumper(yaml.SafeDumper):
    """YAML with every text in quotes: unquoted, the digest 632471343e91 is a number to the command line's parser."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"')


_QuotingDumper.add_representer(str, _QuotingDumper.represent_text)


class Watcher(Protocol):
    """Who is told what happens, to show it."""

    def started(self, run: PlannedRun, state: RunState) -> None:
        """A run's process has started."""

    def ended(self, run: PlannedRun, state: RunState) -> None:
        """A run has ended, in whatever way."""

    def tick(self) -> None:
        """Some time has passed."""


@dataclass(frozen=True)
class Tally:
    """What a call of `execute` did. started: number of runs. stopped: name of the signal that ended it, or ""."""

    started: int
    stopped: str


@dataclass
class _Stop:
    """Set by SIGINT and SIGTERM; the loop looks at it."""

    name: str = ""

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


@dataclass
class _Pool:
    """Children at work, by slot."""

    jobs: int
    busy: dict[int, tuple[PlannedRun, Child]] = field(default_factory=dict)

    def free_slot(self) -> int | None:
        return next((slot for slot in range(self.jobs) if slot not in self.busy), None)


def to_do(plan: Plan, experiment: Experiment, retry: bool) -> list[PlannedRun]:
    """Return the runs that still need to run, after the ledger has been held against MLflow.

    All arms of the first seed come first, then those of the next: what changes on the machine while a sweep goes on
    meets every arm alike.

    Orphans of a killed sweep are ended. A ledger entry whose MLflow run was deleted counts for nothing; a result in
    MLflow that the ledger has lost (folder removed) is taken up again.
    """
    _end_orphans(plan)
    in_store = experiment.ids()
    waiting = []
    for run in plan.runs:
        folder = plan.run_folder(run)
        state = read_state(folder)
        if state.run_id is not None and state.run_id not in in_store:
            state = RunState()
            shutil.rmtree(folder, ignore_errors=True)
        if not state.status.has_result:
            state = _adopt(plan, run, experiment) or state
        if not state.status.has_result and (state.status is not Status.FAILED or retry):
            waiting.append(run)
    return sorted(waiting, key=lambda run: plan.study.seeds.index(run.seed))  # stable: arms stay in order


def execute(
    plan: Plan,
    experiment: Experiment,
    waiting: Sequence[PlannedRun],
    command: Command,
    watcher: Watcher,
    jobs: int,
    num_gpus: int = 0,
) -> Tally:
    """Run what waits. Call it from the main thread, holding the study.

    Args:
        plan: All runs.
        experiment: Where they are tracked.
        waiting: Those to run, in order: what `to_do` returned.
        command: Makes the command line of one run.
        watcher: Is told about starts and ends.
        jobs: Processes at once.
        num_gpus: GPUs to spread the processes over; 0 leaves them to the CPU.
    """
    queue = deque(waiting)
    pool, stop, started = _Pool(jobs), _Stop(), 0
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while (queue or pool.busy) and not stop.name:
            slot = pool.free_slot()
            if queue and slot is not None:
                run = queue.popleft()
                env = share_environment(os.environ, jobs, usable_cores(), slot, num_gpus)
                env["MLFLOW_TRACKING_URI"] = experiment.uri
                pool.busy[slot] = (run, _start(plan, run, experiment, command, env))
                started += 1
                watcher.started(run, read_state(plan.run_folder(run)))
                continue
            _collect(plan, experiment, pool, watcher)
            watcher.tick()
            time.sleep(_POLL_SECONDS)
        _collect(plan, experiment, pool, watcher)  # who ended just before a signal has ended
    finally:
        _stop_children(plan, pool)
        for number, handler in before.items():
            signal.signal(number, handler)
    return Tally(started, stop.name)


def write_overrides(run: PlannedRun, folder: Path) -> Path:
    """Write what goes over the base, as the command line reads it back unchanged; return the file."""
    file = folder / OVERRIDES_FILE
    write_whole(file, yaml.dump(run.overrides, Dumper=_QuotingDumper, sort_keys=False, width=10_000))
    return file


def _start(plan: Plan, run: PlannedRun, experiment: Experiment, command: Command, env: dict[str, str]) -> Child:
    folder = plan.run_folder(run)
    state = read_state(folder)
    checkpoint = None
    if state.status is Status.INTERRUPTED and state.run_id is not None:
        checkpoint = last_checkpoint(folder, experiment.folder(state.run_id))
    if checkpoint is None or state.run_id is None:
        shutil.rmtree(folder, ignore_errors=True)
        run_id = experiment.create(run)
    else:
        run_id = state.run_id
        experiment.reopen(run_id)
    overrides = write_overrides(run, folder)
    state = RunState(Status.RUNNING, run_id, started=time.time(), attempts=state.attempts + 1)
    write_state(folder, state)  # before the process: whatever dies now, the MLflow run is known
    child = Child.start(command(overrides, run_id, checkpoint), env, folder / LOG_FILE)
    write_state(folder, dataclasses.replace(state, pid=child.process.pid, pid_started=child.pid_started))
    return child


def _collect(plan: Plan, experiment: Experiment, pool: _Pool, watcher: Watcher) -> None:
    for slot, (run, child) in list(pool.busy.items()):
        code = child.exit_code()
        if code is None:
            continue
        del pool.busy[slot]
        folder = plan.run_folder(run)
        state = _judge(plan, run, experiment, code)
        assert state.run_id is not None
        experiment.close(state.run_id, str(state.status), finished=state.status.has_result)
        write_state(folder, state)
        watcher.ended(run, state)


def _judge(plan: Plan, run: PlannedRun, experiment: Experiment, code: int) -> RunState:
    """Tell a result from a crash. A run that stopped because its loss is not finite has diverged, not crashed."""
    folder = plan.run_folder(run)
    state = dataclasses.replace(read_state(folder), ended=time.time(), exit_code=code, pid=None, pid_started=None)
    assert state.run_id is not None
    rule = plan.study.diverged
    why = divergence(experiment.history(state.run_id, rule.metric, NONFINITE_STEP), rule)
    if why:
        return dataclasses.replace(state, status=Status.DIVERGED, reason=why)
    lack = _lack(plan, run, experiment, state.run_id)
    if code == 0 and not lack:
        return dataclasses.replace(state, status=Status.FINISHED)
    tail = log_tail(folder / LOG_FILE)
    if code == 0:
        why = f"it ended well but {lack}"
    else:
        why = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        told = [line.removeprefix(_MISTAKE) for line in tail if line.startswith(_MISTAKE)]
        why += f", {told[-1]}" if told else ""
    return dataclasses.replace(state, status=Status.FAILED, reason=why, log_tail=tail)


def _lack(plan: Plan, run: PlannedRun, experiment: Experiment, run_id: str) -> str:
    """Return what a run lacks to be a result, or "": the primary metric after the whole budget, not before."""
    primary, budget = plan.study.primary.metric, run.max_steps
    points = experiment.history(run_id, primary)
    if not points:
        return f"logged no {primary}: the study has nothing to compare"
    last = max(point.step for point in points)
    if budget is None:
        return "" if last > 0 else f"logged {primary} of the untrained model alone; give it more minutes"
    if last != budget:
        return f"logged {primary} last at step {last} of {budget}: no value of the trained model; validate at the end"
    return ""


def _stop_children(plan: Plan, pool: _Pool) -> None:
    """End what still runs; the ledger says `interrupted`, and the next call goes on there."""
    end_all([child.process.pid for _, child in pool.busy.values()], _PATIENCE_SECONDS)
    for run, child in pool.busy.values():
        child.process.wait()
        child.log.close()
        folder = plan.run_folder(run)
        write_state(folder, dataclasses.replace(read_state(folder), status=Status.INTERRUPTED, ended=time.time()))


def _end_orphans(plan: Plan) -> None:
    """End children of a sweep that was killed. We hold the study, so a living one has no parent that waits for it."""
    states = [read_state(plan.run_folder(run)) for run in plan.runs]
    living = [process for state in states if (process := living_process(state)) is not None]
    end_all([process.pid for process in living], _PATIENCE_SECONDS)


def _adopt(plan: Plan, run: PlannedRun, experiment: Experiment) -> RunState | None:
    """Return the state of a run whose result is in MLflow but not in the ledger, and write it there."""
    folder = plan.run_folder(run)
    for row in experiment.find(run):
        outcome = row.tags.get(OUTCOME, "")
        finished = outcome == Status.FINISHED and not _lack(plan, run, experiment, row.run_id)
        if finished or outcome == Status.DIVERGED:
            ended = row.end_ms / 1000 if row.end_ms else None
            state = RunState(Status(outcome), row.run_id, started=row.start_ms / 1000, ended=ended, attempts=1)
            write_overrides(run, folder)
            write_state(folder, state)
            return state
    return None
