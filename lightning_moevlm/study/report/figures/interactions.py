"""Draws a study's factors as a matrix: main effects on the diagonal, two-way interactions beside it.

Only a cell whose interval excludes 0 is coloured, and every cell shows its interval. The colour scale reaches as far as
the widest interval, so that an effect is pale where the study could not have shown a small one.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.report.figures.report_figure import INK, ReportFigure, new_figure, render_figure, wrap
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_interval, format_signed
from lightning_moevlm.study.statistics.effects import Effect

_DARK, _LIGHT = "#111111", "#fafafa"  # letters on a coloured cell: the same whatever the page's scheme
_FEW_FACTORS = 5  # more leave room for small letters alone
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
        values[row, column] = values[column, row] = effect.centre if _excludes_zero(effect) else np.nan
    reach = max(max(map(abs, _ends(effect))) for effect in known.values()) or 1.0
    figure = new_figure(min(8.0, 1.8 + 0.85 * len(factors)))
    axes = figure.subplots()
    # blue is progress, whichever way that is
    colours = "RdBu_r" if result.comparison.primary.direction == "lower" else "RdBu"
    image = axes.imshow(values, cmap=colours, norm=TwoSlopeNorm(0.0, -reach, reach), aspect="auto")
    for term, effect in known.items():
        for one, other in dict.fromkeys(((term[0], term[-1]), (term[-1], term[0]))):
            _write(axes, factors.index(one), factors.index(other), effect, reach, len(factors))
    names = [wrap(name, _LETTERS_OF_FACTOR) for name in factors]
    axes.set_xticks(range(len(factors)), names, rotation=20 if len(factors) > 4 else 0)
    axes.set_yticks(range(len(factors)), names)
    axes.set_xticks([place + 0.5 for place in range(len(factors) - 1)], minor=True)
    axes.set_yticks([place + 0.5 for place in range(len(factors) - 1)], minor=True)
    axes.grid(which="minor", alpha=0.4)
    axes.tick_params(which="minor", length=0)
    level = f"{100 * (1 - result.comparison.decide.alpha):g} %"
    axes.set_title(
        f"diagonal: main effects; beside it: interactions; below each: {level} interval\n"
        "without colour: the interval contains 0",
        fontsize=10,
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label(f"effect on {title}\n({unit}), blue is better" if unit else f"effect on {title}, blue is better")
    bar.ax.yaxis.label.set_fontsize(9)
    sentences = " ".join(f"{' x '.join(term)}: {_cell(effect)}." for term, effect in known.items())
    coloured = ", ".join(" x ".join(term) for term, effect in known.items() if _excludes_zero(effect)) or "none"
    alt = (
        f"Matrix of main effects and two-way interactions on {title}. {sentences} "
        f"Coloured, since the interval excludes 0: {coloured}."
    )
    heading = f"Effects of factors on {title}, alone and together"
    return render_figure(figure, "interactions", heading, alt, _table(result))


def _ends(effect: Effect) -> tuple[float, ...]:
    """Return the ends of the interval; the centre where there is none."""
    if effect.interval is None:
        return (effect.centre or 0.0,)
    return effect.interval.low, effect.interval.high


def _excludes_zero(effect: Effect) -> bool:
    return effect.interval is not None and not effect.interval.low <= 0 <= effect.interval.high


def _write(axes: Axes, row: int, column: int, effect: Effect, reach: float, num_factors: int) -> None:
    assert effect.centre is not None
    is_coloured = _excludes_zero(effect)
    colour = INK if not is_coloured else _LIGHT if abs(effect.centre) > 0.6 * reach else _DARK
    weight = "bold" if is_coloured else "normal"
    interval = f"[{effect.interval.low:+.2g}, {effect.interval.high:+.2g}]" if effect.interval else "no interval"
    axes.text(column, row - 0.04, f"{effect.centre:+.3g}", ha="center", va="bottom", color=colour, weight=weight)
    size = 8 if num_factors <= _FEW_FACTORS else 6
    axes.text(column, row + 0.04, interval, ha="center", va="top", color=colour, fontsize=size)


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
