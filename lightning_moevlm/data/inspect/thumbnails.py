"""Reads a set's modality, sizes of its images, and thumbnails."""

from PIL import Image

from lightning_moevlm.data.format.manifest import Manifest
from lightning_moevlm.data.images.decode import IMAGE_EXTENSIONS
from lightning_moevlm.data.images.open_image import IMAGE_FORMATS, open_image
from lightning_moevlm.data.images.orientation import orientation, turn_image, upright_size
from lightning_moevlm.data.text.captions import find_captions

FORMATS = {"jpg": ("JPEG",), "png": ("PNG",), "image": IMAGE_FORMATS}


def modality_of(manifest: Manifest) -> str:
    """Return the kind of the set's samples: pairs, images or texts."""
    has_images = image_extension(manifest) is not None
    has_captions = find_captions(manifest.members, manifest.layout.caption_field) is not None
    return "pairs" if has_images and has_captions else "images" if has_images else "texts"


def image_extension(manifest: Manifest) -> str | None:
    """Return the extension of the set's images; None if it has no images."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in manifest.members), None)


def read_image_size(data: bytes, extension: str) -> tuple[int, int]:
    """Return (width, height) in pixels, upright, from an image's header.

    Raises:
        ImageTooLargeError: if it has more pixels than allowed.
        ValueError: if the bytes are not such an image.
    """
    with open_image(data, FORMATS[extension]) as image:
        return upright_size(image.size, orientation(data))


def thumbnail(data: bytes, extension: str, side: int) -> Image.Image:
    """Return the whole image as RGB, upright, its longer side at most `side` pixels; transparent pixels lie on white.

    Raises:
        ImageTooLargeError: if it has more pixels than allowed.
        ValueError: if the bytes are not such an image.
    """
    with open_image(data, FORMATS[extension]) as image:
        image.draft("RGB", (2 * side, 2 * side))  # scales a large JPEG while it is decoded
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        rgba = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return turn_image(whole, orientation(data))
