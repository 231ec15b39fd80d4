"""Errors that end a command without a traceback.

`moevlm` prints a `UserError` in one line and exits with code 2. Our own bugs are `assert`s and keep their traceback.
"""


class UserError(ValueError):
    """A mistake in the user's input; the message names the value, the values allowed and the change to make."""


class Diverged(Exception):  # noqa: N818 - an outcome, not a fault
    """A run ended because its loss is not a number; the message names the step."""


class Stopped(Exception):  # noqa: N818 - asked for, not a fault
    """A run was ended by a signal, after it saved a checkpoint; `text` says where."""

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.signal_number = signal_number
