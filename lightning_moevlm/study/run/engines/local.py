"""Runs jobs as processes of this machine, a bounded number at once: one per GPU, or a share of the cores each."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.process_tuning import count_usable_cores
from lightning_moevlm.study.run.engines.engine import Engine, Handle, Job, require_at_least
from lightning_moevlm.study.run.engines.forks import Fork, ForkServer
from lightning_moevlm.study.run.processes.child_process import Child, ProcessEnd, end_children, start_time
from lightning_moevlm.study.run.processes.command_line import moevlm_arguments, share_environment
from lightning_moevlm.study.run.processes.run_files import open_log

SERVER_LOG = "fork_server.txt"


class LocalEngine(Engine):
    """Runs jobs as processes of this machine; they end with this program.

    Args:
        num_gpus: GPUs to spread the jobs over, one each; null takes all visible ones, 0 uses the CPU.
        fork: Fork jobs from one process that has already imported the package, which saves each some seconds. Only on
            Linux and without GPUs, which a fork cannot use; false starts each as a new program.
    """

    name = "local"
    poll_seconds = 0.02

    def __init__(self, num_gpus: int | None = None, fork: bool = True) -> None:
        require_at_least(0, num_gpus=num_gpus)
        if num_gpus and num_gpus > (visible := _visible_gpus()):
            raise UserError(
                f"--engine.num_gpus is {num_gpus}, but the number of visible GPUs is {visible}; give at most {visible}"
            )
        self._num_gpus = num_gpus
        self._jobs = 0
        self._gpus = 0
        self._fork = fork and sys.platform == "linux"
        self._folder = Path()
        self._server: ForkServer | None = None
        self._served: tuple[Mapping[str, str], Path] | None = None  # environment and folder of the server
        self._busy: dict[str, tuple[int, Child]] = {}  # by ticket: slot and process

    def open(self, folder: Path, jobs: int | None, waiting: int) -> int:
        """Return the jobs at once: by default one per GPU, or, without a GPU, one per core."""
        self._gpus = _visible_gpus() if self._num_gpus is None else self._num_gpus
        self._jobs = min(jobs or self._gpus or count_usable_cores(), max(1, waiting))
        self._fork = self._fork and not self._gpus
        self._folder = folder
        return self._jobs

    def submit(self, job: Job) -> Handle:
        """Start a process in the first free slot."""
        taken = {slot for slot, _ in self._busy.values()}
        slot = next(slot for slot in range(self._jobs) if slot not in taken)
        env = {**share_environment(os.environ, self._jobs, count_usable_cores(), slot, self._gpus), **job.environment}
        child, lives_with = self._start(job, env)
        self._busy[job.ticket] = slot, child
        return Handle(lives_with, start_time(lives_with) or child.started)

    def attach(self, ticket: str, job: str) -> bool:
        """Return False: a process of an earlier program has ended with it."""
        return False

    def poll(self, ticket: str) -> ProcessEnd | None:
        """Return how the process ended."""
        process = (child := self._busy[ticket][1]).process
        ended = child.poll()
        if ended is None:
            return None
        del self._busy[ticket]
        if not isinstance(process, Fork):
            return ended
        if process.is_lost and not ended.reason:
            return ProcessEnd(None, f"the fork server ended before the run started, see {SERVER_LOG}")
        # the time that a fork waits for its server's imports is not its own
        return replace(ended, started=process.fork_seconds or ended.started)

    def cancel(self, tickets: Sequence[str]) -> None:
        """End processes, all at once."""
        end_children([self._busy[ticket][1] for ticket in tickets])

    def close(self) -> None:
        """End the fork server; its runs have been waited for."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _start(self, job: Job, env: Mapping[str, str]) -> tuple[Child, int]:
        """Start a job; return its process, and the number of the process that it lives and dies with."""
        words = moevlm_arguments(job.command)
        server = None if words is None else self._server_for(job, env, words)
        if server is None or words is None:
            child = Child.start(job.command, env, job.log, job.timeout_seconds, job.folder)
            return child, child.process.pid or 0
        log = open_log(job.log, job.command)
        server.start(job.ticket, words, job.log)
        return Child(Fork(server, job.ticket), log, time.time(), job.timeout_seconds), server.pid

    def _server_for(self, job: Job, env: Mapping[str, str], words: Sequence[str]) -> ForkServer | None:
        """Return the fork server, started with the first job; None if the job is to be a program of its own."""
        if self._server is not None and self._server.is_gone:
            self._fork = self._fork and bool(self._server.started)  # a server that cannot start is not tried again
            self.close()
        if not self._fork:
            return None
        if self._server is None:
            self._server = ForkServer(words, env, job.folder, self._folder / SERVER_LOG)
            self._served = env, job.folder
        return self._server if self._served == (env, job.folder) else None


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()
