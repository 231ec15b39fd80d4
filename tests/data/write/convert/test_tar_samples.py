"""Samples of tars that other programs have written: the members that belong to one, and those that are left out."""

from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError
from tests.data.found_tars import (
    BOTH,
    flat,
    folder_of,
    keep,
    num_samples,
    read_set,
    sample,
    three_tars,
    write_anew,
)
from tests.data.sources import caption, make_image
from tests.data.write.convert.test_convert import members


def test_an_image_and_a_text_of_two_folders_are_not_a_pair(tmp_path: Path) -> None:
    cats = [("cat/0001.jpg", make_image(500)), ("dog/0001.txt", b"a dog")]
    folder = folder_of(tmp_path / "in", cats, *three_tars())
    for convert_it in (keep, write_anew):
        with pytest.raises(TooManyBadError, match=r"cat/0001: .*member|dog/0001: no image") as refused:
            convert_it(folder, tmp_path / "set")
        assert {count.cause: count.num_rows for count in refused.value.counts} == {"member_missing": 2}
    write_anew(folder, tmp_path / "set", max_bad=2)
    assert make_image(500) not in members(tmp_path / "set").values()


def test_samples_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    tars = [
        flat(
            *(
                sample(100 * t + 10 * i + k, f"{kind}/{i:04d}")
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
        assert found[f"{texts[caption(number).encode()]}.jpg"] == make_image(number)


def test_archives_of_macos_are_read_without_their_hidden_files(tmp_path: Path) -> None:
    tars = []
    for files in three_tars():
        hidden = [[(f"data/._{name}", b"\0\5\26\7"), (f"data/{name}", data)] for name, data in files]
        tars.append([("data/.DS_Store", b"\0\0\0\1"), *flat(*hidden)])
    folder = folder_of(tmp_path / "in", *tars)
    assert num_samples(keep(folder, tmp_path / "kept")) == 60
    assert check_set(ShardStorage(str(tmp_path / "kept"))).problems == ()
    assert sum(batch.num_samples for batch in read_set(tmp_path / "kept").val_dataloader()) == 20
    assert num_samples(write_anew(folder, tmp_path / "anew")) == 60


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
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


def test_an_annotation_that_some_samples_lack_is_not_promised(tmp_path: Path) -> None:
    tars = three_tars()
    tars[0] = [*tars[0], *sample(99, "0099", {"n": 1})]
    manifest = keep(folder_of(tmp_path / "in", *tars), tmp_path / "set").manifest
    assert manifest.members == ("jpg", "txt")
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()


@BOTH
def test_all_images_first_then_all_texts_is_refused_with_a_remedy(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    sorted_by_kind = [sorted(files, key=lambda file: file[0].endswith("txt")) for files in three_tars()]
    folder = folder_of(tmp_path / "in", *sorted_by_kind)
    with pytest.raises(UserError, match=r"part-0\.tar: members of 0000 are not adjacent .*tar --sort=name") as refused:
        convert_it(folder, tmp_path / "set", max_bad=100)
    assert "--max_bad" not in str(refused.value)


def test_the_same_keys_in_every_tar_are_different_samples(tmp_path: Path) -> None:
    tars = [flat(*(sample(20 * t + i, f"{i:04d}") for i in range(20))) for t in range(3)]
    folder = folder_of(tmp_path / "in", *tars)
    manifest = keep(folder, tmp_path / "kept").manifest
    assert check_set(ShardStorage(str(tmp_path / "kept"))).problems == ()
    keys = [key for batch in read_set(tmp_path / "kept").val_dataloader() for key in batch.keys]
    assert keys[0] == f"{manifest.splits['val'][0].file.removesuffix('.tar')}/0000" and len(set(keys)) == 20
    assert num_samples(write_anew(folder, tmp_path / "anew")) == 60
    assert set(map(caption, range(60))) == {
        data.decode() for name, data in members(tmp_path / "anew").items() if name.endswith("txt")
    }
