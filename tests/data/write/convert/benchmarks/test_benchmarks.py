"""Published files of benchmarks become sets: every entry in its split, wrong files refused in one line."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError
from lightning_moevlm.data.write.convert.sources.benchmarks.coco_questions import OkVqa
from lightning_moevlm.data.write.convert.sources.benchmarks.gqa import Gqa
from lightning_moevlm.data.write.convert.sources.benchmarks.karpathy import KarpathyCaptions
from lightning_moevlm.data.write.convert.sources.benchmarks.nlvr2 import Nlvr2
from lightning_moevlm.data.write.convert.sources.benchmarks.textvqa import TextVqa
from lightning_moevlm.data.write.convert.sources.row_source import Source
from tests.data.benchmarks import SOURCES, karpathy_source, write_json
from tests.data.sources import caption, make_image, write_set
from tests.data.statement_set import read_members


def source_of(kind: str, folder: Path) -> Source:
    images = {"gqa": folder / "images", "textvqa": folder / "train_images"}.get(kind, folder)
    return {"gqa": Gqa, "okvqa": OkVqa, "textvqa": TextVqa, "nlvr2": Nlvr2}[kind](folder, images, None)


def questions_of(root: Path) -> dict[str, list[tuple[str, dict[str, object]]]]:
    """(image id, question) by split."""
    return {
        split: [
            (str(about["image_id"]), question)
            for members in read_members(root, split).values()
            for about in [json.loads(members["json"])]
            for question in about["questions"]
        ]
        for split in ("train", "val", "test")
    }


def test_gqa(tmp_path: Path) -> None:
    SOURCES["gqa"](tmp_path)
    assert write_set(source_of("gqa", tmp_path), tmp_path / "set").num_rows == 14
    found = questions_of(tmp_path / "set")
    assert {split: len(questions) for split, questions in found.items()} == {"train": 16, "val": 6, "test": 6}
    assert {image for image, _ in found["test"]} == {"2400040", "2400041", "2400042"}
    kinds = [(question["kind"], question["question"], question["answers"]) for _, question in found["val"][:2]]
    assert kinds == [("verify", "Is the sky dark?", ["yes"]), ("query", "What color is the car?", ["red"])]


@pytest.mark.parametrize(
    ("kind", "question"),
    [
        ("okvqa", ("Vehicles and Transportation", "What is it for?", "ride", ["ride"] * 6 + ["race"] * 4)),
        ("textvqa", ("other", "what is the brand of this camera?", "dakota", ["dakota"] * 7 + ["clos culombu"] * 3)),
    ],
)
def test_two_published_files(tmp_path: Path, kind: str, question: tuple[object, ...]) -> None:
    SOURCES[kind](tmp_path)
    assert write_set(source_of(kind, tmp_path), tmp_path / "set").num_rows == 27
    found = questions_of(tmp_path / "set")
    # the published validation file is the test split; some training images are held out, the others all train
    assert len(found["test"]) == 3 and 0 < len(found["val"]) < 8 and len(found["train"]) == 24 - len(found["val"])
    first = next(about for image, about in found["test"] if int(image, 10 if kind == "okvqa" else 16) == 100)
    assert tuple(first[part] for part in ("kind", "question", "answer", "answers")) == question


def test_nlvr2(tmp_path: Path) -> None:
    SOURCES["nlvr2"](tmp_path)
    write_set(source_of("nlvr2", tmp_path), tmp_path / "set")
    for split, published, number in (("train", "train", 12), ("val", "dev", 4), ("test", "test1", 4)):
        members = read_members(tmp_path / "set", split)
        assert set(members) == {f"{published}-{i}-0-{k}" for i in range(number // 2) for k in (0, 1)}
        about = json.loads(members[f"{published}-1-0-1"]["json"])
        assert about == {"kind": "statement", "answers": ["false"], "identifier": f"{published}-1-0-1"}
        assert members[f"{published}-1-0-0"]["txt"].decode() == f"The left image shows {caption(1)}."
        assert members[f"{published}-1-0-0"].keys() == {"jpg", "right.jpg", "json", "txt"}
    data = ShardDataModule(
        str(tmp_path / "set"), batch_size=4, image_size=32, max_text_len=24, vocab_size=400, annotation="answers",
        second_image="right",
    )  # fmt: skip
    (batch,) = data.val_dataloader()
    assert Counter(batch.answers.given) == {("true",): 2, ("false",): 2}  # type: ignore[union-attr]


@pytest.mark.parametrize("dataset", ["coco", "flickr30k"])
def test_karpathy(tmp_path: Path, dataset: str) -> None:
    file = karpathy_source(tmp_path, dataset)
    write_set(KarpathyCaptions(file, tmp_path, None), tmp_path / "set")
    train, val, test = (read_members(tmp_path / "set", split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (8, 3, 3)
    for split, ids in ((train, range(8)), (val, range(8, 11)), (test, range(11, 14))):
        about = [json.loads(members["json"]) for members in split.values()]
        assert {each["image_id"]: each["captions"] for each in about} == {
            i: [caption(3 * i + k) for k in range(3)] for i in ids
        }
    data = ShardDataModule(str(tmp_path / "set"), batch_size=8, image_size=32, max_text_len=24, vocab_size=400)
    texts = set()
    loader = data.train_dataloader()
    for _ in range(8):
        (batch,) = loader
        texts |= {tuple(row) for row in batch.text_BL.tolist()}  # type: ignore[union-attr]
    assert len(texts) > 12  # other captions of the 8 images in other epochs


def test_wrong_files_are_refused_in_one_line(tmp_path: Path) -> None:
    for kind, make in SOURCES.items():
        folder = tmp_path / kind
        folder.mkdir()
        with pytest.raises(UserError, match=r"has no files .* for the train split; it should hold one each of"):
            source_of(kind, folder)
        make(folder)
        wrong = next(iter(source_of(kind, folder).files.values()))  # type: ignore[attr-defined]
        write_json(wrong, [{"other": 1}])
        message = r"train.json line 1: .*the files of NLVR2" if kind == "nlvr2" else r"holds a JSON list; such files"
        with pytest.raises(UserError, match=message):
            write_set(source_of(kind, folder), tmp_path / "set")
        write_json(wrong, {"version": {"other": 1}})
        message = {
            "gqa": "holds no questions of GQA by number, each with an imageId",
            "nlvr2": "there is no text 'identifier'; give the files of NLVR2",
            "okvqa": "has no data_subtype",
            "textvqa": "has no list 'data': give a file of TextVQA",
        }[kind]
        with pytest.raises(UserError, match=message):
            write_set(source_of(kind, folder), tmp_path / "set")
    write_json(tmp_path / "dataset_coco.json", {"annotations": []})
    with pytest.raises(UserError, match=r"has no list 'images': give a file of Karpathy's splits"):
        write_set(KarpathyCaptions(tmp_path / "dataset_coco.json", tmp_path, None), tmp_path / "set")
    with pytest.raises(UserError, match="there is no such folder"):
        Gqa(tmp_path / "nowhere", tmp_path, None)
    assert not (tmp_path / "set").exists()


def test_bad_entries_are_counted_by_cause(tmp_path: Path) -> None:
    file = karpathy_source(tmp_path)
    content = json.loads(file.read_text())
    content["images"][0]["split"] = "training"
    content["images"][1]["sentences"] = []
    content["images"][2]["sentences"][1]["raw"] = 3
    write_json(file, content)
    with pytest.raises(TooManyBadError) as error:
        write_set(KarpathyCaptions(file, tmp_path, None), tmp_path / "set")
    assert {count.cause for count in error.value.counts} == {"split_unknown", "caption_empty", "row_malformed"}
    (tmp_path / "v").mkdir()
    SOURCES["nlvr2"](tmp_path / "v")
    (tmp_path / "v/dev/dev-0-0-img1.png").unlink()
    with (tmp_path / "v/dev.json").open("a") as lines:
        lines.write(json.dumps({"sentence": "a", "label": "maybe", "identifier": "dev-0-0-9"}) + "\n")
    (tmp_path / "v/dev/dev-1-0-img0.png").write_bytes(make_image(1)[:50])
    source = source_of("nlvr2", tmp_path / "v")
    with pytest.raises(TooManyBadError) as error:
        write_set(source, tmp_path / "set")
    assert [(count.cause, count.num_rows) for count in error.value.counts] == [("row_malformed", 1)]
    with pytest.raises(TooManyBadError) as error:
        write_set(source, tmp_path / "set", 1)
    found = {count.cause: count.num_rows for count in error.value.counts}
    assert found == {"row_malformed": 1, "image_missing": 2, "image_undecodable": 2}
