"""Draws a forest plot: the effect of every arm or factor, its deciding interval and its single seeds."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import StudyResult
from lightning_moevlm.study.declare.comparison import Test
from lightning_moevlm.study.report.figures.report_figure import (
    GROUND,
    INK,
    LETTERS_OF_ROW,
    Look,
    ReportFigure,
    choose_looks,
    new_figure,
    render_figure,
    wrap,
)
from lightning_moevlm.study.report.figures.unfinished_runs import describe_unfinished_runs
from lightning_moevlm.study.report.tables.effect_tables import effects_table
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_interval, format_signed
from lightning_moevlm.study.statistics.effects import Effect

_LETTERS_BELOW = 50
_CENTRES: dict[Test, str] = {"t": "mean", "wilcoxon": "centre (Hodges-Lehmann)", "sign": "median"}


class Row(NamedTuple):
    """One row."""

    name: str
    effect: Effect
    look: Look
    lost: tuple[str, ...] = ()
    """Lost runs, in words."""


def draw_forest(result: StudyResult) -> ReportFigure | None:
    """Draw the arms; None if no arm has been compared yet."""
    study = result.comparison
    look = choose_looks(tuple(arm.arm.name for arm in result.arms), study.baseline)
    rows = [
        Row(arm.arm.name, arm.effect, look[arm.arm.name], describe_unfinished_runs(arm))
        for arm in result.arms
        if arm.effect is not None
    ]
    title, _ = name_and_unit(study.primary.metric)
    texts = (f"Effect on {title}", "effect of each arm", f"arm minus {study.baseline}")
    return _draw_rows(result, rows, "effects", texts, effects_table(result).title)


def draw_factor_forest(result: StudyResult) -> ReportFigure | None:
    """Draw main effects and interactions; None if the design crosses no factors or nothing is compared yet."""
    names = tuple(one.name for one in result.factors)
    look = choose_looks(("", *names), "")
    rows = [Row(one.name, one.effect, look[one.name]) for one in result.factors]
    title, _ = name_and_unit(result.comparison.primary.metric)
    texts = (
        f"Effect of factors on {title}",
        "effect of each factor and interaction",
        "on minus off, or level minus first",
    )
    return _draw_rows(result, rows, "factors", texts, texts[0])


def _draw_rows(
    result: StudyResult, rows: Sequence[Row], name: str, texts: tuple[str, str, str], of_table: str
) -> ReportFigure | None:
    """Draw rows. texts: the title, the content, and the difference that is drawn."""
    if not any(row.effect.differences for row in rows):
        return None
    heading, what, difference = texts
    study = result.comparison
    title, unit = name_and_unit(study.primary.metric)
    figure = new_figure(1.5 + 0.55 * len(rows))
    axes = figure.subplots()
    axes.axvline(0.0, color=INK, linewidth=1.2)
    for place, row in enumerate(rows):
        _draw_row(axes, place, row.effect, row.look)
        word = "\n".join(dict.fromkeys([row.effect.text, *row.lost]))
        axes.annotate(word, (1.01, place), xycoords=("axes fraction", "data"), va="center", weight="bold")
    axes.set_yticks(range(len(rows)), [wrap(row.name, LETTERS_OF_ROW) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    side = "left" if study.primary.direction == "lower" else "right"
    below = f"{title}, {difference}{f' ({unit})' if unit else ''}; {side} of 0 is better"
    axes.set_xlabel(wrap(below, _LETTERS_BELOW))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    level = f"{100 * (1 - study.decide.alpha):g} %"
    axes.set_title(f"{_CENTRES[study.decide.test]} and {level} interval; small circles: single seeds", fontsize=10)
    alt = f"Forest plot of the {what} on {title}. " + " ".join(map(_sentence, rows))
    return render_figure(figure, name, heading, alt, _table(rows, study.seeds, f"{of_table}, {difference}"))


def _draw_row(axes: Axes, row: int, effect: Effect, look: Look) -> None:
    if effect.centre is None:
        return
    if effect.interval is not None:
        ends = (effect.interval.low, effect.interval.high)
        axes.plot(ends, (row, row), color=look.colour, linewidth=2)
        for end in ends:
            axes.plot((end, end), (row - 0.12, row + 0.12), color=look.colour, linewidth=2)
    axes.plot([effect.centre], [row], marker=look.marker, markersize=9, color=look.colour)
    below = [row + 0.28] * len(effect.differences)
    axes.plot(effect.differences, below, "o", markersize=4.5, markerfacecolor=GROUND, color=look.colour)


def _sentence(row: Row) -> str:
    effect = row.effect
    if effect.centre is None:
        return f"{row.name}: {effect.note}."
    interval = f" {format_interval(effect.interval)}" if effect.interval else ""
    return f"{row.name}: {format_signed(effect.centre)}{interval}, {effect.text}."


def _table(rows: Sequence[Row], seeds: Sequence[int], title: str) -> Table:
    """Return the differences by seed; the main table has means and intervals."""
    cells = []
    for row in rows:
        by_seed = dict(zip(row.effect.seeds, row.effect.differences, strict=True))
        cells.append((row.name, *(format_signed(by_seed[s]) if s in by_seed else NOTHING for s in seeds)))
    return Table(title, ("", *(f"seed {s}" for s in seeds)), tuple(cells))
