"""Draws the primary metric over steps, and below it the arms' differences from the baseline.

Above: mean and range over seeds, from the untrained model on. Below: differences paired by seed, mean and t interval
over seeds, with a line at 0. Means are over runs that did not fail; a failed run is a thin line of its own, with a
cross where it diverged and a star where it ended without having learned. A bar stands where the study's rule stopped a
run. Of many arms the baseline alone has a band.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import ArmResult, StudyResult
from lightning_moevlm.study.report.figures.report_figure import (
    INK,
    Look,
    ReportFigure,
    axis_label,
    choose_looks,
    legend_columns,
    new_figure,
    render_figure,
)
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_interval, format_signed
from lightning_moevlm.study.run.ledger import Status
from lightning_moevlm.study.statistics.intervals import Interval, t_interval

_FEWEST_LATE_STEPS = 3  # of fewer points the second half shows nothing that the whole does not
_MANY_BANDS = 8  # more hide each other and the lines
_MANY_STEPS = 10  # a table shows at most about so many

Column = Mapping[int, Mapping[int, float]]
"""Finite values by step, then seed."""


class Point(NamedTuple):
    """A mean at one step, with the ends of what is drawn around it."""

    step: int
    mean: float
    low: float
    high: float


def draw_curves(result: StudyResult) -> ReportFigure | None:
    """Draw the whole training left and its second half enlarged right, if it has points enough; None without any."""
    metric = result.comparison.primary.metric
    title, unit = name_and_unit(metric)
    baseline, alpha = result.comparison.baseline, result.comparison.decide.alpha
    columns = {arm.arm.name: group_by_step(arm, metric) for arm in result.arms}
    apart = {
        name: _subtract(column, columns[baseline]) for name, column in columns.items() if name != baseline and column
    }
    apart = {name: column for name, column in apart.items() if column}
    steps = sorted({step for column in columns.values() for step in column})
    if not steps:
        return None
    look = choose_looks(tuple(columns), baseline)
    names_per_line = legend_columns(tuple(columns))
    figure = new_figure((5.6 if apart else 3.5) + 0.22 * -(-len(columns) // names_per_line))
    half = steps[-1] / 2
    num_panels = 2 if sum(step >= half for step in steps) >= _FEWEST_LATE_STEPS else 1
    grid = figure.subplots(2 if apart else 1, num_panels, squeeze=False, sharex="col")
    few = len(columns) <= _MANY_BANDS
    for above, since in zip(grid[0], (0.0, half), strict=False):
        for arm in result.arms:
            name = arm.arm.name
            points = _spread(columns[name], _range, since)
            _draw(above, points, look[name], name, name == baseline, has_band=few or name == baseline)
            _draw_failed(above, arm, metric, look[name], since, name if not points else "")
            _mark_ends(above, arm, metric, look[name], since)
        above.set_title("from the untrained model (first point)" if not since else "second half, enlarged", fontsize=10)
    for below, since in zip(grid[1] if apart else (), (0.0, half), strict=False):
        below.axhline(0.0, color=INK, linewidth=1.2)
        for name, column in apart.items():
            points = _spread(column, lambda values: _interval_ends(values, alpha), since)
            _draw(below, points, look[name], name, False, has_band=few)
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("optimiser steps")
    grid[0][0].set_ylabel(axis_label(title, unit))
    if apart:
        around = f", {_level(alpha)} interval" if few else ""
        grid[1][0].set_ylabel(f"arm minus {baseline}\n(mean{around})")
    handles, names = grid[0][0].get_legend_handles_labels()
    for text, marker in _marks(result):
        handles.append(Line2D([], [], linestyle="none", marker=marker, markersize=10, markeredgewidth=2.5, color=INK))
        names.append(text)
    figure.legend(handles, names, loc="outside lower center", ncols=legend_columns(names), frameon=False)
    heading, alt = f"{title[0].upper()}{title[1:]} over training", _describe(result, title, columns, apart, few)
    return render_figure(figure, "curves", heading, alt, _table(result, columns, apart, steps))


def _describe(
    result: StudyResult, title: str, columns: Mapping[str, Column], apart: Mapping[str, Column], few: bool
) -> str:
    """Return the figure in words. few: whether every arm has a band."""
    bands = "bands" if few else "the baseline's band"
    alt = (
        f"Line plots over optimiser steps. Above, {title} of {len(columns)} arms: lines are means over the runs of "
        f"{len(result.comparison.seeds)} seeds that did not fail, {bands} their range. "
        + " ".join(_sentence(name, column) for name, column in columns.items() if column)
    )
    if apart:
        alpha = result.comparison.decide.alpha
        around = f", with {_level(alpha)} intervals" if few else ""
        alt += f" Below, differences from {result.comparison.baseline}, paired by seed{around}. " + " ".join(
            f"{name} ends at {_format_difference(column[max(column)], alpha)}." for name, column in apart.items()
        )
    return alt


def _level(alpha: float) -> str:
    return f"{100 * (1 - alpha):g} %"


def group_by_step(arm: ArmResult, metric: str) -> Column:
    """Return the finite values at each step of all seeds whose run did not fail."""
    column: dict[int, dict[int, float]] = {}
    for run in arm.runs:
        if run.state.status.is_failed_result:
            continue
        series = run.series.get(metric)
        for step, value in zip(series.steps, series.values, strict=True) if series else ():
            if math.isfinite(value):
                column.setdefault(step, {})[run.seed] = value
    return dict(sorted(column.items()))


def _subtract(arm: Column, baseline: Column) -> Column:
    """Return the differences of each step, of the seeds that have both."""
    apart = {
        step: {seed: value - baseline[step][seed] for seed, value in values.items() if seed in baseline[step]}
        for step, values in arm.items()
        if step in baseline
    }
    return {step: values for step, values in apart.items() if values}


def _spread(column: Column, find_ends: Callable[[tuple[float, ...]], tuple[float, float]], since: float) -> list[Point]:
    points = [(step, tuple(values.values())) for step, values in column.items() if step >= since]
    return [Point(step, float(np.mean(values)), *find_ends(values)) for step, values in points]


def _range(values: tuple[float, ...]) -> tuple[float, float]:
    return min(values), max(values)


def _interval_ends(values: tuple[float, ...], alpha: float) -> tuple[float, float]:
    interval = t_interval(values, alpha)
    return (math.nan, math.nan) if interval is None else (interval.low, interval.high)


def _draw(axes: Axes, points: list[Point], look: Look, name: str, is_baseline: bool, has_band: bool) -> None:
    if not points:
        return
    steps = [point.step for point in points]
    # The baseline is thick and below, so that an arm that runs upon it shows as a line within a line.
    place, width = (2, 4.0) if is_baseline else (3, 1.6)
    means = [point.mean for point in points]
    axes.plot(
        steps, means, color=look.colour, marker=look.marker, markersize=5, markevery=max(1, len(steps) // 10),
        label=name, linewidth=width, zorder=place,
    )  # fmt: skip
    if has_band:
        low, high = [point.low for point in points], [point.high for point in points]
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.14, linewidth=0)


def _draw_failed(axes: Axes, arm: ArmResult, metric: str, look: Look, since: float, name: str) -> None:
    """Draw each failed run as a thin line. name: for the legend, of an arm without a line of its mean; else empty."""
    for run in arm.runs:
        series = run.series.get(metric) if run.state.status.is_failed_result else None
        pairs = [(step, value) for step, value in zip(*series, strict=True) if step >= since] if series else []
        finite = [pair for pair in pairs if math.isfinite(pair[1])]
        if len(finite) > 1:
            label = f"{name} (every run failed)" if name else None
            axes.plot(
                *zip(*finite, strict=True), color=look.colour, linewidth=0.9, linestyle=":", zorder=3, label=label
            )
            name = ""


def _marks(result: StudyResult) -> list[tuple[str, str]]:
    """Return meaning and marker of the marks at ends of curves that the study has."""
    statuses = {run.state.status for arm in result.arms for run in arm.runs}
    marks = (
        (Status.DIVERGED, "a run diverged", "x"),
        (Status.DID_NOT_LEARN, "a run did not learn", "*"),
        (Status.STOPPED, "a run was stopped early", "|"),
    )
    return [(text, marker) for status, text, marker in marks if status in statuses]


def _mark_ends(axes: Axes, arm: ArmResult, metric: str, look: Look, since: float) -> None:
    """Mark the last number of a run that diverged, did not learn, or was stopped by the study's rule."""
    for run in arm.runs:
        series = run.series.get(metric)
        pairs = list(zip(series.steps, series.values, strict=True)) if series else []
        finite = [(step, value) for step, value in pairs if math.isfinite(value)]
        if not finite or finite[-1][0] < since:
            continue
        if len(finite) < len(pairs) or run.state.status is Status.DIVERGED:
            axes.plot(*finite[-1], marker="x", markersize=10, markeredgewidth=2.5, color=look.colour, zorder=4)
        elif run.state.status is Status.DID_NOT_LEARN:
            axes.plot(*finite[-1], marker="*", markersize=11, color=look.colour, zorder=4)
        elif run.state.status is Status.STOPPED:
            axes.plot(*finite[-1], marker="|", markersize=12, markeredgewidth=2.5, color=look.colour, zorder=4)


def _sentence(name: str, column: Column) -> str:
    first, last = (float(np.mean(list(column[step].values()))) for step in (min(column), max(column)))
    return f"{name} goes from {first:.3f} to {last:.3f}."


def _format_difference(values: Mapping[int, float], alpha: float) -> str:
    differences = tuple(values.values())
    interval: Interval | None = t_interval(differences, alpha)
    mean = format_signed(float(np.mean(differences)))
    return mean if interval is None else f"{mean} {format_interval(interval)}"


def _table(result: StudyResult, columns: Mapping[str, Column], apart: Mapping[str, Column], steps: list[int]) -> Table:
    title, unit = name_and_unit(result.comparison.primary.metric)
    baseline, alpha = result.comparison.baseline, result.comparison.decide.alpha
    every = max(1, math.ceil(len(steps) / _MANY_STEPS))
    shown = sorted({*steps[::every], steps[-1]})
    means = tuple((name, *(_format_mean(column.get(step)) for step in shown)) for name, column in columns.items())
    differences = tuple(
        (
            f"{name} minus {baseline}",
            *(_format_difference(column[step], alpha) if step in column else NOTHING for step in shown),
        )
        for name, column in apart.items()
    )
    notes = (
        f"minus {baseline}: mean and {100 * (1 - alpha):g} % t interval over seeds of the differences within a seed; "
        "intervals of single steps are not corrected for the number of steps.",
    )
    heading = f"{title} ({unit})" if unit else title
    table_columns = ("arm", *(f"step {step}" for step in shown))
    return Table(
        f"{heading}, mean over seeds whose run did not fail",
        table_columns,
        means + differences,
        notes if differences else (),
    )


def _format_mean(values: Mapping[int, float] | None) -> str:
    return f"{float(np.mean(list(values.values()))):.4f}" if values else NOTHING
