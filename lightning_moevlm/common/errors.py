"""Mistakes that the user can mend.

Whatever the command line can say in one line (what came, what is allowed, what to change) is a `UserError`:
`moevlm` prints it without a traceback and leaves with exit code 2. Our own bugs are `assert`s and keep theirs.
"""


class UserError(ValueError):
    """A mistake in the user's input; the message names what came, what is allowed and what to change."""


class Diverged(Exception):  # noqa: N818 - an outcome, not a fault
    """A run was ended because its loss is not a number; the message says at which step and what to try."""


class Stopped(Exception):  # noqa: N818 - asked for, not a fault
    """A run was ended by a signal, after it saved where it stood.

    Args:
        signal_number: which.
        text: where the run stood.
    """

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.signal_number = signal_number
