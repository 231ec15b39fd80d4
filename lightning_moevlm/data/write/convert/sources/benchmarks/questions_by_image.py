"""Makes one sample per image of a benchmark's questions, so that an image is stored once and is never in two splits.

The json member holds `questions`, a list of {kind, question, answer, answers}: answer is the chief one, answers are all
of them, one per person. `moevlm data convert questions` then makes a sample of each.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from lightning_moevlm.data.format.manifest import Split
from lightning_moevlm.data.write.convert.sources.row_source import (
    BadRow,
    ImageLocation,
    Row,
    RowError,
    Source,
    check_key,
    check_text,
    clean_caption,
)


class Asked(NamedTuple):
    """A question about an image."""

    table: str  # name of its file
    image_id: int | str
    file: str  # of the image
    question_id: int | str  # orders the questions of an image
    question: dict[str, object]  # kind, question, answer, answers
    split: Split | None = None  # None: the hash of the image decides


def make_question(kind: str, question: str, answer: str, answers: tuple[str, ...]) -> dict[str, object]:
    """Return an entry of `questions`.

    Raises:
        RowError: a text is empty or is not valid UTF-8.
    """
    check_text(kind)
    return {"kind": kind, "question": clean_caption(question), "answer": answer, "answers": list(answers)}


class QuestionSource(Source):
    """Questions, in the order of their images."""

    @abstractmethod
    def asked(self) -> Iterator[Asked | BadRow]:
        """Yield all questions.

        Raises:
            UserError: if a file as a whole cannot be read.
        """

    def caption(self, image_id: int | str) -> str | None:
        """Return the caption of an image; None in a set without captions.

        Raises:
            RowError: it has none.
        """
        return None

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield images in the order of their numbers, each with its questions in the order of theirs."""
        found: dict[int | str, list[Asked]] = {}
        for each in self.asked():
            if isinstance(each, BadRow):
                yield each
            else:
                found.setdefault(each.image_id, []).append(each)
        for image_id in sorted(found, key=_sortable):
            asked = sorted(found[image_id], key=lambda each: _sortable(each.question_id))
            number = f"{image_id:012d}" if isinstance(image_id, int) else image_id
            place = f"{asked[0].table} image {image_id}"
            questions = [each.question for each in asked]
            try:
                yield Row(
                    place=place,
                    key=check_key(f"{self.name}-{number}"),
                    image=ImageLocation(asked[0].file),
                    caption=self.caption(image_id),
                    annotation={"image_id": image_id, "questions": questions},
                    split=asked[0].split,
                    extra_texts=tuple(str(entry[part]) for entry in questions for part in ("question", "answer")),
                )
            except RowError as fault:
                yield fault.to_bad_row(place)


def _sortable(number: int | str) -> tuple[int, str]:
    """Order numbers by value, and texts by letters."""
    return (number, "") if isinstance(number, int) else (0, number)
