"""Catches the signals that end a sweep cleanly: Ctrl-C, SIGTERM, a closed terminal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Set by signals and read by the loop. name: of the last signal, or empty."""

    name: str = ""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self.name = signal.Signals(number).name


@contextmanager
def catch_stop_signals() -> Iterator[Stop]:
    """Let signals set a Stop within the block, from the main thread; under `nohup` SIGHUP stays ignored."""
    stop = Stop()
    closed = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    before = {number: signal.signal(number, stop.handle) for number in (*_CAUGHT, *closed)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
