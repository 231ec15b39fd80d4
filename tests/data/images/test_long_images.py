"""Very long images need no more memory than others in any reader, and are refused by cause if at all."""

import hashlib
import io
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.faults import MAX_SIDE
from lightning_moevlm.data.images.decode import _lay_on_white, decode_image
from lightning_moevlm.data.images.encode import lay_on
from lightning_moevlm.data.images.gpu_decode import fit_all
from lightning_moevlm.data.images.open_image import ImageTooLargeError
from lightning_moevlm.data.inspect.check import check_set
from lightning_moevlm.data.inspect.html_page import write_page
from lightning_moevlm.data.inspect.thumbnails import read_image_size, thumbnail
from lightning_moevlm.data.storage.shard_storage import ShardStorage
from lightning_moevlm.data.write.convert.convert import ConvertOptions, SetOptions, convert
from lightning_moevlm.data.write.convert.shard_image import ImageOptions, encode_for_shard, inspect_image
from lightning_moevlm.data.write.convert.sources.csv_jsonl import Columns, CsvSource
from lightning_moevlm.data.write.convert.sources.row_source import ImageLocation, RowError
from lightning_moevlm.data.write.convert.tasks import PlannedImage, PlannedSample, ShardTask, write_shard
from lightning_moevlm.data.write.finish_set import Licence
from tests.data.sources import make_image, write_csv

LONG = 60_000
ROOM = 400 * 2**20
"""Bytes that a test may take; enlarged whole, the smallest image here takes 9 GB."""


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process (and its children) have little more memory than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _encoded(pixels: np.ndarray, extension: str) -> bytes:
    out = io.BytesIO()
    options = {"jpg": {"quality": 100, "subsampling": 0}, "png": {}, "webp": {"lossless": True}}[extension]
    Image.fromarray(pixels).save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options)
    return out.getvalue()


def _striped(height: int, width: int) -> np.ndarray:
    """Grey that changes slowly along the longer side, and is bright in its middle."""
    along = np.linspace(-8, 8, max(height, width))
    grey = (40 + 200 * np.exp(-(along**2))).astype(np.uint8)
    line = grey[:, None] if height > width else grey[None, :]
    return np.repeat(np.broadcast_to(line, (height, width))[..., None], 3, axis=2)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("shape", [(LONG, 1), (1, LONG), (LONG, 3), (20_000, 100)])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_any_shape_is_decoded_in_little_memory(extension: str, shape: tuple[int, int]) -> None:
    if extension == "webp":  # which has sides of at most 16,383, and no extension of its own in a set
        shape = (min(shape[0], 16_000), min(shape[1], 16_000))
    data = _encoded(_striped(*shape), extension)
    extension = "image" if extension == "webp" else extension
    for size in (8, 224):
        image_RYX = decode_image(data, extension, size)
        assert image_RYX.shape == (3, size, size)
        assert image_RYX.min() > 200  # the middle, and nothing but the middle
    assert thumbnail(data, extension, 320).size in {(1, 320), (320, 1), (2, 320)}
    assert inspect_image(data, ImageOptions("jpg", None)).side == min(shape)
    assert read_image_size(encode_for_shard(data, ImageOptions("png", 512)), "png") in {(1, 512), (512, 1), (3, 512)}


@pytest.mark.usefixtures("little_memory")
def test_a_device_cuts_them_before_it_resizes_them() -> None:
    long = torch.from_numpy(_striped(LONG, 1)).permute(2, 0, 1)
    wide = torch.from_numpy(_striped(1, LONG)).permute(2, 0, 1)
    fitted = fit_all([long, wide], 224)
    assert fitted.shape == (2, 3, 224, 224) and fitted.min() > 200


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (64, 2_000), (33, 331)])
@pytest.mark.parametrize("size", [24, 64])
def test_cropping_first_gives_the_pixels_of_resizing_the_whole(shape: tuple[int, int], size: int) -> None:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    pixels = np.stack([rows * 3 % 256, 128 + 100 * np.sin(columns / 9), rows + columns], axis=2).astype(np.uint8)
    pixels[..., 0] = pixels[..., 2] = pixels[..., 1]
    scale = size / min(shape)
    target = [round(side * scale) for side in shape]
    whole = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None], target, mode="bilinear", antialias=True)[0]
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    expected = whole[:, top : top + size, left : left + size]
    off = (decode_image(_encoded(pixels, "png"), "png", size).int() - expected.int()).abs()
    assert off.max() <= 14 * max(1, scale)  # less than the step to the next pixel of the source: both round the middle


@pytest.mark.parametrize("shape", [(40, 160), (160, 40), (50, 50), (32, 57)])
def test_common_shapes_are_resized_whole(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scale = 24 / min(shape)
    target = [round(side * scale) for side in shape]
    whole = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None], target, mode="bilinear", antialias=True)[0]
    top, left = (target[0] - 24) // 2, (target[1] - 24) // 2
    expected = whole[:, top : top + 24, left : left + 24]
    assert torch.equal(decode_image(_encoded(pixels, "png"), "png", 24), expected)


def test_a_large_transparent_image_is_laid_on_white_part_by_part() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 40, 4), dtype=np.uint8)
    ground = Image.new("RGBA", (40, 1100), "white")
    expected = np.asarray(Image.alpha_composite(ground, Image.fromarray(pixels)).convert("RGB"))
    assert np.array_equal(_lay_on_white(Image.fromarray(pixels)), expected)
    laid = np.full((1100, 40, 3), 255, dtype=np.uint8)
    lay_on(laid, pixels, 0, 0)
    assert abs(laid.astype(int) - expected).max() <= 1


def test_a_side_that_no_jpeg_can_have_is_refused_by_cause_everywhere() -> None:
    data = _encoded(np.zeros((MAX_SIDE + 1, 1, 3), np.uint8), "png")
    for read in (
        lambda data: decode_image(data, "png", 16),
        lambda data: read_image_size(data, "png"),
        lambda data: thumbnail(data, "png", 16),
    ):
        with pytest.raises(ImageTooLargeError, match="1 x 65501 pixels, 65,500 are allowed per side"):
            read(data)
    for refused in (inspect_image, encode_for_shard):
        with pytest.raises(RowError, match="it has 1 x 65501 pixels, 65,500 are allowed per side") as caught:
            refused(data, ImageOptions("jpg", 64))
        assert caught.value.cause == "image_too_large"
    longest = _encoded(np.zeros((MAX_SIDE, 1, 3), np.uint8), "png")
    assert decode_image(longest, "png", 16).eq(0).all()
    assert decode_image(encode_for_shard(longest, ImageOptions("jpg", None)), "jpg", 16).shape == (3, 16, 16)


@pytest.mark.filterwarnings("ignore:data.decode device")
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_a_set_with_long_images_is_converted_checked_shown_and_trained_on(tmp_path: Path, image_format: str) -> None:
    (tmp_path / "p").mkdir()
    long = _encoded(np.zeros((LONG, 1, 3), np.uint8), "png")
    assert len(long) < 500
    for number in range(30):
        (tmp_path / "p" / f"{number}.png").write_bytes(make_image(number, "png", (20, 16)))
    for number in (30, 31, 32):
        (tmp_path / "p" / f"{number}.png").write_bytes(_encoded(np.full((LONG, 1, 3), number, np.uint8), "png"))
    (tmp_path / "p" / "33.png").write_bytes(_encoded(np.zeros((70_000, 1, 3), np.uint8), "png"))
    splits = ["train" if number % 3 == 0 else "val" if number % 3 == 1 else "test" for number in range(34)]
    rows = [[f"{i}.png", f"number {i}", splits[i]] for i in range(34)]
    table = write_csv(tmp_path / "t.csv", ["image", "caption", "split"], rows)
    source = CsvSource(table, tmp_path / "p", None, Columns("image", "caption", None, "split"))
    form, licence, root = SetOptions(ImageOptions(image_format, None), 6, 300), Licence("CC0", "", ""), tmp_path / "set"  # type: ignore[arg-type]
    with pytest.raises(UserError, match="it has 1 x 70000 pixels, 65,500 are allowed per side"):
        convert(source, root, licence, form, ConvertOptions(0, 1, False))
    left_out = convert(source, root, licence, form, ConvertOptions(1, 1, False)).left_out
    assert [count.cause for count in left_out] == ["image_too_large"]
    assert check_set(ShardStorage(str(root))).problems == ()
    write_page(ShardStorage(str(root)), "val", 11, None, tmp_path / "page.html")
    data = ShardDataModule(str(root), 2, 224, 8, 400, num_streams=1)
    for decode, workers in (("cpu", 0), ("cpu", 1), *((("device", 0),) if image_format == "jpg" else ())):
        data.decode, data.num_workers = decode, workers  # type: ignore[assignment]
        assert sum(batch.num_samples for batch in data.val_dataloader()) == 11


def test_an_image_that_cannot_be_stored_is_not_reported_as_changed(tmp_path: Path) -> None:
    data = make_image(0, "png")[:-60]
    (tmp_path / "a.png").write_bytes(data)
    for sha256, pattern in (
        (hashlib.sha256(data).hexdigest(), "line 2: the image is broken .*fix or remove the image"),
        ("0" * 64, "line 2: the image has changed while the set was converted"),
    ):
        sample = PlannedSample("k", "t.csv line 2", (PlannedImage(ImageLocation("a.png"), sha256),), None, None)
        with pytest.raises(UserError, match=pattern):
            write_shard(ShardTask(tmp_path, tmp_path / "s.tar", (sample,), ImageOptions("jpg", None)))
