"""An image that is stored lying on its side is upright for every reader, and a broken note turns nothing."""

import base64
import io
import random
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lightning_moevlm.bench.data.plain_webdataset import _Resized
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.manifest import read_manifest
from lightning_moevlm.data.images.decode import decode_image, turn_pixels
from lightning_moevlm.data.images.gpu_decode import decode_batch
from lightning_moevlm.data.images.jpeg_batch import Jpeg, JpegBatch
from lightning_moevlm.data.images.orientation import orientation
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.inspect.html_page import write_page
from lightning_moevlm.data.inspect.thumbnails import read_image_size, thumbnail
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.convert import ConvertOptions, SetOptions, convert
from lightning_moevlm.data.write.convert.keep_tars import keep_tars
from lightning_moevlm.data.write.convert.shard_image import ImageOptions
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource
from lightning_moevlm.data.write.finish_set import Licence
from tests.data.sources import write_csv

TURNS = range(1, 9)
FORMATS = ("jpg", "png", "webp")
LICENCE = Licence("CC0", "", "")


def _corner(height: int = 24, width: int = 40) -> np.ndarray:
    """Blue, with a red upper left corner, so that every turn shows another image."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 2] = 255
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    return pixels


def _exif(turn: int, order: str = "<", before: int = 1) -> bytes:
    """An Exif segment with some other tags before the orientation."""
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, before + 1)
    others = b"".join(struct.pack(f"{order}HHII", 0x0100 + i, 3, 1, 9) for i in range(before))
    return b"Exif\0\0" + start + others + struct.pack(f"{order}HHIHH", 0x0112, 3, 1, turn, 0) + bytes(4)


def _stored(pixels: np.ndarray, extension: str, exif: bytes) -> bytes:
    out = io.BytesIO()
    options = {"jpg": {"quality": 95, "subsampling": 0}, "png": {}, "webp": {"lossless": True}}[extension]
    Image.fromarray(pixels).save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], exif=exif, **options)
    return out.getvalue()


@pytest.mark.parametrize("extension", FORMATS)
def test_every_note_is_read_as_pillow_reads_it(extension: str) -> None:
    for turn in TURNS:
        for order in "<>":
            data = _stored(_corner(), extension, _exif(turn, order, before=turn % 3))
            with Image.open(io.BytesIO(data)) as image:
                expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
                encode_for_shard = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            assert orientation(data) == turn
            assert np.array_equal(turn_pixels(encode_for_shard, turn).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("extension", FORMATS)
def test_a_missing_or_broken_note_turns_nothing(extension: str) -> None:
    good = _stored(_corner(), extension, _exif(6))
    assert orientation(_stored(_corner(), extension, b"")) == 1
    for broken in (_exif(0), _exif(9), b"Exif\0\0II*\0" + struct.pack("<I", 2**32 - 1), b"Exif\0\0nothing like it"):
        assert orientation(good.replace(_exif(6).removeprefix(b"Exif\0\0"), broken.removeprefix(b"Exif\0\0"))) == 1
    chance = random.Random(0)
    for _ in range(500):  # and nothing raises
        bad = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            bad[chance.randrange(min(len(bad), 120))] = chance.randrange(256)
        assert orientation(bytes(bad[: chance.randint(0, len(bad))])) in TURNS


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("turn", TURNS)
def test_turned_images_are_upright_for_training_looking_and_the_device(turn: int, extension: str) -> None:
    upright = Image.fromarray(_corner())
    inverse = {6: 8, 8: 6}.get(turn, turn)
    lying = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(_stored(_corner(), "png", _exif(inverse))))))
    data, plain = _stored(lying, extension, _exif(turn)), _stored(np.asarray(upright), extension, b"")
    extension = "image" if extension == "webp" else extension  # what a set calls members of any format
    for side in (8, 24):  # scaled by much, and not at all
        expected, image_RYX = decode_image(plain, extension, side), decode_image(data, extension, side)
        assert (image_RYX.int() - expected.int()).abs().max() <= (12 if extension == "jpg" else 0)
        if extension == "jpg":
            encoded = JpegBatch.pack([Jpeg(data, "a")])
            assert torch.equal(decode_batch(encoded, side, torch.device("cpu")).images_BRYX[0], image_RYX)
    assert read_image_size(data, extension) == (40, 24)
    seen = np.asarray(thumbnail(data, extension, 20))
    assert seen.shape == (12, 20, 3)
    assert seen[2, 2, 0] > 200 and seen[2, 17, 0] < 60 and seen[9, 2, 0] < 60
    peer = _Resized(20)(Image.open(io.BytesIO(data)))
    assert peer[0, 2, 2] > 200 and peer[0, 2, 17] < 60 and peer[0, 17, 2] < 60


@pytest.mark.filterwarnings("ignore:data.decode device")
def test_phone_images_are_upright_in_kept_tars_and_in_converted_tables(tmp_path: Path) -> None:
    """Stored with the left half red, to be shown by a quarter turn: the upper half is red, however they are read."""
    halves = np.zeros((32, 48, 3), dtype=np.uint8)
    halves[:, 24:, 2] = 255
    halves[:, :24, 0] = 255
    numbered = [np.where(halves > 0, 255 - number, halves) for number in range(36)]
    jpegs = [_stored(pixels.astype(np.uint8), "jpg", _exif(6)) for pixels in numbered]
    tars, images = tmp_path / "tars", tmp_path / "images"
    for folder in (tars, images):
        folder.mkdir()
    for number, jpeg in enumerate(jpegs):
        (images / f"{number}.jpg").write_bytes(jpeg)
        with tarfile.open(tars / f"{number % 3:05d}.tar", "a") as tar:
            for extension, content in (("jpg", jpeg), ("txt", f"number {number}".encode())):
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    kept, written = tmp_path / "kept", tmp_path / "written"
    keep_tars(tars, None, kept, LICENCE, 300, ConvertOptions(0, 1, False))
    table = write_csv(tmp_path / "t.csv", ["image", "caption"], [[f"{i}.jpg", f"number {i}"] for i in range(36)])
    source = CsvSource(table, images, None, Columns("image", "caption", None, None))
    convert(source, written, LICENCE, SetOptions(ImageOptions("jpg", None), 12, 300), ConvertOptions(0, 1, False))
    for root in (kept, written):
        data = ShardDataModule(str(root), 4, 16, 8, 400, shuffle_buffer=1)
        for decode in ("cpu", "device"):
            data.decode = decode  # type: ignore[assignment]
            for batch in data.val_dataloader():
                assert batch.images_BRYX is not None
                assert batch.images_BRYX[:, 0, :6].min() > 180 and batch.images_BRYX[:, 0, 10:].max() < 60
        assert {size for size, _ in check_set(ShardStorage(str(root))).sizes} == {(32, 48)}
        assert read_manifest(root).image_size == 32
        page = write_page(ShardStorage(str(root)), "val", 1, None, tmp_path / "page.html")
        (image,) = page.samples[0].images
        assert image.size.startswith("32 x 48 px")
        shown = base64.b64decode(image.data_uri.partition(",")[2])
        pixels = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"))
        assert pixels.shape == (48, 32, 3) and pixels[12, 16, 0] > 180 and pixels[36, 16, 2] > 180


def test_a_page_shows_rotated_images_upright_in_any_browser(tmp_path: Path) -> None:
    from lightning_moevlm.data.inspect.html_page import _show_image

    shown = _show_image(_stored(_corner(), "png", _exif(6)), "png")
    assert shown.size.startswith("24 x 40 px") and shown.data_uri.startswith("data:image/jpeg")
    assert _show_image(_stored(_corner(), "png", b""), "png").data_uri.startswith("data:image/png")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_turns_them_as_the_cpu_does() -> None:
    pytest.importorskip("torchcodec")
    jpegs = [Jpeg(_stored(_corner(), "jpg", _exif(turn)), str(turn)) for turn in TURNS]
    there = decode_batch(JpegBatch.pack(jpegs), 24, torch.device("cuda")).images_BRYX.cpu()
    here = torch.stack([decode_image(jpeg.data, "jpg", 24) for jpeg in jpegs])
    assert (there.int() - here.int()).abs().float().mean() < 2
