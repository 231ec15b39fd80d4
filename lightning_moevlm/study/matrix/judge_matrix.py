"""Corrects the matrix for its many comparisons, by Holm.

Families: the damages of all illnesses; of each illness the cells of single cures; of each illness the cells of several
cures together; the side effects on each healthy model; of each illness the cells repeated on fresh seeds. Each illness
is a question of its own. With three seeds a family of a hundred cells would ask of each an effect of 28 of its standard
deviations; a family of nine asks for 9. So an error of 5 % is that of one family: among ten rows in which no cure works
there is a false claim in 4 of 10 drawn matrices. For the matrix as a whole all cells are judged once more as one
family, and each says whether its verdict stands there too. That keeps 5 % (`tests/study/matrix/simulated`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_moevlm.study.matrix.records import Cell, Matrix, Row, SideEffect
from lightning_moevlm.study.statistics.cures.cure_effect import CureEffect, judge_cell, judge_cures
from lightning_moevlm.study.statistics.cures.damage import judge_damages
from lightning_moevlm.study.statistics.effects import judge_family
from lightning_moevlm.study.statistics.verdict import Rule

FAMILIES = (
    "Holm corrects the p values within each family: the damages of all illnesses; the single cures of one illness; "
    "the combinations of one illness; the side effects on one healthy model; the cells of one illness that were "
    "repeated on fresh seeds. Of cells, acting (cures, helps, harms), curing and doing nothing (none) are a family "
    "each. Cells whose runs are missing count with p = 1. An interval covers by itself, not together with the others."
)


def make_matrix(name: str, folder: str, rows: Sequence[Row], fresh: Mapping[str, Row], part: str = "") -> Matrix:
    """Judge all rows together.

    Args:
        name: Of the folder.
        folder: As the command takes it.
        rows: Each judged cell by cell.
        fresh: Rows of the repetitions, by illness.
        part: Which seeds it is of, in words; empty for all.
    """
    rows = _judge_damages(rows)
    repeated = dict(zip(fresh, _judge_damages(list(fresh.values())), strict=True))
    whole = _judge_whole(rows)
    judged = [_attach_fresh(_judge_cells(row, whole), repeated.get(row.illness)) for row in rows]
    return Matrix(name, folder, tuple(judged), _judge_side_effects(rows), part)


def _judge_damages(rows: Sequence[Row]) -> list[Row]:
    """Judge the damages as one family, by the strictest alpha of the studies."""
    known = {i: row.damage for i, row in enumerate(rows) if row.damage is not None}
    if not known:
        return list(rows)
    judged = {}
    for i in known:  # directions may differ between studies; the family is the same
        judged[i] = judge_damages(known, rows[i].rule)[i]
    return [replace(row, damage=judged.get(i)) for i, row in enumerate(rows)]


def _judge_whole(rows: Sequence[Row]) -> dict[tuple[str, str], CureEffect]:
    """Judge all cells as one family, by illness and arm; chance is that of each row's own runs."""
    cells: dict[tuple[str, str], CureEffect] = {}
    jumps: dict[tuple[str, str], float] = {}
    for row in rows:
        effects = {(row.illness, cell.arm): cell.effect or _nothing(row.rule) for cell in row.cells}
        cells |= effects
        jumps |= dict.fromkeys(effects, max((effect.jump for effect in effects.values()), default=0.0))
    unproved = {(row.illness, cell.arm) for row in rows for cell in row.cells if not row.proved}
    strictest = min((row.rule for row in rows), key=lambda rule: rule.alpha)
    return judge_cures(cells, strictest, unproved, jumps)


def _judge_cells(row: Row, whole: Mapping[tuple[str, str], CureEffect]) -> Row:
    judged: dict[str, CureEffect] = {}
    for kinds in (("alone",), ("all", "all_but", "together")):
        family = {cell.arm: cell.effect or _nothing(row.rule) for cell in row.cells if cell.kind in kinds}
        judged |= judge_cures(family, row.rule, () if row.proved else family.keys())
    return replace(row, cells=tuple(_take_verdict(cell, judged, whole[row.illness, cell.arm]) for cell in row.cells))


def _take_verdict(cell: Cell, judged: Mapping[str, CureEffect], whole: CureEffect) -> Cell:
    if cell.effect is None:
        return cell
    effect = judged[cell.arm]
    return replace(cell, effect=effect, stands=effect.verdict is whole.verdict)


def _nothing(rule: Rule) -> CureEffect:
    """Return a cell without runs, which counts in the correction."""
    return judge_cell({}, {}, {}, (), rule)


def _attach_fresh(row: Row, fresh: Row | None) -> Row:
    if fresh is None:
        return row
    again = {cell.arm: cell.effect for cell in fresh.cells if cell.effect is not None}
    judged = judge_cures(again, row.rule, () if fresh.proved else again.keys())
    return replace(row, cells=tuple(replace(cell, fresh=judged.get(cell.arm)) for cell in row.cells))


def _judge_side_effects(rows: Sequence[Row]) -> tuple[SideEffect, ...]:
    """Return one record per cure and healthy model, judged with the others of that model."""
    merged: dict[tuple[frozenset[str], frozenset[str]], tuple[SideEffect, Rule]] = {}
    for row in rows:
        for one in row.side_effects:
            key = (one.healthy, one.cured)
            before = merged.get(key)
            known = before[0] if before and before[0].effect else one  # a study may have run, and the other not yet
            studies = (*before[0].studies, *one.studies) if before else one.studies
            merged[key] = (replace(known, studies=studies), row.rule)
    judged = []
    for one, rule in merged.values():
        family = {
            other.cure: other.effect
            for other, _ in merged.values()
            if other.effect is not None and other.healthy == one.healthy
        }
        effect = judge_family(family, rule)[one.cure] if one.effect is not None else None
        judged.append(replace(one, effect=effect))
    return tuple(judged)
