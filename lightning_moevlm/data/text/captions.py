"""Reads a set's captions from the member txt (one per sample) or a field of the member json (one or several)."""

import json
from collections.abc import Collection
from random import Random
from typing import NamedTuple

from lightning_moevlm.data.text.texts import decode_text, parse_texts

CAPTION_EXTENSION = "txt"
ANNOTATION_EXTENSION = "json"


class Captions(NamedTuple):
    """The place of a set's captions."""

    member: str  # extension of the member that holds them
    field: str  # of a json member; "" for a text member

    def read(self, data: bytes) -> tuple[str, ...]:
        """Return the captions of a sample's member, without surrounding blanks and without empty ones.

        Raises:
            UnicodeError: if they are not UTF-8.
            ValueError: if the member is not JSON, or its field is neither a text nor a list of texts.
        """
        if not self.field:
            caption = decode_text(data)
            return (caption,) if caption else ()
        content = json.loads(data.decode("utf-8-sig"))
        return parse_texts(content.get(self.field) if isinstance(content, dict) else None, self.field)


def find_captions(members: Collection[str], caption_field: str) -> Captions | None:
    """Return the place of captions in samples of these members; None if they have no captions."""
    if caption_field:
        return Captions(ANNOTATION_EXTENSION, caption_field) if ANNOTATION_EXTENSION in members else None
    return Captions(CAPTION_EXTENSION, "") if CAPTION_EXTENSION in members else None


def draw_caption(captions: tuple[str, ...], draw: str, key: str) -> str:
    """Return one of a sample's captions. draw: the seed of the choice, such as seed and epoch; "" takes the first."""
    if not draw or len(captions) == 1:
        return captions[0]
    return captions[Random(f"caption/{draw}/{key}").randrange(len(captions))]
