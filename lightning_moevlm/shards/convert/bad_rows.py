"""Rows that give no sample: counted by cause, the first of each kept to be shown."""

from collections import Counter
from typing import NamedTuple

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.convert.rows import BAD_CAUSES, BadCause, BadRow


class BadCount(NamedTuple):
    """One line of the table of bad rows. first: the first row of this cause."""

    cause: BadCause
    num_rows: int
    first: BadRow


class TooManyBadError(UserError):
    """More bad rows than allowed; `counts` is the table to show beside the message."""

    def __init__(self, message: str, counts: tuple[BadCount, ...]) -> None:
        super().__init__(message)
        self.counts = counts


class BadRows:
    """Collects bad rows in the source's order."""

    def __init__(self) -> None:
        self._num: Counter[BadCause] = Counter()
        self._first: dict[BadCause, BadRow] = {}

    def add(self, row: BadRow) -> None:
        """Count one."""
        self._num[row.cause] += 1
        self._first.setdefault(row.cause, row)

    def counts(self) -> tuple[BadCount, ...]:
        """Every cause that occurred, in the order of their declaration."""
        return tuple(BadCount(c, self._num[c], self._first[c]) for c in BAD_CAUSES if c in self._num)

    def refuse_beyond(self, max_bad: int) -> None:
        """Go on only if there are few enough.

        Raises:
            TooManyBadError: if there are more than `max_bad`, with the place of the first.

        """
        found = self._num.total()
        if found <= max_bad:
            return
        first = next(iter(self._first.values()))
        rows = "1 row is" if found == 1 else f"{found:,} rows are"
        raise TooManyBadError(
            f"{rows} bad, {max_bad} allowed; the first: {first.place}: {first.message} ({first.cause}); "
            f"mend them, or leave them out with --max_bad {found}",
            self.counts(),
        )
