"""Reads what stands beside the image and text of a sample: answers to a question, or the name of a class."""

import json
from collections import Counter
from typing import NamedTuple

from lightning_moevlm.data.text.captions import ANNOTATION_EXTENSION, draw_caption
from lightning_moevlm.data.text.texts import decode_text, parse_texts

ANSWERS = "answers"
CLASS_EXTENSION = "cls"
"""Member with the number of a class, as in the sets of CLIP_benchmark."""


class Annotation(NamedTuple):
    """A part of a member."""

    name: str  # `answers`, `cls`, or a field of the json member that names a class
    is_appended: bool = False  # whether an answer follows the text

    @property
    def member(self) -> str:
        """File extension of the member."""
        return CLASS_EXTENSION if self.name == CLASS_EXTENSION else ANNOTATION_EXTENSION

    @property
    def what(self) -> str:
        """Its name in messages."""
        return "answers" if self.name == ANSWERS else f"class in {self.name}"

    @property
    def remedy(self) -> str:
        """What to do where a sample lacks it."""
        if self.name == ANSWERS:
            return (
                "make a set of questions first, `moevlm data convert questions SET --licence L --out DIR`, then use DIR"
            )
        return "set data.annotation to a field of the json member that names the class, or to cls"

    def read(self, data: bytes) -> tuple[tuple[str, ...] | None, str]:
        """Return the answers, or the class alone, and the kind of question; None if there are no answers.

        A field that names a class may be null: such a sample has none, and is not classified.

        Raises:
            ValueError: the member is not JSON or not UTF-8, or the field holds neither a text nor a list of texts.
        """
        if self.name == CLASS_EXTENSION:
            label = decode_text(data)
            return ((label,) if label else None), ""
        content = json.loads(data.decode("utf-8-sig"))
        fields = content if isinstance(content, dict) else {}
        kind = str(fields.get("kind", "")) if self.name == ANSWERS else ""
        texts = parse_texts(fields.get(self.name), self.name)
        may_be_null = self.name != ANSWERS and self.name in fields
        return (texts if texts or may_be_null else None), kind


def choose_answer(answers: tuple[str, ...], draw: str, key: str) -> str:
    """Return an answer to append. draw: the seed of the choice among all given; "" takes the most frequent."""
    if not answers:
        return ""
    return draw_caption(answers, draw, key) if draw else Counter(answers).most_common(1)[0][0]
