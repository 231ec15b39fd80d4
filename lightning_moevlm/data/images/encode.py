"""Encodes pixels: JPEG by simplejpeg, PNG by Pillow. The same pixels always become the same bytes."""

import io
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY = 90
ImageFormat = Literal["jpg", "png"]
_ROWS_AT_ONCE = 512


def lay_on(ground_YXR: NDArray[np.uint8], image_YXA: NDArray[np.uint8], left: int, top: int) -> None:
    """Blend an RGBA image into an RGB ground, in place, with its upper left corner at (left, top)."""
    height, width = image_YXA.shape[:2]
    for row in range(0, height, _ROWS_AT_ONCE):  # some rows at a time, because blending takes several copies
        rows = slice(row, row + _ROWS_AT_ONCE)
        ground = ground_YXR[top : top + height, left : left + width][rows]
        alpha = image_YXA[rows, :, 3:].astype(np.uint16)
        blended = image_YXA[rows, :, :3] * alpha + ground.astype(np.uint16) * (255 - alpha)
        ground[:] = ((blended + 127) // 255).astype(np.uint8)  # integers: the same on every machine


def encode(pixels: NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """Encode RGB or RGBA pixels. For jpg, transparent pixels are laid on white."""
    if image_format == "png":
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "png")
        return out.getvalue()
    if pixels.shape[2] == 4:
        ground = np.full((*pixels.shape[:2], 3), 255, dtype=np.uint8)
        lay_on(ground, pixels, 0, 0)
        pixels = ground
    contiguous = np.ascontiguousarray(pixels)
    return bytes(simplejpeg.encode_jpeg(contiguous, JPEG_QUALITY, "RGB", "444", fastdct=False))
