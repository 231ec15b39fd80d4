"""Reads one of img2dataset's tars from end to end, and reports its content and its faults.

Worker processes import this, so it imports nothing heavy.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lightning_moevlm.data.format.manifest import ShardEntry, file_sha256
from lightning_moevlm.data.write.convert.shard_image import ImageOptions, inspect_image, read_format
from lightning_moevlm.data.write.convert.sources.img2dataset import Download, read_samples
from lightning_moevlm.data.write.convert.sources.member_names import MemberNames
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, RowError, parse_json_object
from lightning_moevlm.data.write.convert.unread_texts import UnreadTexts


@dataclass(frozen=True)
class TarReport:
    """The content of one tar."""

    entry: ShardEntry
    choices: dict[str, int]  # good samples by their members: "json" and the text's extension, sorted, with a blank
    images: dict[str, int]  # good samples by extension and format of their image ("jpg JPEG")
    captions: list[str]  # of good samples
    sides: list[int]  # shorter side of every good image, pixels
    keys: list[str]  # of all samples
    bad: list[BadRow]  # one per sample that cannot be used
    unread: str  # a message on texts that nothing would read, or ""


def inspect_tar(download: Download, folder: Path, names: MemberNames) -> TarReport:
    """Read one tar from end to end and inspect every sample.

    Raises:
        UserError: if it is not a whole tar.
    """
    path = folder / download.file
    choices, images, captions, sides = Counter[str](), Counter[str](), list[str](), list[int]()
    bad: list[BadRow] = []
    keys: dict[str, None] = {}
    num_samples = 0
    unread = UnreadTexts(names)
    for key, found in read_samples(folder, download, names.known, lambda name: name in names.known or unread.is_open):
        num_samples += 1
        unread.inspect(found)
        try:
            if key in keys:
                raise RowError("duplicate_key", f"key {key!r} occurs twice in its tar")
            keys[key] = None
            extension = names.find_image(found)
            data = found[extension].data or b""
            side, image_format = inspect_image(data, ImageOptions("jpg", None)).side, read_format(data)
            if "json" in found:
                parse_json_object(found["json"].data or b"")
            if names.text is not None and names.text in found:
                captions.extend(names.read_captions(found[names.text].data or b""))
            sides.append(side)
            images[f"{extension} {image_format}"] += 1
            choices[" ".join(sorted(name for name in ("json", names.text) if name in found))] += 1
        except RowError as error:
            bad.append(error.to_bad_row(f"{download.file} {key[:100]}"))
    entry = ShardEntry(download.file, num_samples, path.stat().st_size, file_sha256(path))
    return TarReport(
        entry,
        dict(sorted(choices.items())),
        dict(sorted(images.items())),
        captions,
        sides,
        list(keys),
        bad,
        unread.problem,
    )
