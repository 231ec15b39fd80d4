"""Fetches a stream's next shard while the current one is read, so that a reader waits for its server only once.

A thread per stream and source opens one shard in advance, never two. The shard is held open, so it can be read even if
others have needed its room in the cache by then. Content and order do not change. Local sets are not prefetched, nor
sets whose cache cannot hold two shards. An error in the background is raised when that shard's turn comes. A server
that did not answer is asked once more then, with all retries.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread
from types import TracebackType
from typing import BinaryIO

from lightning_moevlm.data.format.faults import ShardFault
from lightning_moevlm.data.format.manifest import ShardEntry
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.storage.stop_request import StopRequest


class ShardPrefetcher:
    """Opens shards in their reading order; a context manager.

    At its end a transfer is cancelled: no thread runs on and no partial file is left.
    """

    def __init__(self, storage: ShardStorage, shards: Sequence[ShardEntry]) -> None:
        self._storage = storage
        self._shards = iter(shards)
        self._next = next(self._shards, None)
        self._fetch: _Fetch | None = None

    def place(self, file: ShardEntry) -> str:
        """Return the path or address of a shard, without credentials, for messages."""
        return self._storage.place(file)

    def open(self, entry: ShardEntry) -> BinaryIO:
        """Open the next shard, and start to fetch the one after it.

        Raises:
            ShardFault: if the shard is missing, unreachable, truncated or altered.
            UserError: if the cache cannot be written.
        """
        assert entry == self._next, "shards are opened in their order"
        fetch, self._fetch = self._fetch, None
        self._next = next(self._shards, None)
        try:
            return self._storage.open(entry) if fetch is None else fetch.result()
        finally:
            self._begin(beside=entry)

    def _begin(self, beside: ShardEntry) -> None:
        if self._next is not None and self._next != beside and self._storage.fits_beside(self._next, beside):
            self._fetch = _Fetch(self._storage, self._next)

    def __enter__(self) -> "ShardPrefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fetch is not None:
            self._fetch.abandon()


class _Fetch:
    """One shard being opened by a thread."""

    def __init__(self, storage: ShardStorage, entry: ShardEntry) -> None:
        self._storage = storage
        self._entry = entry
        self._found: Future[BinaryIO] = Future()
        stop = StopRequest()
        # a daemon, so that an ending process does not wait for a server; the finalizer, which runs at the end of the
        # process too, lets it remove its partial file
        thread = Thread(target=_open_into, args=(self._found, storage, entry, stop), name="shard-ahead", daemon=True)
        self.abandon = weakref.finalize(self, _abandon, self._found, stop, thread)
        thread.start()

    def result(self) -> BinaryIO:
        """Wait for the shard and return it."""
        try:
            stream = self._found.result()
        except ShardFault as fault:
            if fault.cause != "shard_unreachable":
                raise  # a retry would not help
            return self._storage.open(self._entry)
        self.abandon.detach()
        return stream


def _open_into(found: "Future[BinaryIO]", storage: ShardStorage, entry: ShardEntry, stop: StopRequest) -> None:
    try:
        found.set_result(storage.open(entry, stop))
    except BaseException as error:  # raised again in `result`
        found.set_exception(error)


def _abandon(found: "Future[BinaryIO]", stop: StopRequest, thread: Thread) -> None:
    stop.set()
    thread.join()
    if found.done() and found.exception() is None:  # a forked copy of the process does not have the thread
        found.result().close()
