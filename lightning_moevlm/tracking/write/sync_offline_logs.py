"""What ended runs left behind while their store was silent, found and delivered."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.secret_masking import MASK, without_url_secrets
from lightning_moevlm.tracking.write.offline_log import JOURNAL, Outbox, Waiting
from lightning_moevlm.tracking.write.run_writer import RunWriter
from lightning_moevlm.tracking.write.store_outage import Silence


class Delivery(StrEnum):
    """What became of one outbox. AT_WORK: another process, its run as a rule, holds it and delivers it itself."""

    DELIVERED = "delivered"
    AT_WORK = "its run is at work"
    KEPT = "kept"


class Delivered(NamedTuple):
    """One outbox after an attempt. waiting: what had waited. reason: why it is kept."""

    outbox: Outbox
    waiting: Waiting
    outcome: Delivery
    reason: str = ""


def outboxes_below(folders: Iterable[Path]) -> list[Outbox]:
    """Return the outboxes in these folders and in all below them; a folder that is missing has none."""
    journals = {journal for folder in folders for journal in folder.rglob(JOURNAL)}
    return [Outbox(journal.parent) for journal in sorted(journals)]


def deliver(outboxes: Sequence[Outbox], uri: str) -> list[Delivered]:
    """Hand over what waits, run by run; a store that is silent is asked once.

    Args:
        outboxes: Of any runs.
        uri: The tracking URI in force, used for the runs that were to go there; it has the credentials, of which an
            outbox keeps none.

    Raises:
        UserError: An outbox names no store, or one whose credentials are not known.
    """
    stores = {outbox.address.store: _store(outbox, uri) for outbox in outboxes}
    silent: dict[str, str] = {}
    done = []
    for outbox in outboxes:
        store = stores[outbox.address.store]
        waiting = outbox.count()
        if store in silent:
            done.append(Delivered(outbox, waiting, Delivery.KEPT, silent[store]))
            continue
        one = _deliver(outbox, waiting, store)
        done.append(one)
        if one.outcome is Delivery.KEPT and not _answers(store):
            silent[store] = one.reason
    return done


def _deliver(outbox: Outbox, waiting: Waiting, store: str) -> Delivered:
    from mlflow import MlflowClient

    if not outbox.hold():
        return Delivered(outbox, waiting, Delivery.AT_WORK)
    try:
        writer = RunWriter(MlflowClient(store), outbox.address.run_id)
        silence = Silence(store, tell=lambda line: None, what="")
        if silence.attempt(lambda: outbox.deliver(writer, has_ended=True)):
            return Delivered(outbox, waiting, Delivery.DELIVERED)
        return Delivered(outbox, waiting, Delivery.KEPT, silence.reason)
    finally:
        outbox.release()


def _answers(store: str) -> bool:
    from mlflow import MlflowClient

    silence = Silence(store, tell=lambda line: None, what="")
    return silence.attempt(lambda: MlflowClient(store).search_experiments(max_results=1))


def _store(outbox: Outbox, uri: str) -> str:
    """Return the tracking URI, credentials and all, of an outbox's store."""
    store = outbox.address.store
    if store == without_url_secrets(uri):
        return uri
    if MASK in store:
        raise UserError(
            f"{outbox.journal} is to go to {store}, whose credentials are not kept on disk: set MLFLOW_TRACKING_URI to "
            "the whole address"
        )
    return store
