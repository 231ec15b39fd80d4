"""Reads img2dataset's output (`output_format webdataset`): NNNNN.tar, each with NNNNN_stats.json beside it.

The tars are WebDataset shards: KEY.jpg, KEY.txt (if there were captions), KEY.json. A tar without statistics was never
finished, and one with fewer samples than its statistics was truncated; both are refused. A folder without any
statistics holds plain WebDataset shards, under any name. Members are grouped to samples as in readers of shards
(`sample_groups`).
Format: the README of github.com/rom1504/img2dataset, "Output format".
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import Scalar
from lightning_moevlm.data.format.sample_groups import key_and_extension, sample_groups
from lightning_moevlm.data.format.tar_members import Member, TarBreak, tar_members
from lightning_moevlm.data.write.convert.sources.member_names import DEFAULT_NAMES, MemberNames, is_image
from lightning_moevlm.data.write.convert.sources.row_source import (
    LONGEST_KEY,
    BadCause,
    BadRow,
    ImageLocation,
    Row,
    RowError,
    Source,
    check_key,
    parse_json_object,
    require_folder,
    resolve_inside,
)
from lightning_moevlm.data.write.convert.unread_texts import UnreadTexts

_TAR = re.compile(r"\d+\.tar")
_STATISTICS = "_stats.json"
REMEDIES: dict[BadCause, str] = {
    "member_missing": "members of a sample stand side by side and have one path up to the first dot of the file name, "
    "folders included; name other members with --image_member, --caption_member or --caption_field",
    "duplicate_key": "samples of one tar need different keys; pack them into several tars, or rename them",
    "row_malformed": "its json members do not have the form expected; name another field with --caption_field",
    "text_not_utf8": "its texts are in another encoding; write them in UTF-8",
}
"""Advice by cause, if many samples are bad."""
_SHOWN = 4
_KEPT_KEY_SIGNS = 40
"""Characters kept of an invalid key; a hash of the whole key follows."""


class Download(NamedTuple):
    """A finished tar."""

    file: str
    num_samples: int | None  # by its statistics; None if the folder has no statistics
    num_bytes: int


class _Statistics(msgspec.Struct):
    successes: int


def find_downloads(folder: Path) -> tuple[Download, ...]:
    """Return the finished tars of a folder, by name.

    Raises:
        UserError: if there are no tars, or one is unfinished.
    """
    require_folder(folder, "folder")
    if any(folder.glob(f"*{_STATISTICS}")):
        found = [_check_finished(path) for path in _tars(folder) if _TAR.fullmatch(path.name)]
    else:
        found = [Download(path.name, None, path.stat().st_size) for path in _tars(folder)]
    below = sorted({path.parent.name for path in folder.glob("*/*.tar")}) if not found else []
    if below:
        raise UserError(
            f"{folder} holds no tars, but folders in it do ({', '.join(below[:_SHOWN])}): convert each to a set and "
            "mix them with data.sources, or link all their tars into one folder"
        )
    if not found:
        raise UserError(
            f"{folder} holds no tars of WebDataset or img2dataset (00000.tar, 00000{_STATISTICS} and so on); was "
            "img2dataset run with --output_format webdataset?"
        )
    return tuple(found)


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _check_finished(path: Path) -> Download:
    stats = path.with_name(f"{path.stem}{_STATISTICS}")
    try:
        successes = msgspec.json.decode(stats.read_bytes(), type=_Statistics).successes
    except FileNotFoundError:
        raise UserError(
            f"{path} has no {stats.name} beside it, so img2dataset has not finished it; let it finish, or move the tar "
            "away"
        ) from None
    except msgspec.DecodeError as error:
        raise UserError(
            f"{stats} does not state the number of successful downloads ({error}); run img2dataset again, or move "
            "the file and its tar away"
        ) from None
    return Download(path.name, successes, path.stat().st_size)


def fingerprint(found: tuple[Download, ...]) -> str:
    """Return the sha256, in hex, of the tars' names, sizes and counts, which are known without reading them."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


class TarSample(NamedTuple):
    """A sample of a tar."""

    key: str
    members: dict[str, Member]  # by extension; unwanted ones have no data


def read_samples(
    folder: Path, download: Download, known: frozenset[str], wanted: Callable[[str], bool]
) -> Iterator[TarSample]:
    """Yield every sample of a tar as in readers of shards. wanted: extensions whose bytes are read.

    Groups without a known extension and without an image (`README.md`) are ignored.

    Raises:
        UserError: if it is not a whole tar, members of a sample are not adjacent, or the number of samples differs from
            its statistics.
    """
    remedy = "download it again, or move it and its statistics away"
    num_samples = 0
    extensions_of: dict[str, set[str]] = {}
    try:
        with resolve_inside(folder, download.file).open("rb") as stream:
            members = tar_members(stream, lambda name: wanted(key_and_extension(name)[1]))
            for key, found, _ in sample_groups(members):
                if not found.keys() & known and not any(map(is_image, found)):
                    continue
                _refuse_scattered(folder / download.file, key, extensions_of.setdefault(key, set()), found)
                extensions_of[key].update(found)
                num_samples += 1
                yield TarSample(key, found)
    except RowError as error:
        raise UserError(f"{folder / download.file}: {error}") from None
    except TarBreak as error:
        raise UserError(f"{folder / download.file} is truncated or not a tar: it {error}; {remedy}") from None
    if download.num_samples is not None and num_samples != download.num_samples:
        raise UserError(
            f"{folder / download.file} holds {num_samples} samples, but {download.num_samples} by its statistics; "
            f"{remedy}"
        )


def _refuse_scattered(tar: Path, key: str, before: set[str], found: dict[str, Member]) -> None:
    """Refuse members of one key with others between: readers would make two incomplete samples of them."""
    if before and not before & found.keys():
        raise UserError(
            f"{tar}: members of {key} are not adjacent (.{', .'.join(sorted(before))} first, "
            f".{', .'.join(sorted(found))} later), but readers of shards need them so; sort the tar: unpack it into an "
            f"empty folder and pack it with `tar --sort=name -cf {tar.name} -C FOLDER .`"
        )


class Img2datasetSource(Source):
    """img2dataset's samples as rows, to write them again: mixed, split by image, scaled."""

    def __init__(self, folder: Path, name: str | None, names: MemberNames = DEFAULT_NAMES) -> None:
        self.found = find_downloads(folder)
        arguments: dict[str, Scalar] = {"source": "img2dataset", "keep_tars": False, "table": fingerprint(self.found)}
        if self.found[0].num_samples is None:
            arguments["keys"] = "TAR-KEY"
        super().__init__(name or folder.resolve().name, folder, {**arguments, **names.as_arguments()})
        self.names = names
        self.layout = Layout({}, names.caption_field or "", keys_repeat=False)
        self.remedies = REMEDIES

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the samples of all tars, in the order of names; images are not read."""
        names, unread = self.names, UnreadTexts(self.names)
        wanted = {"json", names.text}
        for download in self.found:
            tar = read_samples(self.folder, download, names.known, lambda name: name in wanted or unread.is_open)
            for sample in tar:
                unread.inspect(sample.members)
                place = f"{download.file} {sample.key[:100]}"
                try:
                    yield self._row(sample, download, place)
                except RowError as error:
                    yield error.to_bad_row(place)
            if unread.problem:
                raise UserError(f"{self.folder / download.file}: {unread.problem}")

    def _row(self, sample: TarSample, download: Download, place: str) -> Row:
        names, members = self.names, sample.members
        image, about = members[names.find_image(members)], members.get("json")
        text = None if names.text is None else members.get(names.text)
        if text is None and names.caption_field is not None:
            raise RowError("member_missing", f"no .json with captions, only .{', .'.join(members)}")
        captions = () if text is None else names.read_captions(text.data or b"")
        return Row(
            place=place,
            key=self._key(sample.key, download),
            image=ImageLocation(download.file, image.offset, image.num_bytes),
            caption=captions[0] if captions and names.caption_field is None else None,
            annotation=None if about is None else parse_json_object(about.data or b""),
            extra_texts=() if names.caption_field is None else captions,
        )

    def _key(self, key: str, download: Download) -> str:
        """Return a key that is unique in the set; plain WebDataset shards may repeat keys from tar to tar."""
        whole = key if download.num_samples is not None else f"{Path(download.file).stem}-{key}"
        signs = re.sub(r"[^A-Za-z0-9_-]+", "-", whole)
        if signs != whole or len(f"{self.name}-{whole}") > LONGEST_KEY:
            signs = f"{signs[:_KEPT_KEY_SIGNS]}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"
        return check_key(f"{self.name}-{signs}"[-LONGEST_KEY:])
