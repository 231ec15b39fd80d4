"""Reads questions and answers in the format of VQA v1 and v2 (visualqa.org, "VQA Annotations Download"), and OK-VQA.

OK-VQA (arXiv 1906.00067) has the same format; its annotations name the category of knowledge that a question needs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Scalar, Split, file_sha256
from lightning_moevlm.data.write.convert.sources.benchmarks.coco_captions import ImageCaptions, read_captions
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
from lightning_moevlm.data.write.convert.sources.row_source import (
    BadRow,
    RowError,
    check_text,
    clean_caption,
    require_file,
)

_QUESTIONS = "the questions file, such as v2_OpenEnded_mscoco_train2014_questions.json"
_ANNOTATIONS = "the file with the answers, such as v2_mscoco_train2014_annotations.json"
_OK_VQA: dict[Split, str] = {
    "train": "OpenEnded_mscoco_train2014_questions.json",
    "test": "OpenEnded_mscoco_val2014_questions.json",
}
_OK_VQA_ANSWERS: dict[Split, str] = {
    "train": "mscoco_train2014_annotations.json",
    "test": "mscoco_val2014_annotations.json",
}


class _Answer(NamedTuple):
    kind: str
    answer: str
    answers: tuple[str, ...]


class CocoQuestions(QuestionSource):
    """A `*_questions.json` with its `*_annotations.json`, and optionally captions of the same images.

    The kind of a question is its answer's type (yes/no, number, other). image_name: pattern of the images' names, such
    as COCO_train2014_{image_id:012d}.jpg; by default it follows from the `data_subtype` of the questions.
    """

    def __init__(
        self,
        questions: Path,
        annotations: Path,
        images: Path,
        name: str | None,
        image_name: str | None,
        captions: Path | None,
    ) -> None:
        require_file(questions, "questions")
        require_file(annotations, "annotations")
        arguments: dict[str, Scalar] = {
            "source": "coco_vqa",
            "table": file_sha256(questions),
            "annotations": file_sha256(annotations),
            "captions": file_sha256(require_file(captions, "--captions")) if captions else "",
            "image_name": image_name or "",
        }
        super().__init__(name or questions.stem, images, arguments)
        self.questions, self.annotations, self.captions = questions, annotations, captions
        self.image_name = image_name
        self._said: dict[int, ImageCaptions] = {}

    def asked(self) -> Iterator[Asked | BadRow]:
        """Yield the questions of the file."""
        content = read_object(self.questions)
        naming = self.image_name or _guess_naming(content, self.questions)
        if self.captions is not None:
            self._said, bad = read_captions(self.captions)
            yield from bad
        for each in read_questions(self.questions, content, self.annotations, "answer_type"):
            if isinstance(each, BadRow):
                yield each
            else:
                named = self._said.get(each.image_id) if isinstance(each.image_id, int) else None
                yield each._replace(file=_fill_name(naming, each.image_id) if named is None else named.file_name)

    def caption(self, image_id: int | str) -> str | None:
        """Return the first caption of an image, if captions are given."""
        if self.captions is None:
            return None
        about = self._said.get(image_id) if isinstance(image_id, int) else None
        if about is None or not about.captions:
            raise RowError("caption_empty", f"this image has no caption in {self.captions.name}")
        return clean_caption(about.captions[0][1])


class OkVqa(QuestionSource):
    """The files of OK-VQA in one folder; the validation file is the set's test split. Kinds are those of knowledge.

    images: folder with train2014 and val2014.
    """

    def __init__(self, folder: Path, images: Path, name: str | None) -> None:
        self.files, self.answers = find_files(folder, _OK_VQA), find_files(folder, _OK_VQA_ANSWERS)
        arguments: dict[str, Scalar] = {"source": "okvqa", **hashes(self.files), **hashes(self.answers, "answers")}
        super().__init__(name or "okvqa", images, arguments)

    def asked(self) -> Iterator[Asked | BadRow]:
        """Yield the questions of both files."""
        for split, path in self.files.items():
            content = read_object(path)
            naming = f"{path.stem.split('_')[2]}/{_guess_naming(content, path)}"
            for each in read_questions(path, content, self.answers[split], "question_type"):
                if isinstance(each, BadRow):
                    yield each
                else:
                    file = _fill_name(naming, each.image_id)
                    yield each._replace(file=file, split=split_of(split, self.files, file))


def read_questions(
    path: Path, content: dict[str, object], annotations: Path, kind_field: str
) -> Iterator[Asked | BadRow]:
    """Yield the questions of a file that have an answer, with images yet to be named.

    Args:
        path: of the questions.
        content: of that file.
        annotations: file of the answers.
        kind_field: of an annotation, with the kind of question.

    Raises:
        UserError: a file is another one.
    """
    answers, bad = _read_answers(annotations, kind_field)
    yield from bad
    for number, entry in enumerate(list_of(content, "questions", path, _QUESTIONS)):
        try:
            question_id, image_id = number_field(entry, "question_id"), number_field(entry, "image_id")
            text = clean_caption(text_field(entry, "question"))
            if question_id not in answers:
                raise RowError("question_unanswered", f"question {question_id} has no answer in {annotations}")
            kind, answer, given = answers[question_id]
            yield Asked(path.name, image_id, "", question_id, make_question(kind, text, answer, given))
        except RowError as fault:
            yield fault.to_bad_row(f"{path.name} questions[{number}]")


def _read_answers(path: Path, kind_field: str) -> tuple[dict[int, _Answer], list[BadRow]]:
    found: dict[int, _Answer] = {}
    bad: list[BadRow] = []
    content = read_object(path)
    titles = content.get("question_types")  # of OK-VQA: names of its categories
    names: Mapping[object, object] = titles if isinstance(titles, dict) else {}
    for number, entry in enumerate(list_of(content, "annotations", path, _ANNOTATIONS)):
        try:
            question_id = number_field(entry, "question_id")
            given = [text_field(answer, "answer") for answer in list_field(entry, "answers")]
            kind = str(entry.get(kind_field) or "other")
            kind = str(names.get(kind, kind))
            check_text(kind)
            found[question_id] = _Answer(kind, *answers_of(given, entry.get("multiple_choice_answer")))
        except RowError as fault:
            bad.append(fault.to_bad_row(f"{path.name} annotations[{number}]"))
    return found, bad


def _guess_naming(content: dict[str, object], path: Path) -> str:
    subtype = content.get("data_subtype")
    if not isinstance(subtype, str) or "{" in subtype:
        raise UserError(
            f"{path} has no data_subtype, which names the images; give the pattern with "
            "--image_name, for example COCO_train2014_{image_id:012d}.jpg"
        )
    return f"COCO_{subtype}_{{image_id:012d}}.jpg"


def _fill_name(naming: str, image_id: int | str) -> str:
    try:
        return naming.format(image_id=image_id)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"--image_name {naming!r} cannot be filled in ({error}); it may hold {{image_id}} or {{image_id:012d}}"
        ) from None
