"""Writes into one run. Every write may be repeated: a point, param, tag or file that is there already stays one.

MLflow keeps points under (key, time, step, value), so one that comes twice is kept once; equal params are accepted,
tags and files replaced.
"""

import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.write.rewind import drop_points

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_PER_WRITE = 1000  # MLflow's limit for one log_batch
_TEXTS_PER_WRITE = 100  # its limit for params, and for tags

_Item = TypeVar("_Item")


class RunWriter:
    """The write access to one run.

    Every method raises MlflowException or OSError where the store does not take what it is given.

    Args:
        client: of the store.
        uri: the store's, as `resolve_tracking_uri` returns it.
        run_id: the run.
        warn: is given a line when a resumed run cannot replace its points.
    """

    def __init__(self, client: "MlflowClient", uri: str, run_id: str, warn: Callable[[str], None]) -> None:
        self.client = client
        self.run_id = run_id
        self._uri = uri
        self._warn = warn
        self._kept_until: Mapping[str, int] = {}  # steps that a server has, and that a resumed run logs again

    def write_points(self, points: Sequence[Point]) -> None:
        """Write points; leave out those that a server has kept from before a `rewind`."""
        from mlflow.entities import Metric

        new = [point for point in points if point.step > self._kept_until.get(point.key, -1)]
        for part in _split(new, METRICS_PER_WRITE):
            metrics = [Metric(key, value, time_ms, step) for key, step, value, time_ms in part]
            self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def write_params(self, params: Mapping[str, str]) -> None:
        """Write params that the run does not have, or has with the same values."""
        from mlflow.entities import Param

        for part in _split([Param(key, value) for key, value in params.items()], _TEXTS_PER_WRITE):
            self.client.log_batch(self.run_id, params=part, synchronous=True)

    def write_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; existing ones are replaced."""
        from mlflow.entities import RunTag

        for part in _split([RunTag(key, value) for key, value in tags.items()], _TEXTS_PER_WRITE):
            self.client.log_batch(self.run_id, tags=part, synchronous=True)

    def write_file(self, path: Path, name: str) -> None:
        """Keep a file as artifact `name`, a relative path with `/` that ends in the file's own name."""
        self.client.log_artifact(self.run_id, str(path), posixpath.dirname(name) or None)

    def rewind(self, step: int) -> None:
        """Have the points beyond a step replaced by those written from here on; see `drop_points`."""
        self._kept_until = drop_points(self.client, self._uri, self.run_id, step)
        if self._kept_until:
            self._warn(
                f"run {self.run_id} is resumed at step {step} and has points up to step "
                f"{max(self._kept_until.values())}: a server forgets none, so these stay and are not logged again; "
                "if options have changed, leave run_id out and begin a new run"
            )

    def end(self, status: str, end_ms: int) -> None:
        """Set how and when (Unix time, milliseconds) the run ended."""
        self.client.set_terminated(self.run_id, status, end_time=end_ms)


def _split(items: list[_Item], most: int) -> list[list[_Item]]:
    return [items[start : start + most] for start in range(0, len(items), most)]
