"""Draws expert load over training: one heatmap (experts x steps) per arm, block and modality, on one colour scale.

Experts have no identity across seeds, so seeds are not averaged: the first seed with data is shown.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.compare.results import ArmResult, RunResult, StudyResult
from lightning_moevlm.study.report.figures.report_figure import ReportFigure, new_figure, render_figure, wrap
from lightning_moevlm.study.report.figures.unfinished_runs import describe_unfinished_runs
from lightning_moevlm.study.report.tables.table import Table, format_percent

Layer = tuple[int, str]  # block, modality


class Load(NamedTuple):
    """Load of one layer over time."""

    steps: tuple[int, ...]
    shares: np.ndarray
    """Experts x steps, fraction of kept pairs."""


_MANY_TICKS = 8
_ARMS_BESIDE = 5  # more are illegible: they go below, in bands
_LETTERS_ABOVE = 18  # of an arm's name above its panels
_PANEL_INCHES, _PANEL_INCHES_IN_BANDS = 1.3, 0.62  # so that 20 arms with four layers fit on a page
_TITLE_INCHES = 0.45


def draw_expert_load(result: StudyResult) -> ReportFigure | None:
    """Draw the heatmaps; None if no arm has experts."""
    shown = [(arm, run) for arm in result.arms if (run := find_run_with_load(arm)) is not None]
    layers = sorted({layer for _, run in shown for layer in read_loads(run)})
    if not layers:
        return None
    num_columns = min(len(shown), _ARMS_BESIDE)
    num_bands = -(-len(shown) // num_columns)
    inches = _PANEL_INCHES if num_bands == 1 else _PANEL_INCHES_IN_BANDS
    figure = new_figure(max(2.8, inches * len(layers) * num_bands + _TITLE_INCHES * (num_bands - 1) + 1.2))
    grid = figure.subplots(len(layers) * num_bands, num_columns, squeeze=False, sharex=True)
    empty = grid[-len(layers) :, len(shown) - num_columns * (num_bands - 1) :]
    for axes in empty.flat:
        axes.remove()
    for axes in grid[-len(layers) - 1, num_columns - empty.shape[1] :] if num_bands > 1 else ():
        axes.tick_params(labelbottom=True)  # nothing stands below
    relative = {run.name: _relative(read_loads(run)) for _, run in shown}
    highest = max(float(np.nanmax(load)) for loads in relative.values() for _, load in loads.values())
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, highest))
    expert = " expert" if num_bands == 1 else ""  # low panels have no room for the word
    image: AxesImage | None = None
    for place, (arm, run) in enumerate(shown):
        band, column = divmod(place, num_columns)
        loads = relative[run.name]
        for row, layer in enumerate(layers):
            axes = grid[band * len(layers) + row][column]
            if layer in loads:
                image = _draw(axes, *loads[layer], norm)
            else:
                axes.text(0.5, 0.5, "no experts", ha="center", va="center", transform=axes.transAxes)
            if row == 0:
                axes.set_title(_heading(arm, run), fontsize=9 if num_bands == 1 else 8)
            if column == 0:
                axes.set_ylabel(f"block {layer[0]}\n{layer[1]}{expert}", fontsize=9 if num_bands == 1 else 7)
            axes.tick_params(labelsize=8, labelleft=column == 0)
    budgets = [run.max_steps for _, run in shown if run.max_steps is not None]
    if budgets:  # else the clock ends the runs
        grid[0][0].set_xlim(0, max(budgets))
    grid[0][0].xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))  # shared by all panels
    figure.supxlabel("optimiser steps", fontsize=10)
    if num_bands > 1:
        figure.supylabel("expert, by block and modality", fontsize=10)
    assert image is not None
    bar = figure.colorbar(image, ax=list(figure.axes), shrink=0.9, aspect=30, pad=0.01)
    bar.set_label("expert load / even load  (1 = even, 0 = idle)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    missing = _missing(result, shown)
    title = "Expert load by block and modality" + (f" (nothing to show for {', '.join(missing)})" if missing else "")
    return render_figure(figure, "expert_load", title, _sentence(shown, missing), _table(shown))


def _heading(arm: ArmResult, run: RunResult) -> str:
    """Return the heading of an arm's panels: its name, the seed that is shown, and its lost runs."""
    lost = [f"({text})" for text in describe_unfinished_runs(arm)]
    return "\n".join([wrap(arm.arm.name, _LETTERS_ABOVE), f"seed {run.seed}", *lost])


def _missing(result: StudyResult, shown: list[tuple[ArmResult, RunResult]]) -> list[str]:
    drawn = {arm.arm.name for arm, _ in shown}
    return [arm.arm.name for arm in result.arms if arm.arm.name not in drawn]


def _sentence(shown: list[tuple[ArmResult, RunResult]], missing: list[str]) -> str:
    ends = []
    for arm, run in shown:
        last = {layer: float(np.nanmax(load[:, -1])) for layer, (_, load) in read_loads(run).items()}
        (block, modality), share = max(last.items(), key=lambda item: item[1])
        over_seeds = _format_range(_fullest_by_seed(arm)[block, modality])
        ends.append(
            f"{arm.arm.name}: at the end the fullest expert takes {format_percent(share)} (block {block}, {modality}; "
            f"{over_seeds} over seeds)."
        )
    return (
        "Heatmaps of expert load over optimiser steps, one row of cells per expert, red above and blue below the even "
        f"share, one column of panels per arm. {' '.join(ends)}"
        + (f" Not shown, for want of experts or data: {', '.join(missing)}." if missing else "")
    )


def read_loads(run: RunResult) -> dict[Layer, Load]:
    """Return steps and load (experts x steps, fraction of kept pairs) of every layer of a run."""
    series: dict[Layer, dict[int, str]] = {}
    for key in run.series:
        parts = metric_keys.EXPERT_LOAD.match(key)
        if parts:
            series.setdefault((int(parts["block"]), parts["modality"]), {})[int(parts["expert"])] = key
    loads = {}
    for layer, by_expert in series.items():
        steps = run.series[by_expert[0]].steps
        load = np.full((len(by_expert), len(steps)), np.nan)
        place = {step: column for column, step in enumerate(steps)}
        for expert, key in by_expert.items():
            for step, value in zip(*run.series[key], strict=True):
                if step in place:
                    load[expert, place[step]] = value
        loads[layer] = Load(steps, load)
    return loads


def _relative(loads: dict[Layer, Load]) -> dict[Layer, Load]:
    """Return loads as multiples of the even share, so that layers of different widths can be compared."""
    return {layer: Load(steps, shares * len(shares)) for layer, (steps, shares) in loads.items()}


def _draw(axes: Axes, steps: tuple[int, ...], load: np.ndarray, norm: TwoSlopeNorm) -> AxesImage:
    axes.set_facecolor("#bbbbbb")  # where there is no number
    last = steps[-1] if len(steps) > 1 else steps[0] + 1
    extent = (steps[0], last, -0.5, load.shape[0] - 0.5)
    image = axes.imshow(
        load, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest", origin="lower", extent=extent
    )
    axes.set_yticks(range(0, load.shape[0], max(1, 2 * load.shape[0] // _MANY_TICKS)))
    return image


def find_run_with_load(arm: ArmResult) -> RunResult | None:
    """Return the first run with load; runs with a result come first."""
    loaded = [run for run in arm.runs if any(metric_keys.EXPERT_LOAD.match(key) for key in run.series)]
    return min(loaded, key=lambda run: (not run.state.status.has_result, run.seed), default=None)


def _table(shown: list[tuple[ArmResult, RunResult]]) -> Table:
    rows = []
    for arm, run in shown:
        fullest = _fullest_by_seed(arm)
        for layer, (_, load) in sorted(read_loads(run).items()):
            last = load[:, -1]
            shares = ", ".join(format_percent(float(value)) for value in last)
            cells = (_format_range(fullest[layer]), format_percent(float(last.min())), shares)
            rows.append((arm.arm.name, f"block {layer[0]}", layer[1], format_percent(float(last.max())), *cells))
    columns = ("arm", "block", "modality", "fullest", "fullest, all seeds", "emptiest", "all experts in order")
    notes = (
        "of the seed that is shown; all seeds: the least and the greatest share of the fullest expert over seeds.",
    )
    return Table("Expert load at the last logged step, share of kept pairs", columns, tuple(rows), notes)


def _fullest_by_seed(arm: ArmResult) -> dict[Layer, list[float]]:
    """Return the fullest expert's share at the last logged step of each layer, one number per run."""
    shares: dict[Layer, list[float]] = {}
    for run in arm.runs:
        for layer, (_, load) in read_loads(run).items():
            shares.setdefault(layer, []).append(float(np.nanmax(load[:, -1])))
    return shares


def _format_range(shares: list[float]) -> str:
    return f"{format_percent(min(shares))} to {format_percent(max(shares))}"
