"""Finds what the literature does not let one expect, by rule, or says that nothing of the kind is shown.

Only verdicts count, of a share that is notable: what is unclear surprises nobody, nor does a cure of 2 %. A surprise is
picked from all cells, so it says if its verdict does not stand over the whole matrix. A cure that harms or works alone
is judged by its own cell; cures that work together only are a combination that works, while no part of it is shown to
work alone.
"""

from typing import Literal, NamedTuple

from lightning_moevlm.study.matrix.records import Cell, Matrix, Row
from lightning_moevlm.study.matrix.texts import NOTABLE, describe_share, describe_side_effect
from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict
from lightning_moevlm.study.statistics.verdict import Verdict

Kind = Literal["harms", "together only", "not recommended", "recommendation not seen", "side effect"]

_WORKS = (CureVerdict.CURES, CureVerdict.HELPS)
_NOT_FOUND: dict[Kind, str] = {
    "harms": f"No cure is shown to harm a sick model by {NOTABLE:.0%} of the damage or more.",
    "together only": "No cures are shown to work together only.",
    "not recommended": "No cure is shown to work notably against an illness that no source recommends it for.",
    "recommendation not seen": "No recommended cure is shown to do nothing, or to harm.",
    "side effect": "No cure is shown to change a healthy model.",
}


class Surprise(NamedTuple):
    """One finding that was not to be expected."""

    kind: Kind
    illness: str
    """Empty for a side effect."""
    cures: str
    text: str


def find_surprises(matrix: Matrix) -> tuple[Surprise, ...]:
    """Return the surprises, by kind and then in the order of the matrix."""
    found = [one for row in matrix.rows for cell in row.cells for one in _of_cell(row, cell)]
    found += [
        Surprise("side effect", "", one.cure, f"{one.cure} {verb} the healthy model: {describe_side_effect(one)}.")
        for one in matrix.side_effects
        if one.effect and (verb := _SIDE_EFFECTS.get(one.effect.verdict))
    ]
    order = list(_NOT_FOUND)
    return tuple(sorted(found, key=lambda one: order.index(one.kind)))


def describe_surprises(matrix: Matrix) -> tuple[str, ...]:
    """Return the surprises as sentences; one sentence for each kind of which there is none."""
    found = find_surprises(matrix)
    told: list[str] = []
    for kind, nothing in _NOT_FOUND.items():
        told += [one.text for one in found if one.kind == kind] or [nothing]
    silent = [row.illness for row in matrix.rows if row.recommendations is None]
    return (*told, f"Recommendations are not declared for {', '.join(silent)}.") if silent else tuple(told)


_SIDE_EFFECTS = {Verdict.HURTS: "harms", Verdict.HELPS: "improves"}


def _of_cell(row: Row, cell: Cell) -> list[Surprise]:
    effect = cell.decisive
    if effect is None:
        return []
    verdict, found = effect.verdict, []
    is_notable = effect.share is not None and abs(effect.share.estimate) >= NOTABLE

    def add(kind: Kind, told: str) -> None:
        again = f" Fresh seeds {cell.agreement}." if cell.agreement else ""
        whole = "" if cell.stands or cell.is_decided_afresh else " It does not stand over the whole matrix."
        found.append(Surprise(kind, row.illness, cell.label, f"{row.illness}: {told}.{whole}{again}"))

    share = describe_share(effect)
    if verdict is CureVerdict.HARMS and is_notable:
        add("harms", f"{cell.label} harms, {share} of the damage undone")
    alone = row.alone()
    parts = [alone[cure].decisive for cure in cell.cures if cure in alone]
    works_alone = any(part and part.verdict in _WORKS for part in parts)
    if cell.kind in ("together", "all") and verdict in _WORKS and len(parts) > 1 and not works_alone:
        add("together only", f"{cell.label} {verdict} ({share}), and no part of it is shown to do so alone")
    if cell.kind == "alone" and row.recommendations is not None:
        is_recommended = row.recommends(cell.cures[0])
        if verdict in _WORKS and is_notable and not is_recommended:
            add("not recommended", f"{cell.label} {verdict} ({share}), though no source names it against this illness")
        if is_recommended and verdict in (CureVerdict.NONE, CureVerdict.HARMS):
            add(
                "recommendation not seen", f"{cell.label} is recommended, and is shown not to work ({share}, {verdict})"
            )
    return found
