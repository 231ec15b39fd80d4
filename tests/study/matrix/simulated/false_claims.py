"""Counts false claims of drawn matrices: in a family, on the page, and among verdicts that stand over the matrix."""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict
from tests.study.matrix.simulated.drawn_matrix import World, draw_matrix, find_wrong, true_share

KINDS = ("acts", "cures", "none")
"""Claims that are corrected as a family each: that a cure acts, that it cures, that it does nothing."""


@dataclass
class Tally:
    """What was counted in the matrices of one world."""

    matrices: int = 0
    rows: int = 0
    proved: int = 0
    in_row: Counter[str] = field(default_factory=Counter)
    """Rows with a false claim, by kind and `any`."""
    on_page: Counter[str] = field(default_factory=Counter)
    """Matrices with one."""
    standing: Counter[str] = field(default_factory=Counter)
    """Matrices with one among verdicts that stand over the whole matrix."""
    cells: Counter[float] = field(default_factory=Counter)
    """Cells by true share."""
    decided: Counter[float] = field(default_factory=Counter)
    intervals: int = 0
    """Of shares; there are none without a damage that is shown."""
    covered: int = 0

    @property
    def coverage(self) -> float:
        """How many of the intervals of shares hold the true one."""
        return self.covered / self.intervals if self.intervals else math.nan

    def __str__(self) -> str:
        row, page, standing = (
            {kind: round(count / of, 4) for kind, count in counts.items() if count}
            for counts, of in ((self.in_row, self.rows), (self.on_page, self.matrices), (self.standing, self.matrices))
        )
        decided = {share: round(self.decided[share] / count, 2) for share, count in sorted(self.cells.items())}
        return (
            f"{self.matrices} matrices; false claims: in a row {row}, on the page {page}, standing {standing}; "
            f"proved {self.proved / self.rows:.2f}; decided by share {decided}; "
            f"coverage {self.coverage:.4f} of {self.intervals}"
        )


def count_false_claims(world: World, matrices: int) -> Tally:
    """Draw and judge matrices of a world."""
    rng, tally = np.random.default_rng(17), Tally()
    for _ in range(matrices):
        page, standing = set(), set()
        for row in draw_matrix(rng, world).rows:
            damage, wrong = world.damages[int(row.illness)], set()
            tally.rows += 1
            tally.proved += row.proved
            if damage == 0 and row.proved:
                wrong.add("damage")
                standing.add("damage")
            for cell in row.cells:
                assert cell.effect is not None
                share, verdict, told = true_share(world, cell), cell.effect.verdict, cell.effect.share
                tally.cells[share] += 1
                tally.decided[share] += verdict is not CureVerdict.UNCLEAR
                if told is not None and damage:
                    tally.intervals += 1
                    tally.covered += told.interval.low <= share <= told.interval.high
                kind = find_wrong(verdict, damage, share)
                wrong |= {kind} - {""}
                standing |= {kind} - {""} if cell.stands else set()
            tally.in_row.update([*wrong, *(["any"] if wrong else [])])
            page |= wrong
        tally.on_page.update([*page, *(["any"] if page else [])])
        tally.standing.update([*standing, *(["any"] if standing else [])])
        tally.matrices += 1
    return tally
