"""Renders a figure as an image, as a sentence and as the table of its numbers; chooses the arms' colours.

Figures are drawn once, black on white. In the SVG, black becomes the ink and white the ground of the reader's colour
scheme, so that one figure serves a light and a dark page. The PNG stays as it was drawn.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_moevlm.study.report.tables.table import Table

# Okabe and Ito (2008): distinguishable with any of the common colour deficiencies; its yellow is too pale for lines.
# All but the pale two have a contrast of 3 : 1 or more with both grounds. Markers differ, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK = "#000000"
GROUND = "#ffffff"
_MARKERS = "osD^vPX"
WIDTH_INCHES = 8.0
_DOTS_PER_INCH = 130
LETTERS_OF_ROW = 28
"""Of an arm's name beside a row of a figure; a longer one is broken."""
_LETTERS_UPRIGHT = 34  # of a label along an axis three inches high
_LETTERS_BESIDE = 90  # of that size in a row of a figure
_LETTERS_OF_MARK = 7  # so wide are a legend's line and the gaps around it
# A page's colours. An SVG within a page takes its scheme from the page.
_DARK_INK, _DARK_GROUND = "#e8eaed", "#15181c"
_SCHEMES = (
    ":root{--ink:#1c1f23;--ground:#fff;fill:var(--ink)}"
    f"@media (prefers-color-scheme:dark){{:root{{--ink:{_DARK_INK};--ground:{_DARK_GROUND}}}}}"
)


@dataclass(frozen=True)
class ReportFigure:
    """A drawn figure."""

    name: str
    """File name without ending."""
    title: str
    alt: str
    """Its content as sentences."""
    svg: bytes
    """For the page, in light and dark."""
    png: bytes
    """On white, for viewers without SVG."""
    table: Table
    """Its numbers."""


@dataclass(frozen=True)
class Look:
    """The colour and marker of an arm in every figure."""

    colour: str
    marker: str


def choose_looks(arms: tuple[str, ...], baseline: str) -> dict[str, Look]:
    """Return a look for every arm: the baseline in ink, the others in turn through colours, then markers."""
    others = [arm for arm in arms if arm != baseline]
    chosen = {}
    for i, arm in enumerate(others):
        turn = i // len(_COLOURS)  # with every turn through the colours the markers shift by one
        chosen[arm] = Look(_COLOURS[i % len(_COLOURS)], _MARKERS[1 + (i + turn) % (len(_MARKERS) - 1)])
    return {baseline: Look(INK, _MARKERS[0]), **chosen}


def legend_columns(names: Sequence[str]) -> int:
    """Return the number of columns that fit in a legend below a figure, at most 5."""
    longest = max(map(len, names), default=0)
    return max(1, min(5, len(names), _LETTERS_BESIDE // (longest + _LETTERS_OF_MARK)))


def axis_label(title: str, unit: str) -> str:
    """Return a label with its unit, broken so that an upright axis holds it."""
    return wrap(title, _LETTERS_UPRIGHT) + (f"\n({unit})" if unit else "")


def wrap(name: str, letters: int) -> str:
    """Break a name after _, / and spaces into lines of at most so many letters, if its parts allow that."""
    lines = [""]
    for part in re.findall(r"[^_/ ]*[_/ ]*", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > letters:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def new_figure(height_inches: float) -> Figure:
    """Return an empty figure of report width, without pyplot's global state."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained", facecolor=GROUND)
    FigureCanvasAgg(figure)
    return figure


def render_figure(figure: Figure, name: str, title: str, alt: str, table: Table) -> ReportFigure:
    """Render a drawn figure as SVG and PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DOTS_PER_INCH)
    figure.set_layout_engine("none")  # where everything is has just been found; finding it takes most of the time
    return ReportFigure(name, title, alt, _render_svg(figure), png.getvalue(), table)


def render_dark(figure: Figure) -> bytes:
    """Return a PNG of a drawn figure for a dark page: what is in ink becomes light. Changes the figure."""
    for text in figure.findobj(Text):
        if to_hex(text.get_color()) == INK:
            text.set_color(_DARK_INK)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DOTS_PER_INCH, facecolor=_DARK_GROUND)
    return png.getvalue()


def _render_svg(figure: Figure) -> bytes:
    buffer = io.StringIO()
    # A fixed salt: the same figure is the same file. Letters as outlines look alike wherever they are read.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "moevlm"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the reference to a schema on the network
    text = re.sub(r"<metadata>.*?</metadata>\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", "\n", text)
    for drawn, role in ((INK, "var(--ink)"), (GROUND, "var(--ground)")):
        text = re.sub(rf"\b(fill|stroke): ?{drawn}\b", rf"\1: {role}", text, flags=re.IGNORECASE)
    return text.replace("<defs>", f"<style>{_SCHEMES}</style>\n<defs>", 1).encode()
