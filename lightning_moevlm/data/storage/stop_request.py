"""Lets one thread ask another to stop: background work checks whether its result is still wanted."""

from threading import Event


class StoppedError(Exception):
    """Ends work in the background whose result is no longer wanted; it never reaches a reader."""


class StopRequest(Event):
    """An event that long work checks: one thread sets it, another ends at its next check."""

    def check(self) -> None:
        """End the work if the event is set.

        Raises:
            StoppedError: if the event is set.
        """
        if self.is_set():
            raise StoppedError

    def pause(self, seconds: float) -> None:
        """Sleep, and wake at once when asked to stop.

        Raises:
            StoppedError: if the event is set.
        """
        self.wait(seconds)
        self.check()
