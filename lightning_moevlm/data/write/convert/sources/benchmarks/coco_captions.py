"""Reads rows from COCO's caption files (2014, 2017; cocodataset.org, "Data format", 4. Image Captioning).

Their entries refer to images by number. A sample here is an image with all of its captions, or one caption.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import Scalar, file_sha256
from lightning_moevlm.data.text.texts import strip_text
from lightning_moevlm.data.write.convert.sources.benchmarks.json_files import (
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

Take = Literal["first", "each", "draw"]
_WANTED = "COCO's captions file, such as captions_train2017.json"


class ImageCaptions(NamedTuple):
    """The captions of one image."""

    file_name: str
    captions: tuple[tuple[str, str], ...]  # (place, text), in the order of their ids


class CocoCaptions(Source):
    """A `captions_*.json`. The json member of a sample holds all captions of its image.

    take: `first` gives one sample per image, with the caption of lowest id; `each` gives one sample per caption, with a
    copy of the image; `draw` gives one sample per image, of whose captions training draws one per epoch and
    evaluation counts all.
    """

    def __init__(self, annotations: Path, images: Path, name: str | None, take: Take) -> None:
        table = require_file(annotations, "annotations")
        arguments: dict[str, Scalar] = {"source": "coco_captions", "table": file_sha256(table), "captions": take}
        super().__init__(name or table.stem, images, arguments)
        self.table = table
        self.take = take
        if take == "draw":
            self.layout = Layout({}, "captions", keys_repeat=False)

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield images in the order of their ids."""
        said, bad = read_captions(self.table)
        yield from bad
        for image_id, about in sorted(said.items()):
            place = f"{self.table.name} image {image_id}"
            if not about.captions:
                yield BadRow(place, "caption_empty", "this image has no caption")
                continue
            every = [strip_text(caption) for _, caption in about.captions]
            annotation: dict[str, object] = {"image_id": image_id, "file_name": about.file_name, "captions": every}
            extra_texts = tuple(every[1:]) if self.take == "draw" else ()
            for number, (where, text) in enumerate(about.captions[: None if self.take == "each" else 1]):
                key = f"{self.name}-{image_id:012d}" + (f"-{number}" if self.take == "each" else "")
                try:
                    image, words = ImageLocation(about.file_name), clean_caption(text)
                    yield Row(where, key, image, words, annotation, extra_texts=extra_texts)
                except RowError as fault:
                    yield fault.to_bad_row(where)


def read_captions(path: Path) -> tuple[dict[int, ImageCaptions], list[BadRow]]:
    """Return the captions of each image, by its id, and the bad entries.

    Raises:
        UserError: if the file is not a COCO annotation file.
    """
    content = read_object(path)
    names: dict[int, str] = {}
    captions: dict[int, list[tuple[int, str, str]]] = {}
    bad: list[BadRow] = []
    for number, entry in enumerate(list_of(content, "images", path, _WANTED)):
        place = f"{path.name} images[{number}]"
        try:
            image_id = number_field(entry, "id")
            if image_id in names:
                raise RowError("duplicate_key", f"image {image_id} occurs twice")
            names[image_id] = text_field(entry, "file_name")
            check_text(names[image_id])  # it is stored in the json member too
        except RowError as fault:
            bad.append(fault.to_bad_row(place))
    for number, entry in enumerate(list_of(content, "annotations", path, _WANTED)):
        place = f"{path.name} annotations[{number}]"
        try:
            image_id = number_field(entry, "image_id")
            if image_id not in names:
                raise RowError("row_malformed", f"image {image_id} is not among the images")
            said = (number_field(entry, "id"), place, clean_caption(text_field(entry, "caption")))
            captions.setdefault(image_id, []).append(said)
        except RowError as fault:
            bad.append(fault.to_bad_row(place))
    found = {
        image_id: ImageCaptions(name, tuple((place, text) for _, place, text in sorted(captions.get(image_id, []))))
        for image_id, name in names.items()
    }
    return found, bad
