"""Draws bars by arm: throughput and wall time; accuracy beside the accuracy of the constant answer."""

from matplotlib.axes import Axes

from lightning_moevlm.study.compare.results import Mean, StudyResult
from lightning_moevlm.study.report.figures.report_figure import (
    GROUND,
    INK,
    ReportFigure,
    choose_looks,
    new_figure,
    render_figure,
)
from lightning_moevlm.study.report.figures.unfinished_runs import row_label
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_mean, format_percent

_MIDDLE = "#8c8c8c"  # seen on bars of every colour, and on either ground


def draw_throughput(result: StudyResult) -> ReportFigure | None:
    """Draw samples per second and wall time per run; None before any run has ended."""
    if not any(arm.samples_per_second or arm.seconds for arm in result.arms):
        return None
    names = tuple(arm.arm.name for arm in result.arms)
    figure = new_figure(1.4 + 0.42 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, result, [arm.samples_per_second for arm in result.arms], "{:.3g}")
    _bars(right, result, [arm.seconds for arm in result.arms], "{:.3g}")
    left.set_xlabel("training throughput (samples/s)")
    right.set_xlabel("wall time of a run,\nstart-up included (s)")
    rows = tuple(
        (arm.arm.name, format_mean(arm.samples_per_second, 1), format_mean(arm.seconds, 1)) for arm in result.arms
    )
    table = Table("Throughput, mean ± standard deviation over seeds", ("arm", "samples/s", "wall time (s)"), rows)
    alt = "Bar charts of training throughput and wall time by arm. " + " ".join(
        f"{name}: {speed} samples per second, {seconds} s." for name, speed, seconds in rows
    )
    return render_figure(figure, "throughput", "Throughput and wall time", alt, table)


def draw_accuracy(result: StudyResult) -> ReportFigure | None:
    """Draw the accuracy of every term, with the majority class as a mark; None if no term predicts classes."""
    terms = tuple(sorted({term for arm in result.arms for term in arm.accuracy}))
    if not terms:
        return None
    figure = new_figure(1.5 + 0.42 * len(result.arms))
    panels = figure.subplots(1, len(terms), sharey=True, squeeze=False)[0]
    for axes, term in zip(panels, terms, strict=True):
        _bars(axes, result, [_in_percent(arm.accuracy.get(term)) for arm in result.arms], "{:.1f}")
        for row, arm in enumerate(result.arms):
            majority = arm.majority.get(term)
            if majority is not None:
                place = 100 * majority.mean
                label = "always the commonest class" if row == 0 else None
                edges = [row - 0.42, row + 0.42]
                axes.plot([place, place], edges, color=GROUND, linewidth=5)  # keeps the mark apart from a dark bar
                axes.plot([place, place], edges, color=INK, linewidth=2, label=label)
        axes.set_xlabel(f"accuracy,\n{term} (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    columns = ("arm", *(f"{term}, {what}" for term in terms for what in ("accuracy", "majority")))
    rows = tuple(
        (arm.arm.name, *(_cell(kind.get(term)) for term in terms for kind in (arm.accuracy, arm.majority)))
        for arm in result.arms
    )
    table = Table("Masked accuracy at the end of training, mean over seeds", columns, rows)
    sentences = [
        f"{arm.arm.name}, {term}: {_cell(arm.accuracy.get(term))} against {_cell(arm.majority.get(term))}."
        for arm in result.arms
        for term in terms
    ]
    alt = "Bar charts of accuracy by arm, with the accuracy of the commonest class marked. " + " ".join(sentences)
    return render_figure(figure, "accuracy", "Masked accuracy against the majority class", alt, table)


def _bars(axes: Axes, result: StudyResult, means: list[Mean | None], form: str) -> None:
    names = tuple(arm.arm.name for arm in result.arms)
    look = choose_looks(names, result.comparison.baseline)
    # all bars may be 0 (an accuracy after two steps), and an axis needs a length
    highest = max((m.mean + (m.deviation or 0.0) for m in means if m), default=0.0) or 1.0
    for row, (name, mean) in enumerate(zip(names, means, strict=True)):
        if mean is None:
            continue
        axes.barh(row, mean.mean, height=0.62, color=look[name].colour, alpha=0.85)
        if mean.deviation:
            axes.errorbar(mean.mean, row, xerr=mean.deviation, color=_MIDDLE, capsize=3, linewidth=1.2)
        end = mean.mean + (mean.deviation or 0.0)
        axes.text(end + 0.02 * highest, row, form.format(mean.mean), va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [row_label(arm) for arm in result.arms], fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * highest)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _in_percent(mean: Mean | None) -> Mean | None:
    return mean and Mean(100 * mean.mean, None if mean.deviation is None else 100 * mean.deviation, mean.n)


def _cell(mean: Mean | None) -> str:
    return format_percent(mean.mean) if mean else NOTHING
