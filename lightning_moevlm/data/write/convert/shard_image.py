"""Images on their way into a shard: looked at with suspicion, kept byte for byte where that is possible.

An image is kept as it is if it has the set's format, is small enough, stands upright and has plain colours.
Otherwise it is decoded, set upright (EXIF orientation), scaled and encoded anew. What a reader of shards could not
decode is found here, before a shard is written: every image is decoded, JPEG at an eighth of its size.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from lightning_moevlm.data.format.faults import MAX_PIXELS, MAX_SIDE
from lightning_moevlm.data.images.encode import ImageFormat, encode
from lightning_moevlm.data.images.orientation import UPRIGHT, orientation, turn_image
from lightning_moevlm.data.write.convert.sources.row_source import ImageLocation, RowError, resolve_inside

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_PLAIN_MODES = {"jpg": ("RGB", "L"), "png": ("RGB", "RGBA", "L", "LA", "P", "1")}
_DECODABLE_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV")


class ImageOptions(NamedTuple):
    """How images are to be stored. max_side: pixels of the longer side at most; None keeps every size."""

    image_format: ImageFormat
    max_side: int | None


class InspectedImage(NamedTuple):
    """A good image. sha256: of its bytes as found, in hex. side: the shorter one, in pixels, as it will be stored."""

    sha256: str
    side: int


def read_image(folder: Path, image: ImageLocation) -> bytes:
    """Return an image's bytes.

    Raises:
        RowError: if it lies outside of the folder, or is not there.

    """
    path = resolve_inside(folder, image.file)
    try:
        with path.open("rb") as file:
            file.seek(image.offset)
            return file.read(-1 if image.num_bytes is None else image.num_bytes)
    except OSError as error:
        raise RowError("image_missing", f"image {image.file!r} cannot be read ({error.strerror})") from None


def inspect_image(data: bytes, image_options: ImageOptions) -> InspectedImage:
    """Decode an image to see that it is one.

    Raises:
        RowError: if it is none, is cut short, or has too many pixels.

    """
    with _open(data) as image:
        if image.format == "JPEG":
            simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1)
        else:
            image.load()
        side = min(image.size)
        if image_options.max_side is not None and max(image.size) > image_options.max_side:
            side = min(_scaled(image.size, image_options.max_side))
    return InspectedImage(hashlib.sha256(data).hexdigest(), side)


def format_of(data: bytes) -> str:
    """Return the format of an image by its bytes, one of `FORMATS`.

    Raises:
        RowError: if it is no image.

    """
    with _open(data) as image:
        return "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with others behind it


def encode_for_shard(data: bytes, image_options: ImageOptions) -> bytes:
    """Return the bytes that go into the shard: the same ones, or the image encoded anew.

    Raises:
        RowError: as `inspect_image`.

    """
    with _open(data) as image:
        turn = orientation(data)
        if turn == UPRIGHT and _fits(image, image_options):
            return data
        transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        mode = "RGBA" if transparent else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if image_options.max_side is not None and max(image.size) > image_options.max_side:
            image = image.resize(_scaled(image.size, image_options.max_side), Image.Resampling.LANCZOS)
        return encode(np.asarray(turn_image(image, turn)), image_options.image_format)


def _fits(image: Image.Image, image_options: ImageOptions) -> bool:
    return (
        image.format == {"jpg": "JPEG", "png": "PNG"}[image_options.image_format]
        and image.mode in _PLAIN_MODES[image_options.image_format]
        and (image_options.max_side is None or max(image.size) <= image_options.max_side)
    )


def _scaled(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = size
    longer = max(size)
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large and of odd images; both are decided here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise RowError("image_too_large", f"{image.width}x{image.height} pixels, {MAX_PIXELS:,} allowed")
                if max(image.size) > MAX_SIDE:
                    said = f"{image.width}x{image.height} pixels, {MAX_SIDE:,} allowed per side"
                    raise RowError("image_too_large", said)
                if image.mode not in _DECODABLE_MODES:
                    raise RowError("image_undecodable", f"pixels of mode {image.mode}, which has no plain RGB")
                yield image
    except Image.DecompressionBombError:
        raise RowError("image_too_large", f"far more pixels than the {MAX_PIXELS:,} allowed") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise RowError("image_undecodable", f"the bytes are not an image of a known format ({known})") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow and simplejpeg raise for broken bytes
        raise RowError("image_undecodable", f"the image is broken ({error})") from None
