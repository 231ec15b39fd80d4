"""A wish that can be taken back: what works in the background asks whether its result is still wanted."""

from threading import Event


class StoppedError(Exception):
    """Raised where work ends because nobody wants its result any more; it never reaches a reader."""


class Stop:
    """Handed down to whatever takes time; one thread asks to stop, another looks."""

    def __init__(self) -> None:
        self._event = Event()

    @property
    def asked(self) -> bool:
        """Whether the work is to end."""
        return self._event.is_set()

    def ask(self) -> None:
        """Let the work end at its next look."""
        self._event.set()

    def check(self) -> None:
        """Go on only if the result is wanted.

        Raises:
            StoppedError: if it is not.

        """
        if self.asked:
            raise StoppedError

    def pause(self, seconds: float) -> None:
        """Sleep, and wake at once if asked to stop.

        Raises:
            StoppedError: if so.

        """
        self._event.wait(seconds)
        self.check()
