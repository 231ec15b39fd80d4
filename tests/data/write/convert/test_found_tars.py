"""Folders of tars that other programs have written: what makes a sample, what is left out, and what is refused."""

import base64
import gzip
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from lightning_moevlm.cli.main import main
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.layout import Layout
from lightning_moevlm.data.format.manifest import SPLITS, read_manifest
from lightning_moevlm.data.images.decode import decode_image
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.inspect.html_page import write_page
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.bad_rows import TooManyBadError
from lightning_moevlm.data.write.convert.convert import Converted, ConvertOptions, Licence, SetOptions, convert
from lightning_moevlm.data.write.convert.keep_tars import keep_tars
from lightning_moevlm.data.write.convert.shard_image import ImageOptions
from lightning_moevlm.data.write.convert.sources.img2dataset import Img2datasetSource
from lightning_moevlm.data.write.convert.sources.member_names import DEFAULT_NAMES, MemberNames
from tests.data.found_tars import Files, folder_of, sample
from tests.data.sources import caption, make_image
from tests.data.write.convert.test_convert import members

LICENCE = Licence("CC BY 4.0", "", "")
FORM = SetOptions(ImageOptions("jpg", None), 16, 400)


def keep(folder: Path, out: Path, max_bad: int = 0, names: MemberNames = DEFAULT_NAMES) -> Converted:
    return keep_tars(folder, "found", out, LICENCE, 400, ConvertOptions(max_bad, 1, False), names)


def write_anew(folder: Path, out: Path, max_bad: int = 0, names: MemberNames = DEFAULT_NAMES) -> Converted:
    return convert(Img2datasetSource(folder, "found", names), out, LICENCE, FORM, ConvertOptions(max_bad, 1, False))


BOTH = pytest.mark.parametrize("convert_it", [keep, write_anew])


def num_samples(converted: Converted) -> int:
    return sum(converted.manifest.num_samples(split) for split in SPLITS)


def flat(*samples: Files) -> list[tuple[str, bytes]]:
    return list(chain.from_iterable(samples))


def three_tars(per_tar: int = 20) -> list[Files]:
    return [flat(*(sample(i, f"{i:04d}") for i in range(t * per_tar, (t + 1) * per_tar))) for t in range(3)]


def test_a_image_and_a_text_of_two_folders_are_no_pair(tmp_path: Path) -> None:
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


def test_an_annotation_that_some_samples_lack_is_not_promised(tmp_path: Path) -> None:
    tars = three_tars()
    tars[0] = [*tars[0], *sample(99, "0099", {"n": 1})]
    manifest = keep(folder_of(tmp_path / "in", *tars), tmp_path / "set").manifest
    assert manifest.members == ("jpg", "txt")
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()


def test_tars_in_folders_below_are_told(tmp_path: Path) -> None:
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


def test_a_set_whose_split_is_empty_is_told(tmp_path: Path) -> None:
    keep(folder_of(tmp_path / "in", *three_tars()), tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    replace(manifest, splits={**manifest.splits, "val": ()}).write(tmp_path / "set")
    (problem,) = check_set(ShardStorage(str(tmp_path / "set"))).problems
    assert problem.startswith("the val split of ") and problem.endswith("is empty; make the set anew")
    with pytest.raises(UserError, match="to evaluate on is empty; make the set anew"):
        _reading(tmp_path / "set").val_dataloader()


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
            with pytest.raises(
                UserError, match=r"0024\.txt in shard part-1\.tar holds no caption.*data\.max_lost_fraction"
            ):
                list(loader)
            continue
        with pytest.warns(UserWarning, match="caption_empty 1"):
            keys = {key for batch in loader for key in batch.keys}
        assert "0024" not in keys and len(keys) >= 15 and loader.lost == {"caption_empty": 1}


@BOTH
def test_all_images_first_then_all_texts_is_told_with_its_remedy(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
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
    manifest = keep(folder, tmp_path / "kept").manifest
    assert check_set(ShardStorage(str(tmp_path / "kept"))).problems == ()
    keys = [key for batch in _reading(tmp_path / "kept").val_dataloader() for key in batch.keys]
    assert keys[0] == f"{manifest.splits['val'][0].file.removesuffix('.tar')}/0000" and len(set(keys)) == 20
    assert num_samples(write_anew(folder, tmp_path / "anew")) == 60
    assert set(map(caption, range(60))) == {
        data.decode() for name, data in members(tmp_path / "anew").items() if name.endswith("txt")
    }


def _renamed(tars: list[Files], **names: str) -> list[Files]:
    """The same samples with other extensions."""
    return [
        [(f"{key}.{names.get(extension, extension)}", data) for (key, _, extension), data in _parted(files)]
        for files in tars
    ]


def _parted(files: Files) -> Iterator[tuple[tuple[str, str, str], bytes]]:
    for name, data in files:
        yield name.partition("."), data


@BOTH
@pytest.mark.parametrize("extension", ["caption", "text", "caption.txt", "cls"])
def test_captions_under_another_extension_are_not_passed_over(tmp_path: Path, convert_it, extension: str) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "in", *_renamed(three_tars(), txt=extension))
    with pytest.raises(UserError, match=rf"part-0\.tar: samples have no \.txt.* give --caption_member {extension}, or"):
        convert_it(folder, tmp_path / "set")
    manifest = convert_it(folder, tmp_path / "set", names=MemberNames(caption=extension)).manifest
    assert manifest.members == ("jpg", "txt")
    check_set(ShardStorage(str(tmp_path / "set")))
    batch = next(iter(_reading(tmp_path / "set").val_dataloader()))
    assert batch.text_BL is not None and batch.images_BRYX is not None
    alone = convert_it(folder, tmp_path / "alone", names=MemberNames(caption=None)).manifest
    assert alone.members == ("jpg",)


@BOTH
def test_images_under_a_longer_extension_are_named(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "in", *_renamed(three_tars(), jpg="input.jpg", txt="outputs.txt"))
    with pytest.raises(UserError, match=r"only \.input\.jpg, \.outputs\.txt; .* try --image_member input\.jpg"):
        convert_it(folder, tmp_path / "set")
    names = MemberNames(image="input.jpg", caption="outputs.txt")
    assert num_samples(convert_it(folder, tmp_path / "set", names=names)) == 60
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()


@BOTH
def test_dots_in_keys_are_told_with_their_remedy(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    tars = [flat(*(sample(10 * t + i, f"v1.{t}.{i}") for i in range(10))) for t in range(3)]
    with pytest.raises(UserError, match=r"only \.0\.0\.jpg, .* and 16 more; .* no key has a dot in it"):
        convert_it(folder_of(tmp_path / "in", *tars), tmp_path / "set")


def test_images_of_several_formats_are_trained_on_as_they_are(tmp_path: Path) -> None:
    tars = three_tars()
    for files in tars:
        files[0], files[2] = ("a.png", make_image(600, "png")), ("b.webp", make_image(601, "webp"))
        files[1], files[3] = ("a.txt", b"a PNG"), ("b.txt", b"a WebP")
    folder = folder_of(tmp_path / "in", *tars)
    manifest = keep(folder, tmp_path / "set").manifest
    assert manifest.members == ("image", "txt")
    assert manifest.layout == Layout({"image": ("jpg", "png", "webp")}, "", keys_repeat=True)
    assert check_set(ShardStorage(str(tmp_path / "set"))).problems == ()
    (batch, *_) = _reading(tmp_path / "set").val_dataloader()
    assert batch.images_BRYX is not None
    assert [key.rpartition("/")[2] for key in batch.keys[:3]] == [
        "a",
        "b",
        next(iter(batch.keys[2:])).rpartition("/")[2],
    ]
    for row, (number, kind) in enumerate(((600, "png"), (601, "webp"))):
        assert torch.equal(batch.images_BRYX[row], decode_image(make_image(number, kind), "image", 16))


def test_images_of_several_formats_are_shown(tmp_path: Path) -> None:
    kinds = ("webp", "png", "jpg")
    tars = [
        flat(*([(f"{t}.{kind}", make_image(t, kind)), (f"{t}.txt", b"a thing")] for t in range(3))) for kind in kinds
    ]
    manifest = keep(folder_of(tmp_path / "in", *tars), tmp_path / "set").manifest
    assert manifest.members == ("image", "txt")
    storage = ShardStorage(str(tmp_path / "set"))
    for split in SPLITS:
        (sample, *_) = write_page(storage, split, 1, None, tmp_path / "page.html").samples
        kind = kinds[int(manifest.splits[split][0].file[5])]
        mime = f"image/{'jpeg' if kind == 'jpg' else kind}"
        assert sample.faults == () and sample.image is not None
        assert sample.image.data_uri == f"data:{mime};base64,{base64.b64encode(make_image(0, kind)).decode()}"


SEVERAL = MemberNames(caption_field="captions")


def _with_captions_in_json(field: str = "captions") -> list[Files]:
    return [
        flat(
            *(
                [
                    (f"{i:04d}.jpg", make_image(i)),
                    (
                        f"{i:04d}.json",
                        json.dumps({field: [f"first of {i}", f"second of {i}", " "], "url": "x"}).encode(),
                    ),
                ]
                for i in range(20 * t, 20 * t + 20)
            )
        )
        for t in range(3)
    ]


@BOTH
def test_captions_in_json_are_told_and_one_is_drawn_in_every_epoch(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "in", *_with_captions_in_json())
    with pytest.raises(
        UserError, match=r"samples have no \.txt.* give --caption_field captions, or --caption_member null"
    ):
        convert_it(folder, tmp_path / "set")
    manifest = convert_it(folder, tmp_path / "set", names=SEVERAL).manifest
    assert manifest.members == ("jpg", "json") and manifest.layout.caption_field == "captions"
    report = check_set(ShardStorage(str(tmp_path / "set")))
    assert report.problems == () and {card.modality for card in report.cards} == {"pairs"}

    def epochs(seed: int, num_workers: int = 0) -> list[dict[str, str]]:
        data = ShardDataModule(str(tmp_path / "set"), 1, 16, 16, 400, num_workers, num_streams=1, seed=seed)
        loader, spell = data.train_dataloader(), data.tokenizer
        found = []
        for _ in range(2):
            texts: dict[str, str] = {}
            for batch in loader:
                assert batch.text_BL is not None
                texts[batch.keys[0]] = spell.decode(batch.text_BL[0].tolist())
            found.append(texts)
        return found

    first, second = epochs(0)
    assert first != second and first.keys() == second.keys()
    assert {text.split()[0] for text in first.values()} == {"first", "second"}
    assert epochs(0, num_workers=1) == [first, second]
    assert epochs(1)[0] != first
    texts = ShardDataModule(
        None, 4, 16, 16, 400, sources={"words": Source(str(tmp_path / "set"), modality="text")}, num_streams=1
    )
    batch = next(iter(texts.train_dataloader()))
    assert batch.images_BRYX is None and batch.text_BL is not None
    validation = next(iter(_reading(tmp_path / "set").val_dataloader()))
    assert validation.text_BL is not None
    spelt = [
        ShardStorage(str(tmp_path / "set")).read_tokenizer(manifest.tokenizer).decode(row.tolist())
        for row in validation.text_BL
    ]
    assert all(text.startswith("first of") for text in spelt)


@BOTH
def test_a_field_that_is_not_there_is_told(tmp_path: Path, convert_it) -> None:  # type: ignore[no-untyped-def]
    folder = folder_of(tmp_path / "in", *_with_captions_in_json())
    with pytest.raises(TooManyBadError, match=r"60 rows are bad.*no field 'caption', only captions, url"):
        convert_it(folder, tmp_path / "set", names=MemberNames(caption_field="caption"))


def test_a_set_with_a_layout_is_not_read_by_programs_that_do_not_know_it(tmp_path: Path) -> None:
    keep(folder_of(tmp_path / "in", *_with_captions_in_json()), tmp_path / "set", names=SEVERAL)
    written = json.loads((tmp_path / "set/manifest.json").read_text())
    assert written["format"] == "moevlm-shards/2"
    assert written["layout"] == {"stored_as": {}, "caption_field": "captions", "keys_repeat": False}
    keep(folder_of(tmp_path / "plain", *three_tars()), tmp_path / "plain_set")
    written = json.loads((tmp_path / "plain_set/manifest.json").read_text())
    assert written["format"] == "moevlm-shards/1" and "layout" not in written


def test_compressed_tars_are_told_or_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "in", *three_tars())
    (folder / "part-1.tar").write_bytes(gzip.compress((folder / "part-1.tar").read_bytes()))
    (folder / "part-2.tar.xz").write_bytes(lzma.compress((folder / "part-2.tar").read_bytes()))
    (folder / "part-2.tar").unlink()
    convert_them = [
        "data",
        "convert",
        "img2dataset",
        str(folder),
        "--licence=X",
        "--vocab_size=400",
        "--jobs=1",
        "--out",
    ]
    assert main([*convert_them, str(tmp_path / "set")]) == 2
    assert "part-1.tar is gzip" in (said := capsys.readouterr().err) and "--recompress true" in said

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("shutil.copyfileobj", no_room)
        assert main([*convert_them, str(tmp_path / "true"), "--recompress=true"]) == 2
    assert "could not be written (No space left on device)" in capsys.readouterr().err
    for kept in ("true", "false"):
        out = tmp_path / kept
        assert main([*convert_them, str(out), "--recompress=true", f"--keep_tars={kept}"]) == 0
        assert "60 rows read, 60 of them good, 0 bad" in capsys.readouterr().out
        assert check_set(ShardStorage(str(out))).problems == ()
    (folder / "part-1.tar").write_bytes((folder / "part-1.tar").read_bytes()[:2000])
    assert main([*convert_them, str(tmp_path / "broken"), "--recompress=true"]) == 2
    assert "part-1.tar is broken (Compressed file ended" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["false", "in", "true"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["img2dataset", "s3://bucket/set"],
            "folder s3://bucket/set is an address, .*`aws s3 sync s3://bucket/set FOLDER`",
        ),
        (["csv", "https://me:secret@host/t.csv"], r"table https://\*\*\*@host/t.csv is an address, .*rclone copy"),
        (["coco_captions", "gs://bucket/c.json"], r"annotations gs://bucket/c.json is an address, .*gsutil"),
        (["img2dataset", ".", "--out", "s3://bucket/set"], "--out s3://bucket/set is an address, .*local folders only"),
    ],
)
def test_addresses_are_told_the_way_round(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder_of(tmp_path / "in", *three_tars(1)))
    assert main(["data", "convert", *arguments, "--licence=X"]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
