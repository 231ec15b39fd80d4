"""Signals that end a sweep cleanly: Ctrl-C, a polite kill, a terminal that was closed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_HEARD = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Set by signals; the loop looks at it. name: of what came last, or empty."""

    name: str = ""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self.name = signal.Signals(number).name


@contextmanager
def catch_stop_signals() -> Iterator[Stop]:
    """Within, signals set a Stop and end nothing by themselves; under `nohup` a closed terminal stays ignored.

    From the main thread alone.
    """
    stop = Stop()
    closed = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    before = {number: signal.signal(number, stop.handle) for number in (*_HEARD, *closed)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
