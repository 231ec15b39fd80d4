"""One of img2dataset's tars, read from end to end: what it holds and what is wrong with it.

Worker processes run this, so nothing heavy is imported here.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lightning_moevlm.data.format.manifest import ShardEntry, file_sha256
from lightning_moevlm.data.write.convert.shard_image import ImageOptions, format_of, inspect_image
from lightning_moevlm.data.write.convert.sources.img2dataset import Download, read_samples
from lightning_moevlm.data.write.convert.sources.member_names import MemberNames
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, RowError, parse_json_object
from lightning_moevlm.data.write.convert.unread_texts import UnreadTexts


@dataclass(frozen=True)
class TarReport:
    """What one tar holds.

    choices: how many good samples have just these members: the extensions "json" and that of the text, sorted, with a
    blank between. images: how many good samples have an image of this extension and format ("jpg JPEG"). captions: of
    good samples. sides: the shorter one of every good image. keys: of all samples. bad: one per sample that cannot be
    used. unread: a complaint about texts that nothing reads, "" if there are none.
    """

    entry: ShardEntry
    choices: dict[str, int]
    images: dict[str, int]
    captions: list[str]
    sides: list[int]
    keys: list[str]
    bad: list[BadRow]
    unread: str


def inspect_tar(download: Download, folder: Path, names: MemberNames) -> TarReport:
    """Read one tar from end to end and look at every sample.

    Raises:
        UserError: if it is no tar, or not whole.

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
            side, image_format = inspect_image(data, ImageOptions("jpg", None)).side, format_of(data)
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
