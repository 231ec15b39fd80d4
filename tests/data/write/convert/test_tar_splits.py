"""Folders of found tars become splits: never an empty one, and bad samples stay in their tars."""

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import SPLITS, read_manifest
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from tests.data.found_tars import (
    folder_of,
    keep,
    read_set,
    three_tars,
)


def test_tars_in_subfolders_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path / "in/train", *three_tars(1))
    with pytest.raises(UserError, match=r"holds no tars, but folders in it do \(train\): convert each"):
        keep(tmp_path / "in", tmp_path / "set")


def test_an_empty_tar_among_full_ones_is_in_no_split(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", *three_tars(), [], [("README.md", b"about")])
    converted = keep(folder, tmp_path / "set")
    assert all(converted.manifest.num_samples(split) == 20 for split in SPLITS)
    assert sorted(path.name for path in (tmp_path / "set").glob("*.tar")) == [f"part-{i}.tar" for i in range(3)]
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()


def test_too_few_tars_with_samples_leave_no_empty_split(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", *three_tars()[:2], [])
    with pytest.raises(UserError, match=r"holds 2 tars with a sample that can be used.* --keep_tars false"):
        keep(folder, tmp_path / "set")
    strip_text = [(name, data) for name, data in three_tars()[2] if name.endswith("jpg")]
    folder_of(tmp_path / "in", *three_tars()[:2], strip_text)  # no sample of the third has a text
    with pytest.raises(UserError, match="holds 2 tars with a sample that can be used"):
        keep(folder, tmp_path / "set", max_bad=20)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_set_with_an_empty_split_is_refused(tmp_path: Path) -> None:
    keep(folder_of(tmp_path / "in", *three_tars()), tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    replace(manifest, splits={**manifest.splits, "val": ()}).write(tmp_path / "set")
    (problem,) = check_set(ShardStorage(str(tmp_path / "set"))).problems
    assert problem.startswith("the val split of ") and problem.endswith(
        "is empty; build the set again with more samples"
    )
    with pytest.raises(
        UserError, match=r"split of found is empty: build the set again with more samples\. If its tars were indexed"
    ):
        read_set(tmp_path / "set").val_dataloader()


def test_a_tolerated_bad_sample_is_not_trained_on(tmp_path: Path) -> None:
    tars = three_tars()
    tars[1] = [(name, b" " if name == "0024.txt" else data) for name, data in tars[1]]
    keep(folder_of(tmp_path / "in", *tars), tmp_path / "set", max_bad=1)
    shards = read_manifest(tmp_path / "set").splits
    split = next(split for split in SPLITS if shards[split][0].file == "part-1.tar")
    for tolerant in (False, True):
        data = read_set(tmp_path / "set", 0.2 if tolerant else 0.0)
        loader = getattr(data, f"{split}_dataloader")()
        if not tolerant:
            with pytest.raises(
                UserError, match=r"0024\.txt in shard part-1\.tar has no caption.*data\.max_lost_fraction"
            ):
                list(loader)
            continue
        with pytest.warns(UserWarning, match="caption_empty 1"):
            keys = {key for batch in loader for key in batch.keys}
        assert "0024" not in keys and len(keys) >= 15 and loader.lost == {"caption_empty": 1}
