"""Holds a table of text, as terminal, Markdown and HTML show it, and formats its cells."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_moevlm.study.compare.results import Mean, Reproduction
from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict
from lightning_moevlm.study.statistics.intervals import Interval
from lightning_moevlm.study.statistics.verdict import Verdict

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A table of text. The first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """Sentences that explain the columns."""
    essential: int = 0
    """Number of columns, from the left, that a narrow terminal shows; 0: all."""
    figure: str = ""
    """Name of the figure that draws these numbers; the page folds the table below it."""


def format_mean(mean: Mean | None, decimals: int) -> str:
    """Return `mean ± deviation`."""
    if mean is None:
        return NOTHING
    spread = f" ± {mean.deviation:.{decimals}f}" if mean.deviation is not None else ""
    return f"{mean.mean:.{decimals}f}{spread}"


def format_seed_count(mean: Mean | None, num_seeds: int) -> str:
    """Return ` (k of n)` for a mean over some of the seeds, so that a mean over survivors is seen as one."""
    return f" ({mean.n} of {num_seeds})" if mean is not None and mean.n < num_seeds else ""


def format_signed(difference: float) -> str:
    """Return a difference with its sign and four decimals, or with more if it would be printed as 0."""
    if 0 < abs(difference) < 1e-3:
        return f"{difference:+.2g}"
    return f"{difference:+.4f}" if abs(difference) < 1e6 else f"{difference:+.4g}"


def format_interval(interval: Interval) -> str:
    """Return `[low, high]`."""
    return f"[{format_signed(interval.low)}, {format_signed(interval.high)}]"


def format_count(number: float) -> str:
    """Return a count with three digits and k, M, G or T."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def format_percent(fraction: float) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * fraction:.1f} %"


def format_changes(changes: Mapping[str, object]) -> tuple[str, ...]:
    """Return `key: value` for each dotted key."""
    return tuple(f"{key}: {'null' if value is None else value}" for key, value in changes.items())


STYLES: dict[str, str] = {
    Verdict.HELPS: "green",
    Verdict.HURTS: "red",
    Verdict.BREAKS_GUARD: "red",
    Verdict.NO_DIFFERENCE: "blue",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.STOPPED_EARLY: "yellow",
    Reproduction.REPRODUCED: "green",
    Reproduction.NOT_SEEN: "yellow",
    Reproduction.REVERSED: "red",
    CureVerdict.CURES: "green",
    CureVerdict.HARMS: "red",
    CureVerdict.NONE: "blue",
    CureVerdict.UNCLEAR: "yellow",
}


def find_verdict(cell: str) -> str:
    """Return the verdict that a cell shows, or an empty text."""
    return next((str(verdict) for verdict in STYLES if cell == verdict or cell.startswith(f"{verdict} within ")), "")
