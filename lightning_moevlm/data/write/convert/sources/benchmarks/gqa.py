"""Reads the balanced questions of GQA (arXiv 1902.09506; cs.stanford.edu/people/dorarad/gqa/download.html)."""

from collections.abc import Iterator
from pathlib import Path

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Scalar, Split
from lightning_moevlm.data.write.convert.sources.benchmarks.json_files import answers_of, read_object, text_field
from lightning_moevlm.data.write.convert.sources.benchmarks.published_files import find_files, hashes
from lightning_moevlm.data.write.convert.sources.benchmarks.questions_by_image import (
    Asked,
    QuestionSource,
    make_question,
)
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, RowError

_FILES: dict[Split, str] = {
    "train": "train_balanced_questions.json",
    "val": "val_balanced_questions.json",
    "test": "testdev_balanced_questions.json",
}


class Gqa(QuestionSource):
    """The balanced questions in one folder; testdev is the set's test split. Kinds are structural: query, verify, ...

    images: folder of the images, ID.jpg.
    """

    def __init__(self, folder: Path, images: Path, name: str | None) -> None:
        self.files = find_files(folder, _FILES)
        arguments: dict[str, Scalar] = {"source": "gqa", **hashes(self.files)}
        super().__init__(name or "gqa", images, arguments)

    def asked(self) -> Iterator[Asked | BadRow]:
        """Yield the questions of all files; an object holds them by their number."""
        for split, path in self.files.items():
            content = read_object(path)
            first = next(iter(content.values()), None)
            if not isinstance(first, dict) or "imageId" not in first:
                raise UserError(f"{path} holds no questions of GQA by number, each with an imageId: give its own file")
            for question_id, entry in content.items():
                try:
                    image_id = text_field(entry, "imageId")
                    question = _read_question(entry)
                    yield Asked(path.name, image_id, f"{image_id}.jpg", question_id, question, split)
                except RowError as fault:
                    yield fault.to_bad_row(f"{path.name} {question_id[:40]}")


def _read_question(entry: object) -> dict[str, object]:
    text = text_field(entry, "question")
    assert isinstance(entry, dict)
    if "answer" not in entry:
        raise RowError("question_unanswered", "this question has no answer")
    answer, answers = answers_of([], entry["answer"])
    types = entry.get("types")
    kind = types.get("structural") if isinstance(types, dict) else None
    return make_question(str(kind or "other"), text, answer, answers)
