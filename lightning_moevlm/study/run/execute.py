"""Executes the missing runs of a plan: an engine runs jobs, a ledger survives any kill, each run has one MLflow run.

Running twice does nothing. An interrupted run resumes from its last whole checkpoint in the same MLflow run, or starts
again in a new one; jobs that a cluster still has are waited for. A crash is recorded and the other runs continue; a
divergence is a result. A failed run is left alone until `retry` asks for it. Training continues while the store is
unreachable, see `store_retries`.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.active_runs import UNREACHABLE, ActiveRuns, Command, RefusedError, Watcher
from lightning_moevlm.study.run.early_stop import EarlyStop
from lightning_moevlm.study.run.engines import Engine
from lightning_moevlm.study.run.ledger import read_state
from lightning_moevlm.study.run.mlflow_runs import StudyRuns
from lightning_moevlm.study.run.outcome import MOST_STARTS
from lightning_moevlm.study.run.processes.stop_signals import catch_stop_signals
from lightning_moevlm.study.run.store_retries import StoreRetries, StoreUnreachableError


@dataclass(frozen=True)
class Tally:
    """The result of `execute`."""

    started: int  # number of runs
    stopped: str  # name of the signal that ended it, UNREACHABLE, or ""


def execute(
    plan: Plan,
    experiment: StudyRuns,
    waiting: Sequence[PlannedRun],
    command: Command,
    watcher: Watcher,
    engine: Engine,
    jobs: int,
    timeout_minutes: float | None = None,
    silence_seconds: float = 300.0,
) -> Tally:
    """Run the waiting runs. Call it from the main thread, holding the study.

    Args:
        plan: All runs.
        experiment: The study in MLflow.
        waiting: The runs to run, in order, as `find_waiting_runs` returned them.
        command: Makes the command line of one run.
        watcher: Shows starts and ends.
        engine: Runs the jobs; open.
        jobs: Jobs at once.
        timeout_minutes: Longest time of a run, which then has failed.
        silence_seconds: Longest wait for an unreachable store once nothing runs any more.

    Raises:
        UserError: The engine refused a job, or the ledger cannot be written.
    """
    queue = deque(waiting)
    store, early = StoreRetries(experiment.uri, watcher.show), EarlyStop(plan, experiment)
    active = ActiveRuns(plan, experiment, command, engine, timeout_minutes and 60 * timeout_minutes, store, early)
    starts: Counter[str] = Counter()

    def may_repeat(run: PlannedRun) -> bool:
        return starts[run.name] < MOST_STARTS

    with catch_stop_signals() as stop:
        try:
            while (queue or active.runs or active.ended) and not stop.name:
                if queue and len(active.runs) < jobs and store.is_ready:
                    run = queue.popleft()
                    try:
                        starts[run.name] += active.begin(run)
                    except StoreUnreachableError:
                        queue.appendleft(run)
                        continue
                    except RefusedError:
                        if not active.runs:
                            raise
                        jobs = len(active.runs)  # a cluster takes only so many from one user
                        queue.appendleft(run)
                        continue
                    watcher.run_started(run, read_state(plan.run_folder(run)))
                    continue
                active.stop_early()
                queue.extend(active.collect(may_repeat))
                if queue and len(active.runs) < jobs and store.is_ready:
                    continue  # the next run begins before the last one is judged: no slot stays idle
                queue.extend(active.judge(watcher, may_repeat))
                if store.outage_seconds > silence_seconds and not active.runs:
                    stop.name = UNREACHABLE
                watcher.tick()
                time.sleep(engine.poll_seconds)
            active.collect(lambda run: True)  # a run that ended just before the signal has ended
            active.judge(watcher, lambda run: True)
        finally:
            active.stop()
    return Tally(len(+starts), stop.name)
