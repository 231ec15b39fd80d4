"""Draws unsteady runs over time: a row per run with spikes of loss, gradient and update, and its divergence or stop."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.study.compare.results import RunResult, StudyResult
from lightning_moevlm.study.report.figures.report_figure import INK, ReportFigure, new_figure, render_figure
from lightning_moevlm.study.report.tables.table import NOTHING, Table
from lightning_moevlm.study.run.ledger import Status
from lightning_moevlm.study.statistics.outcomes.stability import SPIKE_DEVIATIONS, TRAIN_LOSS, divergence_step, spikes

_MANY_RUNS = 60  # more rows are illegible
_MANY_STEPS = 8  # so many does a cell of the table name


class Mark(NamedTuple):
    """The drawing of an event; size and edge in points."""

    name: str
    marker: str
    colour: str
    size: float = 5.0
    edge: float = 1.0


class Signal(NamedTuple):
    """A metric that can spike."""

    mark: Mark
    key: str
    offset: float
    """Of its mark within the row, so that marks of one step do not hide each other."""


_SIGNALS = (
    Signal(Mark("task loss", "o", "#D55E00"), TRAIN_LOSS, -0.22),
    Signal(Mark("gradient norm", "^", "#0072B2"), metric_keys.GRAD_NORM.key(), 0.0),
    Signal(Mark("update norm", "s", "#009E73"), metric_keys.UPDATE_NORM.key(), 0.22),
)
_DIVERGED = Mark("diverged", "x", INK, 9.0, 2.2)
_STOPPED = Mark("stopped early", "|", INK, 10.0, 3.0)


class Timeline(NamedTuple):
    """One run."""

    name: str
    last: int
    """Last logged step."""
    diverged_at: int | None
    spiked: tuple[tuple[int, ...] | None, ...]
    """Steps by signal; None with too few points."""
    stopped: bool = False
    """By the study's rule `futility_stop`."""

    @property
    def is_steady(self) -> bool:
        """Whether there is nothing to see."""
        return self.diverged_at is None and not self.stopped and not any(self.spiked)


def draw_spikes(result: StudyResult) -> ReportFigure | None:
    """Draw the timelines; None if every run was steady or logged too few points."""
    lines = [line for arm in result.arms for run in arm.runs if (line := build_timeline(run)) is not None]
    if all(line.is_steady for line in lines):
        return None
    shown = lines if len(lines) <= _MANY_RUNS else [line for line in lines if not line.is_steady][:_MANY_RUNS]
    figure = new_figure(1.3 + 0.19 * len(shown))
    axes = figure.subplots()
    for row, line in enumerate(shown):
        axes.plot([0, line.last], [row, row], color=INK, linewidth=0.8, alpha=0.35)
        for signal, steps in zip(_SIGNALS, line.spiked, strict=True):
            _draw(axes, signal.mark, steps or (), row + signal.offset, in_legend=row == 0)
        _draw(axes, _DIVERGED, () if line.diverged_at is None else (line.diverged_at,), row, in_legend=row == 0)
        _draw(axes, _STOPPED, (line.last,) if line.stopped else (), row, in_legend=row == 0)
    axes.set_yticks(range(len(shown)), [line.name for line in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser steps (the line: how far the run has logged)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    title = f"Points {SPIKE_DEVIATIONS:g} deviations or more from those before, and divergences"
    if len(shown) < len(lines):
        title += f" ({len(shown)} of {len(lines)} runs: the first that were not steady)"
    return render_figure(figure, "spikes", title, _sentence(lines), _table(lines))


def _draw(axes: Axes, mark: Mark, steps: Sequence[int], height: float, in_legend: bool) -> None:
    axes.plot(
        steps, [height] * len(steps), mark.marker, markersize=mark.size, markeredgewidth=mark.edge, color=mark.colour,
        label=mark.name if in_legend else None,
    )  # fmt: skip


def build_timeline(run: RunResult) -> Timeline | None:
    """Return a run's timeline; None for a run without points."""
    ends = [run.series[signal.key].steps[-1] for signal in _SIGNALS if signal.key in run.series]
    if not ends:
        return None
    diverged = divergence_step(run.series) if run.state.status is Status.DIVERGED else None
    return Timeline(
        run.name,
        max(ends),
        diverged,
        tuple(_find_spiked(run, signal.key) for signal in _SIGNALS),
        run.state.status is Status.STOPPED,
    )


def _find_spiked(run: RunResult, key: str) -> tuple[int, ...] | None:
    series = run.series.get(key)
    found = spikes(series.values) if series else None
    if series is None or found is None or not found.judged:
        return None
    return tuple(step for step, is_spike in zip(series.steps, found.is_spike, strict=True) if is_spike)


def _sentence(lines: list[Timeline]) -> str:
    unsteady = [line for line in lines if not line.is_steady]
    texts = [f"{line.name}: {'; '.join(_describe(line))}." for line in unsteady[:_MANY_RUNS]]
    rest = f"{len(lines) - len(unsteady)} of {len(lines)} runs had no spike, did not diverge and were not stopped."
    return " ".join(["Timeline of spikes, one row per run over optimiser steps.", *texts, rest])


def _describe(line: Timeline) -> list[str]:
    parts = [
        f"{len(steps)} of {signal.mark.name}, first at step {steps[0]}"
        for signal, steps in zip(_SIGNALS, line.spiked, strict=True)
        if steps
    ]
    if line.diverged_at is not None:
        parts.append(f"diverged at step {line.diverged_at}")
    return parts + ([f"stopped early at step {line.last}"] if line.stopped else [])


def _table(lines: list[Timeline]) -> Table:
    """Return every unsteady run."""
    unsteady = [line for line in lines if not line.is_steady]
    rows = tuple(
        (
            line.name,
            *map(_steps, line.spiked),
            NOTHING if line.diverged_at is None else f"step {line.diverged_at}",
            f"step {line.last}" if line.stopped else NOTHING,
        )
        for line in unsteady
    )
    columns = (
        "run",
        *(f"{signal.mark.name}: spikes at step" for signal in _SIGNALS),
        "diverged at",
        "stopped early at",
    )
    notes = (f"{len(lines) - len(unsteady)} of {len(lines)} runs had no spike, did not diverge and were not stopped.",)
    return Table("Spikes and divergences by run", columns, rows, notes)


def _steps(steps: tuple[int, ...] | None) -> str:
    if steps is None:
        return "too few points"
    if not steps:
        return "none"
    more = f" and {len(steps) - _MANY_STEPS} more" if len(steps) > _MANY_STEPS else ""
    return ", ".join(map(str, steps[:_MANY_STEPS])) + more
