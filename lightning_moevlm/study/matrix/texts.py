"""Words for numbers of the matrix."""

from lightning_moevlm.study.matrix.records import Cell, Matrix, Outcome, Row, SideEffect, StepTime
from lightning_moevlm.study.report.tables.table import NOTHING, format_interval, format_signed
from lightning_moevlm.study.statistics.cures.cure_effect import CureEffect, CureVerdict
from lightning_moevlm.study.statistics.intervals import Interval

UNPROVED = "not proved"
NOTABLE = 0.1
"""Least share, either way, that is advised or surprises. Three seeds can show one of 2 %, which nobody needs."""


def format_share(share: float) -> str:
    """Return a share as a whole percentage."""
    return f"{_bound(share)} %"


def format_share_interval(interval: Interval) -> str:
    """Return the interval of a share in percent; a bound beyond a thousand is shortened."""
    return f"[{_bound(interval.low)}, {_bound(interval.high)}]"


def describe_share(effect: CureEffect | None) -> str:
    """Return share and interval."""
    if effect is None or effect.share is None:
        return NOTHING
    return f"{format_share(effect.share.estimate)} {format_share_interval(effect.share.interval)}"


def describe_cell(cell: Cell) -> str:
    """Return share, interval, verdict and surviving runs of a cell."""
    effect = cell.decisive
    if effect is None:
        return f"missing: {len(cell.missing)} runs" if cell.missing else "missing: healthy or sick runs"
    stable = f", {describe_stable(cell.outcome)} stable" if effect.survival.failed else ""
    if effect.share is None:
        return f"{effect.verdict}{stable}"
    where = " on fresh seeds" if cell.is_decided_afresh else ""
    return f"{describe_share(effect)} {effect.verdict}{where}{stable}"


def describe_stable(outcome: Outcome) -> str:
    """Return surviving runs of all runs, with the exact interval of their share."""
    if outcome.interval is None:
        return NOTHING
    low, high = outcome.interval
    return f"{outcome.survival} [{low:.2f}, {high:.2f}]"


def describe_damage(row: Row) -> str:
    """Return the damage with its interval."""
    if row.damage is None or row.damage.mean is None:
        return NOTHING
    return _with_interval(row.damage.mean, row.damage.interval)


def describe_side_effect(one: SideEffect | None) -> str:
    """Return the effect of a cure on a healthy model, with its interval."""
    if one is None or one.effect is None or one.effect.centre is None:
        return NOTHING
    return _with_interval(one.effect.centre, one.effect.interval)


def describe_cost(fraction: float | None) -> str:
    """Return a relative cost in percent, with its sign."""
    return NOTHING if fraction is None else f"{100 * fraction:+.0f} %"


def describe_time(time: StepTime | None) -> str:
    """Return the relative time of a step, and the clock if it is not that on the wall."""
    if time is None:
        return NOTHING
    return describe_cost(time.more) + (f" ({time.clock})" if time.clock != "wall" else "")


def describe_rows(matrix: Matrix) -> tuple[str, ...]:
    """Return one sentence per illness: what cures it, what helps, what harms."""
    return tuple(_describe_row(row) for row in matrix.rows)


def describe_fresh(matrix: Matrix) -> str:
    """Return how many verdicts were the same on fresh seeds, and how many were reached there; empty if none was."""
    cells = [cell for _, cell in matrix.repeated]
    decided = [cell for cell in cells if cell.effect is not None and cell.effect.verdict is not CureVerdict.UNCLEAR]
    unclear = [cell for cell in cells if cell.is_named and cell not in decided]
    told = []
    if decided:
        agree = sum(cell.agrees is True for cell in decided)
        told.append(f"{agree} of the {len(decided)} verdicts that were repeated are the same on fresh seeds.")
    if unclear:
        reached = sum(cell.is_decided_afresh for cell in unclear)
        told.append(f"Fresh seeds decide {reached} of the {len(unclear)} unclear cells that were named beforehand.")
    return " ".join(told)


def describe_whole(matrix: Matrix) -> str:
    """Return how many verdicts stand over the whole matrix; empty if there is none."""
    cells = [cell for row in matrix.rows for cell in row.cells]
    decided = [cell for cell in cells if cell.effect is not None and cell.effect.verdict is not CureVerdict.UNCLEAR]
    if not decided:
        return ""
    stand = sum(cell.stands for cell in decided)
    return f"{stand} of {len(decided)} verdicts also stand if all {len(cells)} cells of the matrix are one family."


def describe_error(matrix: Matrix) -> str:
    """Return the chance of a false claim on a cell in one family, and in all of them; empty if no cell is judged."""
    alpha = max((row.rule.alpha for row in matrix.rows), default=0.05)
    families = {
        (row.illness, cell.kind == "alone")
        for row in matrix.rows
        for cell in row.cells
        if cell.effect is not None and cell.effect.share is not None
    }
    if not families:
        return ""
    count = "The one family" if len(families) == 1 else f"The {len(families)} families"
    return (
        f"A family has a false claim of one kind with a chance of at most {alpha:.0%}. {count} of cells on this page "
        f"together: up to {1 - (1 - alpha) ** len(families):.0%}. Verdicts that stand over the whole matrix: "
        f"{alpha:.0%}."
    )


def describe_missing(matrix: Matrix) -> str:
    """Return a sentence on runs without a result; empty if all have one."""
    count = sum(map(len, matrix.missing.values()))
    advice = f"To train them: moevlm sweep run {matrix.folder}"
    return f"{count} runs have no result yet, and their cells are empty. {advice}" if count else ""


def find_side_effect(matrix: Matrix, cure: str, illness: str) -> SideEffect | None:
    """Return the side effect of a cure on the healthy model of an illness; None if it was not measured."""
    own = next((one.healthy for one in matrix.side_effects if illness in one.studies), None)
    return next((one for one in matrix.side_effects if one.cure == cure and one.healthy == own), None)


def _describe_row(row: Row) -> str:
    if row.damage is None:
        return f"{row.illness}: not run yet."
    size = f"{describe_damage(row)}, {len(row.damage.effect.seeds)} seeds"
    if not row.proved:
        return f"{row.illness}: {UNPROVED} ({size}), so no cure of it is judged."
    lists = []
    for verdict, word in (
        (CureVerdict.CURES, "cured by"),
        (CureVerdict.HELPS, "helped by"),
        (CureVerdict.HARMS, "harmed by"),
        (CureVerdict.NONE, "no effect of"),
        (CureVerdict.UNCLEAR, "unclear:"),
    ):
        shares = [
            (cell.label, effect.share.estimate)
            for cell in row.cells
            if cell.kind != "all_but" and (effect := cell.decisive) and effect.verdict is verdict and effect.share
        ]
        names = [
            label if verdict is CureVerdict.UNCLEAR else f"{label} ({format_share(share)})"
            for label, share in sorted(shares, key=lambda pair: -pair[1])
        ]
        if names:
            lists.append(f"{word} {', '.join(names)}")
    return f"{row.illness} ({size}): {'; '.join(lists) or 'no cure has a result in every seed yet'}."


def _with_interval(value: float, interval: Interval | None) -> str:
    return format_signed(value) + (f" {format_interval(interval)}" if interval else "")


def _bound(share: float) -> str:
    percent = 100 * share
    if abs(percent) < 0.5:
        return "0"
    return f"{percent:.0f}" if abs(percent) < 1000 else "<-999" if percent < 0 else ">999"
