"""Folders of tars that other programs have written: what makes a sample, what is left out, and what is refused."""

from itertools import chain
from pathlib import Path

import pytest

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.check import check_set
from lightning_moevlm.shards.convert.bad_rows import TooManyBadError
from lightning_moevlm.shards.convert.convert import Converted, Effort, Form, Terms, convert
from lightning_moevlm.shards.convert.img2dataset import Img2datasetSource
from lightning_moevlm.shards.convert.keep_tars import keep_tars
from lightning_moevlm.shards.convert.picture import Wish
from lightning_moevlm.shards.datamodule import ShardDataModule
from lightning_moevlm.shards.manifest import SPLITS, read_manifest
from lightning_moevlm.shards.storage import ShardStorage
from tests.shards.found_tars import Files, folder_of, sample
from tests.shards.sources import caption, picture
from tests.shards.test_convert import members

TERMS = Terms("CC BY 4.0", "", "")
FORM = Form(Wish("jpg", None), 16, 400)


def keep(folder: Path, out: Path, max_bad: int = 0) -> Converted:
    return keep_tars(folder, "found", out, TERMS, 400, Effort(max_bad, 1, False))


def write_anew(folder: Path, out: Path, max_bad: int = 0) -> Converted:
    return convert(Img2datasetSource(folder, "found"), out, TERMS, FORM, Effort(max_bad, 1, False))


def num_samples(converted: Converted) -> int:
    return sum(converted.manifest.num_samples(split) for split in SPLITS)


def flat(*samples: Files) -> list[tuple[str, bytes]]:
    return list(chain.from_iterable(samples))


def three_tars(per_tar: int = 20) -> list[Files]:
    return [flat(*(sample(i, f"{i:04d}") for i in range(t * per_tar, (t + 1) * per_tar))) for t in range(3)]


def test_a_picture_and_a_text_of_two_folders_are_no_pair(tmp_path: Path) -> None:
    cats = [("cat/0001.jpg", picture(500)), ("dog/0001.txt", b"a dog")]
    folder = folder_of(tmp_path / "in", cats, *three_tars())
    for convert_it in (keep, write_anew):
        with pytest.raises(TooManyBadError, match=r"cat/0001: .*member|dog/0001: no picture") as refused:
            convert_it(folder, tmp_path / "set")
        assert {count.cause: count.num_rows for count in refused.value.counts} == {"member_missing": 2}
    write_anew(folder, tmp_path / "set", max_bad=2)
    assert picture(500) not in members(tmp_path / "set").values()


def test_samples_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    tars = [
        flat(
            *(
                sample(100 * t + 10 * i + k, f"{kind}/{t}{i:03d}")
                for i in range(10)
                for k, kind in enumerate(("cat", "dog"))
            )
        )
        for t in range(3)
    ]
    folder = folder_of(tmp_path / "in", *tars)
    for convert_it, out in ((keep, "kept"), (write_anew, "anew")):
        assert num_samples(convert_it(folder, tmp_path / out)) == 60
        assert check_set(ShardStorage(str(tmp_path / out))).problems == ()
    found = members(tmp_path / "anew")
    texts = {data: name.partition(".")[0] for name, data in found.items() if name.endswith(".txt")}
    for t, i, k in ((0, 0, 0), (0, 0, 1), (2, 5, 1)):
        number = 100 * t + 10 * i + k
        assert found[f"{texts[caption(number).encode()]}.jpg"] == picture(number)


def test_archives_of_macos_are_read_without_their_hidden_files(tmp_path: Path) -> None:
    tars = []
    for files in three_tars():
        hidden = [[(f"data/._{name}", b"\0\5\26\7"), (f"data/{name}", data)] for name, data in files]
        tars.append([("data/.DS_Store", b"\0\0\0\1"), *flat(*hidden)])
    folder = folder_of(tmp_path / "in", *tars)
    assert num_samples(keep(folder, tmp_path / "kept")) == 60
    assert check_set(ShardStorage(str(tmp_path / "kept"))).problems == ()
    assert sum(batch.num_samples for batch in _reading(tmp_path / "kept").val_dataloader()) == 20
    assert num_samples(write_anew(folder, tmp_path / "anew")) == 60


def _reading(root: Path, max_lost_fraction: float = 0.0) -> ShardDataModule:
    return ShardDataModule(str(root), 4, 16, 16, 400, num_streams=2, max_lost_fraction=max_lost_fraction)


def test_numbers_that_json_does_not_know_are_borne(tmp_path: Path) -> None:
    tars = [
        flat(*(sample(20 * t + i, f"{t}{i:03d}", {"similarity": float("nan"), "n": i}) for i in range(20)))
        for t in range(3)
    ]
    folder = folder_of(tmp_path / "in", *tars)
    assert keep(folder, tmp_path / "kept").left_out == ()
    assert check_set(ShardStorage(str(tmp_path / "kept"))).problems == ()
    write_anew(folder, tmp_path / "anew")
    found = members(tmp_path / "anew")
    assert {data for name, data in found.items() if name.endswith("json")} == {
        b'{"n":%d,"similarity":null}' % i for i in range(20)
    }


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
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_bad_sample_that_is_borne_is_not_trained_on(tmp_path: Path) -> None:
    tars = three_tars()
    tars[1] = [(name, b" " if name == "0024.txt" else data) for name, data in tars[1]]
    keep(folder_of(tmp_path / "in", *tars), tmp_path / "set", max_bad=1)
    shards = read_manifest(tmp_path / "set").splits
    split = next(split for split in SPLITS if shards[split][0].file == "part-1.tar")
    for tolerant in (False, True):
        data = _reading(tmp_path / "set", 0.2 if tolerant else 0.0)
        loader = getattr(data, f"{split}_dataloader")()
        if not tolerant:
            with pytest.raises(UserError, match=r"0024\.txt in shard part-1\.tar is empty.*data\.max_lost_fraction"):
                list(loader)
            continue
        with pytest.warns(UserWarning, match="caption_empty 1"):
            keys = {key for batch in loader for key in batch.keys}
        assert "0024" not in keys and len(keys) >= 15 and loader.lost == {"caption_empty": 1}


@pytest.mark.parametrize("convert_it", [keep, write_anew])
def test_all_pictures_first_then_all_texts_is_told_with_its_remedy(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    sorted_by_kind = [sorted(files, key=lambda file: file[0].endswith("txt")) for files in three_tars()]
    folder = folder_of(tmp_path / "in", *sorted_by_kind)
    with pytest.raises(
        UserError, match=r"part-0\.tar: members of 0000 do not stand side by side .*tar --sort=name"
    ) as told:
        convert_it(folder, tmp_path / "set", max_bad=100)
    assert "--max_bad" not in str(told.value)


def test_the_same_keys_in_every_tar_are_different_samples(tmp_path: Path) -> None:
    tars = [flat(*(sample(20 * t + i, f"{i:04d}") for i in range(20))) for t in range(3)]
    folder = folder_of(tmp_path / "in", *tars)
    assert num_samples(write_anew(folder, tmp_path / "anew")) == 60
    assert set(map(caption, range(60))) == {
        data.decode() for name, data in members(tmp_path / "anew").items() if name.endswith("txt")
    }
