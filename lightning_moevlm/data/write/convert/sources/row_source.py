"""What every kind of source comes down to: rows, each one sample that is to be, or the reason why it cannot be.

A source only reads its table. Its images are named, not opened: they are looked at later, by several
processes, and never outside the folder that the source names.
"""

import json
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Literal, NamedTuple, get_args

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.layout import PLAIN_LAYOUT, Layout
from lightning_moevlm.data.format.manifest import SPLITS, Scalar, Split
from lightning_moevlm.data.text.texts import strip_text

BadCause = Literal[
    "row_malformed",  # no row of its table: fields missing, not JSON, of another kind
    "text_not_utf8",
    "caption_empty",
    "question_unanswered",
    "key_malformed",  # dots, slashes or other signs that a member's name cannot hold
    "duplicate_key",
    "split_unknown",
    "path_outside",  # an absolute path, `..`, or a link that leads out of the source's folder
    "image_missing",
    "image_undecodable",
    "image_too_large",
    "member_missing",  # a sample of a tar without an image or text that its set promises
]
BAD_CAUSES: tuple[BadCause, ...] = get_args(BadCause)

LONGEST_KEY = 80
"""Signs; they leave room for extension and header in a tar."""
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")
"""Whatever reads tars takes the first dot for the end of the key."""


class BadRow(NamedTuple):
    """A row that gives no sample. place: where it stands in the source. cause: one word. message: what is wrong."""

    place: str
    cause: BadCause
    message: str


class RowError(Exception):
    """Raised inside a source or while looking at an image; whoever goes through rows makes a `BadRow` of it."""

    def __init__(self, cause: BadCause, message: str) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message

    def to_bad_row(self, place: str) -> BadRow:
        """Return the bad row that this is."""
        return BadRow(place, self.cause, self.message)


class ImageLocation(NamedTuple):
    """Where an image's bytes lie: a file below the source's folder, or a part of one (num_bytes not None)."""

    file: str
    offset: int = 0
    num_bytes: int | None = None


class Row(NamedTuple):
    """One sample to be.

    place: where the row stands, for messages. annotation: content of the json member, None for no such member.
    split: None where the hash of what it shows decides. words: texts beside the caption for the tokenizer to learn.
    """

    place: str
    key: str
    image: ImageLocation | None
    caption: str | None
    annotation: dict[str, object] | None
    split: Split | None = None
    extra_texts: tuple[str, ...] = ()


class Source(ABC):
    """A table of rows and the folder that their images lie in.

    name: of the set to be, and the beginning of its keys. arguments: everything that decides about the rows, the
    hash of the table's bytes included; never a path, so that the same table gives the same set anywhere. layout: where
    captions lie in the samples that its rows become, known when the rows are read. tokenizer_file: what spells the
    texts already; None learns a tokenizer from them. remedies: what to do where many
    rows are bad for one cause. notes: sentences to tell when the rows are read.
    """

    layout: Layout = PLAIN_LAYOUT
    tokenizer_file: Path | None = None
    remedies: Mapping[BadCause, str] = {"image_missing": "name the folder of the images with --images"}

    def __init__(self, name: str, folder: Path, arguments: dict[str, Scalar]) -> None:
        self.name = name
        self.folder = folder
        self.arguments = arguments
        self.notes: list[str] = []

    @abstractmethod
    def rows(self) -> Iterator[Row | BadRow]:
        """Yield every row in the source's order.

        Raises:
            UserError: if the table as a whole cannot be read.

        """


def make_set_name(text: str) -> str:
    """Return a name made of signs that a key may have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:48] or "set"


def check_key(key: str) -> str:
    """Return the key.

    Raises:
        RowError: if a tar's member could not be named by it.

    """
    if _KEY.fullmatch(key) is None:
        raise RowError("key_malformed", f"key {key[:100]!r} is not 1 to 80 letters, digits, - and _")
    return key


def parse_split(text: str) -> Split:
    """Return the split that a table names.

    Raises:
        RowError: if it is none.

    """
    for split in SPLITS:
        if strip_text(text) == split:
            return split
    raise RowError("split_unknown", f"split {text[:40]!r} is not one of {', '.join(SPLITS)}")


def clean_caption(text: object) -> str:
    """Return the caption without surrounding blanks and without a byte-order mark.

    Raises:
        RowError: if it is no text, an empty one, or one that UTF-8 cannot hold.

    """
    if not isinstance(text, str):
        raise RowError("row_malformed", f"caption is {type(text).__name__}, not a text")
    check_text(text)
    if not strip_text(text):
        raise RowError("caption_empty", "caption is empty")
    return strip_text(text)


def check_text(text: str) -> None:
    """Refuse what cannot be written as UTF-8.

    Raises:
        RowError: if the text holds half a character (a lone surrogate, or bytes that were no UTF-8).

    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("text_not_utf8", f"bytes or escapes that are no UTF-8 at sign {error.start + 1}") from None


def parse_json_object(data: bytes) -> dict[str, object]:
    """Return the object that a line or a member holds.

    NaN and Infinity, which many programs write and JSON does not know, become null.

    Raises:
        RowError: if it is no JSON object in UTF-8.

    """
    try:
        content = json.loads(data.decode("utf-8-sig"), parse_constant=_null)
    except UnicodeDecodeError as error:
        raise RowError("text_not_utf8", f"bytes that are no UTF-8 at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError("row_malformed", f"this is not JSON ({reason})") from None
    if not isinstance(content, dict):
        raise RowError("row_malformed", f"this is a JSON {type(content).__name__}, not an object")
    return content


def _null(name: str) -> None:
    """Take the place of a constant that JSON does not know."""


def resolve_inside(folder: Path, file: str) -> Path:
    """Return the real path of a file that a table names.

    Raises:
        RowError: if the name leads out of the folder, by its words or by a link, or there is no such regular file.

    """
    name = PurePath(file.replace("\\", "/"))  # tables from Windows
    if name.is_absolute() or PureWindowsPath(file).is_absolute() or ".." in name.parts:
        raise RowError("path_outside", f"image {file[:200]!r} is not a path within the folder of images")
    if "\0" in file or not name.parts:
        raise RowError("image_missing", f"image {file[:200]!r} is not a file name")
    try:
        path = (folder / name).resolve(strict=True)
        mode = path.stat().st_mode
    except UnicodeEncodeError:
        raise RowError("image_missing", f"image {file[:200]!r} is not a file name: it is not UTF-8") from None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a ring of links"
        raise RowError("image_missing", f"image {file[:200]!r} cannot be found ({reason})") from None
    if not path.is_relative_to(folder.resolve()):
        raise RowError("path_outside", f"image {file[:200]!r} is a link that leads out of the folder of images")
    if not stat.S_ISREG(mode):
        raise RowError("image_missing", f"image {file[:200]!r} is not a regular file")
    return path


def require_file(path: Path, option: str) -> Path:
    """Return the path.

    Raises:
        UserError: if no such file exists.

    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file in it")
    if not path.is_file():
        raise UserError(f"{option} {path}: there is no such file")
    return path


def require_folder(path: Path, option: str) -> Path:
    """Return the path.

    Raises:
        UserError: if no such folder exists.

    """
    if path.is_file():
        raise UserError(f"{option} {path} is a file; give the folder that it is in")
    if not path.is_dir():
        raise UserError(f"{option} {path}: there is no such folder")
    return path
