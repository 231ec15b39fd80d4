"""Tables as the world writes them: half characters, odd delimiters, quotes that never close."""

import gzip
import json
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.manifest import SPLITS
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError
from lightning_moevlm.data.write.convert.shard_image import read_image
from lightning_moevlm.data.write.convert.sources.benchmarks.coco_captions import CocoCaptions
from lightning_moevlm.data.write.convert.sources.benchmarks.coco_questions import CocoQuestions
from lightning_moevlm.data.write.convert.sources.csv_format import CsvFormat
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource, JsonlSource
from lightning_moevlm.data.write.convert.sources.row_source import BadRow, ImageLocation, Row, RowError, Source
from tests.data.sources import coco_source, make_image, vqa_source, write_csv, write_images, write_set

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


def test_a_name_that_no_file_can_have_is_a_missing_image(tmp_path: Path) -> None:
    coco_source(tmp_path, 4)
    questions, annotations = vqa_source(tmp_path, 4)
    questions.write_text(json.dumps({**json.loads(questions.read_text()), "data_subtype": "\ud800"}))
    source = CocoQuestions(questions, annotations, tmp_path, None, None, None)
    with pytest.raises(TooManyBadError, match=r"4 rows are bad.*not a file name: it is not UTF-8"):
        write_set(source, tmp_path / "set")


@pytest.mark.parametrize(("delimiter", "sign"), [("\t", "\t"), (";", ";")])
def test_tables_are_divided_by_other_signs(tmp_path: Path, delimiter: str, sign: str) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(f'\ufeffimage{sign}caption\r\n1.jpg{sign}"a, b\nc"\r\n'.encode())  # BOM, line break in quotes
    (row,) = CsvSource(table, None, None, COLUMNS, CsvFormat(delimiter)).rows()
    assert not isinstance(row, BadRow)
    assert row.image is not None and (row.image.file, row.caption) == ("1.jpg", "a, b\nc")
    with pytest.raises(UserError, match="single character"):
        CsvFormat('"')


def test_wrong_delimiters_and_encodings_are_reported_in_printable_characters(tmp_path: Path) -> None:
    for text, remedy in (
        (b"image;caption\n", "add --delimiter ';'"),
        (b"image\tcaption\n", r"add --delimiter '\\t'"),
        ("image,caption\n".encode("utf-16"), "add --encoding utf-16"),
        ("image,l\xe9gende\n".encode("cp1252"), "--encoding cp1252"),
    ):
        (tmp_path / "t.csv").write_bytes(text)
        with pytest.raises(UserError, match=remedy) as refused:
            list(CsvSource(tmp_path / "t.csv", None, None, COLUMNS).rows())
        assert str(refused.value).isprintable()


def test_a_quote_that_never_closes_swallows_no_rows(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text('image,caption\n1.jpg,"never closed\n' + "2.jpg,red\n" * 20)
    # 21 rows would be one bad row, and --max_bad 1 bear it
    with pytest.raises(
        UserError, match=r"captions\.csv line 2: the quoted field that starts here or later is not closed"
    ):
        list(CsvSource(table, None, None, COLUMNS).rows())


def test_a_source_with_bad_rows_alone_reports_them(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(b"image,caption\n1.jpg,caf\xe9\n")
    source = CsvSource(table, None, None, COLUMNS)
    with pytest.raises(TooManyBadError, match="text_not_utf8"):
        write_set(source, tmp_path / "set", 9)


def test_a_table_of_windows_is_read_in_its_encoding(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes("image;caption\r\nsub\\1.jpg;café\r\n".encode("cp1252"))
    with pytest.raises(TooManyBadError, match=r"name the encoding of the table, as with --encoding cp1252"):
        write_set(CsvSource(table, None, None, COLUMNS, CsvFormat(";")), tmp_path / "set")
    write_images(tmp_path, ["sub/1.jpg"])
    (row,) = CsvSource(table, None, None, COLUMNS, CsvFormat(";", "cp1252")).rows()
    assert isinstance(row, Row) and row.caption == "café" and row.image is not None
    assert read_image(tmp_path, row.image) == make_image(0)  # backslashes divide folders
    with pytest.raises(UserError, match="encoding is 'latin9000', which Python does not know"):
        CsvFormat(encoding="latin9000")


@pytest.mark.parametrize("name", ["C:\\images\\1.jpg", "..\\1.jpg", "\\\\server\\share\\1.jpg"])
def test_no_path_of_windows_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(RowError) as refused:
        read_image(tmp_path, ImageLocation(name))
    assert refused.value.cause == "path_outside"


TSV = ["image\tcaption", *(f"{i}.jpg\ta thing, number {i}" for i in range(100))]
TSV[6], TSV[36] = '5.jpg\t"Open', '35.jpg\tand closed"'


def test_quotes_that_are_signs_like_any_other_swallow_no_rows(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("\n".join(TSV) + "\n")
    with pytest.raises(UserError, match=r"t\.tsv line 7: .*closed on line 37, .* look like rows; .*--quotes false"):
        list(CsvSource(table, None, None, COLUMNS, CsvFormat("\t")).rows())
    rows = list(CsvSource(table, None, None, COLUMNS, CsvFormat("\t", quotes=False)).rows())
    assert len(rows) == 100 and isinstance(rows[5], Row) and rows[5].caption == '"Open'
    assert len(list(CsvSource(table, None, None, COLUMNS, CsvFormat("\t", quotes=True)).rows())) == 70
    table.write_text("\n".join([*TSV[:36], '35.jpg\t"closed" in the middle', *TSV[37:]]) + "\n")
    with pytest.raises(
        UserError, match=r"line 7: .* makes one row of lines 7 to 37, which is invalid .*--quotes false"
    ):
        list(CsvSource(table, None, None, COLUMNS, CsvFormat("\t")).rows())


def test_captions_of_several_lines_are_counted(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('image,caption\n1.jpg,"one, two\nthree, four"\n2.jpg,five\n')
    source = CsvSource(table, None, None, COLUMNS)
    assert len(list(source.rows())) == 2
    assert source.notes == ["1 rows span several lines, since quoted fields hold line breaks; the first: t.csv line 2"]


OTHERS = {
    "parquet": (b"PAR1\x15\x04", "is a Parquet file, not a CSV file; .*read_parquet.*data convert jsonl"),
    "gzip": (gzip.compress(b"image,caption\n"), r"is compressed \(gzip\), .*gunzip"),
    "excel": (b"PK\x03\x04rest", "is a zip or Excel file, .*export it as a CSV file"),
    "objects": (b'{"image": "1.jpg", "caption": "a"}\n', "is JSON, .*`moevlm data convert jsonl`"),
    "list": (b'[{"image": "1.jpg", "caption": "a"}]', r"is JSON, .*jq -c '\.\[\]'.*convert that as jsonl"),
    "coco": (b'{"info": {}, "images": [], "annotations": []}', "is JSON, .*coco_captions"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_not_a_table_is_refused_with_a_remedy(tmp_path: Path, kind: str) -> None:
    data, message = OTHERS[kind]
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        CsvSource(tmp_path / "t.csv", None, None, COLUMNS)
    if kind != "objects":
        with pytest.raises(UserError, match=message.partition(",")[0].replace("is JSON", "is one JSON document")):
            JsonlSource(tmp_path / "t.csv", None, None, COLUMNS)


def test_a_file_without_json_objects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("image,caption\n1.jpg,a\n")
    with pytest.raises(UserError, match=r"does not begin with a JSON object; .* data convert csv"):
        JsonlSource(tmp_path / "t", None, None, COLUMNS)
    (tmp_path / "t").write_text('{\n "image": "1.jpg"\n}\n')
    with pytest.raises(UserError, match=r"one JSON document, .*jq -c '\.' "):
        JsonlSource(tmp_path / "t", None, None, COLUMNS)
    with pytest.raises(UserError, match="is a folder; give a file in it"):
        JsonlSource(tmp_path, None, None, COLUMNS)


def test_lists_of_captions_in_lines_are_kept_whole(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.jpg" for i in range(60)])
    rows = [
        {"image": f"{i}.jpg", "caption": [f"one {i}", f"two {i}"] if i % 2 == 0 else f"only {i}"} for i in range(60)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = write_set(JsonlSource(tmp_path / "t.jsonl", None, None, COLUMNS), tmp_path / "set").manifest
    assert manifest.members == ("jpg", "json") and manifest.layout.caption_field == "caption"
    report = check_set(ShardStorage(str(tmp_path / "set")))
    assert report.problems == () and {card.modality for card in report.cards} == {"pairs"}


def test_leaving_rows_out_is_not_advised_where_the_table_is_misread(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.jpg"])
    for num_bad, advice in ((3, r"or leave them out with --max_bad 3"), (20, r"20 of 80 are bad because .*--images")):
        rows = [["0.jpg", "a"]] * 60 + [["gone.jpg", "a"]] * num_bad
        table = write_csv(tmp_path / "t.csv", ["image", "caption"], rows)
        with pytest.raises(TooManyBadError, match=advice) as refused:
            write_set(CsvSource(table, None, None, COLUMNS), tmp_path / "set")
        assert ("--max_bad" in str(refused.value)) == (num_bad == 3)


def test_a_quote_over_two_lines_swallows_no_row(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text('image\tcaption\tpage\n1.jpg\t"Open\tp1\n2.jpg\tclosed"\tp2\n')
    with pytest.raises(UserError, match=r"line 2: .*closed on line 3, .*--quotes false"):
        list(CsvSource(table, None, None, COLUMNS, CsvFormat("\t")).rows())


def test_one_of_an_images_captions_is_drawn(tmp_path: Path) -> None:
    manifest = write_set(CocoCaptions(coco_source(tmp_path, 50), tmp_path, "coco", "draw"), tmp_path / "set").manifest
    assert manifest.members == ("jpg", "json", "txt") and manifest.layout.caption_field == "captions"
    assert sum(manifest.num_samples(split) for split in SPLITS) == 50
    data = ShardDataModule(str(tmp_path / "set"), 1, 16, 16, 400, num_streams=1)
    texts = [
        data.tokenizer.decode(batch.text_BL[0].tolist())
        for batch in data.train_dataloader()
        if batch.text_BL is not None
    ]
    assert 5 < sum(text.endswith("again") for text in texts) < len(texts) - 5


def test_texts_alone_may_have_several_captions(tmp_path: Path) -> None:
    rows = [{"caption": [f"one {i // 2}", f"two {i // 2}"]} for i in range(120)]  # each twice
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonlSource(tmp_path / "t.jsonl", None, None, Columns(None, "caption", None, None))
    assert write_set(source, tmp_path / "set").manifest.members == ("json",)
    report = check_set(ShardStorage(str(tmp_path / "set")))
    assert report.problems == () and {card.modality for card in report.cards} == {"texts"}
    assert sum(card.duplicates_within for card in report.cards) == 60 and not any(
        card.duplicates_across for card in report.cards
    )
