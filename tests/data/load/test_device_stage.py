"""Images decoded on the device, augmented and prefetched, as the options of `data` ask for it; here on the CPU."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.images.augment import Augment
from lightning_moevlm.data.images.decode import check_jpeg
from lightning_moevlm.data.images.gpu_decode import Pixels
from lightning_moevlm.data.images.jpeg_batch import Jpeg, JpegBatch
from lightning_moevlm.data.load.bad_images import insert_pixels
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.data.read.mixture import Source
from lightning_moevlm.data.read.reader import Delivery, Failure
from lightning_moevlm.data.write.demo.scenes import build_scenes
from tests.conftest import PROJECT
from tests.data.recording import Recorder, Seer, quiet_trainer
from tests.data.rewrite import rewrite_shard
from tests.small_run import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*this saves time on CUDA devices only:UserWarning")

CROPS = Augment(crop_area=(0.3, 0.9), flip=0.5)
EVERYTHING: dict[str, Any] = {"decode": "device", "augment": CROPS, "prefetch": 3}


def _data(root: Path, **options: Any) -> ShardDataModule:
    given = {"batch_size": 8, "image_size": 32, "max_text_len": 16, "vocab_size": 400, "shuffle_buffer": 7}
    return ShardDataModule(str(root), **{**given, **options})


def _mix(root: Path, **options: Any) -> ShardDataModule:
    # by name, so that what comes first in `sources` does not come first in a batch
    sources: dict[str, Source | None] = {
        "texts": Source(str(root), 0.2, "text"),
        "images": Source(str(root), 0.4, "image"),
        "pairs": Source(str(root), 0.4),
    }
    given = {"batch_size": 8, "image_size": 32, "max_text_len": 16, "vocab_size": 400, "shuffle_buffer": 7}
    return ShardDataModule(None, sources=sources, **{**given, **options})


def _same(batch: Batch, other: Batch) -> bool:
    tensors = zip(batch[:3], other[:3], strict=True)
    return batch[3:] == other[3:] and all(torch.equal(one, two) for one, two in tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("made", [_data, _mix])
@pytest.mark.parametrize("options", [{"decode": "device"}, {"prefetch": 3}, {"decode": "device", "prefetch": 3}])
def test_the_batches_are_those_of_a_plain_loader(
    scenes_root: Path, num_workers: int, made: Callable[..., ShardDataModule], options: dict[str, Any]
) -> None:
    plain, staged = made(scenes_root), made(scenes_root, num_workers=num_workers, **options)
    for load in (ShardDataModule.train_dataloader, ShardDataModule.val_dataloader):
        expected, found = list(load(plain)), list(load(staged))
        assert all(map(_same, found, expected)) and len(found) == len(expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [5, 15, 18])
def test_resumed_training_sees_the_pixels_of_an_uninterrupted_run(
    scenes_root: Path, tmp_path: Path, num_workers: int, stop: int
) -> None:
    # 120 samples, 15 batches per epoch: stop in the first epoch, at its end, and in the second; 3 more are prepared
    whole = Seer()
    quiet_trainer(tmp_path, max_steps=32, enable_checkpointing=False).fit(whole, _data(scenes_root, **EVERYTHING))
    assert len(set(whole.pixels)) == 32

    saver = ModelCheckpoint(tmp_path, "at", every_n_train_steps=stop, save_top_k=-1, enable_version_counter=False)
    first, data = Seer(), _data(scenes_root, num_workers=num_workers, **EVERYTHING)
    quiet_trainer(tmp_path, max_steps=stop, callbacks=[saver]).fit(first, data)
    assert data.train_loader is not None and data.train_loader.samples == [stop * 8]
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["ShardDataModule"]
    assert (state["epoch"], state["batch"]) == divmod(stop, 15) if stop != 15 else (0, 15)

    second = Seer()
    trainer = quiet_trainer(tmp_path, max_steps=32, enable_checkpointing=False)
    trainer.fit(second, _data(scenes_root, num_workers=num_workers, **EVERYTHING), ckpt_path=tmp_path / "at.ckpt")
    assert first.seen + second.seen == whole.seen
    assert first.pixels + second.pixels == whole.pixels


def test_the_order_is_that_of_a_run_without_any_of_it(scenes_root: Path, tmp_path: Path) -> None:
    plain, staged = Seer(), Seer()
    for model, options in ((plain, {}), (staged, EVERYTHING)):
        quiet_trainer(tmp_path, max_steps=32, enable_checkpointing=False).fit(model, _data(scenes_root, **options))
    assert staged.seen == plain.seen
    assert not set(staged.pixels) & set(plain.pixels)


def test_only_training_images_are_augmented_and_otherwise_in_every_epoch(scenes_root: Path) -> None:
    plain, staged = _data(scenes_root), _data(scenes_root, augment=CROPS)
    for load in (ShardDataModule.val_dataloader, ShardDataModule.test_dataloader):
        assert all(map(_same, load(staged), load(plain)))
    loaders = plain.train_dataloader(), staged.train_dataloader()
    for epoch in range(2):
        for number, (batch, other) in enumerate(zip(*loaders, strict=True)):
            assert batch.images_BRYX is not None and other.images_BRYX is not None
            assert torch.equal(other.images_BRYX, CROPS(batch.images_BRYX, seed=0, rank=0, epoch=epoch, batch=number))


def test_pngs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    build_scenes(tmp_path / "pngs", 60, 32, "png", 16, seed=3, samples_per_shard=16, vocab_size=400, force=False)
    data = _data(tmp_path / "pngs", decode="device")
    with pytest.raises(UserError, match=r"data.decode is device, but .*pngs has PNG images.*set data.decode cpu"):
        data.prepare_data()


def test_a_missing_gpu_is_reported_once(scenes_root: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(tmp_path, max_steps=20, enable_checkpointing=False, val_check_interval=5)
        trainer.fit(Recorder(), _data(scenes_root, **EVERYTHING))
        quiet_trainer(tmp_path, max_steps=2, enable_checkpointing=False).fit(
            Recorder(), _data(scenes_root, augment=CROPS)
        )
    (printed,) = [str(each.message) for each in caught if "CUDA" in str(each.message)]
    assert "data.decode device and data.prefetch 3" in printed and "this run is on cpu" in printed


# what is wrong with images


def _spoilt(root: Path, change: Callable[[bytes], bytes], endings: tuple[str, ...] = ("3.jpg",)) -> None:
    rewrite_shard(root, "train", 0, lambda name, data: change(data) if name.endswith(endings) else data)


def _broken(data: bytes) -> bytes:
    """Put restart markers, which belong elsewhere, among the pixels: beginning and end say nothing of it."""
    middle = len(data) * 3 // 4
    broken = data[:middle] + b"\xff\xd0" * 5 + data[middle + 10 :]
    check_jpeg(broken)
    return broken


def _keys(loader: ShardLoader) -> list[tuple[str, ...]]:
    return [batch.keys for batch in loader]


@pytest.mark.parametrize(
    ("options", "change", "cause"),
    [
        ({}, lambda data: b"no image", "image_undecodable"),
        ({}, lambda data: data[:-2], "image_undecodable"),
        ({}, lambda data: b"", "image_undecodable"),
        ({"max_pixels": 1000}, None, "image_too_large"),
    ],
)
def test_images_with_a_bad_beginning_or_end_are_lost_as_on_the_cpu(
    scenes_copy: Path, options: dict[str, Any], change: Callable[[bytes], bytes] | None, cause: str
) -> None:
    if change is not None:
        _spoilt(scenes_copy, change)
    loaders = [_data(scenes_copy, max_lost_fraction=0.9, decode=decode, **options) for decode in ("cpu", "device")]
    if cause == "image_too_large":  # 32 x 32 = 1024 pixels each, so that all are
        for data in loaders:
            with pytest.raises(UserError, match=r"none of the 32 samples .*\(it has 32 x 32 pixels, 1,000 are allowed"):
                _keys(data.train_dataloader())
        return
    on_cpu, on_device = (data.train_dataloader() for data in loaders)
    with pytest.warns(UserWarning, match=f"samples lost in this epoch: {cause}"):
        assert _keys(on_cpu) == _keys(on_device)
    assert on_cpu.lost == on_device.lost and set(on_cpu.lost) == {cause} and on_cpu.samples == on_device.samples


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_fail_to_decode_are_lost_for_the_same_cause_and_replaced(
    scenes_copy: Path, num_workers: int
) -> None:
    originals = {key: batch for batch in _data(scenes_copy).train_dataloader() for key in batch.keys}
    _spoilt(scenes_copy, _broken, ("3.jpg", "5.jpg"))
    data = _data(scenes_copy, max_lost_fraction=0.5, num_workers=num_workers, decode="device", prefetch=3)
    on_cpu, on_device = _data(scenes_copy, max_lost_fraction=0.5).train_dataloader(), data.train_dataloader()
    with pytest.warns(UserWarning, match="samples lost in this epoch: image_undecodable"):
        _keys(on_cpu)
        batches = list(on_device)
    assert on_device.lost == on_cpu.lost and 1 < on_device.lost["image_undecodable"] < 5
    assert [batch.num_samples for batch in batches] == [8] * 15
    num_copies = sum(8 - len(set(batch.keys)) for batch in batches)
    assert num_copies == on_device.lost["image_undecodable"] and on_device.samples == [120]
    for batch in batches:
        for row, key in enumerate(batch.keys):  # a copy is one of image, text and key
            original = originals[key]
            place = original.keys.index(key)
            for one, two in zip(batch[:3], original[:3], strict=True):
                assert one is not None and two is not None and torch.equal(one[row], two[place])


def test_a_resumed_run_counts_every_loss_once(scenes_copy: Path) -> None:
    _spoilt(scenes_copy, _broken, ("3.jpg", "5.jpg"))
    (scenes_copy / "train-000004.tar").unlink()  # so that streams fill up, and meet bad images again

    def loader() -> ShardLoader:
        return _data(scenes_copy, max_lost_fraction=0.9, decode="device", prefetch=3).train_dataloader()

    on_cpu = _data(scenes_copy, max_lost_fraction=0.9).train_dataloader()
    whole = loader()
    with pytest.warns(UserWarning, match="samples lost"):
        expected = [_keys(whole), _keys(whole)]
        _keys(on_cpu)
        _keys(on_cpu)
    assert whole.lost == on_cpu.lost
    for stop in (1, 6, 14):
        first, resumed = loader(), loader()
        iterator = iter(first)
        for _ in range(stop):
            next(iterator)
        resumed.load_state_dict(first.state_dict())
        with pytest.warns(UserWarning, match="samples lost"):
            assert [_keys(resumed), _keys(resumed)] == [expected[0][stop:], expected[1]]
        assert resumed.lost == whole.lost and resumed.samples == whole.samples


def test_the_first_ends_a_run_that_tolerates_none_in_its_turn(scenes_copy: Path) -> None:
    _spoilt(scenes_copy, _broken)
    given = []
    with pytest.raises(UserError, match=r"3\.jpg in shard train-000000\.tar cannot be decoded .*max_lost_fraction"):
        for batch in _data(scenes_copy, decode="device").train_dataloader():
            given.append(batch.keys)
    ahead = []
    with pytest.raises(UserError, match=r"3\.jpg in shard train-000000\.tar"):
        for batch in _data(scenes_copy, decode="device", prefetch=5).train_dataloader():
            ahead.append(batch.keys)
    assert ahead == given


def test_more_than_allowed_end_the_run(scenes_copy: Path) -> None:
    _spoilt(scenes_copy, _broken, ("3.jpg", "5.jpg", "7.jpg"))  # 3 or more; 0.02 x 120 allows 2
    data = _data(scenes_copy, decode="device", max_lost_fraction=0.02)
    with pytest.raises(UserError, match=r"could not be used \(image_undecodable \d+\), more than"):
        _keys(data.train_dataloader())


def test_evaluation_leaves_out_bad_images(scenes_copy: Path) -> None:
    whole = [key for keys in _keys(_data(scenes_copy).val_dataloader()) for key in keys]
    rewrite_shard(scenes_copy, "val", 0, lambda name, data: _broken(data) if name == f"{whole[2]}.jpg" else data)
    loader = _data(scenes_copy, decode="device", max_lost_fraction=0.5).val_dataloader()
    with pytest.warns(UserWarning, match="image_undecodable 1"):
        batches = list(loader)
    assert [key for batch in batches for key in batch.keys] == [key for key in whole if key != whole[2]]
    assert loader.lost == {"image_undecodable": 1} and loader.samples == [len(whole) - 1]
    assert all(len(batch.images_BRYX) == len(batch.text_BL) == batch.pairs for batch in batches)  # type: ignore[arg-type]


def _delivery() -> tuple[Delivery, JpegBatch]:
    """Pairs a b, images alone c d e, texts alone f, of sources 2, 1 and 0."""
    texts = torch.arange(3)[:, None]
    batch = Batch(torch.empty(5, 3, 1, 1, device="meta"), texts, texts >= 0, tuple("abcdef"), 2, tuple("ppiiit"))
    jpegs = [Jpeg(b"", name) for name in "abcde"]
    images = JpegBatch.join([JpegBatch.pack(jpegs[:2], 2), JpegBatch.pack(jpegs[2:], 1)])
    assert images is not None
    return Delivery(batch, (), {"text_not_utf8": 1}, "", images), images


def test_a_mixed_batch_by_hand() -> None:
    delivery, images = _delivery()
    pixels = torch.arange(5).view(5, 1, 1, 1)
    filled = insert_pixels(delivery, images, Pixels(pixels, {1: ValueError(), 4: ValueError()}), True, True)
    assert isinstance(filled, Delivery) and filled.batch.images_BRYX is not None and filled.batch.text_BL is not None
    # b becomes a, its only neighbour among the pairs; e becomes d; texts are those of a, a and f
    assert filled.batch.keys == tuple("aacddf")
    assert filled.batch.images_BRYX.flatten().tolist() == [0, 0, 2, 3, 3]
    assert filled.batch.text_BL.flatten().tolist() == [0, 0, 2]
    assert (filled.batch.num_pairs, filled.batch.sources) == (2, tuple("ppiiit"))
    # e filled up for another lost sample: it was counted when it was met first
    assert filled.lost == {"text_not_utf8": 1, "image_undecodable": 1} and filled.jpegs is None


def test_a_neighbour_of_another_source_replaces_an_image_or_the_run_ends() -> None:
    delivery, images = _delivery()
    images = images._replace(parts=(1, 1, 3))  # a and b are pairs of two sources
    filled = insert_pixels(delivery, images, Pixels(torch.zeros(5, 3, 1, 1), {0: ValueError()}), True, True)
    assert isinstance(filled, Delivery) and filled.batch.keys == tuple("bbcdef")
    faults = {0: ValueError("broken"), 1: ValueError("broken, too")}
    failure = insert_pixels(delivery, images, Pixels(torch.zeros(5, 3, 1, 1), faults), True, True)
    assert isinstance(failure, Failure) and "b cannot be decoded (broken, too)" in failure.message


def test_the_overlay_runs_without_a_gpu_and_says_so(moevlm: Callable[..., str], scenes_root: Path) -> None:
    overlay = "conf/overlays/gpu_data.yaml"
    assert f"-c {overlay}" in (PROJECT / overlay).read_text(encoding="utf-8")
    with pytest.warns(UserWarning) as caught:
        moevlm("fit", *SMALL, "-c", overlay, "--trainer.fast_dev_run=true", f"--data.root={scenes_root}")
    assert sum("this saves time on CUDA devices only" in str(each.message) for each in caught) == 1
