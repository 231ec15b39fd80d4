"""Runs jobs on a SLURM cluster through submitit; they outlive this program, and the next sweep waits for them.

SLURM stops jobs (time limit, preemption, a node that fails) and restarts them. A restarted job resumes from its last
checkpoint in the same MLflow run. A job without a checkpoint is returned and starts from zero in a new MLflow run.
Nodes need this package, the same folders, and the MLflow store: best a server.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import which
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import psutil

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.run.engines.engine import Engine, Handle, Job, require, require_at_least
from lightning_moevlm.study.run.engines.tickets import NO_OWNER, Tickets
from lightning_moevlm.study.run.engines.worker import NO_CHECKPOINT, run_job
from lightning_moevlm.study.run.processes.child_process import ProcessEnd, is_alive
from lightning_moevlm.study.run.processes.run_files import last_checkpoint

if TYPE_CHECKING:
    import submitit

_LOST = ProcessEnd(None, "ended by the cluster")
_CANCEL_SECONDS = 60.0  # SLURM waits 30 s between asking and making, unless it is set otherwise
_WARNING_SECONDS = 90  # between the signal and the end of a job's time
_LOGS = "submitit"


class SlurmEngine(Engine):
    """Runs jobs on a SLURM cluster; they outlive this program.

    Args:
        partition: Partition; null is the cluster's default.
        minutes: Time limit of one job; a job that reaches it is restarted and resumes.
        cpus: Cores of one run, and its number of threads.
        gpus: GPUs of one run.
        mem_gb: Memory of one run, GB; null is the cluster's default.
        account: Account to charge; null is the user's default.
        qos: Quality of service; null is the default.
        restarts: Restarts of a job that reached its time limit.
        cluster: "local" runs the jobs on this machine, for a trial.
    """

    name = "slurm"
    poll_seconds = 1.0

    def __init__(
        self,
        partition: str | None = None,
        minutes: int = 24 * 60,
        cpus: int = 4,
        gpus: int = 0,
        mem_gb: float | None = None,
        account: str | None = None,
        qos: str | None = None,
        restarts: int = 10,
        cluster: Literal["slurm", "local"] = "slurm",
    ) -> None:
        require("submitit", "slurm", "the engine slurm")
        require_at_least(1, minutes=minutes, cpus=cpus, mem_gb=mem_gb)
        require_at_least(0, gpus=gpus, restarts=restarts)
        if cluster == "slurm" and which("srun") is None:
            raise UserError(
                "this machine has no srun, so it does not belong to a SLURM cluster; run this where sbatch works, "
                "or try the jobs here with --engine.cluster local"
            )
        self._options: dict[str, Any] = {
            "slurm_partition": partition,
            "slurm_account": account,
            "slurm_qos": qos,
            "slurm_signal_delay_s": _WARNING_SECONDS,
            "slurm_additional_parameters": {"requeue": True},
            "slurm_srun_args": [f"--cpus-per-task={cpus}"],  # since SLURM 22.05 srun does not take them from sbatch
            "timeout_min": minutes,
            "cpus_per_task": cpus,
            "gpus_per_node": gpus,
            "mem_gb": mem_gb,
        }
        self._cpus = cpus
        self._restarts = restarts
        self._cluster = cluster
        self._folder = Path()
        self._executor: submitit.AutoExecutor | None = None
        self._jobs: dict[str, submitit.Job[None] | int] = {}  # by ticket; a number: a process that is not our child

    def open(self, folder: Path, jobs: int | None, waiting: int) -> int:
        """Return the jobs at once: all on a cluster, which has a queue; on this machine as many as the cores allow."""
        import submitit

        self._folder = folder.absolute()
        self._executor = submitit.AutoExecutor(
            folder=self._folder / _LOGS, cluster=self._cluster, slurm_max_num_timeout=self._restarts
        )
        known = {name: value for name, value in self._options.items() if value is not None}
        self._executor.update_parameters(**known)
        here = max(1, (os.cpu_count() or 1) // self._cpus)  # submitit's own queue for this machine has no end
        return min(jobs or (waiting if self._cluster == "slurm" else here), max(1, waiting))

    def submit(self, job: Job) -> Handle:
        """Submit a job. Its environment goes along and not into a file: it may hold a password."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        assert self._executor is not None
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self._cpus))}
        self._executor.update_parameters(name=job.name)
        try:
            with _environment({**threads, **job.environment}):
                submitted = self._executor.submit(_Work(replace(job, environment={}), self._folder))
        except (FailedJobError, FailedSubmissionError) as error:
            if (
                Tickets(self._folder).take(job.ticket, NO_OWNER) is None
            ):  # if it begins after all, it finds the ticket taken
                raise UserError(
                    f"sbatch refused the job ({_last_line(error)}): correct the --engine options that it names"
                ) from error
            raise
        self._jobs[job.ticket] = submitted
        return Handle(job=str(submitted.job_id))

    def attach(self, ticket: str, job: str) -> bool:
        """Return whether the cluster still has the job, or the job has written how it ended."""
        import submitit

        if not job:  # the ledger does not know it: the owner of the ticket is the job
            job = Tickets(self._folder).take(ticket, NO_OWNER) or NO_OWNER
            if job == NO_OWNER:
                return False
        if self._cluster == "local":
            self._jobs[ticket] = int(job)
        else:
            self._jobs[ticket] = submitit.SlurmJob(self._folder / _LOGS, job)
        return True

    def poll(self, ticket: str) -> ProcessEnd | None:
        """Return how the job ended, by its own file or because the cluster ended it."""
        tickets = Tickets(self._folder)
        ended = tickets.read_end(ticket)
        if ended is None and self._is_over(ticket):
            ended = tickets.read_end(ticket) or _LOST  # written between the two checks
        if ended is not None:
            del self._jobs[ticket]
        return ended

    def cancel(self, tickets: Sequence[str]) -> None:
        """Cancel jobs, and wait until the cluster says that they are over."""
        for ticket in tickets:
            job = self._jobs[ticket]
            if not isinstance(job, int):
                job.cancel(check=False)
            elif _is_controller(job):
                os.kill(job, signal.SIGINT)
        left, end = list(tickets), time.monotonic() + _CANCEL_SECONDS
        while left and time.monotonic() < end:
            time.sleep(self.poll_seconds)
            left = [ticket for ticket in left if not self._is_over(ticket, at_once=True)]

    def close(self) -> None:
        """Do nothing: jobs are left to the cluster."""

    def _is_over(self, ticket: str, at_once: bool = False) -> bool:
        job = self._jobs[ticket]
        return not _is_controller(job) if isinstance(job, int) else bool(job.done(force_check=at_once))


class _Work:
    """The function that submitit calls on a node."""

    def __init__(self, job: Job, tickets: Path) -> None:
        self.job = job
        self.tickets = tickets

    def __call__(self) -> None:
        import submitit

        signal.signal(signal.SIGTERM, _leave)  # submitit ignores it, and the run would be killed at once
        try:
            run_job(self.job, self.tickets, submitit.JobEnvironment().job_id)
        except Exception as error:  # ends by the cluster are not Exceptions: they pass
            stopped_early = isinstance(error, submitit.core.utils.UncompletedJobError) and not self._has_checkpoint()
            Tickets(self.tickets).write_end(
                self.job.ticket, NO_CHECKPOINT if stopped_early else ProcessEnd(1, _last_line(error))
            )
            raise

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission | None":
        """Return the function to call after a restart; None without a checkpoint.

        submitit calls this in its signal handler; the run ends with this program, right after.
        """
        import submitit

        return submitit.helpers.DelayedSubmission(_Work(self.job, self.tickets)) if self._has_checkpoint() else None

    def _has_checkpoint(self) -> bool:
        return last_checkpoint(*self.job.checkpoints) is not None


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _is_controller(pid: int) -> bool:
    """Return whether submitit's program that runs a job on this machine is alive."""
    try:
        process = psutil.Process(pid)
        return is_alive(process) and "submitit.local._local" in process.cmdline()
    except (psutil.NoSuchProcess, ValueError):
        return False


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("sbatch:")] or lines or [type(error).__name__])[-1]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
