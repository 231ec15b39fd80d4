"""Retries a store that a sweep cannot reach: running runs continue, ended ones wait to be judged, no new one begins.

A run cannot be judged without its points, so the ledger says `ended` until the store answers. Its offline log is
uploaded before it is judged. Once nothing runs and the store stays unreachable, the sweep waits for a while, then
stops; the next `sweep run` judges and resumes.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from lightning_moevlm.study.run.mlflow_runs import StudyRuns
from lightning_moevlm.tracking.store import runs_dir
from lightning_moevlm.tracking.write.offline_log import find_offline_logs
from lightning_moevlm.tracking.write.store_outage import OutageGuard
from lightning_moevlm.tracking.write.sync_offline_logs import SyncResult, sync_offline_logs

_LONGEST_PAUSE = 30.0  # seconds between attempts
_WHAT = "running runs continue; others are judged or begin once it answers"


class StoreUnreachableError(Exception):
    """The store did not answer; nothing was begun."""


class StoreRetries:
    """The store of a study, with growing pauses between attempts after a failure.

    Args:
        uri: Of the store.
        show: Gets one line when an outage begins.
    """

    def __init__(self, uri: str, show: Callable[[str], None]) -> None:
        self._guard = OutageGuard(uri, show, _WHAT)
        self._since = 0.0
        self._pause = 0.0
        self._next = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether it answered last, or the pause is over."""
        return time.monotonic() >= self._next

    @property
    def outage_seconds(self) -> float:
        """Seconds since the outage began; 0 without one."""
        return time.monotonic() - self._since if self._guard.reason else 0.0

    def attempt(self, action: Callable[[], object]) -> bool:
        """Try an action and return whether the store answered; give up after seconds."""
        was_out = bool(self._guard.reason)
        if self._guard.attempt(action):
            self._pause = self._next = 0.0
            return True
        now = time.monotonic()
        self._since = self._since if was_out else now
        self._pause = min(max(1.0, 2 * self._pause), _LONGEST_PAUSE)
        self._next = now + self._pause
        return False


def upload_first(experiment: StudyRuns, run_id: str) -> None:
    """Upload the offline log of a run that has ended.

    Raises:
        OSError: The store does not take it.
    """
    for result in upload_offline_logs(experiment.uri, [run_id]):
        if result.reason:
            raise OSError(result.reason)


def upload_offline_logs(uri: str, run_ids: Iterable[str]) -> Sequence[SyncResult]:
    """Upload the offline logs of runs that have ended; a running run uploads its own."""
    root = runs_dir(uri)
    folders = [folder for run_id in run_ids for folder in root.glob(f"*/{run_id}")]
    return sync_offline_logs([log for folder in folders for log in find_offline_logs(folder)], uri)
