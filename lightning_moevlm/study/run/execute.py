"""Run what a plan still lacks: an engine that carries out jobs, a ledger that survives any kill, one MLflow run each.

Running twice does nothing. An interrupted run goes on from its last whole checkpoint in the same MLflow run, or starts
again in a new one; what a cluster still has is waited for. A crash is recorded and the rest goes on; a divergence is a
result. A crashed run is left alone until it is asked for again (`retry`). A store that goes away ends nothing, see
`silent_store`.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_moevlm.study.plan.planned_run import Plan, PlannedRun
from lightning_moevlm.study.run.early_stop import EarlyStop
from lightning_moevlm.study.run.engines import Engine
from lightning_moevlm.study.run.ledger import read_state
from lightning_moevlm.study.run.mlflow_runs import StudyRuns
from lightning_moevlm.study.run.outcome import MOST_STARTS
from lightning_moevlm.study.run.processes.overrides_file import QuotingDumper
from lightning_moevlm.study.run.processes.stop_signals import catch_stop_signals
from lightning_moevlm.study.run.runs_at_work import UNREACHABLE, Command, RefusedError, RunsAtWork, Watcher
from lightning_moevlm.study.run.store_retries import StoreRetries, StoreUnreachableError

QuotingDumper.add_representer(str, QuotingDumper.represent_text)


@dataclass(frozen=True)
class Tally:
    """What a call of `execute` did. started: number of runs. stopped: name of what ended it, or "".

    That is a signal's, or UNREACHABLE.
    """

    started: int
    stopped: str


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
    """Run what waits. Call it from the main thread, holding the study.

    Args:
        plan: All runs.
        experiment: Where they are tracked.
        waiting: Those to run, in order: what `find_waiting_runs` returned.
        command: Makes the command line of one run.
        watcher: Is told about starts and ends.
        engine: Carries them out; open.
        jobs: How many it gets at once.
        timeout_minutes: A run is ended after so long, and has failed.
        silence_seconds: How long to wait for a silent store once nothing runs any more.

    Raises:
        UserError: the engine refused a job, or the ledger cannot be written.
    """
    queue = deque(waiting)
    store, early = StoreRetries(experiment.uri, watcher.show), EarlyStop(plan, experiment)
    at_work = RunsAtWork(plan, experiment, command, engine, timeout_minutes and 60 * timeout_minutes, store, early)
    starts: Counter[str] = Counter()

    def may_repeat(run: PlannedRun) -> bool:
        return starts[run.name] < MOST_STARTS

    with catch_stop_signals() as stop:
        try:
            while (queue or at_work.runs or at_work.ended) and not stop.name:
                if queue and len(at_work.runs) < jobs and store.is_ready:
                    run = queue.popleft()
                    try:
                        starts[run.name] += at_work.begin(run)
                    except StoreUnreachableError:
                        queue.appendleft(run)
                        continue
                    except RefusedError:
                        if not at_work.runs:
                            raise
                        jobs = len(at_work.runs)  # a cluster takes only so many from one user
                        queue.appendleft(run)
                        continue
                    watcher.run_started(run, read_state(plan.run_folder(run)))
                    continue
                at_work.stop_early()
                queue.extend(at_work.collect(may_repeat))
                if queue and len(at_work.runs) < jobs and store.is_ready:
                    continue  # the next run begins before the last one is judged: its place is not to stand idle
                queue.extend(at_work.judge(watcher, may_repeat))
                if store.outage_seconds > silence_seconds and not at_work.runs:
                    stop.name = UNREACHABLE
                watcher.tick()
                time.sleep(engine.poll_seconds)
            at_work.collect(lambda run: True)  # who ended just before a signal has ended
            at_work.judge(watcher, lambda run: True)
        finally:
            at_work.stop()
    return Tally(len(+starts), stop.name)
