"""Decodes images to pixels: JPEG by simplejpeg, other formats by Pillow.

Pixels stay uint8, a quarter of the memory and of the transfer; the model scales them. Shapes are (3, R, X), but memory
is ordered by row, column, channel, as decoders write it and as torch's antialiased resize of bytes is fastest. The
header is read first, so images with too many pixels cost nothing. Very long images are cropped before they are resized,
so memory is bounded. Images are set upright.
"""

import struct

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_moevlm.data.format.faults import MAX_PIXELS
from lightning_moevlm.data.images.allocation import Allocate, private_bytes
from lightning_moevlm.data.images.open_image import IMAGE_FORMATS, check_pixels, open_image
from lightning_moevlm.data.images.orientation import (
    FLIPPED_ACROSS,
    FLIPPED_DOWN,
    TRANSPOSED,
    UPRIGHT,
    orientation,
    turn_image,
)

IMAGE_EXTENSIONS = ("jpg", "png", "image")
"""Members with images; those of `image` may have any of `IMAGE_FORMATS`, independent of their names in tars."""
SECOND_IMAGES = tuple(f"right.{extension}" for extension in IMAGE_EXTENSIONS)
"""Members with the second image of samples about two images."""

_FORMATS = {"jpg": ("JPEG",), "png": ("PNG",), "image": IMAGE_FORMATS}
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_ROWS_AT_ONCE = 512
_LONGEST = 4
"""Longest side in units of the shorter one; longer images are cropped to their middle before they are resized."""


def decode_image(
    data: bytes, extension: str, size: int, max_pixels: int = MAX_PIXELS, into: Tensor | None = None
) -> Tensor:
    """Decode to uint8 RGB of shape (3, size, size), upright, transparent pixels on white.

    An image of another size is scaled (antialiased, bilinear) until its shorter side fits, and cropped to its middle. A
    JPEG at least twice as large is scaled while it is decoded, as far as possible but never below `size`.

    Args:
        data: Encoded image.
        extension: "jpg" or "png" for that format alone, "image" for any of `IMAGE_FORMATS`.
        size: Pixels per side.
        max_pixels: Largest number of pixels of the encoded image; `MAX_SIDE` limits each side.
        into: A row of `image_rows`, which is returned; decoding into it saves a copy.

    Raises:
        ImageTooLargeError: if the image has more than `max_pixels`, or too long a side; nothing was decoded.
        ValueError: if the bytes are not such an image.
    """
    row_RYX = image_rows(1, size)[0] if into is None else into
    if extension == "jpg" or (extension == "image" and data.startswith(_JPEG_START)):
        _decode_jpeg(data, size, max_pixels, row_RYX)
    else:
        pixels_YXR = _decode_png(data, max_pixels) if extension == "png" else _decode_with_pillow(data, max_pixels)
        fit(pixels_YXR, size, row_RYX, orientation(data))
    return row_RYX


def decode_whole(data: bytes, extension: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to RGB at the image's own size, upright, transparent pixels on white.

    Args:
        data: Encoded image.
        extension: As in `decode_image`.
        max_pixels: As in `decode_image`.

    Raises:
        ImageTooLargeError: if the image has more than `max_pixels`, or too long a side; nothing was decoded.
        ValueError: if the bytes are not such an image.
    """
    with open_image(data, _FORMATS[extension], max_pixels) as image:
        is_plain = image.mode == "RGB" and "transparency" not in image.info
        pixels_YXR = np.array(image) if is_plain else _lay_on_white(image)
    return turn_image(Image.fromarray(pixels_YXR), orientation(data))


def image_kind(member: str) -> str | None:
    """Return the extension that says how an image is encoded; None if the member is not an image."""
    return member.rpartition(".")[2] if member in (*IMAGE_EXTENSIONS, *SECOND_IMAGES) else None


def check_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Check the beginning and the end of a JPEG, without decoding it.

    Raises:
        ImageTooLargeError: if the image has more than `max_pixels`, or too long a side.
        ValueError: if the bytes do not begin as a JPEG does, or are cut short.
    """
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    check_pixels(height, width, max_pixels)
    # markers do not occur within pixels; an end before the last scan belongs to a preview in the header
    end = data.rfind(_JPEG_END)
    if end < 0 or data.find(_JPEG_SCAN, end) >= 0:
        raise ValueError("Premature end of JPEG file")


def image_rows(num_images: int, size: int, allocate: Allocate = private_bytes) -> Tensor:
    """Allocate images: (B, 3, size, size), uint8, each contiguous by row, column, channel."""
    return allocate(num_images * image_bytes(size)).view(num_images, size, size, 3).permute(0, 3, 1, 2)


def image_bytes(size: int) -> int:
    """Return the number of bytes of a decoded image."""
    return size * size * 3


def jpeg_scaling(size: int) -> dict[str, int]:
    """Return simplejpeg's options to scale while decoding: by a factor of at least 2, never below `size`.

    A smaller factor, such as 8/7, takes twice as long as decoding the whole image.
    """
    return {"min_height": size, "min_width": size, "min_factor": 2}


def middle_slices(height: int, width: int) -> tuple[slice, slice]:
    """Return the rows and columns to resize: the whole image, or the middle of a very long one."""
    rows, columns = min(height, _LONGEST * width), min(width, _LONGEST * height)
    top, left = (height - rows) // 2, (width - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def turn_pixels(image_RYX: Tensor, turn: int) -> Tensor:
    """Set pixels (..., Y, X) upright. turn: their EXIF orientation."""
    stored = image_RYX.mT if turn in TRANSPOSED else image_RYX
    axes = [-2] * (turn in FLIPPED_DOWN) + [-1] * (turn in FLIPPED_ACROSS)
    return stored.flip(axes) if axes else stored


def fit(pixels_YXR: NDArray[np.uint8], size: int, row_RYX: Tensor, turn: int = UPRIGHT) -> None:
    """Scale (H, W, 3) pixels until the shorter side has `size`, and write their middle into a row of `image_rows`.

    turn: the EXIF orientation of the pixels.
    """
    stored_YXR = torch.from_numpy(pixels_YXR[middle_slices(*pixels_YXR.shape[:2])])
    image_BRYX = turn_pixels(stored_YXR.permute(2, 0, 1), turn)[None]
    height, width = image_BRYX.shape[2:]
    scale = size / min(height, width)
    target = [max(size, round(height * scale)), max(size, round(width * scale))]
    if target == [height, width]:
        scaled_BRYX = image_BRYX
    elif target == [size, size]:
        # F.interpolate has no `out`, so its result would have to be copied
        torch.ops.aten._upsample_bilinear2d_aa.out(image_BRYX, target, False, None, None, out=row_RYX[None])
        return
    else:
        scaled_BRYX = F.interpolate(image_BRYX, size=target, mode="bilinear", antialias=True)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    row_RYX.copy_(scaled_BRYX[0, :, top : top + size, left : left + size])


def _decode_jpeg(data: bytes, size: int, max_pixels: int, row_RYX: Tensor) -> None:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    check_pixels(height, width, max_pixels)
    scaling, turn = jpeg_scaling(size), orientation(data)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data, **scaling)
    if (height, width) == (size, size) and turn == UPRIGHT:
        simplejpeg.decode_jpeg(data, "RGB", **scaling, buffer=row_RYX.permute(1, 2, 0).numpy())
    else:
        fit(simplejpeg.decode_jpeg(data, "RGB", **scaling), size, row_RYX, turn)


def _decode_png(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    if data[:8] != _PNG_START or data[12:16] != b"IHDR" or len(data) < 24:
        raise ValueError("it does not begin as a PNG file does")
    width, height = struct.unpack(">II", data[16:24])
    check_pixels(height, width, max_pixels)
    return _decode_with_pillow(data, max_pixels, ("PNG",))


def _decode_with_pillow(data: bytes, max_pixels: int, formats: tuple[str, ...] = IMAGE_FORMATS) -> NDArray[np.uint8]:
    """Return the pixels as stored; of a very long image, its middle."""
    with open_image(data, formats, max_pixels) as whole:
        rows, columns = middle_slices(whole.height, whole.width)
        seen = (columns.start, rows.start, columns.stop, rows.stop)
        image = whole if seen == (0, 0, *whole.size) else whole.crop(seen)
        if image.mode == "RGB" and "transparency" not in image.info:
            return np.array(image)
        return _lay_on_white(image)


def _lay_on_white(image: Image.Image) -> NDArray[np.uint8]:
    """Return (H, W, 3) pixels. Some rows at a time, because conversion takes several copies."""
    pixels_YXR = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, _ROWS_AT_ONCE):
        bottom = min(image.height, top + _ROWS_AT_ONCE)
        rgba = image.crop((0, top, image.width, bottom)).convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        pixels_YXR[top:bottom] = np.asarray(Image.alpha_composite(ground, rgba).convert("RGB"))
    return pixels_YXR
