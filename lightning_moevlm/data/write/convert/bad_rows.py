"""Rows that give no sample: counted by cause, the first of each kept to be shown."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.write.convert.sources.row_source import BAD_CAUSES, BadCause, BadRow

_OF_SINGLE_ROWS: tuple[BadCause, ...] = ("caption_empty", "question_unanswered", "image_undecodable", "image_too_large")
_MANY = 10
"""One row in so many, bad for another cause, is no accident."""
_NONE: Mapping[BadCause, str] = {}


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
    """Collects bad rows in the source's order. remedies: what to do where many are bad for one cause."""

    def __init__(self, remedies: Mapping[BadCause, str] = _NONE) -> None:
        self._remedies = remedies
        self._num: Counter[BadCause] = Counter()
        self._first: dict[BadCause, BadRow] = {}

    def add(self, row: BadRow) -> None:
        """Count one."""
        self._num[row.cause] += 1
        self._first.setdefault(row.cause, row)

    def counts(self) -> tuple[BadCount, ...]:
        """Every cause that occurred, in the order of their declaration."""
        return tuple(BadCount(c, self._num[c], self._first[c]) for c in BAD_CAUSES if c in self._num)

    def refuse_beyond(self, max_bad: int, num_rows: int) -> None:
        """Go on only if there are few enough. num_rows: of the source, bad ones included.

        Leaving rows out is advised where they are broken one by one. Where a tenth of all is bad for a cause that comes
        from how the source is named or read, it would throw good data away.

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
            f"{self._advice(num_rows)}",
            self.counts(),
        )

    def _advice(self, num_rows: int) -> str:
        found = self._num.total()
        misread = {cause: num for cause, num in self._num.items() if cause not in _OF_SINGLE_ROWS}
        worst = max(misread, key=misread.__getitem__, default=None)
        remedy = "" if worst is None else self._remedies.get(worst, "")
        if worst is not None and _MANY * sum(misread.values()) > num_rows:
            share = f"{sum(misread.values()):,} of {num_rows:,} are bad because of how the source is written or read"
            return f"{share}: {remedy or 'look at the first, and mend the source'}"
        return f"mend them{f' ({remedy})' if remedy else ''}, or leave them out with --max_bad {found}"
