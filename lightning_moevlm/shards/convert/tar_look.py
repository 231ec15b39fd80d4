"""One of img2dataset's tars, read from end to end: what it holds and what is wrong with it.

Worker processes run this, so nothing heavy is imported here.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lightning_moevlm.shards.convert.img2dataset import (
    KNOWN_EXTENSIONS,
    Download,
    caption_of,
    picture_extension,
    samples_of,
)
from lightning_moevlm.shards.convert.picture import Wish, look_at, refuse_misnamed
from lightning_moevlm.shards.convert.rows import BadRow, RowError, json_object
from lightning_moevlm.shards.manifest import ShardEntry, file_sha256


@dataclass(frozen=True)
class TarLook:
    """What one tar holds.

    members: for every choice of members (their extensions, sorted, with a blank between) how many good samples have
    just these. sides: the shorter one of every good picture. bad: one per sample that cannot be used.
    """

    entry: ShardEntry
    members: dict[str, int]
    captions: list[str]
    sides: list[int]
    bad: list[BadRow]


def look_at_tar(download: Download, folder: Path) -> TarLook:
    """Read one tar from end to end and look at every sample.

    Raises:
        UserError: if it is no tar, or not whole.

    """
    path = folder / download.file
    members, captions, sides = Counter[str](), list[str](), list[int]()
    bad: list[BadRow] = []
    keys: set[str] = set()
    num_samples = 0
    for key, found in samples_of(folder, download, KNOWN_EXTENSIONS.__contains__):
        num_samples += 1
        try:
            if key in keys:
                raise RowError("duplicate_key", f"key {key!r} occurs twice in its tar")
            keys.add(key)
            picture = picture_extension(found)
            data = found[picture].data or b""
            refuse_misnamed(data, picture)
            side = look_at(data, Wish("jpg", None)).side
            if "json" in found:
                json_object(found["json"].data or b"")
            if "txt" in found:
                captions.append(caption_of(found["txt"].data or b""))
            sides.append(side)
            members[" ".join(sorted(extension for extension in found if extension in KNOWN_EXTENSIONS))] += 1
        except RowError as error:
            bad.append(error.at(f"{download.file} {key[:100]}"))
    entry = ShardEntry(download.file, num_samples, path.stat().st_size, file_sha256(path))
    return TarLook(entry, dict(sorted(members.items())), captions, sides, bad)
