"""Images that are converted are scaled, upright, and always readable."""

import io

import numpy as np
import pytest
from PIL import Image

from lightning_moevlm.data.images import decode
from lightning_moevlm.data.images.open_image import ImageTooLargeError
from lightning_moevlm.data.write.convert.shard_image import ImageOptions, encode_for_shard, inspect_image
from lightning_moevlm.data.write.convert.sources.row_source import RowError
from tests.data.sources import make_image

AS_IT_IS = ImageOptions("jpg", None)


def _grey(width: int, height: int, image_format: str) -> bytes:
    out = io.BytesIO()
    Image.new("1" if image_format == "PNG" else "L", (width, height)).save(out, image_format)
    return out.getvalue()


@pytest.mark.parametrize(("image_format", "extension"), [("PNG", "png"), ("JPEG", "jpg")])
def test_an_image_too_large_to_be_read_is_not_stored(image_format: str, extension: str) -> None:
    # 2^13 x 2^13 = 2^26 pixels are allowed; this is one column more
    data = _grey(8193, 8192, image_format)
    for refused in (inspect_image, encode_for_shard):
        with pytest.raises(RowError, match="8193 x 8192 pixels, 67,108,864 are allowed") as conversion:
            refused(data, ImageOptions("jpg", None))
        assert conversion.value.cause == "image_too_large"
    with pytest.raises(ImageTooLargeError, match="8193 x 8192 pixels, 67,108,864 are allowed"):
        decode.decode_image(data, extension, 64)


def test_the_largest_image_that_is_stored_can_be_read() -> None:
    data = _grey(8192, 8192, "JPEG")
    assert encode_for_shard(data, ImageOptions("jpg", None)) == data
    assert decode.decode_image(data, "jpg", 64).eq(0).all()


def test_large_images_are_scaled_and_small_ones_kept() -> None:
    image_options = ImageOptions("jpg", 20)
    assert inspect_image(make_image(0), image_options).side == 16  # 40 x 32 becomes 20 x 16
    assert Image.open(io.BytesIO(encode_for_shard(make_image(0), image_options))).size == (20, 16)
    small = make_image(0, size=(20, 10))
    assert encode_for_shard(small, image_options) == small


def test_images_are_set_upright_and_laid_on_white() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = (255, 0, 0)  # the left half is red
    out, turn_pixels = io.BytesIO(), Image.Exif()
    turn_pixels[0x0112] = 6  # shown turned by 90 degrees clockwise: the left half comes to lie on top
    Image.fromarray(pixels).save(out, "JPEG", exif=turn_pixels, quality=95)
    upright = np.asarray(Image.open(io.BytesIO(encode_for_shard(out.getvalue(), AS_IT_IS))))
    assert upright.shape == (16, 8, 3)
    assert upright[2, 4, 0] > 200 and upright[13, 4, 0] < 50
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(out, "PNG")
    assert np.asarray(Image.open(io.BytesIO(encode_for_shard(out.getvalue(), AS_IT_IS)))).min() > 250


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_a_truncated_image_is_found_before_it_is_written(extension: str) -> None:
    data = make_image(0, extension)
    inspect_image(data, AS_IT_IS)
    with pytest.raises(RowError) as caught:
        inspect_image(data[: len(data) // 2], AS_IT_IS)
    assert caught.value.cause == "image_undecodable"
