"""A byte-order mark, which editors and exports write, is part of no text: not in a tar, a line, a cell or a field."""

import codecs
import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.inspect.html_page import write_page
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.text.texts import strip_text
from lightning_moevlm.data.write.convert.convert import ConvertOptions
from lightning_moevlm.data.write.convert.keep_tars import keep_tars
from lightning_moevlm.data.write.convert.sources.benchmarks.coco_captions import CocoCaptions
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource, JsonlSource
from lightning_moevlm.data.write.convert.sources.img2dataset import Img2datasetSource
from lightning_moevlm.data.write.convert.sources.row_source import Row
from lightning_moevlm.data.write.finish_set import Licence
from tests.data.sources import make_image

MARK = "\ufeff"
COLUMNS = Columns("image", "caption", None, None)


@pytest.mark.parametrize("text", ["a cat", f"{MARK}a cat", f" {MARK} a cat\r\n", f"{MARK}\na cat"])
def test_a_mark_and_blanks_around_a_text_are_stripped(text: str) -> None:
    assert strip_text(text) == "a cat"
    assert strip_text(f"a{MARK}cat") == f"a{MARK}cat"  # within a text it is a character


def _csv(folder: Path, mark: str) -> list[str | None]:
    out = io.StringIO()
    csv.writer(out).writerows([["image", "caption"], ["0.jpg", "a cat"], ["1.jpg", f"{mark}a dog"]])
    (folder / "t.csv").write_text(mark + out.getvalue(), encoding="utf-8")
    return [row.caption for row in CsvSource(folder / "t.csv", folder, None, COLUMNS).rows() if isinstance(row, Row)]


def _jsonl(folder: Path, mark: str) -> list[str | None]:
    lines = [{"image": "0.jpg", "caption": "a cat"}, {"image": "1.jpg", "caption": f"{mark}a dog"}]
    (folder / "t.jsonl").write_text(mark + "\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = JsonlSource(folder / "t.jsonl", folder, None, COLUMNS).rows()
    return [row.caption for row in rows if isinstance(row, Row)]


def _coco(folder: Path, mark: str) -> list[str | None]:
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
        "annotations": [{"id": i, "image_id": i, "caption": text} for i, text in enumerate(["a cat", f"{mark}a dog"])],
    }
    (folder / "c.json").write_text(mark + json.dumps(content), encoding="utf-8")
    rows = [row for row in CocoCaptions(folder / "c.json", folder, None, "first").rows() if isinstance(row, Row)]
    assert [row.annotation and row.annotation["captions"] for row in rows] == [["a cat"], ["a dog"]]
    return [row.caption for row in rows]


def _tars(folder: Path, mark: str) -> list[str | None]:
    _write_tars(folder, [f"{mark}a cat", f"{mark}a dog"], mark)
    return [row.caption for row in Img2datasetSource(folder, None).rows() if isinstance(row, Row)]


def _write_tars(folder: Path, captions: list[str], mark: str) -> None:
    for number, caption in enumerate(captions):
        with tarfile.open(folder / f"{number % 3:05d}.tar", "a") as tar:
            about = mark + json.dumps({"number": number})
            for extension, data in (("jpg", make_image(number)), ("txt", caption.encode()), ("json", about.encode())):
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("mark", ["", MARK])
@pytest.mark.parametrize("captions", [_csv, _jsonl, _coco, _tars])
def test_every_conversion_leaves_marks_out(captions, mark: str, tmp_path: Path) -> None:
    assert captions(tmp_path, mark) == ["a cat", "a dog"]


def test_kept_tars_with_marks_are_read_as_those_without(tmp_path: Path) -> None:
    texts = []
    for mark in ("", MARK):
        folder, out = tmp_path / f"tars{len(mark)}", tmp_path / f"set{len(mark)}"
        folder.mkdir()
        _write_tars(folder, [f"{mark}thing {number}" for number in range(9)], mark)
        keep_tars(folder, "things", out, Licence("CC0", "", ""), 300, ConvertOptions(0, 1, False))
        assert check_set(ShardStorage(str(out))).problems == ()
        data = ShardDataModule(str(out), 1, 8, 16, 300)
        loaders = (data.val_dataloader(), data.test_dataloader())
        found = [
            tuple(batch.text_BL[0].tolist()) for loader in loaders for batch in loader if batch.text_BL is not None
        ]
        page = write_page(ShardStorage(str(out)), "train", 9, None, tmp_path / "page.html")
        texts.append(
            (sorted(data.tokenizer.decode(ids) for ids in found), sorted(s.captions[0].text for s in page.samples))
        )
        if mark:
            assert (folder / "00000.tar").read_bytes().count(codecs.BOM_UTF8) == 6
    (few, more), (others, more_others) = texts
    assert len(few) == len(others) == 6 and all(text.startswith("thing ") for text in (*few, *others, *more_others))
    assert len(more) == len(more_others) == 3
