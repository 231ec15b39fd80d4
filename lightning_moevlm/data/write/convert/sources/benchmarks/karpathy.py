"""Reads the splits of COCO and Flickr30k that retrieval is reported on (Karpathy, arXiv 1412.2306; dataset_coco.json).

An image is one sample with all of its captions. Each epoch of training draws one; in evaluation every caption is a
candidate and an answer, as in the literature.
"""

from collections.abc import Iterator
from pathlib import Path

from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import Scalar, Split, file_sha256
from lightning_moevlm.data.write.convert.sources.benchmarks.json_files import (
    list_field,
    list_of,
    number_field,
    read_object,
    text_field,
)
from lightning_moevlm.data.write.convert.sources.row_source import (
    BadRow,
    ImageLocation,
    Row,
    RowError,
    Source,
    check_text,
    clean_caption,
    require_file,
)

_SPLITS: dict[str, Split] = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_WANTED = "a file of Karpathy's splits, such as dataset_coco.json"


class KarpathyCaptions(Source):
    """A `dataset_*.json`; `restval` is training data, as everywhere in the literature.

    images: folder that paths of images start from; for COCO the one with train2014 and val2014.
    """

    def __init__(self, file: Path, images: Path, name: str | None) -> None:
        table = require_file(file, "file")
        arguments: dict[str, Scalar] = {"source": "karpathy", "table": file_sha256(table), "captions": "together"}
        super().__init__(name or table.stem, images, arguments)
        self.table = table
        self.layout = Layout({}, "captions", keys_repeat=False)

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the images in the order of the file."""
        content = read_object(self.table)
        for number, entry in enumerate(list_of(content, "images", self.table, _WANTED)):
            try:
                yield self._image(entry, f"{self.table.name} images[{number}]")
            except RowError as fault:
                yield fault.to_bad_row(f"{self.table.name} images[{number}]")

    def _image(self, entry: dict[str, object], place: str) -> Row:
        image_id, file, split = number_field(entry, "imgid"), text_field(entry, "filename"), text_field(entry, "split")
        if split not in _SPLITS:
            raise RowError("split_unknown", f"split {split[:40]!r} is not one of {', '.join(_SPLITS)}")
        path = f"{entry['filepath']}/{file}" if "filepath" in entry else file
        check_text(path)
        captions = [clean_caption(text_field(each, "raw")) for each in list_field(entry, "sentences")]
        if not captions:
            raise RowError("caption_empty", "this image has no sentence")
        return Row(
            place=place,
            key=f"{self.name}-{image_id:012d}",
            image=ImageLocation(path),
            caption=captions[0],
            annotation={"image_id": image_id, "file_name": path, "captions": captions},
            split=_SPLITS[split],
            extra_texts=tuple(captions[1:]),
        )
