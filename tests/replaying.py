"""Replays in this process: an engine that runs each job at once, so that faults planted by a test are in it too."""

import os
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from lightning_moevlm.cli.main import main
from lightning_moevlm.study.run.engines import Engine, Handle, Job
from lightning_moevlm.study.run.processes.child_process import ProcessEnd
from lightning_moevlm.study.run.processes.command_line import moevlm_arguments


@Engine.register  # not derived: messages offer a user every engine that is
class InProcess:
    """Runs a job when it is submitted.

    started: names of the jobs so far.
    """

    name = "in process"
    poll_seconds = 0.0

    def __init__(self) -> None:
        self.started: list[str] = []
        self._ends: dict[str, ProcessEnd] = {}

    def open(self, folder: Path, jobs: int | None, waiting: int) -> int:
        return 1

    def submit(self, job: Job) -> Handle:
        self.started.append(job.name)
        words = moevlm_arguments(job.command)
        assert words is not None
        with pytest.MonkeyPatch.context() as patch:
            for name, value in job.environment.items():
                patch.setenv(name, value)
            with job.log.open("a") as log, redirect_stderr(log):
                self._ends[job.ticket] = ProcessEnd(main(words))
        return Handle(os.getpid())

    def attach(self, ticket: str, job: str) -> bool:
        return False

    def poll(self, ticket: str) -> ProcessEnd | None:
        return self._ends[ticket]

    def cancel(self, tickets: Sequence[str]) -> None:
        raise AssertionError("a job has ended before it could be cancelled")

    def close(self) -> None:
        pass
