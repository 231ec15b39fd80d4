"""Reads the questions of a set as rows: one sample per question, for training and evaluation on each.

The json member of the other set holds `questions`, a list of {kind, question, answer} and optionally `answers`, as in
`scenes` and `coco_vqa`. Every question has a copy of its image.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from lightning_moevlm.data.write.convert.sources.row_source import BadRow, Row, RowError, check_key, clean_caption
from lightning_moevlm.data.write.convert.sources.sets.set_source import SetSample, SetSource


class Question(msgspec.Struct):
    """One of a sample's `questions`."""

    question: str
    answer: str
    kind: str = "other"
    answers: tuple[str, ...] = ()


class _Annotation(msgspec.Struct):
    questions: tuple[Question, ...] = ()


class SetQuestions(SetSource):
    """The questions of a set of shards in a folder."""

    def __init__(self, folder: Path, name: str | None) -> None:
        super().__init__(folder, name, "questions")

    @property
    def remedy(self) -> str:
        """Which sets to choose instead."""
        return "choose a set such as scenes, or one that `moevlm data convert coco_vqa` made"

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the questions of all samples, split by split, in the order of the tars."""
        for sample in self.samples():
            if isinstance(sample, BadRow):
                yield sample
                continue
            try:
                yield from self._questions(sample)
            except RowError as fault:
                yield fault.to_bad_row(sample.place)

    def _questions(self, sample: SetSample) -> Iterator[Row]:
        try:
            annotation = msgspec.json.decode(sample.annotation, type=_Annotation)
        except msgspec.MsgspecError as error:
            raise RowError("row_malformed", f"its json holds no questions ({error})") from None
        for number, asked in enumerate(annotation.questions):
            answers = [clean_caption(answer) for answer in asked.answers or (asked.answer,)]
            yield Row(
                place=sample.place,
                key=check_key(f"{sample.key[-70:]}-q{number}"),
                image=sample.image,
                caption=clean_caption(asked.question),
                annotation={"kind": asked.kind, "answers": answers, "sample": sample.key},
                split=sample.split,
            )
