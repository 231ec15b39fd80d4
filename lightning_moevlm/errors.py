"""Mistakes that the user can mend.

Whatever the command line can say in one line (what came, what is allowed, what to change) is a `UserError`:
`moevlm` prints it without a traceback and leaves with exit code 2. Our own bugs are `assert`s and keep theirs.
"""


class UserError(ValueError):
    """A mistake in the user's input; the message names what came, what is allowed and what to change."""
