"""Reads conversations about images in LLaVA's format (arXiv 2304.08485; LLaVA-Instruct-150K and sets in its style).

A JSON list, or a JSON object per line:

    {"id": ..., "image": "a/path.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "A cat."}, ...]}

`messages` of `role` and `content` are read as well. A sample is a conversation: its text is the first question, without
`<image>`, and the json member has `answers` (the first), `kind` and `turns` (all questions with their answers). The
split of an image, by the hash of its name, is that of all its conversations.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import file_sha256
from lightning_moevlm.data.write.convert.sources.row_source import (
    BadRow,
    ImageLocation,
    Row,
    RowError,
    Source,
    clean_caption,
    parse_json_object,
    require_file,
)
from lightning_moevlm.data.write.shard_writer import choose_split

_PLACE = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
Samples = Literal["images", "texts"]


class Llava(Source):
    """Conversations of one file.

    Args:
        file: JSON list, or JSON lines if its name ends in .jsonl.
        images: folder that image paths are relative to.
        name: of the set; None takes the file's.
        samples: conversations about an image, or those without one; the others are left out, and counted.
    """

    def __init__(self, file: Path, images: Path, name: str | None, samples: Samples) -> None:
        self.file = require_file(file, "file")
        self.samples = samples
        arguments = {"source": "llava", "table": file_sha256(file), "samples": samples}
        super().__init__(name or file.stem, images, {**arguments})

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield conversations in the file's order."""
        num_others = 0
        for number, entry in enumerate(self._entries()):
            place = f"{self.file.name} [{number}]"
            try:
                content = parse_json_object(entry) if isinstance(entry, bytes) else entry
                if not isinstance(content, dict):
                    raise RowError("row_malformed", "this is no conversation, an object with conversations")
                image = content.get("image")
                if (image is not None) != (self.samples == "images"):
                    num_others += 1
                    continue
                yield self._row(content, image, place, f"{self.name}-{number:09d}")
            except RowError as fault:
                yield fault.to_bad_row(place)
        if num_others:
            others = "without an image" if self.samples == "images" else "with an image"
            other = "texts" if self.samples == "images" else "images"
            self.notes.append(
                f"{num_others} conversations {others} are left out; --samples {other} makes a set of them, and "
                "data.sources mixes both"
            )

    def _entries(self) -> Iterator[object]:
        if self.file.suffix == ".jsonl":
            with self.file.open("rb") as lines:
                yield from (line for line in lines if line.strip())
            return
        try:
            entries = json.loads(self.file.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{self.file} is not JSON ({where}); call a file of JSON lines .jsonl") from None
        if not isinstance(entries, list):
            raise UserError(f"{self.file} holds a JSON {type(entries).__name__}: give a list of conversations")
        yield from entries

    def _row(self, content: dict[str, object], image: object, place: str, key: str) -> Row:
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if image is not None and not isinstance(image, str):
            raise RowError("row_malformed", "image is not one path: conversations about several images are not read")
        turns = _turns(content)
        question = turns[0][0]
        given = content.get("question_type", content.get("category"))
        return Row(
            place=place,
            key=key,
            image=None if image is None else ImageLocation(image),
            caption=question,
            annotation={
                "kind": given if isinstance(given, str) and given else "other",
                "answers": [turns[0][1]],
                "turns": turns,
            },
            split=choose_split(image if image is not None else question),
            extra_texts=tuple(text for turn in turns for text in turn),
        )


def _turns(content: dict[str, object]) -> list[list[str]]:
    """Return [question, answer] of each turn; only the first question may name the place of the image."""
    said = content.get("conversations", content.get("messages"))
    if not isinstance(said, list) or not said:
        raise RowError("row_malformed", "there is no list conversations")
    texts: list[str] = []
    for number, each in enumerate(said):
        role = each.get("from", each.get("role")) if isinstance(each, dict) else None
        wanted = ("user", "assistant")[number % 2]
        if _ROLES.get(str(role)) != wanted:
            raise RowError("row_malformed", f"message {number + 1} is from {role!r}, and one of the {wanted} is due")
        text = each.get("value", each.get("content"))
        if number == 0 and isinstance(text, str) and text.count(_PLACE) <= 1:
            text = text.replace(_PLACE, "")
        cleaned = clean_caption(text)
        if _PLACE in cleaned:
            raise RowError("row_malformed", f"message {number + 1} names the place of one more image")
        texts.append(cleaned)
    if len(texts) % 2:
        raise RowError("question_unanswered", "the last question has no answer")
    return [texts[place : place + 2] for place in range(0, len(texts), 2)]
