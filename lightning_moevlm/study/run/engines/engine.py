"""Defines engines: they take jobs, report how they ended, and cancel them.

A job is a command line, so that a person can rerun it by hand. `study/run/execute.py` decides which run is next and
what its end means.
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
"""Name of an engine's folder in the folder of a study."""
CHECKPOINT = "{checkpoint}"
"""Stands in a command line for a checkpoint that is not known yet."""


@dataclass(frozen=True)
class Job:
    """One attempt at one run, as texts and absolute paths: another machine that sees the same folders may run it."""

    ticket: str  # names the attempt for good
    name: str  # for people
    command: tuple[str, ...]  # the command line
    again: tuple[str, ...]  # the command line that resumes from CHECKPOINT, for a cluster that stops and restarts jobs
    environment: Mapping[str, str]  # variables set over those of the place
    folder: Path  # working directory
    log: Path  # gets the output
    checkpoints: tuple[Path, ...]  # folders of the run's checkpoints
    timeout_seconds: float | None  # longest time of one start; None: no limit


@dataclass(frozen=True)
class Handle:
    """Identifies a job in the ledger."""

    pid: int | None = None  # process of this machine that the job lives and dies with; None if it outlives this program
    pid_started: float | None = None  # start of that process, seconds since 1970
    job: str = ""  # the cluster's name for it


class Engine(ABC):
    """Runs jobs. Opened once before anything else, and closed at the end."""

    name: ClassVar[str]
    poll_seconds: ClassVar[float]

    @abstractmethod
    def open(self, folder: Path, jobs: int | None, waiting: int) -> int:
        """Get ready.

        Args:
            folder: The engine's own folder in this study.
            jobs: Jobs at once; None leaves it to the engine.
            waiting: Number of jobs to come.

        Returns:
            Number of jobs at once.

        Raises:
            UserError: The place cannot be reached.
        """

    @abstractmethod
    def submit(self, job: Job) -> Handle:
        """Take a job.

        Raises:
            UserError: It was refused, and will not run.
        """

    @abstractmethod
    def attach(self, ticket: str, job: str) -> bool:
        """Watch a job that an earlier program submitted; return False if it has ended unseen, or will never begin.

        Args:
            ticket: Of the attempt.
            job: The cluster's name for it; "" if the earlier program died before it knew.
        """

    @abstractmethod
    def poll(self, ticket: str) -> ProcessEnd | None:
        """Return how a job ended, or None while it waits or runs."""

    @abstractmethod
    def cancel(self, tickets: Sequence[str]) -> None:
        """End jobs: SIGTERM, then SIGKILL. Wait for their end, but not forever; `poll` says if they have ended."""

    @abstractmethod
    def close(self) -> None:
        """Release the place."""


def require(package: str, extra: str, what: str) -> None:
    """Check that an extra is installed.

    Raises:
        UserError: It is not; names the command that installs it.
    """
    if find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'lightning-moevlm[{extra}]'")


def require_at_least(least: float, **options: float | None) -> None:
    """Check that options of an engine are at least so large; None passes.

    Raises:
        UserError: One is smaller.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"--engine.{name} is {value:g}; give at least {least:g}")
