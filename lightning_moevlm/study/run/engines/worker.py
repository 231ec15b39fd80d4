"""What a cluster runs for a job: the run's own command line as a child, watched to its end.

The child ends with this program, whatever ends it. An end that the cluster brought about is not written down: the
cluster may start the job again, which then goes on from the last checkpoint in the same MLflow run.
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
# What the cluster says to its jobs is not meant for the run: Lightning would take the job's tasks for its own ranks.
_CLUSTERS = ("SLURM_", "SUBMITIT_", "RAY_")


def run_job(job: Job, tickets: Path, owner: str) -> None:
    """Run a job to its end and write down how it ended; leave at once where its ticket has been given up.

    Args:
        job: What to run.
        tickets: Folder of the tickets.
        owner: What the cluster calls this job, the same when it starts it again.
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
            time.sleep(_GRACE_SECONDS)  # a cluster that stops a job tells all its processes: were we told too?
    finally:
        child.end()
    files.write_end(job.ticket, ended)
