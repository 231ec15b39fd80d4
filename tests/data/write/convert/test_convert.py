"""Rows become samples or bad rows, and no table can lead a conversion out of its folder."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import lightning_moevlm.data.write.convert.convert as convert_module
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import SPLITS, ShardEntry, read_manifest
from lightning_moevlm.data.text.tokenizer import load_tokenizer
from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError
from lightning_moevlm.data.write.convert.convert import Converted, ConvertOptions, Licence, SetOptions, convert
from lightning_moevlm.data.write.convert.process_pool import WorkerDiedError, map_in_order
from lightning_moevlm.data.write.convert.shard_image import ImageOptions
from lightning_moevlm.data.write.convert.sources.benchmarks.coco_captions import CocoCaptions
from lightning_moevlm.data.write.convert.sources.benchmarks.coco_questions import CocoQuestions
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource, JsonlSource
from lightning_moevlm.data.write.convert.sources.row_source import Source
from lightning_moevlm.data.write.convert.tasks import ShardTask, write_shard
from lightning_moevlm.data.write.convert.work_folder import open_work_folder
from lightning_moevlm.data.write.shard_writer import choose_split
from tests.data.sources import (
    caption,
    coco_source,
    csv_source,
    jsonl_source,
    make_image,
    vqa_source,
    write_csv,
    write_images,
)

LICENCE = Licence("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/", "by us")
AS_IT_IS = ImageOptions("jpg", None)
FORM = SetOptions(AS_IT_IS, 16, 400)
PLAIN = Columns("image", "caption", None, None)


def run(
    source: Source, out: Path, max_bad: int = 0, image_options: ImageOptions = AS_IT_IS, jobs: int = 1
) -> Converted:
    return convert(source, out, LICENCE, SetOptions(image_options, 16, 400), ConvertOptions(max_bad, jobs, False))


def members(root: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    return found


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_csv_rows_become_samples(tmp_path: Path) -> None:
    table = csv_source(tmp_path, 60)
    converted = run(CsvSource(table, tmp_path / "images", None, PLAIN), tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    assert converted == (manifest, True, (), 60, ())
    assert (manifest.name, manifest.licence, manifest.members) == ("captions", "CC BY 4.0", ("jpg", "json", "txt"))
    assert manifest.image_size == 32  # every image is 40 x 32
    found = members(tmp_path / "set")
    assert len(found) == 60 * 3
    for i in range(60):
        key = f"captions-{i:08d}"
        assert found[f"{key}.txt"].decode() == caption(i)
        assert json.loads(found[f"{key}.json"]) == {"page": f"source {i}"}
        source = make_image(i, "png" if i % 5 == 0 else "jpg")
        if i % 5:
            assert found[f"{key}.jpg"] == source  # kept byte for byte
        else:
            assert Image.open(io.BytesIO(found[f"{key}.jpg"])).size == (40, 32)
    tokenizer = load_tokenizer(tmp_path / "set", manifest.tokenizer)
    assert len(tokenizer.ids(caption(3))) < 12  # words, not bytes
    assert (tmp_path / "set/LICENCE.txt").read_text() == f"by us\nCC BY 4.0\n{LICENCE.url}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "images", "set"]


def test_the_image_decides_about_the_split(tmp_path: Path) -> None:
    table = csv_source(tmp_path, 60)
    run(CsvSource(table, tmp_path / "images", None, PLAIN), tmp_path / "set")
    for split in SPLITS:
        for path in (tmp_path / "set").glob(f"{split}-*.tar"):
            with tarfile.open(path) as tar:
                for name in (n for n in tar.getnames() if n.endswith(".jpg")):
                    i = int(name[9:17])
                    source = make_image(i, "png" if i % 5 == 0 else "jpg")
                    assert choose_split(hashlib.sha256(source).hexdigest()) == split


def test_a_column_may_name_the_split(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.jpg" for i in range(6)])
    rows = [[f"{i}.jpg", f"words {i}", f"k{i}", SPLITS[i % 3]] for i in range(6)]
    table = write_csv(tmp_path / "t.csv", ["image", "caption", "id", "part"], rows)
    run(CsvSource(table, None, None, Columns("image", "caption", "id", "part")), tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    assert [manifest.num_samples(split) for split in SPLITS] == [2, 2, 2]
    with tarfile.open(tmp_path / "set/val-000000.tar") as tar:
        assert sorted(tar.getnames()) == ["k1.jpg", "k1.txt", "k4.jpg", "k4.txt"]  # and no json: nothing is left


@pytest.mark.parametrize("jobs", [1, 2])
def test_texts_alone_and_images_alone(tmp_path: Path, jobs: int) -> None:
    table = csv_source(tmp_path, 60)
    texts = CsvSource(table, tmp_path / "images", "t", Columns(None, "caption", None, None))
    run(texts, tmp_path / "texts", jobs=jobs)
    assert read_manifest(tmp_path / "texts").members == ("json", "txt")
    assert read_manifest(tmp_path / "texts").image_size == 0
    images = CsvSource(table, tmp_path / "images", "p", Columns("image", None, None, None))
    run(images, tmp_path / "images_set", jobs=jobs)
    assert read_manifest(tmp_path / "images_set").members == ("jpg", "json")
    assert read_manifest(tmp_path / "images_set").tokenizer.vocab_size == 260  # bytes and special tokens


def test_jsonl_keeps_structured_fields(tmp_path: Path) -> None:
    run(JsonlSource(jsonl_source(tmp_path, 50), None, None, PLAIN), tmp_path / "set")
    found = members(tmp_path / "set")
    assert json.loads(found["rows-00000007.json"]) == {"about": {"boxes": [[7, 1, 2, 3]]}}
    assert found["rows-00000007.txt"].decode() == caption(7)


@pytest.mark.parametrize(("take", "num_samples"), [("first", 50), ("each", 100)])
def test_coco_captions(tmp_path: Path, take: str, num_samples: int) -> None:
    source = CocoCaptions(coco_source(tmp_path, 50), tmp_path, "coco", take)  # type: ignore[arg-type]
    run(source, tmp_path / "set")
    found = members(tmp_path / "set")
    assert len(found) == 3 * num_samples
    first = "coco-000000000007" + ("" if take == "first" else "-0")
    about = json.loads(found[f"{first}.json"])
    assert about["captions"] == [caption(7), f"{caption(7)}, again"]  # by id: 14, then 15
    assert about["file_name"] == "COCO_train2014_000000000007.jpg" and about["image_id"] == 7
    assert found[f"{first}.txt"].decode() == caption(7) and found[f"{first}.jpg"] == make_image(7)
    if take == "each":
        assert found["coco-000000000007-1.txt"].decode() == f"{caption(7)}, again"


def test_coco_questions_follow_the_layout_of_scenes(tmp_path: Path) -> None:
    captions = coco_source(tmp_path, 50)
    questions, annotations = vqa_source(tmp_path, 50)
    run(CocoQuestions(questions, annotations, tmp_path, "vqa", None, None), tmp_path / "set")
    found = members(tmp_path / "set")
    assert {name.partition(".")[2] for name in found} == {"jpg", "json"} and len(found) == 100
    red = ("no", "yes")[caption(7).startswith("red")]
    assert json.loads(found["vqa-000000000007.json"]) == {
        "image_id": 7,
        "questions": [
            {"kind": "number", "question": "How many things?", "answer": "2", "answers": ["2", "many"]},
            {"kind": "yes/no", "question": "Is it red?", "answer": red, "answers": [red]},
        ],
    }
    # the tokenizer has learnt the questions: words, not bytes
    assert len(load_tokenizer(tmp_path / "set", read_manifest(tmp_path / "set").tokenizer).ids("How many things?")) < 7
    run(CocoQuestions(questions, annotations, tmp_path, "vqa", None, captions), tmp_path / "both")
    assert members(tmp_path / "both")["vqa-000000000007.txt"].decode() == caption(7)


def test_the_number_of_processes_does_not_show(tmp_path: Path) -> None:
    table = csv_source(tmp_path, 300)
    for jobs in (1, 2):
        run(CsvSource(table, tmp_path / "images", None, PLAIN), tmp_path / f"set{jobs}", jobs=jobs)
    assert contents(tmp_path / "set1") == contents(tmp_path / "set2")


def test_again_does_nothing_and_another_way_is_refused(tmp_path: Path) -> None:
    table = csv_source(tmp_path, 60)
    source = CsvSource(table, tmp_path / "images", None, PLAIN)
    assert run(source, tmp_path / "set").built
    assert not run(source, tmp_path / "set").built
    with pytest.raises(UserError, match="max_side 0 there, 16 asked"):
        run(source, tmp_path / "set", image_options=ImageOptions("jpg", 16))
    table.write_text(table.read_text().replace("source 1", "source one"))
    with pytest.raises(UserError, match=r"table .* there, .* asked"):
        run(CsvSource(table, tmp_path / "images", None, PLAIN), tmp_path / "set")


def test_an_interrupted_conversion_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = csv_source(tmp_path, 200)
    source = CsvSource(table, tmp_path / "images", None, PLAIN)
    written: list[str] = []

    def write_or_stop(task: ShardTask) -> ShardEntry:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(task.target.name)
        return write_shard(task)

    monkeypatch.setattr(convert_module, "write_shard", write_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "set")
    (work_folder,) = tmp_path.glob(".set.converting-*")
    (work_folder / written[1]).write_bytes(b"damaged meanwhile")
    del written[:]
    monkeypatch.setattr(convert_module, "inspect_images", None)  # every image has been looked at
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "set")
    # shards 0, 2 and 3 were kept; 1 is written again, then 4, 5, 6
    assert written == [f"train-{i:06d}.tar" for i in (1, 4, 5, 6)]
    monkeypatch.undo()
    run(source, tmp_path / "set")
    run(source, tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_two_conversions_of_one_set_do_not_meet(tmp_path: Path) -> None:
    source = CsvSource(csv_source(tmp_path, 60), tmp_path / "images", None, PLAIN)
    recipe = convert_module.make_recipe(source, LICENCE, FORM)
    busy = pytest.raises(UserError, match="being converted by another process")
    with open_work_folder(tmp_path / "set", recipe.fingerprint), busy:
        run(source, tmp_path / "set")
    run(source, tmp_path / "set")


def test_a_process_that_dies_takes_nothing_along(tmp_path: Path) -> None:
    with (
        pytest.raises(WorkerDiedError, match=r"run the same command to resume"),
        open_work_folder(tmp_path / "set", "f" * 64),
    ):
        list(map_in_order(os._exit, [1, 1], num_jobs=2))
    assert len(list(tmp_path.glob(".set.converting-*"))) == 1


BAD_ROWS = {
    "row_malformed": (["0.jpg", "words"], "2 fields under 3 columns"),
    "caption_empty": (["0.jpg", "  ", ""], "caption is empty"),
    "image_missing": (["none.jpg", "words", ""], "'none.jpg' cannot be found"),
    "image_undecodable": (["text.jpg", "words", ""], "not an image of a known format"),
    "text_not_utf8": (["0.jpg", "caf\udce9", ""], "invalid UTF-8 at character 4"),
    "image_too_large": (["bomb.png", "words", ""], "9000 x 9000 pixels"),
}


@pytest.mark.parametrize("cause", BAD_ROWS)
def test_bad_rows_are_refused_with_their_place_or_left_out(tmp_path: Path, cause: str) -> None:
    table = csv_source(tmp_path, 60)
    folder = tmp_path / "images"
    (folder / "0.jpg").write_bytes(make_image(0))
    (folder / "text.jpg").write_text("no image")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")  # 81 million pixels in some kilobytes
    cells, message = BAD_ROWS[cause]
    with table.open("ab") as file:
        file.write(",".join(cells).encode("utf-8", "surrogateescape") + b"\r\n")
    source = CsvSource(table, folder, None, PLAIN)
    with pytest.raises(TooManyBadError, match=rf"1 row is bad.*line 62: .*{message}.*{cause}.*--max_bad 1"):
        run(source, tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "images"]
    (left_out,) = run(source, tmp_path / "set", max_bad=1).left_out
    assert (left_out.cause, left_out.num_rows) == (cause, 1)
    assert sum(read_manifest(tmp_path / "set").num_samples(split) for split in SPLITS) == 60


def test_a_bad_json_line_has_its_number(tmp_path: Path) -> None:
    table = jsonl_source(tmp_path, 30)
    lines = table.read_bytes().splitlines()
    lines[4], lines[9], lines[14], lines[19] = b'{"image": ', b"[1]", b'{"image": "1.jpg", "caption": NaN}', b'"\xff"'
    table.write_bytes(b"\n".join(lines))
    with pytest.raises(TooManyBadError, match=r"4 rows.*the first: rows.jsonl line 5: this is not JSON") as caught:
        run(JsonlSource(table, None, None, PLAIN), tmp_path / "set")
    assert {count.cause: count.num_rows for count in caught.value.counts} == {"row_malformed": 3, "text_not_utf8": 1}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", "not a path within"),
        ("{absolute}", "not a path within"),
        ("a/../../secret.jpg", "not a path within"),
        ("link.jpg", "a link that leads out"),
        ("folder/secret.jpg", "a link that leads out"),
    ],
)
def test_no_path_leaves_the_folder(tmp_path: Path, name: str, reason: str) -> None:
    folder = tmp_path / "in/images"
    write_images(folder, [f"{i}.jpg" for i in range(60)])
    (tmp_path / "in/secret.jpg").write_bytes(make_image(99))
    (folder / "link.jpg").symlink_to(tmp_path / "in/secret.jpg")
    (folder / "folder").symlink_to(tmp_path / "in", target_is_directory=True)
    rows = [[f"{i}.jpg", caption(i)] for i in range(60)]
    bad = name.format(absolute=tmp_path / "in/secret.jpg")
    table = write_csv(tmp_path / "in/t.csv", ["image", "caption"], [*rows, [bad, "words"]])
    source = CsvSource(table, folder, None, PLAIN)
    with pytest.raises(TooManyBadError, match=rf"line 62: .*{reason}.*path_outside"):
        run(source, tmp_path / "set")
    run(source, tmp_path / "set", max_bad=1)
    assert make_image(99) not in members(tmp_path / "set").values()


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.jpg" for i in range(60)])
    (tmp_path / "linked.jpg").symlink_to(tmp_path / "3.jpg")
    rows = [[f"{i}.jpg", caption(i)] for i in range(60)]
    table = write_csv(tmp_path / "t.csv", ["image", "caption"], [*rows, ["linked.jpg", "words"]])
    run(CsvSource(table, None, None, PLAIN), tmp_path / "set")
    assert members(tmp_path / "set")["t-00000060.jpg"] == make_image(3)


def test_a_named_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait forever
    table = write_csv(tmp_path / "t.csv", ["image", "caption"], [["pipe.jpg", "words"]])
    with pytest.raises(TooManyBadError, match="not a regular file"):
        run(CsvSource(table, None, None, PLAIN), tmp_path / "set")


def test_keys_are_unique_and_plain(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.jpg"])
    rows = [["0.jpg", "words", key] for key in ("a", "a", "b.c", "../d", "")]
    table = write_csv(tmp_path / "t.csv", ["image", "caption", "id"], rows)
    with pytest.raises(TooManyBadError) as caught:
        run(CsvSource(table, None, None, Columns("image", "caption", "id", None)), tmp_path / "set")
    assert {count.cause: count.num_rows for count in caught.value.counts} == {"key_malformed": 3, "duplicate_key": 1}


def test_an_image_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = csv_source(tmp_path, 60)
    write_all = convert_module._write_all

    def change_then_write(*arguments):  # type: ignore[no-untyped-def]
        (tmp_path / "images/0/7.jpg").write_bytes(make_image(1000))
        return write_all(*arguments)

    monkeypatch.setattr(convert_module, "_write_all", change_then_write)
    with pytest.raises(UserError, match=r"captions.csv line 9: the image has changed"):
        run(CsvSource(table, tmp_path / "images", None, PLAIN), tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "images"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,words\n", "no column 'caption'.*it has: image, words"),
        ("", "no column 'image'.*it has: none"),
        ("image,caption,image\n", "names a column twice"),
        ("image,caption\n", "no rows"),
    ],
)
def test_a_file_that_is_not_a_table(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        run(CsvSource(tmp_path / "t.csv", None, None, PLAIN), tmp_path / "set")


def test_files_that_are_not_coco(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for text, message in (
        ('{"images": [],\n "annotations": [}', r"c.json is not JSON \(line 2"),
        ('{"images": []}', "no list 'annotations': give COCO's captions file, such as"),
        ("[]", "holds a JSON list; such files hold an object"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            run(CocoCaptions(path, tmp_path, None, "first"), tmp_path / "set")
    path.write_text(json.dumps({"images": [{"id": 1}, 3], "annotations": [{"id": 5, "image_id": 9, "caption": "x"}]}))
    with pytest.raises(TooManyBadError, match=r"3 rows.*c.json images\[0\]: there is no text 'file_name'"):
        run(CocoCaptions(path, tmp_path, None, "first"), tmp_path / "set")
