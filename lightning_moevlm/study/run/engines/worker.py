"""Runs a job on a cluster: starts its command line as a child and watches it to its end.

The child ends with this program. An end by the cluster is not recorded: the cluster may restart the job, which then
resumes from the last checkpoint in the same MLflow run.
"""

import os
import time
from pathlib import Path

from lightning_moevlm.study.run.engines.engine import CHECKPOINT, Job
from lightning_moevlm.study.run.engines.tickets import Tickets
from lightning_moevlm.study.run.processes.child_process import Child, ProcessEnd
from lightning_moevlm.study.run.processes.run_files import last_checkpoint

NO_CHECKPOINT = ProcessEnd(None, "stopped by the cluster before its first checkpoint")
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 1.0
# The cluster's variables are not for the run: Lightning would take the job's tasks for its own ranks.
_CLUSTERS = ("SLURM_", "SUBMITIT_", "RAY_")


def run_job(job: Job, tickets: Path, owner: str) -> None:
    """Run a job to its end and record how it ended; leave at once if its ticket is taken.

    Args:
        job: The job.
        tickets: Folder of the tickets.
        owner: The cluster's name for this job, the same after a restart.
    """
    files = Tickets(tickets)
    before = files.take(job.ticket, owner)
    if before not in (None, owner):
        return
    command = job.command
    if before == owner:  # started again
        checkpoint = last_checkpoint(*job.checkpoints)
        if checkpoint is None:  # from zero it would write every point twice
            files.write_end(job.ticket, NO_CHECKPOINT)
            return
        command = tuple(str(checkpoint) if word == CHECKPOINT else word for word in job.again)
    own = {name: value for name, value in os.environ.items() if not name.startswith(_CLUSTERS)}
    child = Child.start(command, {**own, **job.environment}, job.log, job.timeout_seconds, job.folder)
    try:
        while (ended := child.poll()) is None:
            time.sleep(_POLL_SECONDS)
        if ended.code:
            time.sleep(_GRACE_SECONDS)  # a cluster that stops a job signals all its processes: this one too?
    finally:
        child.end()
    files.write_end(job.ticket, ended)
