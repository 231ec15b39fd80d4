"""Interaction matrix of a study that crosses factors: main effects on the diagonal, two-way interactions beside it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report.figures.report_figure import ReportFigure, new_figure, render_figure, wrap
from lightning_moevlm.study.report.tables.table import (
    NOTHING,
    Table,
    format_interval,
    format_signed,
)
from lightning_moevlm.study.statistics.effects import Effect

_DARK, _LIGHT = "#111111", "#fafafa"  # letters on a coloured cell: the same whatever the page's scheme
_LETTERS_OF_FACTOR = 14  # of a name in a line beside the matrix


def draw_interactions(result: StudyResult) -> ReportFigure | None:
    """Draw it; None where the design has fewer than two factors or no seed has all of its arms."""
    factors = _names(result)
    effects = {tuple(contrast.name for contrast in one.contrasts): one.effect for one in result.factors}
    known = {term: effect for term, effect in effects.items() if effect.centre is not None}
    if len(factors) < 2 or not known:
        return None
    title, unit = name_and_unit(result.comparison.primary.metric)
    values = np.full((len(factors), len(factors)), np.nan)
    for term, effect in known.items():
        row, column = factors.index(term[0]), factors.index(term[-1])
        values[row, column] = values[column, row] = effect.centre
    largest = float(np.nanmax(np.abs(values))) or 1.0
    figure = new_figure(min(8.0, 1.6 + 0.75 * len(factors)))
    axes = figure.subplots()
    # blue is progress, whichever way that is
    colours = "RdBu_r" if result.comparison.primary.direction == "lower" else "RdBu"
    image = axes.imshow(values, cmap=colours, norm=TwoSlopeNorm(0.0, -largest, largest), aspect="auto")
    for term, effect in known.items():
        for one, other in dict.fromkeys(((term[0], term[-1]), (term[-1], term[0]))):
            _write(axes, factors.index(one), factors.index(other), effect, largest)
    names = [wrap(name, _LETTERS_OF_FACTOR) for name in factors]
    axes.set_xticks(range(len(factors)), names, rotation=20 if len(factors) > 4 else 0)
    axes.set_yticks(range(len(factors)), names)
    level = f"{100 * (1 - result.comparison.decide.alpha):g} %"
    axes.set_title(
        f"diagonal: effect of a switch or level; beside it: interactions; star: {level} interval without 0",
        fontsize=10,
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label(f"{title}\n({unit}), blue is better" if unit else f"{title}, blue is better", fontsize=9)
    sentences = " ".join(f"{' x '.join(term)}: {_cell(effect)}." for term, effect in known.items())
    alt = f"Matrix of main effects and two-way interactions on {title}. {sentences}"
    return render_figure(
        figure, "interactions", f"Effects of factors on {title}, alone and together", alt, _table(result)
    )


def _write(axes: Axes, row: int, column: int, effect: Effect, largest: float) -> None:
    assert effect.centre is not None
    star = "*" if effect.interval is not None and not effect.interval.low <= 0 <= effect.interval.high else ""
    colour = _LIGHT if abs(effect.centre) > 0.6 * largest else _DARK
    weight = "bold" if row == column else "normal"
    axes.text(column, row, f"{effect.centre:+.3g}{star}", ha="center", va="center", color=colour, weight=weight)


def _names(result: StudyResult) -> tuple[str, ...]:
    return tuple(dict.fromkeys(contrast.name for one in result.factors for contrast in one.contrasts))


def _table(result: StudyResult) -> Table:
    factors = _names(result)
    effects = {frozenset(contrast.name for contrast in one.contrasts): one.effect for one in result.factors}
    rows = tuple((row, *(_cell(effects.get(frozenset((row, column)))) for column in factors)) for row in factors)
    title, unit = name_and_unit(result.comparison.primary.metric)
    notes = ("a factor with itself: its main effect. In brackets the interval.",)
    return Table(f"Main effects and interactions on {title} ({unit})", ("", *factors), rows, notes)


def _cell(effect: Effect | None) -> str:
    if effect is None or effect.centre is None:
        return NOTHING
    interval = f" {format_interval(effect.interval)}" if effect.interval else ""
    return f"{format_signed(effect.centre)}{interval}"
