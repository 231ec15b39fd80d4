"""Several processes that log into one SQLite file at once: no lock error, no point lost."""

import multiprocessing
import time
import warnings
from pathlib import Path
from typing import Any

from lightning_moevlm.tracking import RunLogger, metric_history
from lightning_moevlm.tracking.write.offline_log import JOURNAL

METRICS = 5
STEPS = 300


def write(uri: str, name: str, told: Any) -> None:
    """Log, with a write every few steps; tell the run."""
    warnings.simplefilter("error", RuntimeWarning)  # "is unavailable" would be one
    logger = RunLogger(tracking_uri=uri, run_name=name, flush_points=25, flush_seconds=0.05)
    for step in range(STEPS):
        logger.log_metrics({f"metric{i}": float(step) for i in range(METRICS)}, step)
        time.sleep(0.005)
    logger.finalize("success")
    told.put(logger.run_id)


def test_four_writers_and_one_database(uri: str) -> None:
    fork = multiprocessing.get_context("fork")  # what they import takes longer than what they do
    told = fork.SimpleQueue()
    writers = [fork.Process(target=write, args=(uri, f"writer{i}", told)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    for _ in writers:
        points = metric_history(uri, told.get())
        assert [(point.step, point.value) for point in points] == [(s, float(s)) for s in range(STEPS)] * METRICS
    assert not list(Path(uri.removeprefix("sqlite:///")).parent.rglob(JOURNAL))
