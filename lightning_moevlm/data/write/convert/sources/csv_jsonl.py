"""Reads rows from a CSV file with a header, or from a file of JSON objects, one per line."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import Scalar, file_sha256
from lightning_moevlm.data.text.texts import strip_text
from lightning_moevlm.data.write.convert.sources.csv_format import NO_QUOTES, CsvFormat, holds_rows, other_delimiter
from lightning_moevlm.data.write.convert.sources.member_names import parse_captions
from lightning_moevlm.data.write.convert.sources.row_source import (
    BadRow,
    ImageLocation,
    Row,
    RowError,
    Source,
    check_key,
    check_text,
    clean_caption,
    parse_json_object,
    parse_split,
    require_file,
)
from lightning_moevlm.data.write.convert.sources.table_file import TableKind, guess_encoding, refuse_other_than_table

DEFAULT_FORMAT = CsvFormat()


class Columns(NamedTuple):
    """Names of columns (or JSON fields) with a meaning; other columns go into the json member."""

    image: str | None  # path within the folder of images; None for a set of texts
    caption: str | None  # None for a set of images
    key: str | None  # of the sample; None numbers the rows
    split: str | None  # train, val or test; None lets the hash decide

    def given(self) -> tuple[str, ...]:
        """Return the names given."""
        return tuple(column for column in self if column is not None)


class _Table(Source):
    """Makes rows of named fields."""

    kind: TableKind

    def __init__(self, table: Path, images: Path | None, name: str | None, columns: Columns) -> None:
        require_file(table, "table")
        refuse_other_than_table(table, self.kind)
        if columns.image is None and columns.caption is None:
            raise UserError("neither images nor captions are named: a set needs images, captions or both")
        columns_given = {f"{role}_column": column or "" for role, column in columns._asdict().items()}
        arguments: dict[str, Scalar] = {"source": self.kind, "table": file_sha256(table), **columns_given}
        super().__init__(name or table.stem, images or table.parent, arguments)
        self.table = table
        self.columns = columns
        self.remedies = {
            "image_missing": "name the folder that the paths start from with --images",
            "path_outside": "write paths that start from the folder of --images",
            "key_malformed": "leave out the option that names keys, and rows are numbered",
            "duplicate_key": "leave out the option that names keys, and rows are numbered",
            "split_unknown": "leave out the option that names splits, and the image decides",
            "text_not_utf8": "write the table in UTF-8, as with `iconv -f CP1252 -t UTF-8`",
        }

    def _row(self, fields: Mapping[str, object], number: int, place: str) -> Row:
        columns = self.columns
        for column in columns.given():
            if column not in fields:
                raise RowError("row_malformed", f"there is no {column!r}")
        image = None
        if columns.image is not None:
            image = ImageLocation(_text(fields, columns.image))
        annotation = {name: value for name, value in fields.items() if name not in columns.given()}
        several: tuple[str, ...] = ()
        if self.layout.caption_field:
            annotation[self.layout.caption_field] = fields[self.layout.caption_field]
            several = parse_captions(fields[self.layout.caption_field], self.layout.caption_field)
        _check_annotation(annotation)
        has_caption = columns.caption is not None and not several
        return Row(
            place=place,
            key=check_key(
                f"{self.name}-{number:08d}" if columns.key is None else _text(fields, columns.key, numbers=True)
            ),
            image=image,
            caption=clean_caption(fields[str(columns.caption)]) if has_caption else None,
            annotation=annotation or None,
            split=None if columns.split is None else parse_split(_text(fields, columns.split)),
            extra_texts=several,
        )


class CsvSource(_Table):
    """A CSV file whose first line names the columns."""

    kind: TableKind = "csv"

    def __init__(
        self, table: Path, images: Path | None, name: str | None, columns: Columns, form: CsvFormat = DEFAULT_FORMAT
    ) -> None:
        super().__init__(table, images, name, columns)
        self.arguments |= form.as_arguments()
        self.form = form
        self._encoding = guess_encoding(table) if form.is_utf_8 else None
        self.remedies = {
            **self.remedies,
            "row_malformed": f"give the --delimiter of fields; {NO_QUOTES}",
            "text_not_utf8": f"name the encoding of the table, as with --encoding {self._encoding or 'cp1252'}",
        }
        if self._encoding is not None and self._encoding.startswith("utf-16"):
            raise UserError(f"table {table} is in UTF-16: add --encoding {self._encoding}")

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the rows of the table, without blank lines; quoted fields may hold line breaks."""
        try:
            yield from self._rows()
        except UnicodeDecodeError as error:
            raise UserError(
                f"table {self.table} is not in {self.form.encoding} ({error.reason}); name the right --encoding"
            ) from None

    def _rows(self) -> Iterator[Row | BadRow]:
        form, num_spanning, spanning = self.form, 0, ""
        # invalid UTF-8 becomes lone surrogates here and is refused row by row
        encoding, errors = ("utf-8-sig", "surrogateescape") if form.is_utf_8 else (form.encoding, "strict")
        with self.table.open(encoding=encoding, errors=errors, newline="") as file:
            reader = csv.reader(file, delimiter=form.delimiter, quoting=form.quoting, strict=True)
            header = self._header(reader)
            number = -1
            while True:
                first = reader.line_num + 1
                place = f"{self.table.name} line {first}"
                number += 1
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    self._refuse_quote(place, first, reader.line_num, str(error))
                    yield BadRow(place, "row_malformed", f"this is not a row of a CSV file ({error})")
                    continue
                if cells is None:
                    break
                if not cells:
                    continue
                if reader.line_num > first:
                    num_spanning, spanning = num_spanning + 1, spanning or place
                    if form.quotes is None and holds_rows(cells, header, self.columns.image, form.delimiter):
                        raise UserError(
                            f"{place}: a quoted field that starts here or later is closed on line {reader.line_num}, "
                            f"and lines between look like rows; {NO_QUOTES}; if they belong to the field, add "
                            "--quotes true"
                        )
                try:
                    if len(cells) != len(header):
                        raise RowError("row_malformed", f"{len(cells)} fields under {len(header)} columns")
                    yield self._row(dict(zip(header, cells, strict=True)), number, place)
                except RowError as fault:
                    yield fault.to_bad_row(place)
        if num_spanning:
            self.notes.append(
                f"{num_spanning:,} rows span several lines, since quoted fields hold line breaks; the first: {spanning}"
            )

    def _refuse_quote(self, place: str, first: int, last: int, error: str) -> None:
        """Refuse an invalid row over several lines: it may have swallowed any number of rows."""
        if "unexpected end of data" in error:
            raise UserError(
                f"{place}: the quoted field that starts here or later is not closed; close the quote, or, {NO_QUOTES}"
            )
        if last > first:
            raise UserError(
                f"{place}: a quoted field that starts here or later makes one row of lines {first} to {last}, which is "
                f"invalid ({error}); correct the quotes, or, {NO_QUOTES}"
            )

    def _header(self, reader: Iterator[list[str]]) -> list[str]:
        try:
            header = next(reader, list[str]())
        except csv.Error as error:
            raise UserError(f"{self.table} line 1 is not a row of a CSV file ({error})") from None
        header = [strip_text(name) for name in header]
        for column in self.columns.given():
            if column not in header:
                raise UserError(
                    f"{self.table} has no column {column!r} (it has: {_list_columns(header)}); "
                    f"{self._header_remedy(header)}"
                )
        if len(set(header)) != len(header):
            raise UserError(f"{self.table} line 1 names a column twice: {', '.join(header)}")
        return header

    def _header_remedy(self, header: list[str]) -> str:
        delimiter = other_delimiter(header, self.columns.given(), self.form.delimiter)
        if delimiter is not None:
            shown = r"\t" if delimiter == "\t" else delimiter
            return f"its fields have another delimiter: add --delimiter '{shown}'"
        if self._encoding is not None:
            return f"it is not in UTF-8: name its encoding, as with --encoding {self._encoding}"
        return (
            "name the right one, or null for none, with --image_column, --caption_column, --key_column, "
            "--split_column; if names are cut wrongly, give the --delimiter of fields"
        )


class JsonlSource(_Table):
    """A file of JSON objects in UTF-8, one per line. If the first line has a list of captions, all lines may."""

    kind: TableKind = "jsonl"

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield a row per line, without blank lines."""
        is_first = True
        with self.table.open("rb") as file:
            for number, line in enumerate(file):
                place = f"{self.table.name} line {number + 1}"
                if not line.strip():
                    continue
                try:
                    fields = parse_json_object(line)
                    if is_first and self.columns.caption and isinstance(fields.get(self.columns.caption), list):
                        self.layout = Layout({}, self.columns.caption, keys_repeat=False)
                    is_first = False
                    yield self._row(fields, number, place)
                except RowError as fault:
                    yield fault.to_bad_row(place)


def _list_columns(header: list[str]) -> str:
    return ", ".join(name if name.isprintable() else ascii(name) for name in header) or "none"


def _text(fields: Mapping[str, object], column: str, numbers: bool = False) -> str:
    value = fields[column]
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError("row_malformed", f"{column!r} is {type(value).__name__}, not a text")
    check_text(value)
    return value


def _check_annotation(annotation: Mapping[str, object]) -> None:
    check_text(json.dumps(annotation, ensure_ascii=False))
