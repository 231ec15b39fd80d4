"""What ended runs left behind while their store was silent, found and delivered."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import MASK, mask_url_secrets
from lightning_moevlm.tracking.write.offline_log import JOURNAL, OfflineLog, PendingCount
from lightning_moevlm.tracking.write.run_writer import RunWriter
from lightning_moevlm.tracking.write.store_outage import OutageGuard


class SyncOutcome(StrEnum):
    """What became of one log. ACTIVE: another process, its run as a rule, holds it and delivers it itself."""

    UPLOADED = "uploaded"
    ACTIVE = "its run is active"
    KEPT = "kept"


class SyncResult(NamedTuple):
    """One log after an attempt. waiting: what had waited. reason: why it is kept."""

    log: OfflineLog
    waiting: PendingCount
    outcome: SyncOutcome
    reason: str = ""


def find_offline_logs(folders: Iterable[Path]) -> list[OfflineLog]:
    """Return the logs in these folders and in all below them; a folder that is missing has none."""
    journals = {journal for folder in folders for journal in folder.rglob(JOURNAL)}
    return [OfflineLog(journal.parent) for journal in sorted(journals)]


def sync_offline_logs(logs: Sequence[OfflineLog], uri: str) -> list[SyncResult]:
    """Hand over what waits, run by run; a store that is silent is asked once.

    Args:
        logs: Of any runs.
        uri: The tracking URI in force, used for the runs that were to go there; it has the credentials, of which an
            log keeps none.

    Raises:
        UserError: An log names no store, or one whose credentials are not known.
    """
    stores = {log.address.store: _store(log, uri) for log in logs}
    silent: dict[str, str] = {}
    done = []
    for log in logs:
        store = stores[log.address.store]
        waiting = log.count()
        if store in silent:
            done.append(SyncResult(log, waiting, SyncOutcome.KEPT, silent[store]))
            continue
        one = _deliver(log, waiting, store)
        done.append(one)
        if one.outcome is SyncOutcome.KEPT and not _answers(store):
            silent[store] = one.reason
    return done


def _deliver(log: OfflineLog, waiting: PendingCount, store: str) -> SyncResult:
    from mlflow import MlflowClient

    if not log.hold():
        return SyncResult(log, waiting, SyncOutcome.ACTIVE)
    try:
        writer = RunWriter(MlflowClient(store), log.address.run_id)
        guard = OutageGuard(store, tell=lambda line: None, what="")
        if guard.attempt(lambda: log.deliver(writer, has_ended=True)):
            return SyncResult(log, waiting, SyncOutcome.UPLOADED)
        return SyncResult(log, waiting, SyncOutcome.KEPT, guard.reason)
    finally:
        log.release()


def _answers(store: str) -> bool:
    from mlflow import MlflowClient

    guard = OutageGuard(store, tell=lambda line: None, what="")
    return guard.attempt(lambda: MlflowClient(store).search_experiments(max_results=1))


def _store(log: OfflineLog, uri: str) -> str:
    """Return the tracking URI, credentials and all, of a log's store."""
    store = log.address.store
    if store == mask_url_secrets(uri):
        return uri
    if MASK in store:
        raise UserError(
            f"{log.journal} is to go to {store}, whose credentials are not kept on disk: set MLFLOW_TRACKING_URI to "
            "the whole address"
        )
    return store
