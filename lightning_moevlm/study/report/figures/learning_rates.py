"""Draws the final value over the learning rate, one curve per ladder, with best rate and failed runs."""

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.compare.results import LadderResult, StudyResult
from lightning_moevlm.study.report.figures.report_figure import (
    INK,
    Look,
    ReportFigure,
    axis_label,
    choose_looks,
    new_figure,
    render_figure,
)
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_mean

_FEWEST_RATES = 3  # two points are no curve
_FAR = 2.0  # times the height of the curves


def draw_learning_rates(result: StudyResult) -> ReportFigure | None:
    """Draw the curves; None if no ladder has results at enough rates."""
    shown = [one for one in result.ladders if _num_rates(one) >= _FEWEST_RATES and any(one.finals.values())]
    if not shown:
        return None
    title, unit = name_and_unit(result.comparison.primary.metric)
    figure = new_figure(4.0 + 0.22 * len(shown))
    axes = figure.subplots()
    axes.set_xscale("log")
    look = choose_looks(tuple(one.ladder.name for one in shown), shown[0].ladder.name)
    untrained = _untrained(result, shown)
    for one in shown:
        _draw(axes, result, one, look[one.ladder.name])
    if untrained is not None:
        _draw_untrained(axes, untrained)
    _mark_divergences(axes, shown, look)
    rates = sorted({rate for one in shown for rate in one.ladder.rungs})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=30 if len(rates) > 8 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_ylabel(axis_label(f"final {title}", unit))
    axes.set_title(
        "mean ± deviation over seeds, failed runs capped; ring: best rate; cross at the top: a run failed", fontsize=10
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    sentences = " ".join(_sentence(result, one) for one in shown)
    alt = f"Line plot of final {title} over the learning rate, one line per ladder. {sentences}"
    return render_figure(figure, "learning_rates", f"Final {title} over the learning rate", alt, _table(result, shown))


def find_best_rate(result: StudyResult, one: LadderResult) -> float | None:
    """Return the learning rate with the best mean; one with a failed run is never the best."""
    sound = {rate: mean.mean for rate, mean in one.finals.items() if mean and one.stable[rate] == one.total[rate]}
    if not sound:
        return None
    sign = 1 if result.comparison.primary.direction == "lower" else -1
    return min(sound, key=lambda rate: sign * sound[rate])


def _num_rates(one: LadderResult) -> int:
    """Return the number of rates with a result; a failure is a result."""
    return sum(total > 0 for total in one.total.values())


def _draw(axes: Axes, result: StudyResult, one: LadderResult, look: Look) -> None:
    known = {rate: mean for rate, mean in one.finals.items() if mean}
    means, bars = [mean.mean for mean in known.values()], [mean.deviation or 0.0 for mean in known.values()]
    axes.errorbar(
        list(known), means, yerr=bars, color=look.colour, marker=look.marker, markersize=6, linewidth=1.8,
        elinewidth=1.2, capsize=3, label=_label(one),
    )  # fmt: skip
    best = find_best_rate(result, one)
    if best is not None:
        ring = known[best].mean
        axes.plot([best], [ring], "o", markersize=15, markerfacecolor="none", markeredgewidth=2, color=look.colour)


def _draw_untrained(axes: Axes, untrained: float) -> None:
    """Draw the untrained model's value; if it would flatten the curves, the legend alone states it."""
    lowest, highest = axes.get_ylim()
    above, below = max(0.0, untrained - highest), max(0.0, lowest - untrained)
    if max(above, below) > _FAR * (highest - lowest):
        place = "above" if above else "below"
        axes.plot([], [], linestyle="none", label=f"untrained model: {untrained:.4g}, {place} the figure")
        return
    axes.axhline(untrained, color=INK, linewidth=1, linestyle=":", label="untrained model")
    lowest, highest = axes.get_ylim()
    if highest > 2 * untrained:  # a run that ended far above it would flatten all the others
        axes.set_ylim(lowest, 1.5 * untrained)


def _mark_divergences(axes: Axes, shown: list[LadderResult], look: dict[str, Look]) -> None:
    """Put a cross at the top for every rate with a failed run, one ladder beside the other."""
    for place, one in enumerate(shown):
        for rate in one.ladder.rungs:
            if one.stable[rate] < one.total[rate]:
                axes.annotate(
                    "x", (rate, 1.0), xycoords=("data", "axes fraction"), textcoords="offset points",
                    xytext=(9 * (place - (len(shown) - 1) / 2), -8), ha="center", va="center", weight="bold",
                    color=look[one.ladder.name].colour,
                )  # fmt: skip


def _label(one: LadderResult) -> str:
    reach = "no rate" if one.largest_stable is None else f"{one.largest_stable:g}"
    return f"{one.ladder.name}: sensitivity {format_mean(one.sensitivity, 4)}, stable up to {reach}"


def _sentence(result: StudyResult, one: LadderResult) -> str:
    best = find_best_rate(result, one)
    mean = one.finals[best] if best is not None else None
    where = f"best at {best:g} with {mean.mean:.4f}" if best is not None and mean else "no rate without a failed run"
    return f"{_label(one)}; {where}."


def _untrained(result: StudyResult, shown: list[LadderResult]) -> float | None:
    """Return the mean over the ladders' arms of the untrained models' value."""
    names = {arm for one in shown for arm in one.ladder.rungs.values()}
    values = [arm.untrained.mean for arm in result.arms if arm.arm.name in names and arm.untrained]
    return sum(values) / len(values) if values else None


def _table(result: StudyResult, shown: list[LadderResult]) -> Table:
    title, unit = name_and_unit(result.comparison.primary.metric)
    rows = []
    for one in shown:
        best = find_best_rate(result, one)
        for rate, arm in one.ladder.rungs.items():
            stable = f"{one.stable[rate]}/{one.total[rate]}" if one.total[rate] else NOTHING
            remark = "best" if rate == best else "largest stable" if rate == one.largest_stable else ""
            if rate == best == one.largest_stable:
                remark = "best, largest stable"
            rows.append((arm, one.ladder.name, f"{rate:g}", format_mean(one.finals[rate], 4), stable, remark))
    columns = ("arm", "ladder", "learning rate", f"final ({unit})" if unit else "final", "stable", "")
    return Table(f"Final {title} by learning rate, mean ± standard deviation over seeds", columns, tuple(rows))
