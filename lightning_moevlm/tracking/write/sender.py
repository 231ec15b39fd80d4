"""Empties a run's offline logs into MLflow from a thread of its own, so that training never waits for a store.

A write to SQLite costs about 10 ms whether it carries one point or a hundred, and training logs every step; so points
are sent when there are enough of them, or enough time has passed. A store that does not take them is left alone for
longer each time.
"""

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from lightning_moevlm.tracking.store import limit_request_time
from lightning_moevlm.tracking.write.offline_log import OfflineLog
from lightning_moevlm.tracking.write.run_writer import RunWriter
from lightning_moevlm.tracking.write.store_outage import OutageGuard

_LONGEST_PAUSE = 60.0  # seconds between attempts on a store that does not answer


class Sender:
    """Sends one run's logs until it is closed.

    Args:
        log: of this process.
        earlier: of processes that were killed, held by this one; sent before.
        make_writer: returns a writer into the run.
        guard: of the store.
        flush_points: send when this many points are pending.
        flush_seconds: send what is pending when the last attempt is this long ago.
    """

    def __init__(
        self,
        log: OfflineLog,
        earlier: Sequence[OfflineLog],
        make_writer: Callable[[], RunWriter],
        guard: OutageGuard,
        flush_points: int,
        flush_seconds: float,
    ) -> None:
        self.log = log
        self._earlier = list(earlier)
        self._make_writer = make_writer
        self._writer = make_writer()
        self._guard = guard
        self._flush_points, self._flush_seconds = flush_points, flush_seconds
        self._pending_points = 0
        self._pause = 0.0
        self._sending = threading.Lock()
        self._due, self._is_closing = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="Sender", daemon=True)
        self._owner = os.getpid()
        self._limits = ExitStack()

    def start(self) -> None:
        """Begin to send."""
        self._limits.enter_context(limit_request_time())  # here, not in the thread: the environment is the process's
        atexit.register(self.close)
        self._thread.start()

    def notice(self, points: int | None = None) -> None:
        """Take note that so many points were appended, or, without a number, something that is to be seen at once.

        Raises:
            Exception: the thread has failed, for a reason that is not the store's.
        """
        if self._failure is not None:
            raise self._failure
        self._pending_points += points or 0
        if points is None or self._pending_points >= self._flush_points or not self._flush_seconds:
            self._due.set()

    def flush(self, has_ended: bool = False) -> bool:
        """Send everything now and return whether the store took it; where not, have it outlast a power failure."""
        with self._sending:
            self._pending_points = 0
            if self._guard.attempt(lambda: self._upload(has_ended)):
                self._pause = 0.0
                return True
            self._pause = min(max(2 * self._pause, self._flush_seconds or 1.0), _LONGEST_PAUSE)
            self.log.sync()
            return False

    def close(self, has_ended: bool = False) -> bool:
        """End the thread, send the rest, and return whether the store has everything; then the log is gone."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner:
            return False  # a child process has no thread, and its parent's log is not its business
        self._is_closing.set()
        self._due.set()
        self._thread.join()
        is_done = self.flush(has_ended)
        self._limits.close()
        if is_done:
            self.log.remove()
        else:
            for log in (*self._earlier, self.log):
                log.release()
        return is_done

    def _upload(self, has_ended: bool) -> None:
        while self._earlier:
            self._earlier[0].upload(self._make_writer(), has_ended=False)
            self._earlier.pop(0).remove()
        self.log.upload(self._writer, has_ended)

    def _run(self) -> None:
        try:
            while not self._is_closing.wait(self._pause):
                if not self._pause:
                    self._due.wait(self._flush_seconds or None)
                self._due.clear()
                if not self._is_closing.is_set() and not (self.log.is_empty and not self._earlier):
                    self.flush()
        except Exception as error:  # raised again in the training's thread
            self._failure = error
