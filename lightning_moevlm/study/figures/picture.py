"""A picture that can be read three ways: as an image, as a sentence, as the table of its numbers."""

import io
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_moevlm.study.table import Table

# Okabe and Ito (2008): told apart with any of the common colour deficiencies; its yellow is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_BASELINE_COLOUR = "#222222"
_MARKERS = "osD^vPX"
WIDTH_INCHES = 8.0
_DOTS_PER_INCH = 130
FONT_POINTS = 10.0


@dataclass(frozen=True)
class Picture:
    """A drawn figure. name: file name without ending; alt: the sentence; table: the numbers behind it."""

    name: str
    title: str
    alt: str
    png: bytes
    table: Table


@dataclass(frozen=True)
class Look:
    """How an arm is drawn everywhere."""

    colour: str
    marker: str


def looks(arms: tuple[str, ...], baseline: str) -> dict[str, Look]:
    """Return a look for every arm: the baseline is near-black, the others go through colours, then markers."""
    others = [arm for arm in arms if arm != baseline]
    chosen = {}
    for i, arm in enumerate(others):
        turn = i // len(_COLOURS)  # with every turn through the colours the markers shift by one
        chosen[arm] = Look(_COLOURS[i % len(_COLOURS)], _MARKERS[1 + (i + turn) % (len(_MARKERS) - 1)])
    return {baseline: Look(_BASELINE_COLOUR, _MARKERS[0]), **chosen}


def new_figure(height_inches: float) -> Figure:
    """Return an empty figure of report width, without pyplot's global state."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()
