"""Run what a plan still lacks: an engine that carries out jobs, a ledger that survives any kill, one MLflow run each.

Running twice does nothing. An interrupted run goes on from its last whole checkpoint in the same MLflow run, or starts
again in a new one; what a cluster still has is waited for. A crash is recorded and the rest goes on; a divergence is a
result. A crashed run is left alone until it is asked for again (`retry`). A store that goes away ends nothing, see
`silent_store`.
"""

import dataclasses
import shutil
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import yaml

from lightning_moevlm.errors import UserError
from lightning_moevlm.study.child import LOG_FILE, PATIENCE_SECONDS, Ended, end_all, last_checkpoint
from lightning_moevlm.study.claim import OUTCOME, Experiment
from lightning_moevlm.study.early_stop import EarlyStop
from lightning_moevlm.study.engines import CHECKPOINT, Engine, Job
from lightning_moevlm.study.judge import MOST_STARTS, ended_state, judge_ended, lack_of, settle
from lightning_moevlm.study.ledger import (
    RunState,
    Status,
    living_process,
    read_state,
    write_state,
    write_whole,
)
from lightning_moevlm.study.plan import Plan, PlannedRun
from lightning_moevlm.study.silent_store import SilentStore, StoreSilentError
from lightning_moevlm.study.stop_signals import heard_signals
from lightning_moevlm.tracking.store import sqlite_path

OVERRIDES_FILE = "overrides.yaml"
SILENCE = "a silent store"

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

    def told(self, line: str) -> None:
        """Something happened to the sweep itself."""


@dataclass(frozen=True)
class Tally:
    """What a call of `execute` did. started: number of runs. stopped: name of what ended it, or "".

    That is a signal's, or SILENCE.
    """

    started: int
    stopped: str


class _RefusedError(UserError):
    """The engine takes no more, in its own words."""


@dataclass
class _AtWork:
    """The runs that the engine has, by ticket, and what becomes of them in the ledger and in MLflow."""

    plan: Plan
    experiment: Experiment
    command: Command
    engine: Engine
    timeout_seconds: float | None
    store: SilentStore
    early: EarlyStop
    runs: dict[str, PlannedRun] = field(default_factory=dict)
    ended: list[tuple[PlannedRun, Ended]] = field(default_factory=list)  # and not judged
    cut_short: set[str] = field(default_factory=set)  # names of those that we ended early

    def begin(self, run: PlannedRun) -> bool:
        """Hand a run to the engine; return False where the engine had it already.

        Raises:
            StoreSilentError: it cannot be told to MLflow.
            _RefusedError: the engine refused it.
            UserError: the ledger cannot be written.
        """
        folder = self.plan.run_folder(run)
        state = read_state(folder)
        if state.is_elsewhere:
            if self.engine.attach(state.ticket, state.job):
                self.runs[state.ticket] = run
                return False
            state = dataclasses.replace(state, status=Status.INTERRUPTED)
        checkpoint = None
        if state.status is Status.INTERRUPTED and state.run_id is not None:
            checkpoint = last_checkpoint(folder, self.experiment.folder(state.run_id))
        run_id = self._claim(run, state.run_id if checkpoint else None)
        if checkpoint is None:
            shutil.rmtree(folder, ignore_errors=True)
        job = self._job(run, run_id, checkpoint)
        attempts = state.attempts + 1
        state = RunState(
            Status.RUNNING, run_id, started=time.time(), attempts=attempts, engine=self.engine.name, ticket=job.ticket
        )
        write_state(folder, state)  # before the job: whatever dies now, the MLflow run and the ticket are known
        try:
            handle = self.engine.submit(job)
        except UserError as error:
            write_state(folder, dataclasses.replace(state, status=Status.INTERRUPTED, attempts=attempts - 1))
            raise _RefusedError(str(error)) from error
        self.runs[job.ticket] = run
        write_state(folder, dataclasses.replace(state, pid=handle.pid, pid_started=handle.pid_started, job=handle.job))
        return True

    def collect(self, may_repeat: Callable[[PlannedRun], bool]) -> list[PlannedRun]:
        """Note the runs that have ended; return those that others have stopped and that may go on."""
        again = []
        for ticket, run in list(self.runs.items()):
            ended = self.engine.poll(ticket)
            if ended is None:
                continue
            del self.runs[ticket]
            was_stopped = ended.code is None or (
                ended.stop_signal and not ended.reason and run.name not in self.cut_short
            )
            if was_stopped and may_repeat(run):
                self._interrupt(run)
                again.append(run)
                continue
            folder = self.plan.run_folder(run)
            write_state(folder, ended_state(read_state(folder), ended))
            self.ended.append((run, ended))
        return again

    def judge(self, watcher: Watcher, may_repeat: Callable[[PlannedRun], bool]) -> list[PlannedRun]:
        """Judge the runs that have ended; return those that found no store and that may begin again."""
        again = []
        for run, ended in self.ended[:]:
            if not self.store.is_ready:
                break
            if self.store.attempt(partial(settle, self.plan, run, self.experiment, ended)):
                watcher.ended(run, read_state(self.plan.run_folder(run)))
            elif self._may_have_met_silence(run, ended) and may_repeat(run):
                self._interrupt(run)
                again.append(run)
            elif self._was_deleted(run) and may_repeat(run):
                shutil.rmtree(self.plan.run_folder(run), ignore_errors=True)
                watcher.told(f"{run.name}: its run in MLflow was deleted while it trained; it begins again from zero")
                again.append(run)
            else:
                continue
            self.ended.remove((run, ended))
        return again

    def stop_early(self) -> None:
        """End the runs that have diverged or whose arm is withdrawn; they are collected as all others."""
        tickets = {run.name: ticket for ticket, run in self.runs.items()}
        over: list[PlannedRun] = []
        if tickets and self.early.is_due and self.store.is_ready:
            self.store.attempt(lambda: over.extend(self.early.over(tuple(self.runs.values()))))
        if over:
            self.cut_short.update(run.name for run in over)
            self.engine.cancel([tickets[run.name] for run in over])

    def stop(self) -> None:
        """End what still runs; the ledger says `interrupted`, and the next call goes on there.

        What a cluster has not ended in good time stays with it: the next call waits for it.
        """
        if self.runs:
            self.engine.cancel(list(self.runs))
        ended = [run for ticket, run in self.runs.items() if self.engine.poll(ticket) is not None]
        for run in ended:
            self._interrupt(run)
        if ended and self.store.is_ready:
            ids = [read_state(self.plan.run_folder(run)).run_id for run in ended]
            self.store.attempt(partial(self.experiment.interrupt, [each for each in ids if each]))

    def _may_have_met_silence(self, run: PlannedRun, ended: Ended) -> bool:
        """Whether a run may have ended as it did because it found no store when it began.

        Not where we ended it, nor where the store is a file: that is busy for a moment at most, and a run that goes on
        past its crash would turn that into a result.
        """
        return ended.code != 0 and run.name not in self.cut_short and sqlite_path(self.experiment.uri) is None

    def _was_deleted(self, run: PlannedRun) -> bool:
        """Whether the store answers, and no longer has the run."""
        there: list[str] = []
        answers = self.store.attempt(lambda: there.extend(self.experiment.ids()))
        return answers and read_state(self.plan.run_folder(run)).run_id not in there

    def _claim(self, run: PlannedRun, run_id: str | None) -> str:
        """Return the id of the run's one run in MLflow: that of the attempt to go on with, or a new one."""
        claimed: list[str] = []

        def claim() -> None:
            if run_id is not None:
                self.experiment.reopen(run_id)
            claimed.append(run_id or self.experiment.create(run))

        if not self.store.attempt(claim):
            raise StoreSilentError
        return claimed[-1]

    def _interrupt(self, run: PlannedRun) -> None:
        folder = self.plan.run_folder(run)
        write_state(folder, dataclasses.replace(read_state(folder), status=Status.INTERRUPTED, ended=time.time()))

    def _job(self, run: PlannedRun, run_id: str, checkpoint: Path | None) -> Job:
        folder = self.plan.run_folder(run)
        overrides = write_overrides(run, folder)
        return Job(
            ticket=uuid.uuid4().hex,
            name=f"{run.study}/{run.name}",
            command=tuple(self.command(overrides, run_id, checkpoint)),
            again=tuple(self.command(overrides, run_id, Path(CHECKPOINT))),
            environment={"MLFLOW_TRACKING_URI": self.experiment.uri},
            folder=Path.cwd(),
            log=(folder / LOG_FILE).absolute(),
            checkpoints=(folder.absolute(), self.experiment.folder(run_id).absolute()),
            timeout_seconds=self.timeout_seconds,
        )


def to_do(plan: Plan, experiment: Experiment, engine: Engine, retry: bool) -> list[PlannedRun]:
    """Return the runs that still need to run, after the ledger has been held against MLflow.

    What a cluster has comes first: it is waited for. Then all arms of the first seed, then those of the next: what
    changes on the machine while a sweep goes on meets every arm alike.

    Orphans of a killed sweep are ended. A ledger entry whose MLflow run was deleted counts for nothing; a result in
    MLflow that the ledger has lost (folder removed) is taken up again.

    Raises:
        UserError: another engine has some of the runs.
    """
    _refuse_others(plan, engine)
    _end_orphans(plan)
    in_store = experiment.ids()
    judge_ended(plan, experiment, in_store)
    elsewhere, waiting = [], []
    for run in plan.runs:
        folder = plan.run_folder(run)
        state = read_state(folder)
        if state.is_elsewhere:
            if state.run_id not in in_store:
                raise UserError(
                    f"{run.name}: {state.engine} has it (job {state.job or 'unknown'}), but its run in MLflow was "
                    f"deleted; cancel the job and remove {folder} to run it again"
                )
            elsewhere.append(run)
            continue
        if state.run_id is not None and state.run_id not in in_store:
            state = RunState()
            shutil.rmtree(folder, ignore_errors=True)
        if not state.status.has_result:
            state = _adopt(plan, run, experiment) or state
        over = state.status.has_result if plan.comparison.stop_hopeless is None else state.status.is_settled
        if not over and (state.status is not Status.FAILED or retry):
            waiting.append(run)
    waiting.sort(key=lambda run: plan.comparison.seeds.index(run.seed))  # stable: arms stay in order
    return [*elsewhere, *waiting]


def execute(
    plan: Plan,
    experiment: Experiment,
    waiting: Sequence[PlannedRun],
    command: Command,
    watcher: Watcher,
    engine: Engine,
    jobs: int,
    timeout_minutes: float | None = None,
    silence_seconds: float = 300.0,
) -> Tally:
    """Run what waits. Call it from the main thread, holding the study.

    Args:
        plan: All runs.
        experiment: Where they are tracked.
        waiting: Those to run, in order: what `to_do` returned.
        command: Makes the command line of one run.
        watcher: Is told about starts and ends.
        engine: Carries them out; open.
        jobs: How many it gets at once.
        timeout_minutes: A run is ended after so long, and has failed.
        silence_seconds: How long to wait for a silent store once nothing runs any more.

    Raises:
        UserError: the engine refused a job, or the ledger cannot be written.
    """
    queue = deque(waiting)
    store, early = SilentStore(experiment.uri, watcher.told), EarlyStop(plan, experiment)
    at_work = _AtWork(plan, experiment, command, engine, timeout_minutes and 60 * timeout_minutes, store, early)
    starts: Counter[str] = Counter()

    def may_repeat(run: PlannedRun) -> bool:
        return starts[run.name] < MOST_STARTS

    with heard_signals() as stop:
        try:
            while (queue or at_work.runs or at_work.ended) and not stop.name:
                if queue and len(at_work.runs) < jobs and store.is_ready:
                    run = queue.popleft()
                    try:
                        starts[run.name] += at_work.begin(run)
                    except StoreSilentError:
                        queue.appendleft(run)
                        continue
                    except _RefusedError:
                        if not at_work.runs:
                            raise
                        jobs = len(at_work.runs)  # a cluster takes only so many from one user
                        queue.appendleft(run)
                        continue
                    watcher.started(run, read_state(plan.run_folder(run)))
                    continue
                at_work.stop_early()
                queue.extend(at_work.collect(may_repeat))
                if queue and len(at_work.runs) < jobs and store.is_ready:
                    continue  # the next run begins before the last one is judged: its place is not to stand idle
                queue.extend(at_work.judge(watcher, may_repeat))
                if store.silent_seconds > silence_seconds and not at_work.runs:
                    stop.name = SILENCE
                watcher.tick()
                time.sleep(engine.poll_seconds)
            at_work.collect(lambda run: True)  # who ended just before a signal has ended
            at_work.judge(watcher, lambda run: True)
        finally:
            at_work.stop()
    return Tally(len(+starts), stop.name)


def write_overrides(run: PlannedRun, folder: Path) -> Path:
    """Write what goes over the base, as the command line reads it back unchanged; return the file."""
    file = folder / OVERRIDES_FILE
    write_whole(file, yaml.dump(run.overrides, Dumper=_QuotingDumper, sort_keys=False, width=10_000))
    return file


def _refuse_others(plan: Plan, engine: Engine) -> None:
    """Refuse to go on beside another engine that still has runs of the study."""
    for run in plan.runs:
        state = read_state(plan.run_folder(run))
        if state.is_elsewhere and state.engine != engine.name:
            raise UserError(
                f"{run.name} is with {state.engine} (job {state.job or 'unknown'}), not with {engine.name}; wait for "
                f"it with --engine {state.engine}, or cancel the job and remove {plan.run_folder(run)}"
            )


def _end_orphans(plan: Plan) -> None:
    """End children of a sweep that was killed. We hold the study, so a living one has no parent that waits for it."""
    states = [read_state(plan.run_folder(run)) for run in plan.runs]
    living = [process for state in states if (process := living_process(state)) is not None]
    end_all([process.pid for process in living], PATIENCE_SECONDS)


def _adopt(plan: Plan, run: PlannedRun, experiment: Experiment) -> RunState | None:
    """Return the state of a run whose result is in MLflow but not in the ledger, and write it there."""
    folder = plan.run_folder(run)
    for row in experiment.find(run):
        outcome = row.tags.get(OUTCOME, "")
        finished = outcome == Status.FINISHED and not lack_of(plan, run, experiment, row.run_id)
        if finished or outcome == Status.DIVERGED:
            ended = row.end_ms / 1000 if row.end_ms else None
            state = RunState(Status(outcome), row.run_id, started=row.start_ms / 1000, ended=ended, attempts=1)
            write_overrides(run, folder)
            write_state(folder, state)
            return state
    return None
