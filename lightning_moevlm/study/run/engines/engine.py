"""Where the runs of a study are carried out: an engine takes jobs, tells how they ended, and ends them.

A job is a command line, so that a person can rerun it by hand. What a run is, which one is next and what its end means
is no engine's business: see `study/execute.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.run.processes.child_process import ProcessEnd

JOBS_FOLDER = "jobs"
"""Of an engine, in the folder of a study."""
CHECKPOINT = "{checkpoint}"
"""Stands in a command line for the checkpoint to go on from, where that is not known yet."""


@dataclass(frozen=True)
class Job:
    """One attempt at one run, in plain words: another machine may carry it out that sees the same folders.

    ticket: names the attempt for good. name: for people. command: what to run. again: the same, but going on from
    CHECKPOINT, for a cluster that stops a job and starts it once more. environment: set over that of the place. folder:
    to run in. log: gets the output. checkpoints: where the run's checkpoints are. timeout_seconds: of one start; None:
    no limit. All paths are absolute.
    """

    ticket: str
    name: str
    command: tuple[str, ...]
    again: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    log: Path
    checkpoints: tuple[Path, ...]
    timeout_seconds: float | None


@dataclass(frozen=True)
class Handle:
    """By what the ledger finds a job again.

    pid, pid_started: process of this machine that the job lives and dies with; None where it outlives this program.
    job: what the cluster calls it.
    """

    pid: int | None = None
    pid_started: float | None = None
    job: str = ""


class Engine(ABC):
    """Carries out jobs. Opened once, before anything else is asked of it, and closed at the end."""

    name: ClassVar[str]
    poll_seconds: ClassVar[float]

    @abstractmethod
    def open(self, folder: Path, jobs: int | None, waiting: int) -> int:
        """Get ready.

        Args:
            folder: Where the engine may keep what it needs, of this study alone.
            jobs: Jobs at once, as asked for; None leaves it to the engine.
            waiting: Jobs that there are.

        Returns:
            How many jobs it wants at once.

        Raises:
            UserError: the place cannot be reached.
        """

    @abstractmethod
    def submit(self, job: Job) -> Handle:
        """Take a job.

        Raises:
            UserError: it was refused, and will not run.
        """

    @abstractmethod
    def attach(self, ticket: str, job: str) -> bool:
        """Take up a job that an earlier program handed over; False where it has ended unseen, or will never begin.

        Args:
            ticket: Of the attempt.
            job: What the cluster calls it; "" where the earlier program died before it knew.
        """

    @abstractmethod
    def poll(self, ticket: str) -> ProcessEnd | None:
        """Return how a job ended, or None while it waits or runs."""

    @abstractmethod
    def cancel(self, tickets: Sequence[str]) -> None:
        """End jobs: first asked, then made to. Waits until they are gone, but not forever: `poll` has the last word."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the place."""


def require(package: str, extra: str, what: str) -> None:
    """Make sure that an extra is installed.

    Raises:
        UserError: it is not; says how to get it.
    """
    if find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'lightning-moevlm[{extra}]'")


def require_at_least(least: float, **options: float | None) -> None:
    """Make sure that options of an engine are not too small; None is not looked at.

    Raises:
        UserError: one is.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"--engine.{name} is {value:g}; give at least {least:g}")
