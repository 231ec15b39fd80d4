"""Starts, watches and ends the runs of a study that are under way."""

import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.early_stop import EarlyStop
from lightning_moevlm.study.run.engines import CHECKPOINT, Engine, Job
from lightning_moevlm.study.run.ledger import RunState, Status, read_state, write_state
from lightning_moevlm.study.run.mlflow_runs import StudyRuns
from lightning_moevlm.study.run.outcome import mark_ended, record_outcome
from lightning_moevlm.study.run.processes.child_process import ProcessEnd
from lightning_moevlm.study.run.processes.overrides_file import write_overrides
from lightning_moevlm.study.run.processes.run_files import LOG_FILE, last_checkpoint
from lightning_moevlm.study.run.store_retries import StoreRetries, StoreUnreachableError
from lightning_moevlm.tracking.store import sqlite_path

UNREACHABLE = "an unreachable store"

# (overrides file, id of the MLflow run to write to, checkpoint to resume from) -> command line
Command = Callable[[Path, str, Path | None], list[str]]


class Watcher(Protocol):
    """Shows the progress of a sweep."""

    def run_started(self, run: PlannedRun, state: RunState) -> None:
        """A run's process has started."""

    def run_ended(self, run: PlannedRun, state: RunState) -> None:
        """A run has ended."""

    def tick(self) -> None:
        """Some time has passed."""

    def show(self, line: str) -> None:
        """Show a line on the sweep itself."""


class RefusedError(UserError):
    """The engine refused a job; the message is its own."""


@dataclass
class ActiveRuns:
    """The runs that the engine has, by ticket, with their entries in the ledger and in MLflow."""

    plan: Plan
    experiment: StudyRuns
    command: Command
    engine: Engine
    timeout_seconds: float | None
    store: StoreRetries
    early: EarlyStop
    runs: dict[str, PlannedRun] = field(default_factory=dict)
    ended: list[tuple[PlannedRun, ProcessEnd]] = field(default_factory=list)  # and not judged
    cut_short: set[str] = field(default_factory=set)  # names of those that we ended early

    def begin(self, run: PlannedRun) -> bool:
        """Hand a run to the engine; return False if the engine had it already.

        Raises:
            StoreUnreachableError: MLflow does not answer.
            RefusedError: The engine refused it.
            UserError: The ledger cannot be written.
        """
        folder = self.plan.run_folder(run)
        state = read_state(folder)
        if state.is_elsewhere:
            if self.engine.attach(state.ticket, state.job):
                self.runs[state.ticket] = run
                return False
            state = replace(state, status=Status.INTERRUPTED)
        checkpoint = None
        if state.can_resume and state.run_id is not None:
            checkpoint = last_checkpoint(folder, self.experiment.folder(state.run_id))
        run_id = self._claim(run, state.run_id if checkpoint else None)
        if checkpoint is None:
            shutil.rmtree(folder, ignore_errors=True)
        job = self._job(run, run_id, checkpoint)
        attempts = state.attempts + 1
        state = RunState(
            Status.RUNNING, run_id, started=time.time(), attempts=attempts, engine=self.engine.name, ticket=job.ticket
        )
        write_state(
            folder, state
        )  # before the job: after any crash from here on, the MLflow run and the ticket are known
        try:
            handle = self.engine.submit(job)
        except UserError as error:
            write_state(folder, replace(state, status=Status.INTERRUPTED, attempts=attempts - 1))
            raise RefusedError(str(error)) from error
        self.runs[job.ticket] = run
        write_state(folder, replace(state, pid=handle.pid, pid_started=handle.pid_started, job=handle.job))
        return True

    def collect(self, may_repeat: Callable[[PlannedRun], bool]) -> list[PlannedRun]:
        """Note the runs that have ended; return those that were stopped from outside and may resume."""
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
            write_state(folder, mark_ended(read_state(folder), ended))
            self.ended.append((run, ended))
        return again

    def judge(self, watcher: Watcher, may_repeat: Callable[[PlannedRun], bool]) -> list[PlannedRun]:
        """Judge the runs that have ended; return those that found no store and may begin again."""
        again = []
        for run, ended in self.ended[:]:
            if not self.store.is_ready:
                break
            if self.store.attempt(partial(record_outcome, self.plan, run, self.experiment, ended)):
                watcher.run_ended(run, read_state(self.plan.run_folder(run)))
            elif self._may_have_met_outage(run, ended) and may_repeat(run):
                self._interrupt(run)
                again.append(run)
            elif self._was_deleted(run) and may_repeat(run):
                shutil.rmtree(self.plan.run_folder(run), ignore_errors=True)
                watcher.show(f"{run.name}: its run in MLflow was deleted while it trained; it starts again from zero")
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
            self.store.attempt(lambda: over.extend(self.early.find_runs_to_end(tuple(self.runs.values()))))
        if over:
            self.cut_short.update(run.name for run in over)
            self.engine.cancel([tickets[run.name] for run in over])

    def stop(self) -> None:
        """End the running runs; the ledger says `interrupted`, and the next call resumes them.

        A job that the cluster does not end in time stays with it: the next call waits for it.
        """
        if self.runs:
            self.engine.cancel(list(self.runs))
        ended = [run for ticket, run in self.runs.items() if self.engine.poll(ticket) is not None]
        for run in ended:
            self._interrupt(run)
        if ended and self.store.is_ready:
            ids = [read_state(self.plan.run_folder(run)).run_id for run in ended]
            self.store.attempt(partial(self.experiment.interrupt, [each for each in ids if each]))

    def _may_have_met_outage(self, run: PlannedRun, ended: ProcessEnd) -> bool:
        """Whether a run may have failed because it found no store when it began.

        Not if the sweep ended it, nor if the store is a file: that is busy for a moment at most, and a crashed run that
        resumes past its crash would become a result.
        """
        return ended.code != 0 and run.name not in self.cut_short and sqlite_path(self.experiment.uri) is None

    def _was_deleted(self, run: PlannedRun) -> bool:
        """Whether the store answers, and no longer has the run."""
        there: list[str] = []
        answers = self.store.attempt(lambda: there.extend(self.experiment.ids()))
        return answers and read_state(self.plan.run_folder(run)).run_id not in there

    def _claim(self, run: PlannedRun, run_id: str | None) -> str:
        """Return the id of the run's one run in MLflow: that of the attempt to resume, or a new one."""
        claimed: list[str] = []

        def claim() -> None:
            if run_id is not None:
                self.experiment.reopen(run_id)
            claimed.append(run_id or self.experiment.create(run))

        if not self.store.attempt(claim):
            raise StoreUnreachableError
        return claimed[-1]

    def _interrupt(self, run: PlannedRun) -> None:
        folder = self.plan.run_folder(run)
        write_state(folder, replace(read_state(folder), status=Status.INTERRUPTED, ended=time.time()))

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
