"""Reads NLVR2, true and false statements about two photographs (arXiv 1811.00491; github.com/lil-lab/nlvr, nlvr2).

Each line of a file is a JSON object with `sentence`, `label` and `identifier` (split-set-pair-sentence). The images of
a pair are split-set-pair-img0.png and -img1.png, whatever their format. Those of training lie in numbered folders.
"""

from collections.abc import Iterator
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Scalar, Split
from lightning_moevlm.data.write.convert.sources.benchmarks.json_files import text_field
from lightning_moevlm.data.write.convert.sources.benchmarks.published_files import find_files, hashes
from lightning_moevlm.data.write.convert.sources.row_source import (
    BadRow,
    ImageLocation,
    Row,
    RowError,
    Source,
    check_key,
    clean_caption,
    parse_json_object,
)

_FILES: dict[Split, str] = {"train": "train.json", "val": "dev.json", "test": "test1.json"}
_LABELS = ("true", "false")


class Nlvr2(Source):
    """The files train.json, dev.json and test1.json in one folder.

    images: folder with train (or images/train), dev and test1.
    """

    def __init__(self, folder: Path, images: Path, name: str | None) -> None:
        self.files = find_files(folder, _FILES)
        arguments: dict[str, Scalar] = {"source": "nlvr2", **hashes(self.files)}
        super().__init__(name or "nlvr2", images, arguments)

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the statements of all files."""
        train = "images/train" if (self.folder / "images/train").is_dir() else "train"
        for split, path in self.files.items():
            with path.open("rb") as file:
                for number, line in enumerate(file):
                    place = f"{path.name} line {number + 1}"
                    if not line.strip():
                        continue
                    try:
                        yield _read_statement(parse_json_object(line), split, train, place)
                    except RowError as fault:
                        if number == 0:
                            raise UserError(
                                f"{place}: {fault.message}; give the files of NLVR2, a JSON object with sentence, "
                                "label and identifier per line"
                            ) from None
                        yield fault.to_bad_row(place)


def _read_statement(entry: dict[str, object], split: Split, train: str, place: str) -> Row:
    identifier = text_field(entry, "identifier")
    published, _, _ = identifier.partition("-")
    pair, _, _ = identifier.rpartition("-")
    label = str(entry.get("label")).lower()
    if label not in _LABELS:
        raise RowError("row_malformed", f"label is {str(entry.get('label'))[:40]!r}, not True or False")
    folder = f"{train}/{entry['directory']}" if published == "train" and "directory" in entry else published
    return Row(
        place=place,
        key=check_key(identifier),
        image=ImageLocation(f"{folder}/{pair}-img0.png"),
        caption=clean_caption(text_field(entry, "sentence")),
        annotation={"kind": "statement", "answers": [label], "identifier": identifier},
        split=split,
        second_image=ImageLocation(f"{folder}/{pair}-img1.png"),
    )
