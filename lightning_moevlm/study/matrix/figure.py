"""Draws the matrix: a column for each illness with its damage, a row for each cure with its side effect and cost.

A cell's colour is its verdict, in colours that people with any common colour deficiency tell apart; the word is written
in it too.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_moevlm.study.matrix.records import Cell, Matrix, Row, SideEffect
from lightning_moevlm.study.matrix.tables import RECOMMENDED, share_table
from lightning_moevlm.study.matrix.texts import (
    UNPROVED,
    describe_cost,
    describe_time,
    format_share,
    format_share_interval,
)
from lightning_moevlm.study.report.figures.report_figure import (
    INK,
    ReportFigure,
    new_figure,
    render_dark,
    render_figure,
    wrap,
)
from lightning_moevlm.study.report.tables.table import format_signed
from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict
from lightning_moevlm.study.statistics.verdict import Verdict

_DARK, _LIGHT = "#111111", "#fafafa"  # letters on a coloured cell: the same whatever the page's scheme
_FILL: dict[str, tuple[str, str]] = {  # Okabe and Ito's blue and vermilion, light blue and grey between
    CureVerdict.CURES: ("#0072B2", _LIGHT),
    CureVerdict.HELPS: ("#9fd3f2", _DARK),
    CureVerdict.NONE: ("#d9d9d9", _DARK),
    CureVerdict.HARMS: ("#D55E00", _DARK),
    Verdict.HELPS: ("#9fd3f2", _DARK),
    Verdict.HURTS: ("#D55E00", _DARK),
    Verdict.NO_DIFFERENCE: ("#d9d9d9", _DARK),
}
_PLAIN = ("none", INK)  # unclear and missing: the ground of the page
_LETTERS_OF_ILLNESS = 15
_COLUMN_INCHES, _ROW_INCHES, _LEFT_INCHES, _TOP_INCHES = 1.22, 0.36, 1.7, 1.7
_STRIP_GAP = 0.15  # columns


def draw_matrix(matrix: Matrix) -> ReportFigure:
    """Draw it; cells without runs stay empty and say so."""
    with matplotlib.rc_context({"text.parse_math": False}):
        title = "Share of an illness's damage that each cure undoes"
        size = f"{len(matrix.cures)} cures and {len(matrix.rows)} illnesses"
        alt = f"Matrix of {size}. The sentences below say what each illness shows."
        return render_figure(_draw(matrix), "matrix", title, alt, share_table(matrix))


def draw_dark(matrix: Matrix) -> bytes:
    """Return a PNG of it for a dark page."""
    with matplotlib.rc_context({"text.parse_math": False}):
        return render_dark(_draw(matrix))


def _draw(matrix: Matrix) -> Figure:
    names = (*matrix.cures, *matrix.all_column)
    figure = new_figure(_TOP_INCHES + _ROW_INCHES * len(names))
    columns = len(matrix.rows) + _STRIP_GAP + len(_strips(matrix))
    figure.set_figwidth(max(8.0, _LEFT_INCHES + _COLUMN_INCHES * columns))
    axes = figure.subplots()
    axes.set_facecolor("none")
    for column, row in enumerate(matrix.rows):
        alone = row.alone()
        for place, cell in enumerate([*(alone.get(cure) for cure in matrix.cures), row.everything]):
            if cell is not None:
                is_recommended = cell.kind == "alone" and row.recommends(cell.cures[0])
                _draw_cell(axes, column, place, cell, is_recommended)
    _draw_strips(axes, matrix)
    _label(axes, matrix, names)
    return figure


def _label(axes: Axes, matrix: Matrix, names: tuple[str, ...]) -> None:
    strips = _strips(matrix)
    strip = [len(matrix.rows) + _STRIP_GAP + i for i in range(len(strips))]
    axes.set_xlim(-0.5, len(matrix.rows) + _STRIP_GAP + len(strips) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    heads = [*map(_label_illness, matrix.rows), *(strip.head for strip in strips)]
    axes.set_xticks([*range(len(matrix.rows)), *strip], heads, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "share of the damage undone, in % with its interval; k/n: stable runs, where some failed; "
        f"{RECOMMENDED}: a source recommends it;\n= and ≠: the verdict on fresh seeds agrees or differs; "
        "*: fresh seeds decide; bold: the illness is proved",
        fontsize=8,
    )
    for label, row in zip(axes.get_xticklabels(), matrix.rows, strict=False):
        label.set_fontweight("bold" if row.proved else "normal")


def _label_illness(row: Row) -> str:
    """Return illness, damage, and whether its sign leads the loss."""
    lines = [wrap(row.illness, _LETTERS_OF_ILLNESS)]
    if row.damage is None or row.damage.mean is None:
        lines.append("missing runs")
    else:
        interval = row.damage.interval
        lines.append(f"{row.damage.mean:+.2f}")
        lines += [f"[{interval.low:+.2f}, {interval.high:+.2f}]"] if interval else []
        lines += [] if row.proved else [UNPROVED]
    leads = [sign.lead for sign in row.signs if sign.lead is not None]
    if leads:
        lines.append(f"sign leads\nby {max(leads)} steps" if max(leads) > 0 else "no sign leads")
    return "\n".join(lines)


def _draw_cell(axes: Axes, column: int, place: int, cell: Cell, is_recommended: bool) -> None:
    effect = cell.decisive
    fill, ink = _PLAIN if effect is None else _FILL.get(effect.verdict, _PLAIN)
    _box(axes, column, place, fill, dashed=effect is None)
    if is_recommended:
        mark = INK if effect is None else ink
        axes.text(column + 0.45, place - 0.42, RECOMMENDED, ha="right", va="top", fontsize=8, color=mark)
    if effect is None:
        axes.text(column, place, "incomplete", ha="center", va="center", fontsize=7, style="italic", color=INK)
        return
    survived = f"  {effect.survival}" if effect.survival.failed else ""
    if effect.share is None:
        axes.text(column, place, f"–{survived}", ha="center", va="center", fontsize=8, color=ink)
        return
    mark = " *" if cell.is_decided_afresh else {True: " =", False: " ≠", None: ""}[cell.agrees]
    share = f"{format_share(effect.share.estimate)} {effect.verdict}{mark}"
    axes.text(column, place - 0.17, share, ha="center", va="center", fontsize=8.5, weight="bold", color=ink)
    interval = format_share_interval(effect.share.interval)
    axes.text(column, place + 0.24, f"{interval}{survived}", ha="center", va="center", fontsize=7, color=ink)


class _Strip(NamedTuple):
    """A column beside the illnesses: what cures do to a healthy model, or what they cost there."""

    head: str
    model: Mapping[str, SideEffect]  # by cure
    read: Callable[[SideEffect], str]
    is_effect: bool = False


def _strips(matrix: Matrix) -> list[_Strip]:
    """Return the columns; of several healthy models the side effects alone, each named by its first illness."""
    models = matrix.by_healthy_model
    if len(models) == 1:
        costs = (("time of a step", lambda one: describe_time(one.time)), ("peak memory", _describe_memory))
        effect = _Strip("healthy:\nside effect", models[0], _describe_effect, True)
        return [effect, *(_Strip(f"healthy:\n{word}", models[0], read) for word, read in costs)]
    firsts = [next(iter(model.values())).studies[0] for model in models]
    return [
        _Strip(f"healthy of\n{wrap(first, _LETTERS_OF_ILLNESS)}:\nside effect", model, _describe_effect, True)
        for first, model in zip(firsts, models, strict=True)
    ]


def _describe_effect(one: SideEffect) -> str:
    return "incomplete" if one.effect is None or one.effect.centre is None else format_signed(one.effect.centre)


def _describe_memory(one: SideEffect) -> str:
    return describe_cost(one.memory)


def _draw_strips(axes: Axes, matrix: Matrix) -> None:
    for number, strip in enumerate(_strips(matrix)):
        column = len(matrix.rows) + _STRIP_GAP + number
        for place, cure in enumerate(matrix.cures):
            one = strip.model.get(cure)
            if one is None:
                continue
            fill, ink = _FILL.get(one.effect.verdict if one.effect else "", _PLAIN)
            if strip.is_effect:
                _box(axes, column, place, fill)
            colour = ink if strip.is_effect else INK
            axes.text(column, place, strip.read(one), ha="center", va="center", fontsize=8, color=colour)


def _box(axes: Axes, column: float, place: float, fill: str, dashed: bool = False) -> None:
    style = {"linestyle": ":", "linewidth": 0.8} if dashed else {"linewidth": 0.6}
    axes.add_patch(Rectangle((column - 0.48, place - 0.46), 0.96, 0.92, facecolor=fill, edgecolor="#8a8a8a", **style))
