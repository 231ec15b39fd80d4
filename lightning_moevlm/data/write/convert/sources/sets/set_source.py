"""Reads the samples of a set of shards: their images by place in the tars, and what their json members say.

A set that is made from another keeps its splits and its tokenizer, so that a model trained on the captions can
continue. The bytes of images are copied unchanged if they fit.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Manifest, Scalar, ShardEntry, Split
from lightning_moevlm.data.format.sample_groups import key_and_extension, sample_groups
from lightning_moevlm.data.format.tar_members import TarBreak, tar_members
from lightning_moevlm.data.images.decode import IMAGE_EXTENSIONS
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.captions import ANNOTATION_EXTENSION
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, ImageLocation, Source


class SetSample(NamedTuple):
    """A sample of the other set."""

    split: Split
    place: str  # tar and key, for messages
    key: str
    image: ImageLocation | None
    annotation: bytes  # of its json member


class SetSource(Source):
    """Rows made from the samples of a set of shards in a folder.

    Args:
        folder: Folder of the set.
        name: Name of the new set; None adds the kind to the other set's name.
        kind: Kind of conversion, such as questions.
        arguments: All else that determines the rows.

    Raises:
        UserError: there is no such set, or its samples have no json member.
    """

    def __init__(self, folder: Path, name: str | None, kind: str, arguments: dict[str, Scalar] | None = None) -> None:
        self.storage = ShardStorage(str(folder))
        self.manifest: Manifest = self.storage.read_manifest()
        if ANNOTATION_EXTENSION not in self.manifest.members:
            raise UserError(
                f"samples of {folder} have no json member with {kind}: they have {', '.join(self.manifest.members)}; "
                f"{self.remedy}"
            )
        common: dict[str, Scalar] = {"source": kind, "table": self.manifest.digest}
        super().__init__(name or f"{self.manifest.name}-{kind}", folder, common | (arguments or {}))
        self.tokenizer_file = folder / self.manifest.tokenizer.file

    @property
    def remedy(self) -> str:
        """Which sets to choose instead of one without json members."""
        return "choose a set such as scenes"

    def samples(self) -> Iterator[SetSample | BadRow]:
        """Yield the samples of all splits, in the order of the tars."""
        for split, entries in self.manifest.splits.items():
            for entry in entries:
                yield from self._read_tar(split, entry)

    def _read_tar(self, split: Split, entry: ShardEntry) -> Iterator[SetSample | BadRow]:
        path, layout = self.storage.local_path(entry), self.manifest.layout
        texts = layout.extensions_of(ANNOTATION_EXTENSION)
        try:
            with path.open("rb") as stream:
                members = tar_members(stream, lambda name: key_and_extension(name)[1] in texts)
                for key, found, _ in sample_groups(members):
                    place = f"{entry.file} {key[:100]}"
                    image = next((m for name in IMAGE_EXTENSIONS if (m := layout.find(name, found)) is not None), None)
                    text = layout.find(ANNOTATION_EXTENSION, found)
                    if text is None:
                        yield BadRow(place, "member_missing", "this sample has no json member")
                        continue
                    where = None if image is None else ImageLocation(entry.file, image.offset, image.num_bytes)
                    yield SetSample(split, place, key, where, text.data or b"")
        except TarBreak as error:
            raise UserError(f"{path} is truncated or not a tar: it {error}; build the set again") from None
