"""Writes into one run. All of them may be repeated: a point, param, tag or file that is there already stays one.

MLflow keeps points under (key, time, step, value), so one that comes twice is kept once; equal params are accepted,
tags and files replaced.
"""

import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm.tracking.point import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_PER_WRITE = 1000  # MLflow's limit for one log_batch
_OTHERS_PER_WRITE = 100  # its limit for params, and for tags


class RunWriter:
    """The write access to one run.

    Every method raises MlflowException or OSError where the store does not take what it is given.
    """

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.client = client
        self.run_id = run_id

    def points(self, points: Sequence[Point]) -> None:
        """Write at most `METRICS_PER_WRITE` points."""
        from mlflow.entities import Metric

        metrics = [Metric(key, value, time_ms, step) for key, step, value, time_ms in points]
        self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def params(self, params: Mapping[str, str]) -> None:
        """Write params that the run does not have, or has with the same values."""
        from mlflow.entities import Param

        pairs = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(pairs), _OTHERS_PER_WRITE):
            batch = pairs[start : start + _OTHERS_PER_WRITE]
            self.client.log_batch(self.run_id, params=batch, synchronous=True)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; existing ones are replaced."""
        from mlflow.entities import RunTag

        pairs = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(pairs), _OTHERS_PER_WRITE):
            batch = pairs[start : start + _OTHERS_PER_WRITE]
            self.client.log_batch(self.run_id, tags=batch, synchronous=True)

    def file(self, path: Path, name: str) -> None:
        """Keep a file as artifact `name`, a relative path with `/` that ends as the file is called."""
        self.client.log_artifact(self.run_id, str(path), posixpath.dirname(name) or None)

    def ending(self, status: str, end_ms: int) -> None:
        """Set how and when (Unix time, milliseconds) the run ended."""
        self.client.set_terminated(self.run_id, status, end_time=end_ms)
