"""Draws the primary metric over active FLOPs, wall time and peak memory, with the Pareto front ringed.

The front starts at the cheapest arm. A costlier arm joins it if it is shown to be better than every cheaper arm of the
front: the interval of their differences, paired by seed, excludes 0. So no two ringed arms differ by noise alone. Only
arms whose planned runs all finished are compared: a mean over the survivors of divergences is no performance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import ArmResult, Mean, StudyResult, peak_memory_of, read_values
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
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_count, format_mean
from lightning_moevlm.study.statistics.effects import pair_differences
from lightning_moevlm.study.statistics.intervals import interval_of

_LARGE = 1e5  # from here on a cost is written with a prefix: 25 M


class Cost(NamedTuple):
    """One kind of cost."""

    name: str
    unit: str
    by_arm: Mapping[str, Mean]
    """Over seeds; an arm whose cost is unknown is absent."""

    @property
    def varies(self) -> bool:
        """Whether two arms differ in it."""
        return len({mean.mean for mean in self.by_arm.values()}) > 1


def draw_pareto(result: StudyResult) -> ReportFigure | None:
    """Draw the metric over each cost that varies; None where fewer than two arms have finished or no cost varies."""
    arms = [arm for arm in result.arms if arm.final and arm.finished == arm.planned]
    costs = _costs(arms)
    drawn = [cost for cost in costs if cost.varies]
    if len(arms) < 2 or not drawn:
        return None
    finals = {arm.arm.name: arm.final for arm in arms if arm.final}
    fronts = {cost.name: find_front(cost, finals, _compare_arms(result, arms)) for cost in costs}
    title, unit = name_and_unit(result.comparison.primary.metric)
    look = choose_looks(tuple(arm.arm.name for arm in result.arms), result.comparison.baseline)
    columns = legend_columns(tuple(finals))
    figure = new_figure(3.9 + 0.22 * -(-len(finals) // columns))
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, drawn, strict=True):
        _draw(axes, cost, finals, fronts[cost.name], look)
    panels[0].set_ylabel(axis_label(f"final {title}", unit))
    better = "lower" if result.comparison.primary.direction == "lower" else "higher"
    level = f"{100 * (1 - result.comparison.decide.alpha):g} %"
    caption = (
        f"left and {better} is better; bars: ± standard deviation over seeds; ringed: the front\n"
        f"front: the cheapest arm, and each costlier arm that is better than all cheaper ones on it\n"
        f"({level} interval of the paired difference excludes 0)"
    )
    absent = len(result.arms) - len(finals)
    if absent:
        caption += f"\nnot shown: {absent} of {len(result.arms)} arms, which have a run that did not finish"
    figure.suptitle(caption, fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    same = [cost for cost in costs if cost.by_arm and not cost.varies]
    alt = f"Scatter plots of final {title} over cost, one point per arm. " + " ".join(
        [f"Over {cost.name} the front is {', '.join(fronts[cost.name])}." for cost in drawn]
        + [f"{cost.name[0].upper()}{cost.name[1:]} is the same in all arms." for cost in same]
    )
    return render_figure(figure, "pareto", f"What {title} costs", alt, _table(result, costs, fronts))


def find_front(cost: Cost, finals: Mapping[str, Mean], is_better: Callable[[str, str], bool]) -> tuple[str, ...]:
    """Return the arms on the front, cheapest first.

    Args:
        cost: Of the arms.
        finals: The primary metric.
        is_better: Whether the first arm is shown to be better than the second.
    """
    # Of arms that cost the same, one that another is worse than comes first.
    by_cost = sorted(
        cost.by_arm, key=lambda arm: (cost.by_arm[arm].mean, sum(is_better(other, arm) for other in cost.by_arm))
    )
    found: list[str] = []
    for arm in by_cost:
        if arm in finals and all(is_better(arm, other) for other in found):
            found.append(arm)
    return tuple(found)


def _compare_arms(result: StudyResult, arms: Sequence[ArmResult]) -> Callable[[str, str], bool]:
    """Return a function that says whether one arm is shown to be better than another."""
    study = result.comparison
    values = {arm.arm.name: read_values(arm.runs, study.primary.metric) for arm in arms}

    def is_better(arm: str, other: str) -> bool:
        differences = tuple(pair_differences(values[arm], values[other], study.seeds).values())
        interval = interval_of(study.decide.test, differences, study.decide.alpha) if differences else None
        if interval is None:
            return False
        return interval.high < 0 if study.primary.direction == "lower" else interval.low > 0

    return is_better


def _costs(arms: Sequence[ArmResult]) -> list[Cost]:
    flops = {a.arm.name: Mean(a.card.active_flops_per_sample, None, 1) for a in arms if a.card}
    memory = {a.arm.name: peak_memory_of(a.runs) for a in arms}
    return [
        Cost("active compute", "forward FLOPs per sample", flops),
        Cost("wall time", "s per run", {a.arm.name: a.seconds for a in arms if a.seconds}),
        Cost("peak memory", "MiB", {arm: mean for arm, mean in memory.items() if mean}),
    ]


def _draw(axes: Axes, cost: Cost, finals: Mapping[str, Mean], front: tuple[str, ...], look: Mapping[str, Look]) -> None:
    line = [(cost.by_arm[arm].mean, finals[arm].mean) for arm in front]
    axes.plot(*zip(*line, strict=True), color=INK, linewidth=1, linestyle="--", alpha=0.7)
    for arm, spent in cost.by_arm.items():
        own, final = look[arm], finals[arm]
        axes.errorbar(
            spent.mean, final.mean, xerr=spent.deviation, yerr=final.deviation, label=arm, color=own.colour,
            marker=own.marker, markersize=7, linestyle="none", elinewidth=1, capsize=3, alpha=0.85,
        )  # fmt: skip
        if arm in front:
            axes.plot([spent.mean], [final.mean], "o", color=INK, markersize=15, markerfacecolor="none")
    if max(spent.mean for spent in cost.by_arm.values()) >= _LARGE:
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel(f"{cost.name}\n({cost.unit})")
    axes.margins(x=0.12, y=0.12)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _table(result: StudyResult, costs: list[Cost], fronts: Mapping[str, tuple[str, ...]]) -> Table:
    title, _ = name_and_unit(result.comparison.primary.metric)
    rows = []
    for arm in result.arms:
        name = arm.arm.name
        cells = []
        for cost in costs:
            spent = cost.by_arm.get(name)
            mark = ", on the front" if name in fronts[cost.name] else ""
            cells.append(NOTHING if spent is None else f"{_format(cost, spent)}{mark}")
        rows.append((name, format_mean(arm.final, 4), *cells))
    columns = ("arm", f"final {title}", *(f"{cost.name} ({cost.unit})" for cost in costs))
    notes = ("Arms with a run that did not finish are on no front.",)
    return Table(f"What {title} costs, mean ± standard deviation over seeds", columns, tuple(rows), notes)


def _format(cost: Cost, spent: Mean) -> str:
    return format_count(spent.mean) if cost.name == "active compute" else format_mean(spent, 1)
