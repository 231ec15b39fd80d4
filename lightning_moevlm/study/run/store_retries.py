"""A sweep whose MLflow server goes away: what runs goes on, what has ended waits to be judged, nothing new begins.

A run cannot be judged without its points, so its end is written into the ledger (`ended`) until the store answers. What
it could not log lies in its outbox and is delivered before it is judged. While nothing is left to run and the store
stays silent, the sweep waits for a while, then stops; the next `sweep run` judges and goes on.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from lightning_moevlm.study.run.mlflow_runs import StudyRuns
from lightning_moevlm.tracking.store import runs_dir
from lightning_moevlm.tracking.write.offline_log import JOURNAL, OfflineLog
from lightning_moevlm.tracking.write.store_outage import OutageGuard
from lightning_moevlm.tracking.write.sync_offline_logs import SyncOutcome, SyncResult, sync_offline_logs

_LONGEST_PAUSE = 30.0  # seconds between attempts
_WHAT = "what runs goes on; runs are judged and others begin once it answers"


class StoreUnreachableError(Exception):
    """The store did not answer; nothing was begun."""


class StoreRetries:
    """The store of a study, asked again and again; after a failure not before a growing pause is over.

    uri: the store's. tell: is handed one line when a silence begins.
    """

    def __init__(self, uri: str, tell: Callable[[str], None]) -> None:
        self._silence = OutageGuard(uri, tell, _WHAT)
        self._since = 0.0
        self._pause = 0.0
        self._next = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether it answered last, or has been left alone for long enough."""
        return time.monotonic() >= self._next

    @property
    def outage_seconds(self) -> float:
        """For how long it has not answered; 0 where it did."""
        return time.monotonic() - self._since if self._silence.reason else 0.0

    def attempt(self, action: Callable[[], object]) -> bool:
        """Do something with it and tell whether it answered; give up after seconds."""
        was_silent = bool(self._silence.reason)
        if self._silence.attempt(action):
            self._pause = self._next = 0.0
            return True
        now = time.monotonic()
        self._since = self._since if was_silent else now
        self._pause = min(max(1.0, 2 * self._pause), _LONGEST_PAUSE)
        self._next = now + self._pause
        return False


def upload_first(experiment: StudyRuns, run_id: str) -> None:
    """Deliver what a run that has ended kept on disk.

    Raises:
        OSError: the store does not take it.
    """
    for told in upload_offline_logs(experiment.uri, [run_id]):
        if told.outcome is SyncOutcome.KEPT:
            raise OSError(told.reason)


def upload_offline_logs(uri: str, run_ids: Iterable[str]) -> Sequence[SyncResult]:
    """Deliver what runs kept on disk while their store was silent; those that are at work do it themselves."""
    root = runs_dir(uri)
    journals = [journal for run_id in run_ids for journal in root.glob(f"*/{run_id}/{JOURNAL}")]
    return sync_offline_logs([OfflineLog(journal.parent) for journal in journals], uri)
