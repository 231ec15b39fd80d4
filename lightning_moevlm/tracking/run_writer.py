"""Writes into one run of a store that may stop answering.

Training must not die of its bookkeeping: an attempt tells whether the store took what it was given, and the
first failure of a silence is a warning. What to keep meanwhile is the caller's business.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_moevlm.tracking.masking import masked_url
from lightning_moevlm.tracking.runs import Point
from lightning_moevlm.tracking.store import impatient_requests, reason_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_PER_WRITE = 1000  # MLflow's limit for one log_batch
_OTHERS_PER_WRITE = 100  # its limit for params, and for tags


class RunWriter:
    """The write access to one run. shown_uri: named in warnings, credentials masked."""

    def __init__(self, client: "MlflowClient", run_id: str, shown_uri: str) -> None:
        self.client = client
        self.run_id = run_id
        self._shown_uri = masked_url(shown_uri)
        self._silent = False

    def points(self, points: Sequence[Point]) -> None:
        """Write at most `METRICS_PER_WRITE` points."""
        from mlflow.entities import Metric

        metrics = [Metric(key, value, time_ms, step) for key, step, value, time_ms in points]
        self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def params(self, params: Mapping[str, str]) -> None:
        """Write params that the run does not have."""
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

    def attempt(self, action: Callable[[], object]) -> bool:
        """Do something with the store and tell whether it answered; give up after seconds."""
        from mlflow.exceptions import MlflowException

        try:
            with impatient_requests():
                action()
        except (MlflowException, OSError) as error:  # the exceptions of `requests` are OSErrors
            if not self._silent:
                self._silent = True
                rank_zero_warn(
                    f"MLflow at {self._shown_uri} takes nothing at the moment; training goes on, "
                    f"what it logs is kept: {reason_of(error)}",
                    category=RuntimeWarning,
                )
            return False
        self._silent = False
        return True
