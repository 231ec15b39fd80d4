"""A table of text: what terminal, Markdown and HTML show, and the words that its cells are written in."""

from dataclasses import dataclass

from lightning_moevlm.study.compare.results import Mean
from lightning_moevlm.study.statistics.intervals import Interval
from lightning_moevlm.study.statistics.verdict import Verdict

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A table of text. The first column names the row.

    notes: what a reader must know to read it. essential: how many columns, from the left, a narrow terminal shows;
    0 = all. picture: name of the one that draws these numbers, under which the page folds the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    essential: int = 0
    figure: str = ""


def format_mean(mean: Mean | None, decimals: int) -> str:
    """Return `mean ± deviation`."""
    if mean is None:
        return NOTHING
    spread = f" ± {mean.deviation:.{decimals}f}" if mean.deviation is not None else ""
    return f"{mean.mean:.{decimals}f}{spread}"


def format_seed_count(mean: Mean | None, num_seeds: int) -> str:
    """Return how many seeds a mean is over, where they are not all: a mean of survivors is to be seen as one."""
    return f" ({mean.n} of {num_seeds})" if mean is not None and mean.n < num_seeds else ""


def format_signed(difference: float) -> str:
    """Return a difference with its sign and four decimals, or as many as a small one takes to be told from 0."""
    if 0 < abs(difference) < 1e-3:
        return f"{difference:+.2g}"
    return f"{difference:+.4f}" if abs(difference) < 1e6 else f"{difference:+.4g}"


def format_interval(interval: Interval) -> str:
    """Return `[low, high]`."""
    return f"[{format_signed(interval.low)}, {format_signed(interval.high)}]"


def format_count(number: float) -> str:
    """Return a count with three digits and a k, M, G or T."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def format_percent(fraction: float) -> str:
    """Return a fraction as percent."""
    return f"{100 * fraction:.1f} %"


STYLES: dict[str, str] = {
    Verdict.HELPS: "green",
    Verdict.HURTS: "red",
    Verdict.BREAKS_GUARD: "red",
    Verdict.NO_DIFFERENCE: "blue",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.STOPPED_EARLY: "yellow",
}


def find_verdict(cell: str) -> str:
    """Return the verdict that a cell of a table shows, or an empty text."""
    return next((str(verdict) for verdict in STYLES if cell == verdict or cell.startswith(f"{verdict} within ")), "")
