"""Reads the questions of a set as rows: one sample per question, for training and evaluation on each.

The json member of the other set holds `questions`, a list of {kind, question, answer} and optionally `answers`, as in
`scenes` and `coco_vqa`. Every question keeps the split of its image, whose bytes are copied. The new set keeps the
tokenizer, so that a model trained on the captions can continue with the questions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Manifest, Scalar, ShardEntry, Split
from lightning_moevlm.data.format.sample_groups import key_and_extension, sample_groups
from lightning_moevlm.data.format.tar_members import Member, TarBreak, tar_members
from lightning_moevlm.data.images.decode import IMAGE_EXTENSIONS
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.captions import ANNOTATION_EXTENSION
from lightning_moevlm.data.write.convert.sources.row_source import (
    BadRow,
    ImageLocation,
    Row,
    RowError,
    Source,
    check_key,
    clean_caption,
    make_set_name,
)


class Question(msgspec.Struct):
    """One of a sample's `questions`."""

    question: str
    answer: str
    kind: str = "other"
    answers: tuple[str, ...] = ()


class _Annotation(msgspec.Struct):
    questions: tuple[Question, ...] = ()


class _Place(NamedTuple):
    split: Split
    entry: ShardEntry


class SetQuestions(Source):
    """The questions of a set of shards in a folder."""

    def __init__(self, folder: Path, name: str | None) -> None:
        self.storage = ShardStorage(str(folder))
        self.manifest: Manifest = self.storage.read_manifest()
        if ANNOTATION_EXTENSION not in self.manifest.members:
            raise UserError(
                f"samples of {folder} have no json member with questions: they have "
                f"{', '.join(self.manifest.members)}; choose a set such as scenes, or one that `moevlm data convert "
                "coco_vqa` made"
            )
        arguments: dict[str, Scalar] = {"source": "questions", "table": self.manifest.digest}
        super().__init__(make_set_name(name or f"{self.manifest.name}-questions"), folder, arguments)
        self.tokenizer_file = folder / self.manifest.tokenizer.file

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the questions of all samples, split by split, in the order of the tars."""
        for split, entries in self.manifest.splits.items():
            for entry in entries:
                yield from self._read_tar(_Place(split, entry))

    def _read_tar(self, place: _Place) -> Iterator[Row | BadRow]:
        path = self.storage.local_path(place.entry)
        layout = self.manifest.layout
        texts = layout.extensions_of(ANNOTATION_EXTENSION)
        try:
            with path.open("rb") as stream:
                members = tar_members(stream, lambda name: key_and_extension(name)[1] in texts)
                for key, found, _ in sample_groups(members):
                    yield from self._questions(key, found, place)
        except TarBreak as error:
            raise UserError(f"{path} is truncated or not a tar: it {error}; build the set again") from None

    def _questions(self, key: str, found: dict[str, Member], place: _Place) -> Iterator[Row | BadRow]:
        where = f"{place.entry.file} {key[:100]}"
        layout = self.manifest.layout
        image = next((m for name in IMAGE_EXTENSIONS if (m := layout.find(name, found)) is not None), None)
        text = layout.find(ANNOTATION_EXTENSION, found)
        try:
            if text is None:
                raise RowError("member_missing", "this sample has no json member")
            try:
                annotation = msgspec.json.decode(text.data or b"", type=_Annotation)
            except msgspec.MsgspecError as error:
                raise RowError("row_malformed", f"its json holds no questions ({error})") from None
            for number, asked in enumerate(annotation.questions):
                answers = [clean_caption(answer) for answer in asked.answers or (asked.answer,)]
                yield Row(
                    place=where,
                    key=check_key(f"{key[-70:]}-q{number}"),
                    image=None if image is None else ImageLocation(place.entry.file, image.offset, image.num_bytes),
                    caption=clean_caption(asked.question),
                    annotation={"kind": asked.kind, "answers": answers, "sample": key},
                    split=place.split,
                )
        except RowError as fault:
            yield fault.to_bad_row(where)
