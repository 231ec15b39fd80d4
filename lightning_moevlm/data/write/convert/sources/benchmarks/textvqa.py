"""Reads TextVQA, questions about texts in images (arXiv 1904.08920; textvqa.org/dataset)."""

from collections.abc import Iterator
from pathlib import Path

from lightning_moevlm.data.format.manifest import Scalar, Split
from lightning_moevlm.data.write.convert.sources.benchmarks.json_files import (
    answers_of,
    list_field,
    list_of,
    number_field,
    read_object,
    text_field,
)
from lightning_moevlm.data.write.convert.sources.benchmarks.published_files import find_files, hashes, split_of
from lightning_moevlm.data.write.convert.sources.benchmarks.questions_by_image import (
    Asked,
    QuestionSource,
    make_question,
)
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, RowError

_FILES: dict[Split, str] = {"train": "TextVQA_*_train.json", "test": "TextVQA_*_val.json"}
_WANTED = "a file of TextVQA with answers, such as TextVQA_0.5.1_train.json"


class TextVqa(QuestionSource):
    """The files of TextVQA in one folder; the validation file is the set's test split.

    images: folder of the images, ID.jpg.
    """

    def __init__(self, folder: Path, images: Path, name: str | None) -> None:
        self.files = find_files(folder, _FILES)
        arguments: dict[str, Scalar] = {"source": "textvqa", **hashes(self.files)}
        super().__init__(name or "textvqa", images, arguments)

    def asked(self) -> Iterator[Asked | BadRow]:
        """Yield the questions of both files."""
        for split, path in self.files.items():
            for number, entry in enumerate(list_of(read_object(path), "data", path, _WANTED)):
                try:
                    image_id, question_id = text_field(entry, "image_id"), number_field(entry, "question_id")
                    given = list_field(entry, "answers")
                    if not given:
                        raise RowError("question_unanswered", f"question {question_id} has no answers")
                    question = make_question("other", text_field(entry, "question"), *answers_of(given))
                    where = split_of(split, self.files, image_id)
                    yield Asked(path.name, image_id, f"{image_id}.jpg", question_id, question, where)
                except RowError as fault:
                    yield fault.to_bad_row(f"{path.name} data[{number}]")
