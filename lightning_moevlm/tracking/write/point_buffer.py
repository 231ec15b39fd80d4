"""Points wait here until enough of them, or enough time, is worth a write.

One write to SQLite costs about 10 ms whether it carries one point or a hundred; training logs every step. A
store that stops answering is left alone for longer each time, and nothing is given up: what was not delivered
stays in order, here or, spilled, in the run's `OfflineLog`.
"""

import time
from collections.abc import Callable, Sequence

from lightning_moevlm.tracking.point import Point

_LONGEST_PAUSE = 60.0  # seconds between attempts on a store that does not answer


class PointBuffer:
    """First in, first out. `add` may be called from another thread than `deliver`.

    flush_points: a write is due at this many points. flush_seconds: or when the last one is this long ago.
    clock: seconds that only grow.
    """

    def __init__(self, flush_points: int, flush_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._points: list[Point] = []
        self._flush_points = flush_points
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._last_attempt = clock()
        self._pause = 0.0

    def __len__(self) -> int:
        return len(self._points)

    def add(self, point: Point) -> None:
        """Keep a point."""
        self._points.append(point)

    @property
    def due(self) -> bool:
        """True when a write is worth its cost now."""
        waited = self._clock() - self._last_attempt
        if self._pause:
            return waited >= self._pause
        return len(self._points) >= self._flush_points or (bool(self._points) and waited >= self._flush_seconds)

    def deliver(
        self,
        write: Callable[[Sequence[Point]], None],
        per_write: int,
        first: Callable[[], None] | None = None,
    ) -> None:
        """Hand every point to `write`, at most `per_write` at once; a point leaves after its write.

        Args:
            write: Takes points.
            per_write: Points at once.
            first: Done before, for what is older than the points.

        Raises:
            whatever `first` and `write` raise; the points from that write on are kept, and `due` waits longer.
        """
        try:
            if first is not None:
                first()
            while self._points:
                part = self._points[:per_write]
                write(part)
                del self._points[: len(part)]
        except Exception:
            self._pause = min(max(2 * self._pause, self._flush_seconds), _LONGEST_PAUSE)
            raise
        else:
            self._pause = 0.0
        finally:
            self._last_attempt = self._clock()

    def spill(self, keep: Callable[[Sequence[Point]], None]) -> None:
        """Hand every point to `keep`, which takes them elsewhere; they leave afterwards, and `due` stays as it is."""
        taken = self._points[:]
        if taken:
            keep(taken)
            del self._points[: len(taken)]
