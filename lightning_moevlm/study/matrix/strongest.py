"""Chooses the strongest cells of the matrix, and makes the studies that repeat them on fresh seeds.

A cell is as strong as the end of its interval that is nearer to 0: what it is shown to do at least. The cells that the
figure draws compete, single cures and all together, if their verdict is cures, helps or harms.
"""

import dataclasses

from lightning_moevlm.study.declare.designs.cures import HEALTHY, SICK
from lightning_moevlm.study.declare.study_file import Study
from lightning_moevlm.study.matrix.records import Cell, Matrix
from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict

NUM_CELLS = 10
FRESH = "_fresh"
"""End of the name of a study that repeats cells."""

_SHOWN = (CureVerdict.CURES, CureVerdict.HELPS, CureVerdict.HARMS)


def find_strongest(matrix: Matrix, among: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """Return the arms of the strongest cells by illness. among: illnesses whose studies have fresh seeds."""
    rows = [row for row in matrix.rows if row.illness in among]
    cells = [(row.illness, cell) for row in rows for cell in row.cells if cell.kind in ("alone", "all")]
    shown = [(illness, cell) for illness, cell in cells if cell.effect and cell.effect.verdict in _SHOWN]
    best = sorted(shown, key=lambda pair: -_strength(pair[1]))[:NUM_CELLS]
    return {name: tuple(cell.arm for illness, cell in best if illness == name) for name, _ in best}


def repeat(study: Study, arms: tuple[str, ...]) -> Study:
    """Return a study of these arms, the healthy and the sick model, on the fresh seeds."""
    design = study.comparison.design
    assert design is not None and design.cure_study is not None, "a cure study"
    kept = tuple(arm for arm in study.comparison.arms if arm.name in (HEALTHY, SICK, *arms))
    comparison = dataclasses.replace(
        study.comparison,
        name=f"{study.comparison.name}{FRESH}",
        question=f"{study.comparison.question} Repeated on fresh seeds.",
        arms=kept,
        seeds=design.cure_study.fresh_seeds,
    )
    # the command that resumes it takes the folder
    return dataclasses.replace(study, comparison=comparison, file=study.file.parent)


def _strength(cell: Cell) -> float:
    assert cell.effect is not None and cell.effect.share is not None, "it has a verdict"
    interval = cell.effect.share.interval
    return min(abs(interval.low), abs(interval.high))
