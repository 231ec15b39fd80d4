"""What img2dataset writes (`output_format webdataset`): NNNNN.tar, each with NNNNN_stats.json beside it.

Its tars are WebDataset shards already: KEY.jpg, KEY.txt (where there were captions), KEY.json. A tar without its
statistics was never finished, and one that holds fewer samples than they tell was cut short; both are refused. A folder
without any statistics is one of plain WebDataset shards, under any name: what they hold is what their set has.
Format: the README of github.com/rom1504/img2dataset, "Output format".
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.convert.rows import (
    BadRow,
    PictureAt,
    Row,
    RowError,
    Source,
    checked_caption,
    checked_key,
    existing_folder,
    inside,
    json_object,
    set_name,
)
from lightning_moevlm.shards.manifest import OTHER_SPELLINGS, Scalar

PICTURE_EXTENSIONS = ("jpg", "png", "webp")
_TAR = re.compile(r"\d+\.tar")
_STATISTICS = "_stats.json"


class Part(NamedTuple):
    """A member of a sample: where its bytes lie in the tar."""

    offset: int
    num_bytes: int


class Download(NamedTuple):
    """One tar that is finished. num_samples: as its statistics tell; None where the folder has none."""

    file: str
    num_samples: int | None
    num_bytes: int


def downloads(folder: Path) -> tuple[Download, ...]:
    """Return the finished tars of a folder, by name.

    Raises:
        UserError: if there are none, or one is not finished.

    """
    existing_folder(folder, "folder")
    if any(folder.glob(f"*{_STATISTICS}")):
        found = [_finished(path) for path in _tars(folder) if _TAR.fullmatch(path.name)]
    else:
        found = [Download(path.name, None, path.stat().st_size) for path in _tars(folder)]
    if not found:
        raise UserError(
            f"{folder} holds no tars of WebDataset or img2dataset (00000.tar, 00000{_STATISTICS} and so on); was "
            "img2dataset run with --output_format webdataset?"
        )
    return tuple(found)


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _finished(path: Path) -> Download:
    stats = path.with_name(f"{path.stem}{_STATISTICS}")
    try:
        successes = json.loads(stats.read_bytes())["successes"]
    except FileNotFoundError:
        raise UserError(
            f"{path} has no {stats.name} beside it, so img2dataset has not finished it; let it finish, or move the tar "
            "away"
        ) from None
    except (ValueError, KeyError, TypeError):
        successes = None
    if not isinstance(successes, int):
        raise UserError(f"{stats} does not tell how many downloads were successes; is it img2dataset's?")
    return Download(path.name, successes, path.stat().st_size)


def fingerprint(found: tuple[Download, ...]) -> str:
    """Sha256, in hex, of the tars' names, sizes and counts: what can be told of them without reading them."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def samples_of(folder: Path, download: Download) -> Iterator[tuple[str, dict[str, Part]]]:
    """Yield every sample of a tar: its key, and its members by extension; one that comes again begins a second sample.

    Raises:
        UserError: if it is no tar, ends within a member, or holds another number of samples.

    """
    remedy = "download it again, or move it and its statistics away"
    num_samples = 0
    try:
        path = inside(folder, download.file)
        with tarfile.open(path, "r:") as tar:
            key, parts = "", dict[str, Part]()
            for member in tar:
                if not member.isreg():
                    continue
                name, _, ending = member.name.rpartition("/")[2].partition(".")
                extension = OTHER_SPELLINGS.get(ending.lower(), ending.lower())
                if parts and (name != key or extension in parts):
                    num_samples += 1
                    yield key, parts
                    parts = {}
                key = name
                parts[extension] = Part(member.offset_data, member.size)
            if parts:
                num_samples += 1
                yield key, parts
    except RowError as error:
        raise UserError(f"{folder / download.file}: {error}") from None
    except tarfile.TarError as error:
        raise UserError(f"{folder / download.file} is cut short, or no tar ({error}); {remedy}") from None
    if download.num_samples is not None and num_samples != download.num_samples:
        raise UserError(
            f"{folder / download.file} holds {num_samples} samples, its statistics tell {download.num_samples}; "
            f"{remedy}"
        )


def read_part(file: BinaryIO, part: Part) -> bytes:
    """Return a member's bytes from its tar."""
    file.seek(part.offset)
    return file.read(part.num_bytes)


def picture_extension(parts: dict[str, Part]) -> str:
    """Return the extension of a sample's picture.

    Raises:
        RowError: if it has none.

    """
    for extension in PICTURE_EXTENSIONS:
        if extension in parts:
            return extension
    raise RowError("member_missing", f"no picture (.{', .'.join(PICTURE_EXTENSIONS)}), only .{', .'.join(parts)}")


def caption_of(data: bytes) -> str:
    """Return the caption that a txt member holds.

    Raises:
        RowError: if it is empty or no UTF-8.

    """
    try:
        return checked_caption(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("text_not_utf8", f"bytes that are no UTF-8 at byte {error.start + 1}") from None


class Img2datasetSource(Source):
    """img2dataset's samples as rows, for writing them anew: in new shards, mixed, split by picture, scaled."""

    def __init__(self, folder: Path, name: str | None) -> None:
        self.found = downloads(folder)
        arguments: dict[str, Scalar] = {"source": "img2dataset", "keep_tars": False, "table": fingerprint(self.found)}
        super().__init__(set_name(name or folder.resolve().name), folder, arguments)

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the samples of every tar, by name; pictures are not read."""
        for download in self.found:
            with (self.folder / download.file).open("rb") as file:
                for key, parts in samples_of(self.folder, download):
                    texts: dict[str, bytes] = {}
                    for extension in ("txt", "json"):
                        if extension in parts:
                            texts[extension] = read_part(file, parts[extension])
                    place = f"{download.file} {key[:100]}"
                    try:
                        yield self._row(key, parts, texts, download.file, place)
                    except RowError as error:
                        yield error.at(place)

    def _row(self, key: str, parts: dict[str, Part], texts: dict[str, bytes], file: str, place: str) -> Row:
        offset, num_bytes = parts[picture_extension(parts)]
        return Row(
            place=place,
            key=checked_key(f"{self.name}-{key}"),
            picture=PictureAt(file, offset, num_bytes),
            caption=caption_of(texts["txt"]) if "txt" in texts else None,
            annotation=json_object(texts["json"]) if "json" in texts else None,
        )
