"""Tars without a manifest: they train at once, and whatever is wrong with them is told or counted."""

import gzip
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.plain.draw_reader import DrawReader
from lightning_moevlm.data.plain.options import WebDatasetOptions
from lightning_moevlm.data.read.evaluation_reader import FixedReader
from lightning_moevlm.data.read.reader import Cursor, Reader
from lightning_moevlm.data.read.sample_order import Rank
from tests.data.found_tars import flat, sample, write_tar
from tests.data.plain.maps import Turned, failing, shout
from tests.data.sources import caption
from tests.data.unsteady_server import Unsteady


def plain(urls: Any, cache: Path, reading: WebDatasetOptions | None = None, **options: Any) -> ShardDataModule:
    given = {"batch_size": 4, "image_size": 16, "max_text_len": 24, "vocab_size": 300, "num_streams": 2}
    return ShardDataModule(None, urls=urls, webdataset=reading, cache_dir=str(cache / "cache"), **(given | options))


def keys(loader: Any) -> list[str]:
    return [key for batch in loader for key in batch.keys]


def test_a_folder_trains_at_once(tars: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = plain(str(tars), tmp_path)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data.prepare_data()
    assert "2 tars without a manifest, part-2.tar held out. An epoch is 16 samples" in caplog.text
    assert "a resumed run draws other samples" in caplog.text and "`moevlm data index` makes a set" in caplog.text
    loader = data.train_dataloader()
    first = list(loader)
    assert len(loader) == len(first) == 4 and first[0].pairs == 4
    assert {key for batch in first for key in batch.keys} <= {f"{number:04d}" for number in range(16)}
    assert keys(loader) != [key for batch in first for key in batch.keys]  # another epoch
    assert sorted(keys(data.val_dataloader())) == [f"{number:04d}" for number in range(16, 24)]
    assert keys(data.val_dataloader()) == keys(data.test_dataloader())
    told = [data.tokenizer.decode(text_L) for text_L in first[0].text_BL.tolist()]
    assert told == [caption(int(key)) for key in first[0].keys] and data.tokenizer.vocab_size <= 300


def test_runs_repeat_and_share_one_tokenizer(tars: Path, tmp_path: Path) -> None:
    one, two = plain(str(tars), tmp_path), plain(f"{tars}/part-{{0..2}}.tar", tmp_path, num_workers=2)
    assert one.manifest_digest == two.manifest_digest and one.tokenizer.to_json() == two.tokenizer.to_json()
    assert keys(one.train_dataloader()) == keys(two.train_dataloader())
    assert keys(one.val_dataloader()) == keys(two.val_dataloader())
    resumed = plain(str(tars), tmp_path).train_dataloader()
    loader = one.train_dataloader()
    iterator = iter(loader)
    next(iterator)
    resumed.load_state_dict(loader.state_dict())
    assert len(list(resumed)) == 3  # the rest of the epoch, of other samples


def test_evaluation_is_shared_by_ranks_and_training_is_equally_long(tars: Path, tmp_path: Path) -> None:
    data = plain(str(tars), tmp_path)
    (train,), (val,) = (data._open(split, data.sets) for split in ("train", "val"))  # type: ignore[arg-type]
    seen: list[list[str]] = []
    drawn: list[list[str]] = []
    for index in range(5):  # more ranks and streams than tars
        rank = Rank(index, 5)
        fixed = FixedReader((val,), 1, rank, 2, False)
        draws = DrawReader(train, 1, rank, 2, False, 100, 0, 3)
        reader: Reader
        for reader, found in ((fixed, seen), (draws, drawn)):
            start = reader.next_epoch(Cursor(-1, 0))
            batches = [
                d.batch for s in range(2) for d in reader.stream(start, s, lambda n: torch.empty(n, dtype=torch.uint8))
            ]  # type: ignore[attr-defined]
            assert len(batches) == reader.num_batches  # type: ignore[attr-defined]
            found.append([key for batch in batches for key in batch.keys])
    assert sorted(key for found in seen for key in found) == [f"{number:04d}" for number in range(16, 24)]
    assert all(len(found) == 3 for found in drawn) and len({tuple(found) for found in drawn}) > 1


def test_the_libraries_decode_and_a_map_of_ones_own(tars: Path, tmp_path: Path) -> None:
    def first(reading: WebDatasetOptions | None = None) -> torch.Tensor:
        data = plain(str(tars), tmp_path, reading, num_streams=1, image_size=32)  # as large as the images
        pixels: torch.Tensor = next(iter(data.val_dataloader())).images_BRYX.int()
        return pixels

    untouched = first()
    for spec in ("pil", "rgb8", "torchrgb8"):
        decoded = first(WebDatasetOptions(decode=spec))  # type: ignore[arg-type]
        assert (decoded - untouched).abs().float().mean() < 3  # another JPEG decoder
    upside = first(WebDatasetOptions(decode="pil", map=Turned()))
    assert torch.equal(upside, first(WebDatasetOptions(decode="pil")).flip(-1, -2))
    data = plain(str(tars), tmp_path, WebDatasetOptions(map=shout))
    assert {int(key) % 2 for key in keys(data.train_dataloader())} == {0} and len(keys(data.val_dataloader())) == 4
    text_L = next(iter(data.val_dataloader())).text_BL[0].tolist()
    assert data.tokenizer.decode(text_L).isupper()


def test_a_server_is_read_and_a_missing_tar_is_told_or_counted(server: Unsteady, tars: Path, tmp_path: Path) -> None:
    urls = f"{server.url}/web/part-{{0..2}}.tar"
    server.drops, server.busy = 1, 1
    data = plain(urls, tmp_path)
    assert len(keys(data.train_dataloader())) == 16 and len(keys(data.val_dataloader())) == 8
    missing = f"{server.url}/web/part-{{2..4}}.tar"
    reading = WebDatasetOptions(held_out=f"{server.url}/web/part-0.tar", epoch_samples=32)
    few: dict[str, Any] = {"shuffle_buffer": 4, "num_streams": 1}
    own = tmp_path / "tokenizer.json"
    own.write_text(data.tokenizer.to_json())
    strict = plain(missing, tmp_path, reading, tokenizer=str(own))
    with pytest.raises(UserError, match=rf"{server.url}/web/part-[34].tar is missing.*max_lost_fraction"):
        keys(strict.train_dataloader())
    lenient = plain(missing, tmp_path, reading, tokenizer=str(own), max_lost_fraction=0.95, **few)
    with pytest.warns(UserWarning, match="samples lost in this epoch: shard_missing"):
        loader = lenient.train_dataloader()
        assert len(keys(loader)) == 32
    assert loader.lost["shard_missing"] > 0
    with pytest.raises(UserError, match=r"no sample comes from data.urls: 15 losses in a row, the last: .* is missing"):
        keys(plain(f"{server.url}/web/part-{{3..4}}.tar", tmp_path, reading, tokenizer=str(own), max_lost_fraction=0.95,
                   ).train_dataloader())  # fmt: skip


def test_broken_members_are_told_or_counted(tars: Path, tmp_path: Path) -> None:
    bad = {
        "text": [("0030.jpg", b"not an image"), ("0030.txt", b"a red thing")],
        "untold": sample(31, "0031")[:1],
        "imageless": [("0032.txt", b"a blue thing")],
        "blank": [*sample(33, "0033")[:1], ("0033.txt", b" ")],
        "latin": [*sample(34, "0034")[:1], ("0034.txt", "Käse".encode("latin-1"))],
    }
    told = {
        "text": (r"0030.image in .*part-[01].tar cannot be decoded", "image_undecodable"),
        "untold": (r"0031 in .*part-[01].tar has no .txt, only .jpg; name the members in .*caption", "member_missing"),
        "imageless": (r"0032 in .* has no .jpg or .jpeg or .png or .webp, only .txt; .*image", "member_missing"),
        "blank": (r"0033.txt in .* has no caption", "caption_empty"),
        "latin": (r"0034.txt in .* cannot be decoded", "text_not_utf8"),
    }
    for kind, files in bad.items():
        write_tar(tars / "part-0.tar", flat(sample(1, "0001"), files, sample(2, "0002")))
        shutil.copy(tars / "part-0.tar", tars / "part-1.tar")
        with pytest.raises(UserError, match=told[kind][0]):
            keys(plain(str(tars), tmp_path).train_dataloader())
        loader = plain(str(tars), tmp_path, max_lost_fraction=0.9).train_dataloader()
        with pytest.warns(UserWarning, match=told[kind][1]):
            assert set(keys(loader)) == {"0001", "0002"}
        assert set(loader.lost) == {told[kind][1]}, kind


def test_broken_tars_and_maps_are_told(tars: Path, tmp_path: Path) -> None:
    whole = (tars / "part-0.tar").read_bytes()
    for content, told in (
        (b"", "part-0.tar is truncated or not a tar"),
        (b"<html>moved</html>" * 100, "part-0.tar is truncated or not a tar"),
        (whole[: len(whole) // 2 + 100], "part-0.tar is truncated: it ends without the mark"),
    ):
        (tars / "part-0.tar").write_bytes(content)
        with pytest.raises(UserError, match=told):
            plain(str(tars), tmp_path).prepare_data()
    (tars / "part-0.tar").write_bytes(gzip.compress(whole))  # the library unpacks it
    assert len(keys(plain(str(tars), tmp_path).train_dataloader())) == 16
    with pytest.raises(UserError, match=r"data.webdataset.map failed for a sample \(KeyError: 'no such field'\)"):
        plain(str(tars), tmp_path, WebDatasetOptions(map=failing)).prepare_data()
    with pytest.raises(UserError, match="returned a int: return the sample as a dict"):
        plain(str(tars), tmp_path, WebDatasetOptions(map=len)).prepare_data()  # type: ignore[arg-type]


def test_captions_of_a_json_field_and_one_modality(tars: Path, tmp_path: Path) -> None:
    for number in range(3):
        files = flat(*(sample(i, f"{i:04d}", {"alt": [f"a thing {i}", "a thing"]})[::2] for i in range(4)))
        write_tar(tars / f"part-{number}.tar", files)
    data = plain(str(tars), tmp_path, WebDatasetOptions(caption_field="alt"))
    text_L = next(iter(data.val_dataloader())).text_BL[0].tolist()
    assert data.tokenizer.decode(text_L) == "a thing 0"
    batch = next(iter(plain(str(tars), tmp_path, WebDatasetOptions(caption=None)).train_dataloader()))
    assert batch.text_BL is None and batch.images_BRYX is not None
    batch = next(iter(plain(str(tars), tmp_path, WebDatasetOptions(None, None, "alt")).train_dataloader()))
    assert batch.images_BRYX is None and batch.text_BL is not None


def test_what_cannot_be_is_refused(tars: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data.root to null"):
        ShardDataModule(str(tars), 4, 16, 24, 300, urls=str(tars))
    with pytest.raises(UserError, match=r"data.urls names one tar, which cannot serve training and validation both"):
        plain(f"{tars}/part-0.tar", tmp_path).prepare_data()
    with pytest.raises(UserError, match=r"matches no tar"):
        plain(f"{tars}/none-*.tar", tmp_path).prepare_data()
    with pytest.raises(UserError, match=r"an epoch of data.urls has 16 samples, less than a batch of 40"):
        plain(str(tars), tmp_path, batch_size=40).train_dataloader()
    with pytest.raises(UserError, match="shell commands are not allowed"):
        plain("pipe:cat x.tar", tmp_path).prepare_data()
    with pytest.raises(UserError, match="not counted, so their samples have no fixed order"):
        keys(plain(str(tars), tmp_path).ordered_train_dataloader())
    with pytest.raises(UserError, match="image and caption are both null"):
        WebDatasetOptions(None, None)
