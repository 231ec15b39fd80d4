"""Counts rows that give no sample by cause, and keeps the first of each."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.write.convert.sources.row_source import BAD_CAUSES, BadCause, BadRow

_OF_SINGLE_ROWS: tuple[BadCause, ...] = ("caption_empty", "question_unanswered", "image_undecodable", "image_too_large")
_MANY = 10
"""If one row in so many is bad for another cause, the source is misread."""
_NONE: Mapping[BadCause, str] = {}


class BadCount(NamedTuple):
    """One line of the table of bad rows."""

    cause: BadCause
    num_rows: int
    first: BadRow  # of this cause


class TooManyBadError(UserError):
    """More rows are bad than allowed. `counts` is the table to show with the message."""

    def __init__(self, message: str, counts: tuple[BadCount, ...]) -> None:
        super().__init__(message)
        self.counts = counts


class BadRows:
    """Collects bad rows in the source's order. remedies: advice by cause, if many rows are bad."""

    def __init__(self, remedies: Mapping[BadCause, str] = _NONE) -> None:
        self._remedies = remedies
        self._num: Counter[BadCause] = Counter()
        self._first: dict[BadCause, BadRow] = {}

    def add(self, row: BadRow) -> None:
        """Count a row."""
        self._num[row.cause] += 1
        self._first.setdefault(row.cause, row)

    def counts(self) -> tuple[BadCount, ...]:
        """Return all causes that occurred, in the order of their declaration."""
        return tuple(BadCount(c, self._num[c], self._first[c]) for c in BAD_CAUSES if c in self._num)

    def refuse_beyond(self, max_bad: int, num_rows: int) -> None:
        """Refuse more than `max_bad` bad rows. num_rows: of the source, bad ones included.

        Single broken rows can be left out. If a tenth of all rows is bad because the source is misnamed or misread,
        that would lose good data, so another remedy is advised.

        Raises:
            TooManyBadError: with the place of the first bad row.
        """
        found = self._num.total()
        if found <= max_bad:
            return
        first = next(iter(self._first.values()))
        rows = "1 row is" if found == 1 else f"{found:,} rows are"
        raise TooManyBadError(
            f"{rows} bad, {max_bad} allowed; the first: {first.place}: {first.message} ({first.cause}); "
            f"{self._advise(num_rows)}",
            self.counts(),
        )

    def _advise(self, num_rows: int) -> str:
        found = self._num.total()
        misread = {cause: num for cause, num in self._num.items() if cause not in _OF_SINGLE_ROWS}
        worst = max(misread, key=misread.__getitem__, default=None)
        remedy = "" if worst is None else self._remedies.get(worst, "")
        if worst is not None and _MANY * sum(misread.values()) > num_rows:
            share = f"{sum(misread.values()):,} of {num_rows:,} are bad because of how the source is written or read"
            return f"{share}: {remedy or 'look at the first, and correct the source'}"
        return f"correct them{f' ({remedy})' if remedy else ''}, or leave them out with --max_bad {found}"
