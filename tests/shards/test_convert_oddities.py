"""Tables as the world writes them: half characters, odd delimiters, quotes that never close."""

import json
from pathlib import Path

import pytest

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.convert.bad_rows import TooManyBadError
from lightning_moevlm.shards.convert.coco import CocoCaptions, CocoQuestions
from lightning_moevlm.shards.convert.convert import Effort, Form, Terms, convert
from lightning_moevlm.shards.convert.picture import Wish
from lightning_moevlm.shards.convert.rows import BadRow, Source
from lightning_moevlm.shards.convert.tables import Columns, CsvSource
from tests.shards.sources import coco_source, vqa_source

COLUMNS = Columns("image", "caption", None, None)


def bad_rows(source: Source) -> list[tuple[str, str]]:
    return [(row.cause, row.place) for row in source.rows() if isinstance(row, BadRow)]


def test_half_characters_in_coco_files_are_bad_entries(tmp_path: Path) -> None:
    captions = coco_source(tmp_path, 4)
    content = json.loads(captions.read_text())
    content["images"][0]["file_name"] = "\udcff.jpg"  # of image 3, which has annotations 6 and 7 of the file
    captions.write_text(json.dumps(content))
    found = bad_rows(CocoCaptions(captions, tmp_path, None, "first"))
    assert found[0] == ("text_not_utf8", "captions_train2014.json images[0]")

    questions, annotations = vqa_source(tmp_path, 4)
    content = json.loads(annotations.read_text())
    content["annotations"][1]["answer_type"] = "\ud800"
    annotations.write_text(json.dumps(content))
    found = bad_rows(CocoQuestions(questions, annotations, tmp_path, None, None, None))
    assert [cause for cause, _ in found] == ["text_not_utf8", "question_unanswered"]


def test_a_name_that_no_file_can_have_is_a_missing_picture(tmp_path: Path) -> None:
    coco_source(tmp_path, 4)
    questions, annotations = vqa_source(tmp_path, 4)
    questions.write_text(json.dumps({**json.loads(questions.read_text()), "data_subtype": "\ud800"}))
    source = CocoQuestions(questions, annotations, tmp_path, None, None, None)
    with pytest.raises(TooManyBadError, match=r"4 rows are bad.*no file name: it is no UTF-8"):
        convert(source, tmp_path / "set", Terms("X", "", ""), Form(Wish("jpg", None), 16, 400), Effort(0, 1, False))


@pytest.mark.parametrize(("delimiter", "sign"), [("\\t", "\t"), ("\t", "\t"), (";", ";")])
def test_tables_are_divided_by_other_signs(tmp_path: Path, delimiter: str, sign: str) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(f'\ufeffimage{sign}caption\r\n1.jpg{sign}"a, b\nc"\r\n'.encode())  # BOM, line break in quotes
    (row,) = CsvSource(table, None, None, COLUMNS, delimiter).rows()
    assert not isinstance(row, BadRow)
    assert row.picture is not None and (row.picture.file, row.caption) == ("1.jpg", "a, b\nc")
    with pytest.raises(UserError, match="single character"):
        CsvSource(table, None, None, COLUMNS, '"')


def test_wrong_delimiters_and_encodings_are_told_in_printable_signs(tmp_path: Path) -> None:
    for text in (b"image;caption\n", "image,caption\n".encode("utf-16")):
        (tmp_path / "t.csv").write_bytes(text)
        with pytest.raises(UserError, match="--delimiter; the file has to be in UTF-8") as refused:
            list(CsvSource(tmp_path / "t.csv", None, None, COLUMNS).rows())
        assert str(refused.value).isprintable()


def test_a_quote_that_never_closes_swallows_no_rows(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text('image,caption\n1.jpg,"never closed\n' + "2.jpg,red\n" * 20)
    # 21 rows would be one bad row, and --max_bad 1 bear it
    with pytest.raises(UserError, match=r"captions\.csv line 2: a quote is opened here or later, and never closed"):
        list(CsvSource(table, None, None, COLUMNS).rows())


def test_when_all_rows_are_bad_that_is_what_is_told(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(b"image,caption\n1.jpg,caf\xe9\n")
    source = CsvSource(table, None, None, COLUMNS)
    with pytest.raises(TooManyBadError, match="text_not_utf8"):
        convert(source, tmp_path / "set", Terms("X", "", ""), Form(Wish("jpg", None), 16, 400), Effort(9, 1, False))
