"""Reads rows from COCO's annotation files: captions (COCO 2014, 2017), and questions with answers (VQA v1, v2).

Their entries refer to images by number. A sample here is an image with all of its entries, so an image is stored once
and is never in two splits. Formats: cocodataset.org, "Data format", 4. Image Captioning; visualqa.org, "VQA Annotations
Download".
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import Scalar, file_sha256
from lightning_moevlm.data.text.texts import strip_text
from lightning_moevlm.data.write.convert.sources.row_source import (
    BadRow,
    ImageLocation,
    Row,
    RowError,
    Source,
    check_text,
    clean_caption,
    make_set_name,
    require_file,
    require_folder,
)

Take = Literal["first", "each", "draw"]
_FILES = {
    "images": "COCO's captions file, such as captions_train2017.json",
    "annotations": "the file of captions or answers, such as captions_train2017.json",
    "questions": "the questions file, such as v2_OpenEnded_mscoco_train2014_questions.json",
}


class _ImageCaptions(NamedTuple):
    """The captions of one image."""

    file_name: str
    captions: tuple[tuple[str, str], ...]  # (place, text), in the order of their ids


class CocoCaptions(Source):
    """A `captions_*.json`. The json member of a sample holds all captions of its image.

    take: `first` gives one sample per image, with the caption of lowest id; `each` gives one sample per caption, with a
    copy of the image; `draw` gives one sample per image, and training draws one of its captions per epoch.
    """

    def __init__(self, annotations: Path, images: Path, name: str | None, take: Take) -> None:
        table = require_file(annotations, "annotations")
        arguments: dict[str, Scalar] = {"source": "coco_captions", "table": file_sha256(table), "captions": take}
        super().__init__(make_set_name(name or table.stem), require_folder(images, "--images"), arguments)
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


class CocoQuestions(Source):
    """A `*_questions.json` with its `*_annotations.json`, and optionally captions of the same images.

    The json member holds `questions`, a list of {kind, question, answer, answers}: kind is the answer's type (yes/no,
    number, other), answer the most frequent one, answers all of them. image_name: pattern of the images' names, such as
    COCO_train2014_{image_id:012d}.jpg; by default it follows from the `data_subtype` of the questions.
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
        super().__init__(make_set_name(name or questions.stem), require_folder(images, "--images"), arguments)
        self.questions, self.annotations, self.captions = questions, annotations, captions
        self.image_name = image_name

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield images in the order of their ids, each with its questions in the order of theirs."""
        content = _read_object(self.questions)
        naming = self.image_name or self._guess_naming(content)
        answers, bad = self._answers()
        yield from bad
        said: dict[int, _ImageCaptions] = {}
        if self.captions is not None:
            said, bad = read_captions(self.captions)
            yield from bad
        asked: dict[int, list[tuple[int, str]]] = {}
        for number, entry in enumerate(_list(content, "questions", self.questions)):
            place = f"{self.questions.name} questions[{number}]"
            try:
                question = (_number(entry, "question_id"), clean_caption(_field(entry, "question")))
                asked.setdefault(_number(entry, "image_id"), []).append(question)
                if question[0] not in answers:
                    raise RowError("question_unanswered", f"question {question[0]} has no answer in {self.annotations}")
            except RowError as fault:
                yield fault.to_bad_row(place)
        for image_id, questions in sorted(asked.items()):
            found = [_question(text, answers[i]) for i, text in sorted(questions) if i in answers]
            if not found:
                continue  # its questions are bad rows above
            place = f"{self.questions.name} image {image_id}"
            caption = None
            try:
                if self.captions is not None:
                    about = said.get(image_id)
                    if about is None or not about.captions:
                        raise RowError("caption_empty", f"this image has no caption in {self.captions.name}")
                    caption = clean_caption(about.captions[0][1])
                yield Row(
                    place=place,
                    key=f"{self.name}-{image_id:012d}",
                    image=ImageLocation(said[image_id].file_name if image_id in said else _fill_name(naming, image_id)),
                    caption=caption,
                    annotation={"image_id": image_id, "questions": found},
                    extra_texts=tuple(str(entry[part]) for entry in found for part in ("question", "answer")),
                )
            except RowError as fault:
                yield fault.to_bad_row(place)

    def _guess_naming(self, content: dict[str, object]) -> str:
        subtype = content.get("data_subtype")
        if not isinstance(subtype, str) or "{" in subtype:
            raise UserError(
                f"{self.questions} has no data_subtype, which names the images; give the pattern with "
                "--image_name, for example COCO_train2014_{image_id:012d}.jpg"
            )
        return f"COCO_{subtype}_{{image_id:012d}}.jpg"

    def _answers(self) -> tuple[dict[int, dict[str, object]], list[BadRow]]:
        found: dict[int, dict[str, object]] = {}
        bad: list[BadRow] = []
        for number, entry in enumerate(_list(_read_object(self.annotations), "annotations", self.annotations)):
            try:
                question_id = _number(entry, "question_id")
                given = [clean_caption(_field(answer, "answer")) for answer in _list_answers(entry)]
                most = entry.get("multiple_choice_answer")
                answer = clean_caption(most if most is not None or not given else max(given, key=given.count))
                kind = str(entry.get("answer_type") or "other")
                check_text(kind)
                found[question_id] = {"kind": kind, "answer": answer, "answers": given or [answer]}
            except RowError as fault:
                bad.append(fault.to_bad_row(f"{self.annotations.name} annotations[{number}]"))
        return found, bad


def _list_answers(entry: dict[str, object]) -> list[object]:
    given = entry.get("answers", [])
    if not isinstance(given, list):
        raise RowError("row_malformed", "answers are not a list")
    return given


def _question(text: str, answer: dict[str, object]) -> dict[str, object]:
    return {"kind": answer["kind"], "question": text, "answer": answer["answer"], "answers": answer["answers"]}


def _fill_name(naming: str, image_id: int) -> str:
    try:
        return naming.format(image_id=image_id)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"--image_name {naming!r} cannot be filled in ({error}); it may hold {{image_id}} or {{image_id:012d}}"
        ) from None


def read_captions(path: Path) -> tuple[dict[int, _ImageCaptions], list[BadRow]]:
    """Return the captions of each image, by its id, and the bad entries.

    Raises:
        UserError: if the file is not a COCO annotation file.
    """
    content = _read_object(path)
    names: dict[int, str] = {}
    captions: dict[int, list[tuple[int, str, str]]] = {}
    bad: list[BadRow] = []
    for number, entry in enumerate(_list(content, "images", path)):
        place = f"{path.name} images[{number}]"
        try:
            image_id = _number(entry, "id")
            if image_id in names:
                raise RowError("duplicate_key", f"image {image_id} occurs twice")
            names[image_id] = _field(entry, "file_name")
            check_text(names[image_id])  # it is stored in the json member too
        except RowError as fault:
            bad.append(fault.to_bad_row(place))
    for number, entry in enumerate(_list(content, "annotations", path)):
        place = f"{path.name} annotations[{number}]"
        try:
            image_id = _number(entry, "image_id")
            if image_id not in names:
                raise RowError("row_malformed", f"image {image_id} is not among the images")
            said = (_number(entry, "id"), place, clean_caption(_field(entry, "caption")))
            captions.setdefault(image_id, []).append(said)
        except RowError as fault:
            bad.append(fault.to_bad_row(place))
    found = {
        image_id: _ImageCaptions(name, tuple((place, text) for _, place, text in sorted(captions.get(image_id, []))))
        for image_id, name in names.items()
    }
    return found, bad


def _read_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{path} is not JSON ({where})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; COCO files hold an object")
    return content


def _list(content: dict[str, object], key: str, path: Path) -> Sequence[dict[str, object]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list {key!r}: give {_FILES[key]}")
    return entries


def _field(entry: object, key: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        raise RowError("row_malformed", f"there is no text {key!r}")
    return str(entry[key])


def _number(entry: object, key: str) -> int:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**18:
        raise RowError("row_malformed", f"there is no number {key!r}")
    return value
