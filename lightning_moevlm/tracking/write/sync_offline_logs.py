"""Uploads what runs that have ended kept on disk while their store was unreachable."""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import MASK, mask_url_secrets
from lightning_moevlm.tracking.store import open_client
from lightning_moevlm.tracking.write.offline_log import OfflineLog, PendingCount
from lightning_moevlm.tracking.write.run_writer import RunWriter
from lightning_moevlm.tracking.write.store_outage import OutageGuard


class SyncResult(NamedTuple):
    """One log after an attempt."""

    log: OfflineLog
    pending: PendingCount
    """What it held before."""
    reason: str = ""
    """Why it is kept; empty where it is uploaded."""


def sync_offline_logs(logs: Sequence[OfflineLog], uri: str) -> list[SyncResult]:
    """Upload logs in their order, but for those of active runs, which upload them themselves.

    A store that does not answer is asked once.

    Args:
        logs: of any runs, those of one run in the order in which they were begun.
        uri: the tracking URI in force, for the runs of that store: it has the credentials, which no log has.

    Raises:
        UserError: a log names no store, or one whose credentials are not known.
    """
    stores = [_find_store(log, uri) for log in logs]
    failures: dict[str, str] = {}  # by store that does not answer, or by run
    results = []
    for log, store in zip(logs, stores, strict=True):
        run_id, pending = log.address.run_id, log.count()
        reason = failures.get(store) or failures.get(run_id, "")
        if not reason and not log.hold():
            continue
        if not reason and (reason := _upload(log, store, run_id)):
            failures[run_id if _answers(store) else store] = reason
        log.release()
        results.append(SyncResult(log, pending, reason))
    return results


def _upload(log: OfflineLog, store: str, run_id: str) -> str:
    """Upload and remove a log; return why the store does not take it, or nothing."""
    guard = OutageGuard(store, tell=lambda line: None, meanwhile="")
    writer = RunWriter(open_client(store), store, run_id, warn=lambda line: None)
    if guard.attempt(lambda: log.upload(writer, has_ended=True)):
        log.remove()
    return guard.reason


def _answers(store: str) -> bool:
    guard = OutageGuard(store, tell=lambda line: None, meanwhile="")
    return guard.attempt(lambda: open_client(store).search_experiments(max_results=1))


def _find_store(log: OfflineLog, uri: str) -> str:
    """Return the tracking URI of a log's store with its credentials."""
    store = log.address.store
    if store == mask_url_secrets(uri):
        return uri
    if MASK in store:
        raise UserError(
            f"{log.journal} belongs to {store}, whose credentials are not kept on disk: set MLFLOW_TRACKING_URI to "
            "the address with user name and password"
        )
    return store
