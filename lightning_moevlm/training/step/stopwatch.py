"""Counts the wall time and the CPU time of training steps, without validations.

CPU time is that of all threads of this process, without data workers. It grows far less than wall time where other work
shares the cores.
"""

import time
from typing import NamedTuple


class Seconds(NamedTuple):
    """Time that has passed."""

    wall: float
    cpu: float


class Stopwatch:
    """Counts from `restart` on, except between `pause` and `resume`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from 0."""
        self._counted, self._since = Seconds(0.0, 0.0), _now()

    def pause(self) -> None:
        """Stop counting."""
        self._counted = self.read()

    def resume(self) -> None:
        """Count again."""
        self._since = _now()

    def read(self) -> Seconds:
        """Return what has been counted. It must not be paused."""
        now = _now()
        return Seconds(*(done + to - start for done, to, start in zip(self._counted, now, self._since, strict=True)))


def _now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())
