"""img2dataset's folders: tars that stay as they are, and samples that are written again."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.manifest import SPLITS, read_manifest
from lightning_moevlm.data.images.decode import decode_image
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError
from lightning_moevlm.data.write.convert.convert import Converted, ConvertOptions, Licence
from lightning_moevlm.data.write.convert.keep_tars import keep_tars
from lightning_moevlm.data.write.convert.sources.img2dataset import Img2datasetSource
from tests.data.sources import caption, img2dataset_source, make_image, write_set
from tests.data.write.convert.test_convert import contents, members

LICENCE = Licence("CC BY 4.0", "", "")


def keep(folder: Path, out: Path, max_bad: int = 0, jobs: int = 1) -> Converted:
    return keep_tars(folder, "web", out, LICENCE, 400, ConvertOptions(max_bad, jobs, False))


def test_the_tars_are_the_same_files(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 5, 6)
    before = contents(folder)
    assert keep(folder, tmp_path / "set").built
    manifest = read_manifest(tmp_path / "set")
    assert contents(folder) == before
    tars = sorted(shard.file for split in SPLITS for shard in manifest.splits[split])
    assert tars == [f"{i:05d}.tar" for i in range(5)]
    assert all((tmp_path / "set" / tar).samefile(folder / tar) for tar in tars)
    assert [len(manifest.splits[split]) for split in SPLITS] == [3, 1, 1]
    assert (manifest.members, manifest.image_size) == (("jpg", "json", "txt"), 32)
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()
    assert not keep(folder, tmp_path / "set").built
    assert keep(folder, tmp_path / "other", jobs=2).manifest == manifest
    assert contents(tmp_path / "set") == contents(tmp_path / "other")


def test_the_set_may_be_made_in_the_folder_itself(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 5, 6)
    before = contents(folder)
    assert keep(folder, folder).built
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"manifest.json", "tokenizer.json", "LICENCE.txt"}
    assert check_set(ShardStorage(str(folder))).problems == ()
    assert not keep(folder, folder).built
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_where_links_are_not_possible_tars_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 6)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    keep(folder, tmp_path / "set")
    assert not (tmp_path / "set/00000.tar").samefile(folder / "00000.tar")
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()


def test_samples_are_written_anew(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 2, 30)
    source = Img2datasetSource(folder, "web")
    write_set(source, tmp_path / "set")
    found = members(tmp_path / "set")
    assert len(found) == 2 * 30 * 3
    # the fourth sample of the second tar is number 33; its key counts the downloads that failed
    assert found["web-000010006.jpg"] == make_image(33)
    assert found["web-000010006.txt"].decode() == caption(33)
    assert json.loads(found["web-000010006.json"])["url"] == "https://example.org/33.jpg"
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()


def test_unfinished_or_truncated_tars_are_refused(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 6)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no tars of WebDataset or img2dataset"):
        keep(tmp_path / "none", tmp_path / "set")
    (tmp_path / "none").rmdir()
    (folder / "00001_stats.json").rename(tmp_path / "stats")
    with pytest.raises(UserError, match=r"00001.tar has no 00001_stats.json .* has not finished it"):
        keep(folder, tmp_path / "set")
    stats = json.loads((tmp_path / "stats").read_text())
    (folder / "00001_stats.json").write_text(json.dumps(stats | {"successes": 7}))
    with pytest.raises(UserError, match=r"00001.tar holds 6 samples, but 7 by its statistics"):
        keep(folder, tmp_path / "set")
    (tmp_path / "stats").rename(folder / "00001_stats.json")
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[:2000])  # within an image
    with pytest.raises(UserError, match=r"00001.tar is truncated or not a tar"):
        keep(folder, tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_plain_shards_of_any_name_have_no_statistics(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 6)
    for number in range(3):
        (folder / f"{number:05d}_stats.json").unlink()
        (folder / f"{number:05d}.tar").rename(folder / f"cc3m-train-{number:04d}.tar")
    keep(folder, tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    assert sorted(entry.file for split in SPLITS for entry in manifest.splits[split]) == [
        f"cc3m-train-{number:04d}.tar" for number in range(3)
    ]
    assert sum(manifest.num_samples(split) for split in SPLITS) == 18
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()


def test_too_few_tars_to_deal_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 2 tars, .* --keep_tars false"):
        keep(img2dataset_source(tmp_path / "in", 2, 6), tmp_path / "set")


def test_bad_samples_are_reported_and_may_stay(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 6)
    tar = folder / "00001.tar"
    data = tar.read_bytes()
    text = caption(8).encode()  # the third sample of the second tar
    tar.write_bytes(data.replace(text, b" " * len(text)).replace(make_image(9), bytes(len(make_image(9)))))
    with pytest.raises(TooManyBadError, match=r"2 rows are bad.*the first: 00001.tar 000010004: caption is empty"):
        keep(folder, tmp_path / "set")
    converted = keep(folder, tmp_path / "set", max_bad=2)
    assert {count.cause: count.num_rows for count in converted.left_out} == {"caption_empty": 1, "image_undecodable": 1}
    assert sum(converted.manifest.num_samples(split) for split in SPLITS) == 18  # they are still in their tar


def test_webp_is_trained_on_as_it_is_or_written_anew(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 20, "webp")
    manifest = keep(folder, tmp_path / "kept").manifest
    assert manifest.members == ("image", "json", "txt") and manifest.layout.stored_as == {"image": ("webp",)}
    assert check_set(ShardStorage(str(tmp_path / "kept"))).problems == ()
    data = ShardDataModule(str(tmp_path / "kept"), 4, 16, 16, 400, num_streams=2)
    batch = next(iter(data.val_dataloader()))
    first = 20 * int(manifest.splits["val"][0].file.removesuffix(".tar"))
    expected = decode_image(make_image(first, "webp"), "image", 16)
    assert batch.images_BRYX is not None and torch.equal(batch.images_BRYX[0], expected)
    with pytest.raises(UserError, match=r"images of several formats.*--image_format jpg"):
        ShardDataModule(str(tmp_path / "kept"), 4, 16, 16, 400, decode="device").prepare_data()
    source = Img2datasetSource(folder, "web")
    write_set(source, tmp_path / "set")
    assert read_manifest(tmp_path / "set").members == ("jpg", "json", "txt")


@pytest.mark.parametrize("spelling", ["jpeg", "JPG", "JPEG"])
def test_other_spellings_of_jpg_are_read_as_it(tmp_path: Path, spelling: str) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 30, "jpg", spelling)
    manifest = keep(folder, tmp_path / "kept").manifest
    assert manifest.members == ("jpg", "json", "txt")
    assert check_set(ShardStorage(str(tmp_path / "kept"))).problems == ()
    data = ShardDataModule(str(tmp_path / "kept"), 4, 16, 16, 400, num_streams=2)
    assert sum(batch.num_samples for batch in data.val_dataloader()) == 30
    write_set(Img2datasetSource(folder, "web"), tmp_path / "anew")
    assert members(tmp_path / "anew")["web-000000000.jpg"] == make_image(0)


def test_bytes_decide_the_format_of_images(tmp_path: Path) -> None:
    # img2dataset's --disable_all_reencoding calls everything .jpg
    folder = img2dataset_source(tmp_path / "in", 3, 30, "png", "jpg")
    manifest = keep(folder, tmp_path / "set").manifest
    assert manifest.members == ("json", "png", "txt") and manifest.layout.stored_as == {"png": ("jpg",)}
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()
    converted = write_set(Img2datasetSource(folder, "web"), tmp_path / "anew")
    assert converted.left_out == ()


def test_a_sample_without_a_member_is_one_bad_sample(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 6)
    for tar in ("00000.tar", "00001.tar"):
        # the first sample of one tar loses its image (header and data), that of the other its caption and json
        data = (folder / tar).read_bytes()
        with tarfile.open(folder / tar) as whole:
            image_end, sample_end = (whole.getmembers()[place].offset for place in (1, 3))
        kept = data[image_end:] if tar == "00000.tar" else data[:image_end] + data[sample_end:]
        (folder / tar).write_bytes(kept)
    with pytest.raises(TooManyBadError, match=r"2 rows are bad, .* 00000.tar 000000000: no image") as refused:
        keep(folder, tmp_path / "set")
    assert [(count.cause, count.num_rows) for count in refused.value.counts] == [("member_missing", 2)]
    keep(folder, tmp_path / "set", max_bad=2)
    assert check_set(ShardStorage(str(tmp_path / "set"))).faults == {"member_missing": 2}


def test_a_folder_of_tars_without_a_manifest_names_the_command(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 6)
    for read in (
        lambda: check_set(ShardStorage(str(folder))),
        ShardDataModule(str(folder), 4, 16, 16, 400).prepare_data,
    ):
        with pytest.raises(UserError, match=r"holds tars, but no manifest\.json.*convert img2dataset"):
            read()
    for pattern in (folder / "{00000..00002}.tar", folder / "00000.tar", folder / "*.tar"):
        with pytest.raises(UserError, match="give the folder that holds its shards"):
            check_set(ShardStorage(str(pattern)))


def test_a_link_to_a_tar_elsewhere_is_not_followed(tmp_path: Path) -> None:
    folder = img2dataset_source(tmp_path / "in", 3, 6)
    shutil.move(folder / "00002.tar", tmp_path / "elsewhere.tar")
    (folder / "00002.tar").symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(UserError, match="a link that leads out"):
        keep(folder, tmp_path / "set")


def test_worker_processes_start_quickly() -> None:
    code = (
        "import sys, lightning_moevlm.data.write.convert.tasks, lightning_moevlm.data.write.convert.inspect_tar; "
        "print(sorted({'torch', 'lightning', 'tokenizers', 'webdataset', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
