import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_moevlm.shards.check import check_set
from lightning_moevlm.shards.contact_sheet import write_contact_sheet
from lightning_moevlm.shards.manifest import file_sha256, read_manifest


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
    report = check_set(scenes_root)
    assert report.problems == ()
    assert [card.split for card in report.cards] == ["train", "val", "test"]
    manifest = read_manifest(scenes_root)
    for card in report.cards:
        assert card.num_samples == manifest.num_samples(card.split)
        assert 4 < card.caption_min <= card.caption_median <= card.caption_p95 <= card.caption_max < 60


def test_every_problem_is_found(scenes_copy: Path) -> None:
    image = _rewrite(scenes_copy, 0, ".jpg", b"no picture")
    annotation = _rewrite(scenes_copy, 1, ".json", b"{no json")
    caption = _rewrite(scenes_copy, 2, ".txt", b"  ")
    gone = _rewrite(scenes_copy, 3, ".txt", None)
    (scenes_copy / "val-000000.tar").unlink()
    problems = check_set(scenes_copy).problems
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
    problems = check_set(scenes_copy).problems
    assert len(problems) == shards[0].num_samples
    assert all("occurs twice" in problem for problem in problems)


def test_a_missing_tokenizer(scenes_copy: Path) -> None:
    (scenes_copy / "tokenizer.json").unlink()
    (problem,) = check_set(scenes_copy).problems
    assert "tokenizer.json is missing" in problem


def test_contact_sheet_shows_the_pictures(scenes_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "sheets" / "val.png"
    write_contact_sheet(scenes_root, read_manifest(scenes_root), "val", 12, path)
    sheet = np.asarray(Image.open(path).convert("RGB"))
    assert [p.name for p in path.parent.iterdir()] == ["val.png"]
    assert sheet.shape[1] == 6 * 172 + 12
    # twelve tiles in two rows, each with more than one colour, and dark caption pixels below each
    for place in range(12):
        left, top = 12 + place % 6 * 172, 12 + place // 6 * 242
        assert len(np.unique(sheet[top : top + 160, left : left + 160].reshape(-1, 3), axis=0)) > 10
        assert (sheet[top + 161 : top + 230, left : left + 160] < 90).any()


def test_annotations_are_one_json_object_per_sample(scenes_root: Path) -> None:
    with tarfile.open(scenes_root / "val-000000.tar") as tar:
        members = [m for m in tar if m.name.endswith(".json")]
        about = [json.loads(tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    assert members and all({"ground", "objects", "relations", "questions", "statements"} == set(a) for a in about)
