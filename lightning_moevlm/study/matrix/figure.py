"""Draws the matrix: illnesses with their damage as rows, cures as columns, below them each cure's side effect and cost.

A cell's colour is its verdict, in colours that people with any common colour deficiency tell apart; the word is written
in it too.
"""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from lightning_moevlm.study.matrix.records import Cell, Matrix, Row, SideEffect
from lightning_moevlm.study.matrix.tables import CLAIMED, share_table
from lightning_moevlm.study.matrix.texts import (
    UNPROVED,
    describe_cost,
    format_share,
    format_share_interval,
)
from lightning_moevlm.study.report.figures.report_figure import INK, ReportFigure, new_figure, render_figure, wrap
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
_LETTERS_OF_ILLNESS, _LETTERS_OF_CURE = 22, 12
_COLUMN_INCHES, _ROW_INCHES, _LEFT_INCHES = 0.86, 0.72, 2.4
_STRIP = ("side effect", "time of a step", "peak memory")
_STRIP_ROWS = 0.6 * len(_STRIP)  # in heights of an illness's row


def draw_matrix(matrix: Matrix) -> ReportFigure:
    """Draw it; cells without runs stay empty and say so."""
    with matplotlib.rc_context({"text.parse_math": False}):
        return _draw(matrix)


def _draw(matrix: Matrix) -> ReportFigure:
    columns = (*matrix.cures, "all")
    num_rows = len(matrix.rows)
    models = matrix.by_healthy_model
    figure = new_figure(1.7 + _ROW_INCHES * num_rows + 0.42 * len(_STRIP) * len(models))
    figure.set_figwidth(max(8.0, _LEFT_INCHES + _COLUMN_INCHES * len(columns)))
    axes = figure.subplots()
    for place, row in enumerate(matrix.rows):
        alone = row.alone()
        everything = next((cell for cell in row.cells if cell.kind == "all"), None)
        for column, cell in enumerate([*(alone.get(cure) for cure in matrix.cures), everything]):
            if cell is not None:
                is_claimed = cell.kind == "alone" and row.is_claimed(cell.cures[0])
                _draw_cell(axes, column, place, cell, is_claimed)
    for number, model in enumerate(models):
        _draw_strip(axes, matrix.cures, model, num_rows + number * _STRIP_ROWS)
    _label(axes, matrix, columns)
    title = "Share of an illness's damage that each cure undoes"
    alt = f"Matrix of {num_rows} illnesses and {len(matrix.cures)} cures. The sentences below say what each row shows."
    return render_figure(figure, "matrix", title, alt, share_table(matrix))


def _label(axes: Axes, matrix: Matrix, columns: tuple[str, ...]) -> None:
    num_rows = len(matrix.rows)
    models = matrix.by_healthy_model
    bottom = num_rows + 0.25 + _STRIP_ROWS * len(models)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(bottom - 0.5, -0.5)
    names = [wrap(name, _LETTERS_OF_CURE) for name in columns]
    axes.set_xticks(
        range(len(columns)),
        names,
        rotation=0 if len(columns) <= 8 else 40,
        ha="center" if len(columns) <= 8 else "left",
    )
    axes.xaxis.tick_top()
    strip = [num_rows + 0.05 + 0.6 * i for i in range(len(_STRIP) * len(models))]
    axes.set_yticks([*range(num_rows), *strip], [*map(_label_row, matrix.rows), *_label_strips(models)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "share of the damage undone, in % with its interval; k/n: stable runs, where some failed; "
        f"{CLAIMED}: a source claims it;\n= and ≠: the verdict on fresh seeds agrees or differs; bold: the illness is "
        "proved",
        fontsize=9,
    )
    for label, row in zip(axes.get_yticklabels(), matrix.rows, strict=False):
        label.set_fontweight("bold" if row.proved else "normal")
        label.set_fontsize(9)


def _label_strips(models: Sequence[Mapping[str, SideEffect]]) -> list[str]:
    """Return the labels of the strips; of several healthy models, each is named by the first of its illnesses."""
    firsts = [next(iter(model.values())).studies[0] for model in models]
    names = ["healthy"] if len(models) == 1 else [f"healthy of {first}" for first in firsts]
    return [f"{name}: {word}" for name in names for word in _STRIP]


def _label_row(row: Row) -> str:
    """Return illness, damage, and whether its sign leads the loss."""
    lines = [wrap(row.illness, _LETTERS_OF_ILLNESS)]
    if row.damage is None or row.damage.mean is None:
        lines.append("missing runs")
    else:
        interval = row.damage.interval
        size = f"{row.damage.mean:+.3g}" + (f" [{interval.low:+.3g}, {interval.high:+.3g}]" if interval else "")
        lines.append(size if row.proved else f"{size}\n{UNPROVED}")
    leads = [sign.lead for sign in row.signs if sign.lead is not None]
    if leads:
        lines.append(f"sign leads by {max(leads)} steps" if max(leads) > 0 else "no sign leads")
    return "\n".join(lines)


def _draw_cell(axes: Axes, column: int, place: int, cell: Cell, is_claimed: bool) -> None:
    effect = cell.effect
    fill, ink = _PLAIN if effect is None else _FILL.get(effect.verdict, _PLAIN)
    _box(axes, column, place, 1.0, fill, dashed=effect is None)
    if is_claimed:
        mark = INK if effect is None else ink
        axes.text(column + 0.46, place - 0.44, CLAIMED, ha="right", va="top", fontsize=9, color=mark)
    if effect is None:
        axes.text(column, place, "incomplete", ha="center", va="center", fontsize=7, style="italic", color=INK)
        return
    if effect.share is None:
        axes.text(column, place, "–", ha="center", va="center", fontsize=9, color=ink)
        return
    marks = {True: " =", False: " ≠", None: ""}[cell.agrees]
    axes.text(
        column,
        place - 0.22,
        format_share(effect.share) + marks,
        ha="center",
        va="center",
        fontsize=10,
        weight="bold",
        color=ink,
    )
    if effect.interval is not None:
        axes.text(
            column,
            place + 0.05,
            format_share_interval(effect.interval),
            ha="center",
            va="center",
            fontsize=7,
            color=ink,
        )
    survived = f" {effect.survival}" if effect.survival.failed else ""
    axes.text(column, place + 0.28, f"{effect.verdict}{survived}", ha="center", va="center", fontsize=7.5, color=ink)


def _draw_strip(axes: Axes, cures: Sequence[str], model: Mapping[str, SideEffect], top: float) -> None:
    """Draw what each cure does to one healthy model, and its cost."""
    for column, cure in enumerate(cures):
        one = model.get(cure)
        if one is None:
            continue
        verdict = one.effect.verdict if one.effect else ""
        fill, ink = _FILL.get(verdict, _PLAIN)
        _box(axes, column, top + 0.05, 0.55, fill)
        effect = "incomplete" if one.effect is None or one.effect.centre is None else format_signed(one.effect.centre)
        for i, text in enumerate((effect, describe_cost(one.time), describe_cost(one.memory))):
            axes.text(
                column,
                top + 0.05 + 0.6 * i,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color=ink if i == 0 else INK,
            )


def _box(axes: Axes, column: float, place: float, height: float, fill: str, dashed: bool = False) -> None:
    style = {"linestyle": ":", "linewidth": 0.8} if dashed else {"linewidth": 0.6}
    axes.add_patch(
        Rectangle(
            (column - 0.48, place - 0.46 * height), 0.96, 0.92 * height, facecolor=fill, edgecolor="#8a8a8a", **style
        )
    )
