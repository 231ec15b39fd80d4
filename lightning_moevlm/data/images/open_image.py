"""Opens encoded images with Pillow: checks their size first, and makes every error of Pillow a `ValueError`."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from lightning_moevlm.data.format.faults import MAX_PIXELS, MAX_SIDE

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
"""Errors of Pillow for broken files."""


class ImageTooLargeError(ValueError):
    """The header of an image announces more pixels than allowed."""


def check_pixels(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image by its size.

    Raises:
        ImageTooLargeError: if it has more than `max_pixels`, or a side of more than `MAX_SIDE`.
    """
    if height * width > max_pixels:
        raise ImageTooLargeError(f"it has {width} x {height} pixels, {max_pixels:,} are allowed")
    if max(height, width) > MAX_SIDE:
        raise ImageTooLargeError(f"it has {width} x {height} pixels, {MAX_SIDE:,} are allowed per side")


@contextmanager
def open_image(
    data: bytes, formats: tuple[str, ...] = IMAGE_FORMATS, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open an image of one of the formats; errors of decoding it in the context are translated too.

    Raises:
        ImageTooLargeError: if it has more than `max_pixels`, or too long a side; nothing was decoded.
        ValueError: if the bytes are not such an image, or are broken.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            check_pixels(image.height, image.width, max_pixels)
            yield image
    except ImageTooLargeError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit
        raise ImageTooLargeError(str(error)) from error
    except Image.UnidentifiedImageError:
        raise ValueError(f"the bytes are not an image of a known format ({', '.join(formats)})") from None
    except _PILLOW_ERRORS as error:
        raise ValueError(str(error)) from error


def format_of(image: Image.Image) -> str:
    """Return the format of an opened image, one of `IMAGE_FORMATS`."""
    return "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG followed by others
