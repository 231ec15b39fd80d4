"""Reads fields of benchmarks' JSON files. A wrong file is one `UserError`; a wrong entry is a bad row."""

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.write.convert.sources.row_source import RowError, clean_caption


def read_object(path: Path) -> dict[str, object]:
    """Return the content of a file that holds a JSON object.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{path} is not JSON ({where})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; such files hold an object")
    return content


def list_of(content: dict[str, object], key: str, path: Path, wanted: str) -> Sequence[dict[str, object]]:
    """Return a list of entries. wanted: the file that has it.

    Raises:
        UserError: there is no such list.
    """
    entries = content.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list {key!r}: give {wanted}")
    return entries


def text_field(entry: object, key: str) -> str:
    """Return a text.

    Raises:
        RowError: there is none.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        raise RowError("row_malformed", f"there is no text {key!r}")
    return str(entry[key])


def number_field(entry: object, key: str) -> int:
    """Return a whole number of at most 18 digits.

    Raises:
        RowError: there is none.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**18:
        raise RowError("row_malformed", f"there is no number {key!r}")
    return value


def list_field(entry: dict[str, object], key: str) -> list[object]:
    """Return a list; an empty one if there is none.

    Raises:
        RowError: it is something else.
    """
    values = entry.get(key, [])
    if not isinstance(values, list):
        raise RowError("row_malformed", f"{key} are not a list")
    return values


def answers_of(given: Sequence[object], most: object = None) -> tuple[str, tuple[str, ...]]:
    """Return the chief answer to a question, and all of them. most: the chief one, None for the most frequent.

    Raises:
        RowError: there is no answer, or one is not a text.
    """
    answers = tuple(clean_caption(answer) for answer in given)
    chief = clean_caption(most if most is not None or not answers else max(answers, key=answers.count))
    return chief, answers or (chief,)
