import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

from lightning_moevlm.data.format.manifest import file_sha256, read_manifest
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource
from tests.data.sources import caption, csv_source, make_image, write_csv, write_set


def _rewrite(root: Path, number: int, name_ends: str, data: bytes | None) -> str:
    """Replace (None: remove) the first such member of a training shard and make the manifest agree."""
    manifest = read_manifest(root)
    shards = list(manifest.splits["train"])
    path = root / shards[number].file
    out, changed = io.BytesIO(), ""
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            if not changed and member.name.endswith(name_ends):
                changed = member.name
                if data is None:
                    continue
                content = data
                member.size = len(data)
            new.addfile(member, io.BytesIO(content))
    path.write_bytes(out.getvalue())
    shards[number] = replace(shards[number], num_bytes=path.stat().st_size, sha256=file_sha256(path))
    replace(manifest, splits={**manifest.splits, "train": tuple(shards)}).write(root)
    return changed


def test_a_good_set_has_no_problems(scenes_root: Path) -> None:
    report = check_set(ShardStorage(str(scenes_root)))
    assert report.problems == ()
    assert [card.split for card in report.cards] == ["train", "val", "test"]
    manifest = read_manifest(scenes_root)
    for card in report.cards:
        assert card.num_samples == manifest.num_samples(card.split)
        assert 4 < card.caption_min <= card.caption_median <= card.caption_p95 <= card.caption_max < 60


def test_every_problem_is_found(scenes_copy: Path) -> None:
    image = _rewrite(scenes_copy, 0, ".jpg", b"no image")
    annotation = _rewrite(scenes_copy, 1, ".json", b"{no json")
    caption = _rewrite(scenes_copy, 2, ".txt", b"  ")
    gone = _rewrite(scenes_copy, 3, ".txt", None)
    (scenes_copy / "val-000000.tar").unlink()
    problems = check_set(ShardStorage(str(scenes_copy))).problems
    assert len(problems) == 5
    for problem, part in zip(
        problems,
        (
            f"{image} in shard train-000000.tar cannot be decoded",
            f"{annotation} in shard train-000001.tar cannot be decoded",
            f"{Path(caption).stem} in shard train-000002.tar has an empty caption",
            f"{Path(gone).stem} in shard train-000003.tar has no .txt member",
            "val-000000.tar is missing",
        ),
        strict=True,
    ):
        assert part in problem


def test_a_key_that_occurs_twice(scenes_copy: Path) -> None:
    manifest = read_manifest(scenes_copy)
    shards = (*manifest.splits["train"], manifest.splits["train"][0])
    replace(manifest, splits={**manifest.splits, "train": shards}).write(scenes_copy)
    problems = check_set(ShardStorage(str(scenes_copy))).problems
    assert len(problems) == shards[0].num_samples
    assert all("occurs twice" in problem for problem in problems)


def test_a_missing_tokenizer(scenes_copy: Path) -> None:
    (scenes_copy / "tokenizer.json").unlink()
    (problem,) = check_set(ShardStorage(str(scenes_copy))).problems
    assert "tokenizer.json is missing" in problem


def test_annotations_are_one_json_object_per_sample(scenes_root: Path) -> None:
    with tarfile.open(scenes_root / "val-000000.tar") as tar:
        members = [m for m in tar if m.name.endswith(".json")]
        about = [json.loads(tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    assert members and all({"ground", "objects", "relations", "questions", "statements"} == set(a) for a in about)


def test_the_card_counts_what_occurs_twice(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(make_image(0 if i in (1, 4) else i, size=(40, 30 + i)))
    (tmp_path / "1.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    (tmp_path / "4.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    # train: 0, 1, 2 (0 and 1 the same image); val: 3, 4 (4 is 0 again); test: 5
    splits = ("train", "train", "train", "val", "val", "test")
    rows = [[f"{i}.jpg", caption(i), split] for i, split in enumerate(splits)]
    table = write_csv(tmp_path / "t.csv", ["image", "caption", "split"], rows)
    source = CsvSource(table, None, None, Columns("image", "caption", None, "split"))
    write_set(source, tmp_path / "set")
    report = check_set(ShardStorage(str(tmp_path / "set")))
    assert report.problems == () and report.faults == {}
    duplicates = [(card.duplicates_within, card.duplicates_across) for card in report.cards]
    assert duplicates == [(1, 0), (0, 1), (0, 0)]
    # heights are 30, 30, 32 in train; 33, 30 in val; 35 in test; every width is 40
    assert [(c.side_min, c.side_median, c.side_max) for c in report.cards] == [(30, 30, 40), (30, 33, 40), (35, 35, 40)]
    assert report.sizes == (((40, 30), 3), ((40, 32), 1), ((40, 33), 1), ((40, 35), 1))


def test_sets_of_one_modality_have_a_card(tmp_path: Path) -> None:
    table = csv_source(tmp_path, 60)
    for columns, name, modality in (
        (Columns(None, "caption", None, None), "t", "texts"),
        (Columns("image", None, None, None), "p", "images"),
    ):
        source = CsvSource(table, tmp_path / "images", name, columns)
        write_set(source, tmp_path / name)
        report = check_set(ShardStorage(str(tmp_path / name)))
        assert report.problems == () and {card.modality for card in report.cards} == {modality}
        assert all((card.caption_max > 0) is (name == "t") for card in report.cards)
        assert all((card.side_max > 0) is (name == "p") for card in report.cards)


def test_faults_are_counted_by_cause(scenes_copy: Path) -> None:
    _rewrite(scenes_copy, 0, ".jpg", b"no image")
    _rewrite(scenes_copy, 1, ".txt", b"\xff")
    _rewrite(scenes_copy, 2, ".json", b"{no json")
    (scenes_copy / "val-000000.tar").unlink()
    manifest = read_manifest(scenes_copy)
    report = check_set(ShardStorage(str(scenes_copy)))
    assert report.faults == {
        "image_undecodable": 1,
        "json_malformed": 1,
        "shard_missing": manifest.splits["val"][0].num_samples,
        "text_not_utf8": 1,
    }
    # what follows a bad sample in its shard is still counted
    assert report.cards[0].num_samples == manifest.num_samples("train") - 3
