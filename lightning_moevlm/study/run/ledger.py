"""Keeps the state of each run on disk, readable after any crash.

Each run folder has one `state.json`, always replaced as a whole (written beside, flushed, renamed). A run that is
`running` while its process is gone was interrupted. A run on a cluster has no process here: it stays `running` until
the next `sweep run` has asked the cluster. A lock per study keeps two sweeps of a study apart; the system frees it when
its holder dies.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import filelock
import msgspec
import psutil
from msgspec.structs import replace

from lightning_moevlm.common.atomic_files import write_atomically
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.processes.child_process import ProcessEnd, is_alive
from lightning_moevlm.tracking.read.sqlite_rows import reading
from lightning_moevlm.tracking.store import sqlite_path

STATE_FILE = "state.json"
_STORE_FILE = "tracking.txt"
_REMEDY = "remove the folder; a result in MLflow is then read back, without one the run is trained again"


class Status(StrEnum):
    """The state of a run. FINISHED, DIVERGED and DID_NOT_LEARN are results; FAILED is a crash; the others have to run.

    DID_NOT_LEARN is a finished run that the comparison of arms has judged; no ledger holds it.
    STOPPED was ended by the study's futility rule: it has no result and needs none. ENDED waits to be judged: its
    process has ended, and the store has not answered since.
    """

    PLANNED = "planned"
    RUNNING = "running"
    ENDED = "ended"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    DIVERGED = "diverged"
    DID_NOT_LEARN = "did not learn"
    FAILED = "failed"
    STOPPED = "stopped early"

    @property
    def has_result(self) -> bool:
        """Whether the run ended, well or badly, and not by a crash."""
        return self is Status.FINISHED or self.is_failed_result

    @property
    def is_failed_result(self) -> bool:
        """Whether the run ended badly: it did not survive, see `statistics.outcomes.survival`."""
        return self in (Status.DIVERGED, Status.DID_NOT_LEARN)

    @property
    def has_whole_budget(self) -> bool:
        """Whether the run went to the end of its budget; one that diverged may have been ended before."""
        return self in (Status.FINISHED, Status.DID_NOT_LEARN)

    @property
    def is_settled(self) -> bool:
        """Whether the run need not run any more."""
        return self.has_result or self is Status.STOPPED


class RunState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run's entry."""

    status: Status  # where it stands
    run_id: str | None = None  # its one run in MLflow
    pid: int | None = None  # process on this machine that it lives and dies with
    # start of that process, seconds since 1970; with its number it names a process for good
    pid_started: float | None = None
    started: float | None = None  # start of the latest attempt, seconds since 1970
    ended: float | None = None  # end of the latest attempt, seconds since 1970
    attempts: int = 0  # how often it was started
    exit_code: int | None = None  # of the latest attempt
    reason: str = ""  # why it failed, or what made it diverge
    log_tail: tuple[str, ...] = ()  # last lines of a crashed run's log
    engine: str = "local"  # engine of the latest attempt
    ticket: str = ""  # our name for the latest attempt
    job: str = ""  # the cluster's name for the latest attempt
    taken_from: str = ""  # the run of another study that it is a copy of, not trained here; see `known_runs`

    @property
    def is_elsewhere(self) -> bool:
        """Whether a cluster has it: only the cluster knows its end."""
        return self.status is Status.RUNNING and self.engine != "local" and self.pid is None

    @property
    def can_resume(self) -> bool:
        """Whether the latest attempt was stopped: by a kill, or asked to end, as after --timeout_minutes, and saved."""
        has_saved = self.status is Status.FAILED and ProcessEnd(self.exit_code).stop_signal is not None
        return self.status is Status.INTERRUPTED or has_saved

    @property
    def seconds(self) -> float | None:
        """Wall time of the latest attempt, or None while it has no end."""
        return self.ended - self.started if self.ended is not None and self.started is not None else None


def read_state(folder: Path) -> RunState:
    """Return the state in a run's folder: planned without a file, interrupted if it is `running` without a process.

    Raises:
        UserError: The file cannot be read, or is not a state (edited by hand).
    """
    file = folder / STATE_FILE
    try:
        state = msgspec.json.decode(file.read_bytes(), type=RunState)
    except FileNotFoundError:
        return RunState(Status.PLANNED)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; correct that, or {_REMEDY}") from error
    except msgspec.ValidationError as error:
        raise UserError(f"{file}: not a run's state ({error}); {_REMEDY}") from error
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error}); {_REMEDY}") from error
    if state.status is Status.RUNNING and not state.is_elsewhere and find_process(state) is None:
        return replace(state, status=Status.INTERRUPTED)
    return state


def write_state(folder: Path, state: RunState) -> None:
    """Replace a run's state as a whole."""
    write_atomically(folder / STATE_FILE, msgspec.json.format(msgspec.json.encode(state), indent=1).decode() + "\n")


def read_ledger(plan: Plan) -> list[tuple[PlannedRun, RunState]]:
    """Return every planned run with its state, in the plan's order."""
    return [(run, read_state(plan.run_folder(run))) for run in plan.runs]


def check_store(folder: Path, uri: str) -> None:
    """Refuse another store than the one that has the study's runs: they would look lost.

    Raises:
        UserError: The study's runs are in another store.
    """
    file, here = folder / _STORE_FILE, mask_url_secrets(uri)
    before = file.read_text(encoding="utf-8").strip() if file.exists() else here
    if before != here and not _was_moved(folder, before, uri):
        raise UserError(
            f"the runs of {folder.name} are in {before}, but the tracking URI is now {here}: set "
            f"MLFLOW_TRACKING_URI={before}. If the new one is a copy with these runs, write its URI into {file}. To "
            f"train every run again, remove {folder}"
        )


def _was_moved(folder: Path, before: str, uri: str) -> bool:
    """Whether the study's SQLite file is gone and another one has its runs, as after moving the project."""
    old, new = sqlite_path(before), sqlite_path(uri)
    if old is None or new is None or old.exists() or not new.exists():
        return False
    states = [read_state(file.parent) for file in folder.glob(f"*/{STATE_FILE}")]
    with reading(new) as store:
        there = {row[0] for row in store.execute("SELECT run_uuid FROM runs")}
    return {state.run_id for state in states if state.run_id} <= there


def remember_store(folder: Path, uri: str) -> None:
    """Remember in which MLflow store a study's runs are, secrets masked."""
    write_atomically(folder / _STORE_FILE, mask_url_secrets(uri) + "\n")


def find_process(state: RunState) -> psutil.Process | None:
    """Return the process that a state names, or None if it is gone or its number now belongs to another process."""
    if state.pid is None or state.pid_started is None:
        return None
    try:
        process = psutil.Process(state.pid)
        same = abs(process.create_time() - state.pid_started) < 1.0
        return process if same and is_alive(process) else None
    except psutil.NoSuchProcess:
        return None


@contextlib.contextmanager
def hold_study(folder: Path) -> Iterator[None]:
    """Lock a study while the block runs.

    Raises:
        UserError: Another `sweep run` holds it (names process, machine and start), or the folder cannot be written.
    """
    owner = folder / "owner.json"
    lock = filelock.FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"{folder}: another `sweep run` of this study is running ({_owner(owner)}); wait for it or end it first"
        ) from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; a sweep keeps its state there") from error
    try:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_atomically(owner, json.dumps(me) + "\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(file: Path) -> str:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):  # it has the lock and is about to write this file
        return "just started"
