"""A set seen from outside of training: what its samples are, how large its images, and what they look like."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from lightning_moevlm.data.format.manifest import Manifest
from lightning_moevlm.data.images.decode import (
    IMAGE_EXTENSIONS,
    IMAGE_FORMATS,
    PILLOW_ERRORS,
    ImageTooLargeError,
    check_pixels,
)
from lightning_moevlm.data.images.orientation import orientation, turn_image, upright_size
from lightning_moevlm.data.text.captions import find_captions

_FORMATS = {"jpg": ("JPEG",), "png": ("PNG",), "image": IMAGE_FORMATS}


def modality_of(manifest: Manifest) -> str:
    """Return what the set's samples are: pairs, images or texts."""
    has_images = image_extension(manifest) is not None
    has_captions = find_captions(manifest.members, manifest.layout.caption_field) is not None
    return "pairs" if has_images and has_captions else "images" if has_images else "texts"


def image_extension(manifest: Manifest) -> str | None:
    """Return the extension of the set's images, None if it has none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in manifest.members), None)


def read_image_size(data: bytes, extension: str) -> tuple[int, int]:
    """Return (width, height) in pixels, upright, from the image's header.

    Raises:
        ImageTooLargeError: if it has more pixels than allowed.
        ValueError: if the bytes are no such image.

    """
    with open_image(data, extension) as image:
        return upright_size(image.size, orientation(data))


def thumbnail(data: bytes, extension: str, side: int) -> Image.Image:
    """Return the whole image as RGB, upright, its longer side at most `side` pixels; transparent pixels lie on white.

    Raises:
        ImageTooLargeError: if it has more pixels than allowed.
        ValueError: if the bytes are no such image.

    """
    with open_image(data, extension) as image:
        try:
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is scaled while it is decoded
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            rgba = image.convert("RGBA")
        except PILLOW_ERRORS as error:
            raise ValueError(str(error)) from error
    whole = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return turn_image(whole, orientation(data))


def open_image(data: bytes, extension: str) -> Image.Image:
    """Open an image of the format that its extension names, without decoding it.

    Raises:
        ImageTooLargeError: if it has more pixels than allowed.
        ValueError: if the bytes are no such image.

    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decided below
            image = Image.open(io.BytesIO(data), formats=_FORMATS[extension])
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(str(error)) from error
    except UnidentifiedImageError:
        raise ValueError(f"these bytes are no {' or '.join(_FORMATS[extension])}") from None
    except PILLOW_ERRORS as error:
        raise ValueError(str(error)) from error
    check_pixels(image.height, image.width)
    return image
