"""What performance costs: the primary metric over active FLOPs, wall time and peak memory, with the front marked.

An arm is on a front where no other arm is at least as good at no more cost, and better in one of the two. Only arms of
which every planned run finished are compared: a mean over the survivors of divergences is no performance.
"""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import ArmResult, Mean, StudyResult, peak_memory_of
from lightning_moevlm.study.declare.comparison import Direction
from lightning_moevlm.study.report.figures.report_figure import (
    INK,
    Look,
    ReportFigure,
    choose_looks,
    legend_columns,
    new_figure,
    render_figure,
)
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_count, format_mean


class Place(NamedTuple):
    """Where an arm lies. cost: lower is better. value: of the primary metric."""

    arm: str
    cost: float
    value: float


class Cost(NamedTuple):
    """One kind of cost: its axis, and by arm what it is, None where it is not known."""

    name: str
    unit: str
    by_arm: dict[str, float | None]


def draw_pareto(result: StudyResult) -> ReportFigure | None:
    """Draw it; None where fewer than two arms have finished."""
    finals = {arm.arm.name: arm.final for arm in result.arms if arm.final and arm.finished == arm.planned}
    if len(finals) < 2:
        return None
    title, unit = name_and_unit(result.comparison.primary.metric)
    costs = _costs(result, finals)
    fronts = {cost.name: find_front(_places(cost, finals), result.comparison.primary.direction) for cost in costs}
    drawn = [cost for cost in costs if len({place.cost for place in _places(cost, finals)}) > 1]
    if not drawn:
        return None
    look = choose_looks(tuple(arm.arm.name for arm in result.arms), result.comparison.baseline)
    columns = legend_columns(tuple(finals))
    figure = new_figure(3.4 + 0.22 * -(-len(finals) // columns))
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, drawn, strict=True):
        _draw(axes, _places(cost, finals), finals, fronts[cost.name], look)
        axes.set_xlabel(f"{cost.name} ({cost.unit})")
    panels[0].set_ylabel(f"final {title}\n({unit})" if unit else f"final {title}")
    better = "lower" if result.comparison.primary.direction == "lower" else "higher"
    told = f"further left and {better} is better; ringed and joined: the front"
    absent = len(result.arms) - len(finals)
    if absent:
        told += f"\nnot shown: {absent} of {len(result.arms)} arms, of which a run did not finish"
    figure.suptitle(told, fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    same = [cost for cost in costs if cost not in drawn and any(v is not None for v in cost.by_arm.values())]
    alt = f"Scatter plots of final {title} over cost, one point per arm. " + " ".join(
        [f"Over {cost.name} the front is {_join(fronts[cost.name])}." for cost in drawn]
        + [f"{cost.name[0].upper()}{cost.name[1:]} is the same in all arms." for cost in same]
    )
    return render_figure(figure, "pareto", f"What {title} costs", alt, _table(result, costs, fronts))


def find_front(places: Sequence[Place], direction: Direction) -> tuple[str, ...]:
    """Return the arms on the front, cheapest first."""
    sign = 1 if direction == "lower" else -1

    def beaten(one: Place) -> bool:
        return any(
            other.cost <= one.cost
            and sign * other.value <= sign * one.value
            and (other.cost, other.value) != (one.cost, one.value)
            for other in places
        )

    return tuple(place.arm for place in sorted(places, key=lambda p: p.cost) if not beaten(place))


def _costs(result: StudyResult, finals: dict[str, Mean]) -> list[Cost]:
    arms = [arm for arm in result.arms if arm.arm.name in finals]
    return [
        Cost("active compute", "forward FLOPs per sample", {a.arm.name: _flops(a) for a in arms}),
        Cost("wall time", "s per run", {a.arm.name: _mean(a.seconds) for a in arms}),
        Cost("peak memory", "MiB", {a.arm.name: _mean(_memory(a)) for a in arms}),
    ]


def _flops(arm: ArmResult) -> float | None:
    return arm.card.active_flops_per_sample if arm.card else None


def _memory(arm: ArmResult) -> Mean | None:
    return peak_memory_of(arm.runs)


def _mean(mean: Mean | None) -> float | None:
    return mean.mean if mean else None


def _places(cost: Cost, finals: dict[str, Mean]) -> list[Place]:
    return [Place(arm, spent, finals[arm].mean) for arm, spent in cost.by_arm.items() if spent is not None]


def _draw(
    axes: Axes, places: list[Place], finals: dict[str, Mean], on_front: tuple[str, ...], look: dict[str, Look]
) -> None:
    by_arm = {place.arm: place for place in places}
    line = [by_arm[arm] for arm in on_front]
    axes.plot([p.cost for p in line], [p.value for p in line], color=INK, linewidth=1, linestyle="--", alpha=0.7)
    for place in places:
        own = look[place.arm]
        spread = finals[place.arm].deviation
        if spread:
            axes.errorbar(place.cost, place.value, yerr=spread, color=own.colour, capsize=3, linewidth=1, alpha=0.5)
        axes.plot(
            [place.cost],
            [place.value],
            marker=own.marker,
            markersize=7,
            color=own.colour,
            linestyle="none",
            label=place.arm,
        )
        if place.arm in on_front:
            axes.plot(
                [place.cost],
                [place.value],
                marker="o",
                markersize=15,
                markerfacecolor="none",
                color=INK,
                linestyle="none",
            )
    axes.margins(x=0.12, y=0.12)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _join(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "empty"


def _table(result: StudyResult, costs: list[Cost], fronts: dict[str, tuple[str, ...]]) -> Table:
    title, _ = name_and_unit(result.comparison.primary.metric)
    rows = []
    for arm in result.arms:
        name = arm.arm.name
        cells = []
        for cost in costs:
            spent = cost.by_arm.get(name)
            mark = ", on the front" if name in fronts[cost.name] else ""
            cells.append(NOTHING if spent is None else f"{_number(cost, spent)}{mark}")
        rows.append((name, format_mean(arm.final, 4), *cells))
    columns = ("arm", f"final {title}", *(f"{cost.name} ({cost.unit})" for cost in costs))
    notes = ("arms with a run that did not finish are on no front.",)
    return Table(f"What {title} costs, mean over seeds", columns, tuple(rows), notes)


def _number(cost: Cost, spent: float) -> str:
    return format_count(spent) if cost.name == "active compute" else f"{spent:.1f}"
