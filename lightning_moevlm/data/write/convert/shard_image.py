"""Inspects images of a source, and prepares them for a shard; they are kept byte for byte if possible.

An image is kept if it has the set's format, is small enough, is upright and has plain colours. Otherwise it is decoded,
set upright (EXIF orientation), scaled and encoded anew. Every image is decoded before a shard is written, JPEG at an
eighth of its size, so that readers of shards find no broken ones.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from lightning_moevlm.data.images.encode import ImageFormat, encode
from lightning_moevlm.data.images.open_image import ImageTooLargeError, format_of, open_image
from lightning_moevlm.data.images.orientation import UPRIGHT, orientation, turn_image
from lightning_moevlm.data.write.convert.sources.row_source import ImageLocation, RowError, resolve_inside

_PLAIN_MODES = {"jpg": ("RGB", "L"), "png": ("RGB", "RGBA", "L", "LA", "P", "1")}
_DECODABLE_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV")


class ImageOptions(NamedTuple):
    """The form of stored images."""

    image_format: ImageFormat
    max_side: int | None  # largest longer side, pixels; None keeps all sizes


class InspectedImage(NamedTuple):
    """A good image."""

    sha256: str  # of its original bytes, in hex
    side: int  # shorter side as stored, pixels


def read_image(folder: Path, image: ImageLocation) -> bytes:
    """Return an image's bytes.

    Raises:
        RowError: if it is outside of the folder or does not exist.
    """
    path = resolve_inside(folder, image.file)
    try:
        with path.open("rb") as file:
            file.seek(image.offset)
            return file.read(-1 if image.num_bytes is None else image.num_bytes)
    except OSError as error:
        raise RowError("image_missing", f"image {image.file!r} cannot be read ({error.strerror})") from None


def inspect_image(data: bytes, image_options: ImageOptions) -> InspectedImage:
    """Decode an image to check it.

    Raises:
        RowError: if it is invalid, truncated or too large.
    """
    with _open(data) as image:
        if image.format == "JPEG":
            simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1)
        else:
            image.load()
        side = min(image.size)
        if image_options.max_side is not None and max(image.size) > image_options.max_side:
            side = min(_scale_size(image.size, image_options.max_side))
    return InspectedImage(hashlib.sha256(data).hexdigest(), side)


def read_format(data: bytes) -> str:
    """Return the format of an image by its bytes, one of `IMAGE_FORMATS`.

    Raises:
        RowError: if it is not an image.
    """
    with _open(data) as image:
        return format_of(image)


def encode_for_shard(data: bytes, image_options: ImageOptions) -> bytes:
    """Return the bytes for the shard: unchanged, or encoded anew.

    Raises:
        RowError: as in `inspect_image`.
    """
    with _open(data) as image:
        turn = orientation(data)
        if turn == UPRIGHT and _fits(image, image_options):
            return data
        transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        mode = "RGBA" if transparent else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if image_options.max_side is not None and max(image.size) > image_options.max_side:
            image = image.resize(_scale_size(image.size, image_options.max_side), Image.Resampling.LANCZOS)
        return encode(np.asarray(turn_image(image, turn)), image_options.image_format)


def _fits(image: Image.Image, image_options: ImageOptions) -> bool:
    return (
        image.format == {"jpg": "JPEG", "png": "PNG"}[image_options.image_format]
        and image.mode in _PLAIN_MODES[image_options.image_format]
        and (image_options.max_side is None or max(image.size) <= image_options.max_side)
    )


def _scale_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = size
    longer = max(size)
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large and of odd images; both are checked here
            with open_image(data) as image:
                if image.mode not in _DECODABLE_MODES:
                    raise RowError("image_undecodable", f"pixels of mode {image.mode}, which has no plain RGB")
                yield image
    except ImageTooLargeError as error:
        raise RowError("image_too_large", str(error)) from None
    except ValueError as error:
        raise RowError("image_undecodable", f"the image is broken ({error})") from None
