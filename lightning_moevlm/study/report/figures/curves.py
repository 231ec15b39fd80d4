"""Learning curves: the primary metric over steps, mean and range over seeds, from the untrained model on.

A cross stands where a run diverged, a bar where the study's rule stopped one. Of many arms the baseline alone has a
band.
"""

import math

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.report.figures.report_figure import (
    INK,
    Look,
    ReportFigure,
    choose_looks,
    legend_columns,
    new_figure,
    render_figure,
)
from lightning_moevlm.study.report.tables.table import NOTHING, Table
from lightning_moevlm.study.run.ledger import Status

_FEWEST_LATE_STEPS = 3  # of fewer points the second half shows nothing that the whole does not
_MANY_BANDS = 8  # more hide each other and the lines
_MANY_STEPS = 10  # a table shows at most about so many


def draw_curves(result: StudyResult) -> ReportFigure | None:
    """Draw the whole training left and its second half enlarged right, if it has points enough; None without any."""
    metric = result.comparison.primary.metric
    title, unit = name_and_unit(metric)
    columns = {arm.arm.name: group_by_step(arm, metric) for arm in result.arms}
    steps = sorted({step for column in columns.values() for step in column})
    if not steps:
        return None
    look = choose_looks(tuple(columns), result.comparison.baseline)
    figure = new_figure(3.5 + 0.22 * -(-len(columns) // legend_columns(tuple(columns))))
    half = steps[-1] / 2
    num_panels = 2 if sum(step >= half for step in steps) >= _FEWEST_LATE_STEPS else 1
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    whole = panels[0]
    for arm in result.arms:
        name = arm.arm.name
        is_baseline = name == result.comparison.baseline
        has_band = is_baseline or len(columns) <= _MANY_BANDS
        _draw(whole, columns[name], look[name], name, is_baseline, has_band)
        _mark_ends(whole, arm, metric, look[name])
        for late in panels[1:]:
            _draw(late, {s: v for s, v in columns[name].items() if s >= half}, look[name], name, is_baseline, has_band)
            _mark_ends(late, arm, metric, look[name], half)
    whole.set_title("from the untrained model (first point)", fontsize=10)
    for late in panels[1:]:
        late.set_title("second half, enlarged", fontsize=10)
    for axes in panels:
        axes.set_xlabel("optimiser steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    whole.set_ylabel(f"{title}\n({unit})" if unit else title)
    handles, names = whole.get_legend_handles_labels()
    for told, marker in _marks(result):
        handles.append(Line2D([], [], linestyle="none", marker=marker, markersize=10, markeredgewidth=2.5, color=INK))
        names.append(told)
    figure.legend(handles, names, loc="outside lower center", ncols=legend_columns(names), frameon=False)
    num_seeds = len(result.comparison.seeds)
    alt = (
        f"Line plot of {title} over optimiser steps for {len(columns)} arms; lines are means over "
        f"{num_seeds} seeds, bands {'' if len(columns) <= _MANY_BANDS else '(of the baseline alone) '}their range. "
        + " ".join(_sentence(name, column) for name, column in columns.items() if column)
    )
    heading = f"{title[0].upper()}{title[1:]} over training"
    return render_figure(figure, "curves", heading, alt, _table(columns, steps, title, unit))


def group_by_step(arm: ArmResult, metric: str) -> dict[int, list[float]]:
    """Return the finite values of all seeds at each step."""
    column: dict[int, list[float]] = {}
    for run in arm.runs:
        series = run.series.get(metric)
        for step, value in zip(series.steps, series.values, strict=True) if series else ():
            if math.isfinite(value):
                column.setdefault(step, []).append(value)
    return dict(sorted(column.items()))


def _draw(axes: Axes, column: dict[int, list[float]], look: Look, name: str, is_baseline: bool, has_band: bool) -> None:
    if not column:
        return
    steps = list(column)
    means = [sum(values) / len(values) for values in column.values()]
    every = max(1, len(steps) // 10)
    # The baseline is thick and below, so that an arm that runs upon it shows as a line within a line.
    place, width = (2, 4.0) if is_baseline else (3, 1.6)
    axes.plot(
        steps,
        means,
        color=look.colour,
        marker=look.marker,
        markersize=5,
        markevery=every,
        label=name,
        linewidth=width,
        zorder=place,
    )
    if not has_band:
        return
    low, high = [min(v) for v in column.values()], [max(v) for v in column.values()]
    axes.fill_between(steps, low, high, color=look.colour, alpha=0.12, linewidth=0)


def _marks(result: StudyResult) -> list[tuple[str, str]]:
    """Return what the marks at ends of curves mean, of those that the study has, and the marks."""
    statuses = {run.state.status for arm in result.arms for run in arm.runs}
    marks = ((Status.DIVERGED, "a run diverged", "x"), (Status.STOPPED, "a run was stopped early", "|"))
    return [(told, marker) for status, told, marker in marks if status in statuses]


def _mark_ends(axes: Axes, arm: ArmResult, metric: str, look: Look, since: float = 0.0) -> None:
    """Put a cross at the last number of a run that diverged, and a bar where the study's rule stopped it."""
    for run in arm.runs:
        series = run.series.get(metric)
        pairs = list(zip(series.steps, series.values, strict=True)) if series else []
        finite = [(step, value) for step, value in pairs if math.isfinite(value)]
        if not finite or finite[-1][0] < since:
            continue
        if len(finite) < len(pairs) or run.state.status is Status.DIVERGED:
            axes.plot(*finite[-1], marker="x", markersize=10, markeredgewidth=2.5, color=look.colour, zorder=4)
        elif run.state.status is Status.STOPPED:
            axes.plot(*finite[-1], marker="|", markersize=12, markeredgewidth=2.5, color=look.colour, zorder=4)


def _sentence(name: str, column: dict[int, list[float]]) -> str:
    first, last = next(iter(column.values())), list(column.values())[-1]
    return f"{name} goes from {sum(first) / len(first):.3f} to {sum(last) / len(last):.3f}."


def _table(columns: dict[str, dict[int, list[float]]], steps: list[int], title: str, unit: str) -> Table:
    every = max(1, math.ceil(len(steps) / _MANY_STEPS))
    shown = sorted({*steps[::every], steps[-1]})
    rows = tuple((name, *(_mean(column.get(step, [])) for step in shown)) for name, column in columns.items())
    return Table(f"{title} ({unit}), mean over seeds", ("arm", *(f"step {step}" for step in shown)), rows)


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else NOTHING
