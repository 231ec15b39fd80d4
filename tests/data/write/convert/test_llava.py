"""Conversations in LLaVA's format become samples of all their turns."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.write.convert.sources.llava import Llava
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, Row
from tests.data.sources import make_image, write_set


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def entry(number: int) -> dict[str, Any]:
    texts = (f"<image>\nwhat is {number}?", f"a cat {number}", "sure?", "yes")
    return {"id": str(number), "image": f"pictures/{number}.jpg", "conversations": said(*texts)}


def write(folder: Path, entries: list[Any], name: str = "mine.json") -> Path:
    (folder / "pictures").mkdir(exist_ok=True)
    for number in range(len(entries)):
        (folder / f"pictures/{number}.jpg").write_bytes(make_image(number))
    file = folder / name
    text = "\n".join(map(json.dumps, entries)) if name.endswith("l") else json.dumps(entries)
    file.write_text(text, encoding="utf-8")
    return file


def rows_of(file: Path, samples: Any = "images") -> tuple[list[Row | BadRow], list[str]]:
    source = Llava(file, file.parent, None, samples)
    return list(source.rows()), source.notes


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_a_conversation_is_a_sample(tmp_path: Path, name: str) -> None:
    alone = {"conversations": said("why?", "because")}
    chat = {"image": ["pictures/1.jpg"], "messages": [{"role": "user", "content": "where is it?<image>"},
                                                      {"role": "assistant", "content": "here"}]}  # fmt: skip
    file = write(tmp_path, [entry(0), chat, alone], name)
    (first, second), notes = rows_of(file)
    assert isinstance(first, Row) and isinstance(second, Row)
    assert (first.key, first.caption) == ("mine-000000000", "what is 0?")
    turns = [["what is 0?", "a cat 0"], ["sure?", "yes"]]
    assert first.annotation == {"kind": "other", "answers": ["a cat 0"], "turns": turns}
    assert first.image is not None and first.image.file == "pictures/0.jpg"
    assert (second.caption, second.annotation["turns"]) == ("where is it?", [["where is it?", "here"]])  # type: ignore[index]
    assert notes[0].startswith("1 conversations without an image are left out; --samples texts makes a set of them")
    (text,), notes = rows_of(file, "texts")
    assert isinstance(text, Row) and text.image is None and text.caption == "why?"
    assert notes[0].startswith("2 conversations with an image are left out")


@pytest.mark.parametrize(
    ("changed", "cause", "message"),
    [
        ({"conversations": said("what?")}, "question_unanswered", "the last question has no answer"),
        ({"conversations": said("what?", "<image> a cat")}, "row_malformed", "names the place of one more image"),
        ({"conversations": said("<image><image>?", "a cat")}, "row_malformed", "names the place of one more image"),
        ({"conversations": said("what?", " ")}, "caption_empty", "caption is empty"),
        ({"conversations": said("what?", "it")[::-1]}, "row_malformed", "message 1 is from 'gpt', and one of the user"),
        ({"conversations": []}, "row_malformed", "there is no list conversations"),
        ({"image": ["a.jpg", "b.jpg"]}, "row_malformed", "conversations about several images are not read"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, changed: dict[str, Any], cause: str, message: str) -> None:
    (good, bad), _ = rows_of(write(tmp_path, [entry(0), entry(1) | changed]))
    assert isinstance(good, Row) and isinstance(bad, BadRow)
    assert (bad.place, bad.cause) == ("mine.json [1]", cause)
    assert message in bad.message


def test_other_files_are_refused(tmp_path: Path) -> None:
    for text, message in (
        ("{}", "holds a JSON dict: give a list"),
        ("[", r"is not JSON.*call a file of JSON lines \.jsonl"),
    ):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(UserError, match=message):
            rows_of(tmp_path / "mine.json")


def test_the_set_trains_with_and_without_a_processor(tmp_path: Path) -> None:
    """Without one, the first turn is a question with its answer."""
    root = tmp_path / "set"
    write_set(Llava(write(tmp_path, [entry(number) for number in range(40)]), tmp_path, None, "images"), root)
    data = ShardDataModule(str(root), 4, 16, 60, 400, annotation="answers", append_answer=True)
    batch = next(iter(data.val_dataloader()))
    assert batch.answers is not None and batch.text_BL is not None
    (given,) = batch.answers.given[0]
    assert data.tokenizer.decode(batch.text_BL[0].tolist()) == f"what is {given.rpartition(' ')[2]}?{given}"
