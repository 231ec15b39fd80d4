import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.special_tokens import BOS, EOS
from lightning_moevlm.data.format.faults import SampleFault
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.images.decode import check_jpeg, decode_image, image_rows
from lightning_moevlm.data.images.open_image import ImageTooLargeError
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.text.tokenizer import load_tokenizer, train_tokenizer


def _halves(height: int, width: int) -> np.ndarray:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return pixels


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (48, 96), (20, 20), (31, 77)])
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_any_size_becomes_the_wanted_one(shape: tuple[int, int], extension: str) -> None:
    pixels = _halves(*shape)
    if extension == "jpg":
        data = simplejpeg.encode_jpeg(pixels, 95, "RGB", "444")
    else:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "png")
        data = out.getvalue()
    image_RYX = decode_image(data, extension, 32)
    assert image_RYX.shape == (3, 32, 32)
    assert image_RYX.dtype == torch.uint8
    red, blue = image_RYX[:, 16, 4].tolist(), image_RYX[:, 16, 27].tolist()
    assert red[0] > 240 and red[2] < 15
    assert blue[2] > 240 and blue[0] < 15


def test_lossless_png_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    assert torch.equal(decode_image(out.getvalue(), "png", 16), torch.from_numpy(pixels).permute(2, 0, 1))


def _jpg(pixels: np.ndarray) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "444"))


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(40, 40), (40, 60), (33, 47)])
def test_resizing_is_that_of_pillow(shape: tuple[int, int]) -> None:
    # less than twice 32 pixels: the whole JPEG is decoded, then resized, and not scaled by 7/8 and the like on the way
    data = _jpg(_noise(*shape))
    scale = 32 / min(shape)
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    whole = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB")).resize((width, height), Image.Resampling.BILINEAR)
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = np.asarray(whole)[top : top + 32, left : left + 32]
    off = decode_image(data, "jpg", 32).permute(1, 2, 0).numpy().astype(int) - expected
    assert abs(off).max() <= 1  # rounding; torch and Pillow both compute with whole numbers


def test_a_multiple_is_scaled_while_it_is_decoded() -> None:
    data = _jpg(_noise(64, 64))
    expected = simplejpeg.decode_jpeg(data, "RGB", min_height=16, min_width=16)
    assert expected.shape == (16, 16, 3)
    assert np.array_equal(decode_image(data, "jpg", 16).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("side", [16, 24, 64])
@pytest.mark.parametrize("encode", [_jpg, _png])
def test_a_row_of_a_batch_gets_the_same_pixels_as_an_image_alone(encode, side: int) -> None:
    data, extension = encode(_noise(side, side)), encode.__name__[1:]
    rows_BRYX = image_rows(3, 16)
    rows_BRYX.zero_()
    written = decode_image(data, extension, 16, into=rows_BRYX[1])
    assert written.data_ptr() == rows_BRYX[1].data_ptr()
    assert torch.equal(rows_BRYX[1], decode_image(data, extension, 16))
    assert not rows_BRYX[0].any() and not rows_BRYX[2].any()


def test_transparent_is_white() -> None:
    pixels = np.full((16, 16, 4), 200, dtype=np.uint8)
    pixels[..., 3] = 0
    assert decode_image(_png(pixels), "png", 16).unique().tolist() == [255]


def _bombs() -> list[tuple[str, bytes]]:
    """Headers that promise 60000 x 60000 pixels, 10 GiB, before next to nothing."""
    sides = struct.pack(">HH", 60000, 60000)
    jpg, png = _jpg(_noise(16, 16)), _png(_noise(16, 16))
    place = jpg.index(b"\xff\xc0") + 5  # start of frame: marker, length, bits, height, width
    return [
        ("jpg", jpg[:place] + sides + jpg[place + 4 :]),
        ("png", png[:16] + struct.pack(">II", 60000, 60000) + png[24:]),
    ]


@pytest.mark.parametrize(("extension", "data"), _bombs())
def test_bombs_are_refused_by_their_header(extension: str, data: bytes) -> None:
    with pytest.raises(ImageTooLargeError, match="it has 60000 x 60000 pixels, 67,108,864 are allowed"):
        decode_image(data, extension, 16)


@pytest.mark.parametrize("encode", [_jpg, _png])
def test_the_limit_is_an_option(encode) -> None:
    data, extension = encode(_noise(16, 20)), encode.__name__[1:]
    assert decode_image(data, extension, 16, max_pixels=320).shape == (3, 16, 16)
    with pytest.raises(ImageTooLargeError, match="20 x 16 pixels, 319 are allowed"):
        decode_image(data, extension, 16, max_pixels=319)


@pytest.mark.parametrize("encode", [_jpg, _png])
def test_no_broken_image_raises_anything_else(encode) -> None:
    good, extension = encode(_noise(24, 24)), encode.__name__[1:]
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        if chance.random() < 0.3:
            del bad[chance.randrange(len(bad)) :]
        try:
            decode_image(bytes(bad), extension, 16)
        except ValueError:
            refused += 1
    assert refused > 50


def _captioned(root: Path, extension: str = "jpg", **options: int) -> Collate:
    tokenizer = load_tokenizer(root, train_tokenizer(["a"], 260, root))
    return Collate((extension, "txt"), tokenizer, 16, 8, **options)


def test_every_fault_of_a_sample_has_its_cause(tmp_path: Path) -> None:
    good = {"jpg": _jpg(_noise(16, 16)), "txt": b"a"}
    collate = _captioned(tmp_path, max_pixels=1000)
    for members, cause, pattern in (
        ({"txt": b"a"}, "member_missing", "k in shard x.tar has no .jpg"),
        ({"jpg": good["jpg"]}, "member_missing", "k in shard x.tar has no .txt"),
        (good | {"jpg": b"no image"}, "image_undecodable", r"k.jpg in shard x.tar cannot be decoded \("),
        (good | {"jpg": _png(_noise(16, 16))}, "image_undecodable", "k.jpg"),  # another format than its name says
        (good | {"jpg": good["jpg"][:-200]}, "image_undecodable", "k.jpg"),
        (good | {"jpg": _jpg(_noise(32, 32))}, "image_too_large", "k.jpg .*32 x 32 pixels, 1,000 are allowed"),
        (good | {"txt": b"caf\xe9"}, "text_not_utf8", "k.txt in shard x.tar"),
    ):
        with pytest.raises(SampleFault, match=pattern) as caught:
            collate.decode(RawSample("k", "x.tar", members))
        assert caught.value.cause == cause
    assert collate.decode(RawSample("k", "x.tar", good)).caption == "a"


def test_a_row_is_free_again_after_a_fault(tmp_path: Path) -> None:
    collate = _captioned(tmp_path)
    rows_BRYX = collate.image_rows(2)
    assert rows_BRYX is not None
    samples = [RawSample(f"k{i}", "x.tar", {"jpg": _jpg(_noise(16, 16)), "txt": b"a"}) for i in range(3)]
    samples[1].members["txt"] = b"\xff"  # type: ignore[index]
    decoded = []
    for sample in samples:
        try:
            decoded.append(collate.decode(sample, rows_BRYX[len(decoded)]))
        except SampleFault:
            continue
    batch = collate.make_batch(decoded, rows_BRYX)
    assert batch.keys == ("k0", "k2")
    expected = collate([samples[0], samples[2]])
    assert all(torch.equal(one, other) for one, other in zip(batch[:3], expected[:3], strict=True))


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_rubbish_is_a_user_error_that_names_the_sample(extension: str, tmp_path) -> None:
    tokenizer = load_tokenizer(tmp_path, train_tokenizer(["a"], 260, tmp_path))
    collate = Collate((extension,), tokenizer, 16, 8)
    with pytest.raises(UserError, match=f"k1.{extension} in shard x.tar cannot be decoded"):
        collate([RawSample("k1", "x.tar", {extension: b"no image"})])
    with pytest.raises(UserError, match=f"k1 in shard x.tar has no .{extension}"):
        collate([RawSample("k1", "x.tar", {})])


def test_a_batch_holds_the_modalities_of_the_set(tmp_path) -> None:
    tokenizer = load_tokenizer(tmp_path, train_tokenizer(["a"], 260, tmp_path))
    jpg = simplejpeg.encode_jpeg(_halves(16, 16), 95, "RGB", "444")
    raw = [
        RawSample("k1", "x.tar", {"jpg": jpg, "txt": b" a \n"}),
        RawSample("k2", "x.tar", {"jpg": jpg, "txt": b"aa"}),
    ]
    both = Collate(("jpg", "json", "txt"), tokenizer, 16, 4)
    assert both.wanted == {"jpg", "txt"}
    images_BRYX, text_BL, text_mask_BL, keys, *_ = both(raw)
    assert images_BRYX is not None and images_BRYX.shape == (2, 3, 16, 16) and images_BRYX.dtype == torch.uint8
    (a,) = tokenizer.ids("a")
    assert text_BL is not None and text_BL.tolist() == [[BOS, a, EOS, 0], [BOS, a, a, EOS]]
    assert text_mask_BL is not None and text_mask_BL.tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert keys == ("k1", "k2")
    assert Collate(("txt",), tokenizer, 16, 4)(raw).images_BRYX is None
    only_images = Collate(("jpg",), tokenizer, 16, 4)(raw)
    assert only_images.text_BL is None and only_images.text_mask_BL is None
    with pytest.raises(UserError, match=r"k3\.txt in shard x\.tar has no caption"):
        both([RawSample("k3", "x.tar", {"jpg": jpg, "txt": b" \n"})])


def test_a_jpeg_that_is_cut_short_is_found_out_without_decoding() -> None:
    jpeg = bytes(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), dtype=np.uint8), 90, "RGB", "444"))
    check_jpeg(jpeg)
    check_jpeg(jpeg + b"words after the end")  # decoders do not mind
    # a preview within the header has an end of its own
    with_preview = jpeg[:2] + b"\xff\xe1" + (len(jpeg) + 2).to_bytes(2, "big") + jpeg + jpeg[2:]
    check_jpeg(with_preview)
    for cut in (jpeg[:-2], jpeg[:-9], with_preview[:-2]):
        for look in (check_jpeg, lambda data: decode_image(data, "jpg", 16)):
            with pytest.raises(ValueError, match="Premature end of JPEG file"):
                look(cut)
    with pytest.raises(ImageTooLargeError, match="16 x 16 pixels, 255 are allowed"):
        check_jpeg(jpeg, max_pixels=255)
