"""Defines sources of a conversion: rows that each become a sample, or the reason why they cannot.

A source reads only its table and names its images. Images are inspected later, by several processes, and never outside
of the source's folder.
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
    "row_malformed",  # not a row of its table: fields missing, not JSON, of another type
    "text_not_utf8",
    "caption_empty",
    "question_unanswered",
    "key_malformed",  # dots, slashes or other characters that a member's name cannot hold
    "duplicate_key",
    "split_unknown",
    "path_outside",  # an absolute path, `..`, or a link out of the source's folder
    "image_missing",
    "image_undecodable",
    "image_too_large",
    "member_missing",  # a sample of a tar without an image or text that its set promises
]
BAD_CAUSES: tuple[BadCause, ...] = get_args(BadCause)

LONGEST_KEY = 80
"""Characters; they leave room for the extension in a tar header."""
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")
"""Without dots: readers of tars end the key at the first dot."""


class BadRow(NamedTuple):
    """A row that gives no sample."""

    place: str  # in the source
    cause: BadCause
    message: str


class RowError(Exception):
    """A row or its image is bad; readers of rows turn this into a `BadRow`."""

    def __init__(self, cause: BadCause, message: str) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message

    def to_bad_row(self, place: str) -> BadRow:
        """Return this as a bad row."""
        return BadRow(place, self.cause, self.message)


class ImageLocation(NamedTuple):
    """The place of an image's bytes."""

    file: str  # path within the source's folder
    offset: int = 0
    num_bytes: int | None = None  # None: up to the end of the file


class Row(NamedTuple):
    """A row that becomes a sample."""

    place: str  # in the source, for messages
    key: str
    image: ImageLocation | None
    caption: str | None
    annotation: dict[str, object] | None  # content of the json member; None: no such member
    split: Split | None = None  # None: the hash of the content decides
    extra_texts: tuple[str, ...] = ()  # for the tokenizer, besides the caption
    second_image: ImageLocation | None = None  # of samples with two images

    @property
    def images(self) -> tuple[ImageLocation, ...]:
        """The images of the sample, none to two."""
        return tuple(image for image in (self.image, self.second_image) if image is not None)


class Source(ABC):
    """A table of rows and the folder of their images.

    Args:
        name: Name of the set, and prefix of its keys; other characters than keys may have become -.
        folder: Folder of the images.
        arguments: All that determines the rows, with the hash of the table. Paths are left out, so that the same table
            gives the same set anywhere.

    Raises:
        UserError: if there is no such folder.
    """

    layout: Layout = PLAIN_LAYOUT  # place of captions in the samples; known after the rows are read
    tokenizer_file: Path | None = None  # encodes the texts; None trains a tokenizer on them
    remedies: Mapping[BadCause, str] = {"image_missing": "name the folder of the images with --images"}

    def __init__(self, name: str, folder: Path, arguments: dict[str, Scalar]) -> None:
        self.name = make_set_name(name)
        self.folder = require_folder(folder, "--images")
        self.arguments = arguments
        self.notes: list[str] = []  # sentences to print after the rows are read

    @abstractmethod
    def rows(self) -> Iterator[Row | BadRow]:
        """Yield all rows in the source's order.

        Raises:
            UserError: if the table as a whole cannot be read.
        """


def make_set_name(text: str) -> str:
    """Return a name of characters that keys may have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:48] or "set"


def check_key(key: str) -> str:
    """Return the key.

    Raises:
        RowError: if a member of a tar cannot have this key.
    """
    if _KEY.fullmatch(key) is None:
        raise RowError("key_malformed", f"key {key[:100]!r} is not 1 to 80 letters, digits, - and _")
    return key


def parse_split(text: str) -> Split:
    """Return the split that a table names.

    Raises:
        RowError: if it is not a split.
    """
    for split in SPLITS:
        if strip_text(text) == split:
            return split
    raise RowError("split_unknown", f"split {text[:40]!r} is not one of {', '.join(SPLITS)}")


def clean_caption(text: object) -> str:
    """Return the caption without surrounding blanks and without a byte-order mark.

    Raises:
        RowError: if it is not a text, is empty, or is not valid UTF-8.
    """
    if not isinstance(text, str):
        raise RowError("row_malformed", f"caption is {type(text).__name__}, not a text")
    check_text(text)
    if not strip_text(text):
        raise RowError("caption_empty", "caption is empty")
    return strip_text(text)


def check_text(text: str) -> None:
    """Refuse a text that UTF-8 cannot encode.

    Raises:
        RowError: if it holds half a character (a lone surrogate, or bytes of invalid UTF-8).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("text_not_utf8", f"invalid UTF-8 at character {error.start + 1}") from None


def parse_json_object(data: bytes) -> dict[str, object]:
    """Parse a JSON object.

    NaN and Infinity, which many programs write although JSON lacks them, become null.

    Raises:
        RowError: if it is not a JSON object in UTF-8.
    """
    try:
        content = json.loads(data.decode("utf-8-sig"), parse_constant=_null)
    except UnicodeDecodeError as error:
        raise RowError("text_not_utf8", f"invalid UTF-8 at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError("row_malformed", f"this is not JSON ({reason})") from None
    if not isinstance(content, dict):
        raise RowError("row_malformed", f"this is a JSON {type(content).__name__}, not an object")
    return content


def _null(name: str) -> None:
    """Replace a constant that JSON lacks."""


def resolve_inside(folder: Path, file: str) -> Path:
    """Return the real path of a file that a table names.

    Raises:
        RowError: if the name or a link leads out of the folder, or there is no such regular file.
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
        reason = getattr(error, "strerror", None) or "a cycle of links"
        raise RowError("image_missing", f"image {file[:200]!r} cannot be found ({reason})") from None
    if not path.is_relative_to(folder.resolve()):
        raise RowError("path_outside", f"image {file[:200]!r} is a link that leads out of the folder of images")
    if not stat.S_ISREG(mode):
        raise RowError("image_missing", f"image {file[:200]!r} is not a regular file")
    return path


def require_file(path: Path, option: str) -> Path:
    """Return the path, or raise a `UserError` if it is not a file."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file in it")
    if not path.is_file():
        raise UserError(f"{option} {path}: there is no such file")
    return path


def require_folder(path: Path, option: str) -> Path:
    """Return the path, or raise a `UserError` if it is not a folder."""
    if path.is_file():
        raise UserError(f"{option} {path} is a file; give the folder that it is in")
    if not path.is_dir():
        raise UserError(f"{option} {path}: there is no such folder")
    return path
