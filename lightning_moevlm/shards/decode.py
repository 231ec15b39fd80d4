"""From encoded bytes to pixels: JPEG by simplejpeg, PNG by Pillow, nothing else.

Pixels stay uint8 (a quarter of the memory and of the transfer); whoever computes with them scales them.
"""

import io

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_moevlm.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "png")
CAPTION_EXTENSION = "txt"


def decode_image(data: bytes, extension: str, size: int) -> Tensor:
    """Decode to uint8 RGB of shape (3, size, size); transparent pixels are laid on white.

    A picture of another size is scaled (antialiased) until its shorter side fits and cut to its middle.

    Raises:
        ValueError: if the bytes are no such image.

    """
    if extension == "jpg":
        # the decoder may skip work by scaling while it decodes, but never below the wanted size
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size)
    else:
        pixels = _decode_png(data)
    image_RYX = torch.from_numpy(pixels).permute(2, 0, 1)
    return image_RYX if image_RYX.shape[1:] == (size, size) else _fit(image_RYX, size)


def decode_caption(data: bytes) -> str:
    """Decode a caption; it is UTF-8 without surrounding blanks.

    Raises:
        ValueError: if the bytes are no UTF-8.

    """
    return data.decode("utf-8").strip()


def _decode_png(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            rgba = image.convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(str(error)) from error
    ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(ground, rgba).convert("RGB"))


def _fit(image_RYX: Tensor, size: int) -> Tensor:
    height, width = image_RYX.shape[1:]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    scaled = F.interpolate(image_RYX[None].contiguous(), size=target, mode="bilinear", antialias=True)[0]
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return scaled[:, top : top + size, left : left + size]


def undecodable(key: str, shard: str, extension: str, error: ValueError) -> UserError:
    """Return the error to raise for a member that cannot be decoded."""
    return UserError(f"{key}.{extension} in shard {shard} cannot be decoded ({error}); rebuild the set without it")
