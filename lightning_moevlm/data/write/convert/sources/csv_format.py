"""Describes the format of a CSV file (delimiter, encoding, quotes), and detects signs of another one."""

import codecs
import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Scalar

_DELIMITERS = (",", ";", "\t", "|")
_FILE_NAME = re.compile(r"\S+\.[A-Za-z]{2,5}")
NO_QUOTES = "if quotes are ordinary characters in this table, add --quotes false"


@dataclass(frozen=True)
class CsvFormat:
    """The format of a CSV file."""

    delimiter: str = ","
    encoding: str = "utf-8"  # a name that Python knows
    quotes: bool | None = None  # whether fields may be quoted; None allows it, and refuses quotes that look wrong

    def __post_init__(self) -> None:
        """Refuse invalid values."""
        if len(self.delimiter) != 1 or self.delimiter in '\r\n"':
            raise UserError(f"delimiter is {self.delimiter!r}: give a single character, such as ; or \\t")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise UserError(
                f"encoding is {self.encoding!r}, which Python does not know; give utf-8 or cp1252, for example"
            ) from None

    @property
    def is_utf_8(self) -> bool:
        """Whether the text is UTF-8."""
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")

    @property
    def quoting(self) -> Literal[0, 3]:
        """The option `quoting` of `csv.reader`."""
        if self.quotes is False:
            return csv.QUOTE_NONE
        return csv.QUOTE_MINIMAL

    def as_arguments(self) -> dict[str, Scalar]:
        """Return the options that determine the rows; defaults except the delimiter are left out."""
        arguments: dict[str, Scalar] = {"delimiter": self.delimiter}
        if not self.is_utf_8:
            arguments["encoding"] = self.encoding
        return arguments if self.quotes is not False else {**arguments, "quotes": False}


def other_delimiter(header: Sequence[str], named: Sequence[str], delimiter: str) -> str | None:
    """Return a delimiter that gives the header all named columns; None if there is none."""
    line = delimiter.join(header)
    for other in _DELIMITERS:
        if other != delimiter and set(named) <= set(next(csv.reader([line], delimiter=other), [])):
            return other
    return None


def holds_rows(cells: Sequence[str], header: Sequence[str], image: str | None, delimiter: str) -> bool:
    """Return whether lines within a quoted field look like rows of the table.

    A line between the first and the last looks so if it has all fields, and an image in the image column. The first and
    the last, which continue outside of the quotes, look so if they have the remaining fields, and an image.
    """
    place = None if image is None else header.index(image)
    for column, cell in enumerate(cells):
        first, *others = (line.split(delimiter) for line in cell.splitlines() or [""])
        for fields in others:
            has_image = place is not None and place < len(fields) and _FILE_NAME.fullmatch(fields[place]) is not None
            if len(fields) == len(header) > 1 and (place is None or has_image):
                return True
            if has_image and len(fields) == column + 1 and len(first) == len(header) - column:
                return True
    return False
