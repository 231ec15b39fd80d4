"""Refuses files that are not a table of the given kind (Parquet, compressed, JSON for CSV), with a remedy."""

import codecs
import shlex
from pathlib import Path
from typing import Literal

from lightning_moevlm.common.errors import UserError

TableKind = Literal["csv", "jsonl"]
_LOOKED_AT = 2**16
"""Bytes at the beginning of a file to inspect."""
_OTHERS = {
    b"PAR1": ("a Parquet file", ""),
    b"\x1f\x8b": ("compressed (gzip)", "gunzip {file}"),
    b"BZh": ("compressed (bzip2)", "bunzip2 {file}"),
    b"\xfd7zXZ": ("compressed (xz)", "unxz {file}"),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", "unzstd {file}"),
    b"PK\x03\x04": ("a zip or Excel file", ""),
    b"ARROW1": ("an Arrow file", ""),
    b"SQLite format 3": ("an SQLite database", ""),
}
_PARQUET = (
    "python -c \"import pandas; pandas.read_parquet('{file}').to_json('{stem}.jsonl', orient='records', lines=True)\""
)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def refuse_other_than_table(path: Path, kind: TableKind) -> None:
    """Inspect the beginning of a file.

    Raises:
        UserError: if it is not a table of this kind, with a remedy.
    """
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
    for mark, (what, command) in _OTHERS.items():
        if start.startswith(mark):
            raise UserError(f"table {path} is {what}, not a {_NAMES[kind]}; {_remedy(path, mark, command)}")
    if start.startswith(_UTF_16):
        return
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    begins_object, begins_list = text.startswith(b"{"), text.startswith((b"[{", b"[\n", b"[ ", b"[\r", b"[]"))
    if kind == "csv" and (begins_object or begins_list):
        raise UserError(f"table {path} is JSON, not a CSV file; {_json_remedy(path, text)}")
    if kind == "jsonl" and (begins_list or (begins_object and _is_document(text))):
        raise UserError(f"table {path} is one JSON document, not an object per line; {_json_remedy(path, text)}")
    if kind == "jsonl" and text and not begins_object:
        raise UserError(
            f"table {path} does not begin with a JSON object; convert a CSV file with `moevlm data convert csv`"
        )


_NAMES = {"csv": "CSV file", "jsonl": "file of JSON objects"}


def _remedy(path: Path, mark: bytes, command: str) -> str:
    if mark == b"PAR1":
        said = _PARQUET.format(file=path, stem=path.with_suffix(""))
        return f"write its rows as JSON with `{said}`, and convert that with `moevlm data convert jsonl`"
    if command:
        return f"unpack it with `{command.format(file=shlex.quote(str(path)))}`"
    return "export it as a CSV file in UTF-8"


def _json_remedy(path: Path, text: bytes) -> str:
    if text.startswith(b"{") and _is_coco(text):
        return "it looks like COCO's: convert it with `moevlm data convert coco_captions`"
    if text.startswith(b"{") and not _is_document(text):
        return "convert it with `moevlm data convert jsonl`"
    rows = ".[]" if text.startswith(b"[") else "."
    quoted, lines = shlex.quote(str(path)), shlex.quote(f"{path.with_suffix('')}.jsonl")
    return f"write an object per line with `jq -c '{rows}' {quoted} > {lines}`, and convert that as jsonl"


def _is_document(text: bytes) -> bool:
    """Return whether an object spans several lines, or is COCO's."""
    return text.partition(b"\n")[0].rstrip().endswith((b",", b"{", b"[")) or _is_coco(text)


def _is_coco(text: bytes) -> bool:
    return b'"images"' in text and b'"annotations"' in text


def guess_encoding(path: Path) -> str | None:
    """Guess the encoding of a text; None if its beginning is UTF-8."""
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
        if start.startswith(_UTF_16):
            return "utf-16"
        if b"\0" in start:
            return "utf-16-le" if start[1::2].count(0) >= start[::2].count(0) else "utf-16-be"
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while start:
                decoder.decode(start)
                start = file.read(_LOOKED_AT)
        except UnicodeDecodeError:
            return "cp1252"  # the most frequent other encoding: Windows, western languages
    return None
