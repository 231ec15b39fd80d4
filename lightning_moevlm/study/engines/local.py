"""Processes of this machine, a bounded number at once: one per GPU, or a share of the cores each."""

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_moevlm.study.child import Child, Ended, end_children, share_environment, usable_cores
from lightning_moevlm.study.engines.engine import Engine, Handle, Job, require_at_least


class LocalEngine(Engine):
    """Runs jobs as processes of this machine; they end with this program.

    Args:
        num_gpus: GPUs to spread the jobs over, one each; null takes all, 0 leaves them to the CPU.
    """

    name = "local"
    poll_seconds = 0.1

    def __init__(self, num_gpus: int | None = None) -> None:
        require_at_least(0, num_gpus=num_gpus)
        self._num_gpus = num_gpus
        self._jobs = 0
        self._gpus = 0
        self._busy: dict[str, tuple[int, Child]] = {}  # by ticket: slot and process

    def open(self, folder: Path, jobs: int | None, waiting: int) -> int:
        """Return one job per GPU, or, without a GPU, one per core, unless it is told otherwise."""
        self._gpus = _visible_gpus() if self._num_gpus is None else self._num_gpus
        self._jobs = min(jobs or self._gpus or usable_cores(), max(1, waiting))
        return self._jobs

    def submit(self, job: Job) -> Handle:
        """Start a process in the first free slot."""
        taken = {slot for slot, _ in self._busy.values()}
        slot = next(slot for slot in range(self._jobs) if slot not in taken)
        env = share_environment(os.environ, self._jobs, usable_cores(), slot, self._gpus)
        child = Child.start(job.command, {**env, **job.environment}, job.log, job.timeout_seconds, job.folder)
        self._busy[job.ticket] = slot, child
        return Handle(child.process.pid, child.pid_started)

    def attach(self, ticket: str, job: str) -> bool:
        """Return False: a process of an earlier program has ended with it."""
        return False

    def poll(self, ticket: str) -> Ended | None:
        """Return how the process ended."""
        ended = self._busy[ticket][1].poll()
        if ended is not None:
            del self._busy[ticket]
        return ended

    def cancel(self, tickets: Sequence[str]) -> None:
        """End processes, all at once."""
        end_children([self._busy[ticket][1] for ticket in tickets])

    def close(self) -> None:
        """Do nothing: what was started has been waited for."""


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()
