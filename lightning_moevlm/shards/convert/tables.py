"""Rows from a table: a CSV file with a header, or a file of JSON objects, one per line."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.convert.rows import (
    BadRow,
    PictureAt,
    Row,
    RowError,
    Source,
    checked_caption,
    checked_key,
    checked_split,
    checked_text,
    existing_file,
    existing_folder,
    json_object,
    set_name,
)
from lightning_moevlm.shards.manifest import file_sha256


class Columns(NamedTuple):
    """Which column (or JSON field) holds what; None for nothing of the kind.

    image: a picture's path within the folder of pictures. key: of the sample; None numbers the rows. split: train,
    val or test; None leaves it to the hash. Whatever other columns there are goes into the json member.
    """

    image: str | None
    caption: str | None
    key: str | None
    split: str | None

    def named(self) -> tuple[str, ...]:
        """The columns that have a meaning."""
        return tuple(column for column in self if column is not None)


class _Table(Source):
    """What both kinds of tables share: from named fields to a row."""

    kind: str

    def __init__(self, table: Path, pictures: Path | None, name: str | None, columns: Columns) -> None:
        existing_file(table, "table")
        if columns.image is None and columns.caption is None:
            raise UserError("neither pictures nor captions are named: a set needs one of them or both")
        folder = existing_folder(table.parent if pictures is None else pictures, "--pictures")
        arguments = {f"{role}_column": column or "" for role, column in columns._asdict().items()}
        super().__init__(
            set_name(name or table.stem), folder, {"source": self.kind, "table": file_sha256(table), **arguments}
        )
        self.table = table
        self.columns = columns

    def _row(self, fields: Mapping[str, object], number: int, place: str) -> Row:
        columns = self.columns
        for column in columns.named():
            if column not in fields:
                raise RowError("row_malformed", f"there is no {column!r}")
        picture = None
        if columns.image is not None:
            picture = PictureAt(_text(fields, columns.image))
        annotation = {name: value for name, value in fields.items() if name not in columns.named()}
        _check_annotation(annotation)
        return Row(
            place=place,
            key=checked_key(
                f"{self.name}-{number:08d}" if columns.key is None else _text(fields, columns.key, numbers=True)
            ),
            picture=picture,
            caption=None if columns.caption is None else checked_caption(fields[columns.caption]),
            annotation=annotation or None,
            split=None if columns.split is None else checked_split(_text(fields, columns.split)),
        )


class CsvSource(_Table):
    """A CSV file in UTF-8 whose first line names the columns."""

    kind = "csv"

    def __init__(
        self, table: Path, pictures: Path | None, name: str | None, columns: Columns, delimiter: str = ","
    ) -> None:
        delimiter = "\t" if delimiter == "\\t" else delimiter  # as a shell hands it on
        if len(delimiter) != 1 or delimiter in '\r\n"':
            raise UserError(f"delimiter is {delimiter!r}, but must be a single character, as ; or \\t")
        super().__init__(table, pictures, name, columns)
        self.arguments |= {"delimiter": delimiter}
        self.delimiter = delimiter

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield one row per line of the table that is not blank; quoted fields may hold line breaks."""
        # bytes that are no UTF-8 become lone surrogates here and are refused row by row
        with self.table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=self.delimiter, strict=True)
            header = self._header(reader)
            number = -1
            while True:
                place = f"{self.table.name} line {reader.line_num + 1}"
                number += 1
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    if "unexpected end of data" in str(error):  # any number of rows may be in it
                        raise UserError(
                            f"{place}: a quote is opened here or later, and never closed; close it"
                        ) from None
                    yield BadRow(place, "row_malformed", f"this is no row of a CSV file ({error})")
                    continue
                if cells is None:
                    return
                if not cells:
                    continue
                try:
                    if len(cells) != len(header):
                        raise RowError("row_malformed", f"{len(cells)} fields under {len(header)} columns")
                    yield self._row(dict(zip(header, cells, strict=True)), number, place)
                except RowError as fault:
                    yield fault.at(place)

    def _header(self, reader: Iterator[list[str]]) -> list[str]:
        try:
            header = next(reader, list[str]())
        except csv.Error as error:
            raise UserError(f"{self.table} line 1 is no row of a CSV file ({error})") from None
        for column in self.columns.named():
            if column not in header:
                said = ", ".join(name if name.isprintable() else ascii(name) for name in header) or "none"
                raise UserError(
                    f"{self.table} has no column {column!r} (it has: {said}); name the right one, or null for none, "
                    "with --image_column, --caption_column, --key_column, --split_column; if names are cut "
                    "wrongly, say how fields are divided with --delimiter; the file has to be in UTF-8"
                )
        if len(set(header)) != len(header):
            raise UserError(f"{self.table} line 1 names a column twice: {', '.join(header)}")
        return header


class JsonlSource(_Table):
    """A file of JSON objects in UTF-8, one per line."""

    kind = "jsonl"

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield one row per line that is not blank."""
        with self.table.open("rb") as file:
            for number, line in enumerate(file):
                place = f"{self.table.name} line {number + 1}"
                if not line.strip():
                    continue
                try:
                    yield self._row(json_object(line), number, place)
                except RowError as fault:
                    yield fault.at(place)


def _text(fields: Mapping[str, object], column: str, numbers: bool = False) -> str:
    value = fields[column]
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError("row_malformed", f"{column!r} is {type(value).__name__}, not a text")
    checked_text(value)
    return value


def _check_annotation(annotation: Mapping[str, object]) -> None:
    checked_text(json.dumps(annotation, ensure_ascii=False))
