"""Runs jobs as tasks of a Ray cluster: an existing one by its address, or one on this machine.

Ray ends the tasks of a program when that program ends, so a killed sweep leaves nothing behind; the next one resumes
from the last checkpoints. Every node needs this package and the same folders. A cluster runs any code that it is sent,
so strangers must not reach it. Our own listens on loopback alone and requires a secret that only this program knows.
"""

import logging
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.process_tuning import count_usable_cores
from lightning_moevlm.study.run.engines.engine import Engine, Handle, Job, require, require_at_least
from lightning_moevlm.study.run.engines.tickets import Tickets
from lightning_moevlm.study.run.engines.worker import run_job
from lightning_moevlm.study.run.processes.child_process import PATIENCE_SECONDS, ProcessEnd

_CONNECT_SECONDS = 10.0
# Without clusters of several machines Ray listens on loopback. The variable is named after the systems where that is
# the default. Ray replaces a loopback address in `ray.init` by one that the network can reach.
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class RayEngine(Engine):
    """Runs jobs as tasks of a Ray cluster; they end with this program.

    Args:
        address: Address of an existing cluster, e.g. 10.0.0.1:6379, or auto; null starts one on this machine.
        num_cpus: Cores of one run, and its number of threads.
        num_gpus: GPUs of one run; a fraction lets several runs share one.
    """

    name = "ray"
    poll_seconds = 0.2

    def __init__(self, address: str | None = None, num_cpus: int = 1, num_gpus: float = 0.0) -> None:
        require("ray", "ray", "the engine ray")
        require_at_least(1, num_cpus=num_cpus)
        require_at_least(0, num_gpus=num_gpus)
        self._address = address
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._folder = Path()
        self._tasks: dict[str, Any] = {}  # by ticket

    def open(self, folder: Path, jobs: int | None, waiting: int) -> int:
        """Connect; return the number of jobs that the cluster has room for."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # usage reports to Ray's makers
        if self._address is None:  # other users of this machine reach loopback too
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            os.environ.setdefault(_ONE_MACHINE, "0")
        self._folder = folder.absolute()
        _check_address(self._address)
        import ray  # it reads the environment when it is imported

        here: dict[str, Any] = {
            "num_cpus": max(count_usable_cores(), self._num_cpus * (jobs or 1)),
            "include_dashboard": False,
        }
        try:
            ray.init(
                address=self._address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **({} if self._address else here),
            )
        except Exception as error:  # Ray raises plain ones too, e.g. where a busy machine is slow to start it
            ray.shutdown()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            remedy = (
                "start one with `ray start --head`, and give the address that it prints as --engine.address"
                if self._address
                else "repeat the command, or give the address of a running cluster as --engine.address"
            )
            raise UserError(f"no Ray cluster at {self._address or 'this machine'} ({reason}): {remedy}") from error
        room = ray.cluster_resources()
        at_once = int(room.get("CPU", 0) // self._num_cpus)
        if self._num_gpus:
            at_once = min(at_once, int(room.get("GPU", 0) / self._num_gpus))
        if at_once < 1:
            self.close()
            raise UserError(
                f"the Ray cluster has {room.get('CPU', 0):g} cores and {room.get('GPU', 0):g} GPUs, but one run needs "
                f"{self._num_cpus} and {self._num_gpus:g}; lower --engine.num_cpus or --engine.num_gpus"
            )
        return min(jobs or at_once, max(1, waiting))

    def submit(self, job: Job) -> Handle:
        """Submit it as a task. Ray must not repeat it: its first start has logged to MLflow."""
        import ray

        environment = {"OMP_NUM_THREADS": str(self._num_cpus), **_own_threads(), **job.environment}
        words = {**vars(job), "environment": environment}
        task: Any = ray.remote(run_job)
        task = task.options(num_cpus=self._num_cpus, num_gpus=self._num_gpus, max_retries=0, name=job.name)
        self._tasks[job.ticket] = task.remote(Job(**words), self._folder, job.ticket)
        me = psutil.Process()
        return Handle(me.pid, me.create_time())

    def attach(self, ticket: str, job: str) -> bool:
        """Return False: a task of an earlier program has ended with it."""
        return False

    def poll(self, ticket: str) -> ProcessEnd | None:
        """Return how the task ended; without an exit code if its node or its worker was lost."""
        import ray

        ready, _ = ray.wait([self._tasks[ticket]], timeout=0)
        if not ready:
            return None
        task = self._tasks.pop(ticket)
        ended = Tickets(self._folder).read_end(ticket)
        if ended is not None:
            return ended
        try:
            ray.get(task)
        except ray.exceptions.RayTaskError as error:
            return ProcessEnd(1, f"the Ray worker failed before the run began: {str(error).strip().splitlines()[-1]}")
        except ray.exceptions.RayError as error:
            return ProcessEnd(None, f"lost by Ray: {str(error).strip().splitlines()[0]}")
        return ProcessEnd(None, "its ticket was taken by another job")

    def cancel(self, tickets: Sequence[str]) -> None:
        """Interrupt tasks, which then end their runs."""
        import ray

        tasks = [self._tasks[ticket] for ticket in tickets]
        for task in tasks:
            ray.cancel(task)
        ray.wait(tasks, num_returns=len(tasks), timeout=2 * PATIENCE_SECONDS)

    def close(self) -> None:
        """Disconnect; a cluster of our own ends."""
        import ray

        ray.shutdown()


def _check_address(address: str | None) -> None:
    """Refuse host:port without a listener: Ray would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`, or give the address "
            "that it prints as --engine.address"
        ) from error


def _own_threads() -> dict[str, str]:
    """Return the number of threads that the user has set, which then stays."""
    own = os.environ.get("OMP_NUM_THREADS")
    return {} if own is None else {"OMP_NUM_THREADS": own}
