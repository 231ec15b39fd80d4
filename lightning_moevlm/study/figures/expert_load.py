"""Expert load over training: one heatmap (experts x steps) per arm, block and modality, all on one colour scale.

Experts have no identity across seeds, so seeds are not averaged: the first seed with data is shown.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from lightning_moevlm import keys
from lightning_moevlm.study.figures.picture import Picture, new_figure, png_of
from lightning_moevlm.study.results import ArmResult, RunResult, StudyResult
from lightning_moevlm.study.tables import Table, percent

Layer = tuple[int, str]  # block, modality
_MANY_TICKS = 8


def draw_expert_load(result: StudyResult) -> Picture | None:
    """Draw it; None where no arm has experts."""
    shown = [(arm, run) for arm in result.arms if (run := _first_with_load(arm)) is not None]
    layers = sorted({layer for _, run in shown for layer in loads_of(run)})
    if not layers:
        return None
    figure = new_figure(max(2.6, 1.35 * len(layers) + 1.2))
    grid = figure.subplots(len(layers), len(shown), squeeze=False, sharex=True)
    highest = max(float(np.nanmax(load)) for _, run in shown for _, load in loads_of(run).values())
    image: AxesImage | None = None
    for column, (arm, run) in enumerate(shown):
        loads = loads_of(run)
        for row, layer in enumerate(layers):
            axes = grid[row][column]
            if layer in loads:
                image = _draw(axes, *loads[layer], highest)
            else:
                axes.text(0.5, 0.5, "no experts", ha="center", va="center", transform=axes.transAxes)
            if row == 0:
                axes.set_title(f"{arm.arm.name}\nseed {run.run.seed}", fontsize=9)
            if row == len(layers) - 1:
                axes.set_xlabel("optimiser steps", fontsize=9)
            if column == 0:
                axes.set_ylabel(f"block {layer[0]}\n{layer[1]} expert", fontsize=9)
            axes.tick_params(labelsize=8)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, shrink=0.9, aspect=30, pad=0.01)
    experts = {load.shape[0] for _, run in shown for _, load in loads_of(run).values()}
    uniform = 1 / experts.pop() if len(experts) == 1 else None
    bar.set_label(
        "share of kept token-expert pairs" + (f"\n(line: even load {uniform:.3f})" if uniform else ""),
        fontsize=9,
    )
    if uniform is not None:
        bar.ax.axhline(uniform, color="white", linewidth=2)
    table = _table(shown)
    drawn = {arm.arm.name for arm, _ in shown}
    missing = [arm.arm.name for arm in result.arms if arm.arm.name not in drawn]
    ends = ", ".join(
        f"{fullest} ({arm}, {block}, {modality})" for arm, block, modality, fullest, *_ in table.rows
    )
    alt = (
        f"Heatmaps of expert load over steps for {len(shown)} arms and {len(layers)} layers; one row per expert, "
        f"brighter is more load. At the end the fullest expert holds {ends}."
        + (f" Not shown, for want of experts or data: {', '.join(missing)}." if missing else "")
    )
    return Picture("expert_load", "Expert load by block and modality", alt, png_of(figure), table)


def loads_of(run: RunResult) -> dict[Layer, tuple[tuple[int, ...], np.ndarray]]:
    """Return steps and load (experts x steps, fraction of kept pairs) of every layer of a run."""
    series: dict[Layer, dict[int, str]] = {}
    for key in run.series:
        parts = keys.EXPERT_LOAD.match(key)
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
        loads[layer] = (steps, load)
    return loads


def _draw(axes: Axes, steps: tuple[int, ...], load: np.ndarray, highest: float) -> AxesImage:
    image = axes.imshow(
        load, aspect="auto", cmap="cividis", vmin=0.0, vmax=highest, interpolation="nearest", origin="lower",
        extent=(steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1, -0.5, load.shape[0] - 0.5),
    )  # fmt: skip
    axes.set_yticks(
        range(0, load.shape[0], max(1, load.shape[0] // _MANY_TICKS) * (2 if load.shape[0] > 4 else 1))
    )
    return image


def _first_with_load(arm: ArmResult) -> RunResult | None:
    return next((run for run in arm.runs if any(keys.EXPERT_LOAD.match(key) for key in run.series)), None)


def _table(shown: list[tuple[ArmResult, RunResult]]) -> Table:
    rows = []
    for arm, run in shown:
        for (block, modality), (_, load) in sorted(loads_of(run).items()):
            last = load[:, -1]
            shares = ", ".join(percent(float(value)) for value in last)
            extremes = (percent(float(last.max())), percent(float(last.min())))
            rows.append((arm.arm.name, f"block {block}", modality, *extremes, shares))
    columns = ("arm", "block", "modality", "fullest", "emptiest", "all experts in order")
    return Table("Expert load at the last logged step, share of kept pairs", columns, tuple(rows))
