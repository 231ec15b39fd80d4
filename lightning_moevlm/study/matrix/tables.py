"""Tables of the matrix, the same on the page, in Markdown and in the terminal."""

from lightning_moevlm.contracts.metric_keys import name_and_unit
from lightning_moevlm.study.matrix.judge_matrix import FAMILIES
from lightning_moevlm.study.matrix.records import Cell, Matrix, Row
from lightning_moevlm.study.matrix.texts import (
    NOTABLE,
    UNPROVED,
    describe_cell,
    describe_cost,
    describe_damage,
    describe_error,
    describe_fresh,
    describe_share,
    describe_side_effect,
    describe_stable,
    describe_time,
    find_side_effect,
)
from lightning_moevlm.study.report.tables.stability_tables import format_recovery
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_signed
from lightning_moevlm.study.statistics.cures.cure_effect import CURED, HALF, CureVerdict
from lightning_moevlm.study.statistics.paired_tests import format_p

RECOMMENDED = "†"
"""Mark of a cell whose cure a source names against the illness."""

_WORKS = (CureVerdict.CURES, CureVerdict.HELPS)
_SEEN: dict[CureVerdict, str] = {
    CureVerdict.CURES: "seen",
    CureVerdict.HELPS: "seen",
    CureVerdict.NONE: "not seen",
    CureVerdict.HARMS: "not seen",
}
_CLOCK = (
    "(CPU): CPU time, since the wall times of one arm's runs differ by more than a quarter: other work ran beside "
    "them. No time is shown if CPU times differ as much or were not logged."
)
_MOST_ADVICE = 3  # cures named for one illness


def all_tables(matrix: Matrix) -> tuple[Table, ...]:
    """Return every table that has rows, the one for a person with a sick run first."""
    tables = (
        advice_table(matrix),
        illness_table(matrix),
        share_table(matrix),
        recommendation_table(matrix),
        combination_table(matrix),
        side_effect_table(matrix),
        fresh_table(matrix),
        stability_table(matrix),
        missing_table(matrix),
    )
    return tuple(table for table in tables if table.rows)


def advice_table(matrix: Matrix) -> Table:
    """Return sign -> illness -> what to switch on, what it costs, how sure it is."""
    rows = []
    for row in matrix.rows:
        if not row.proved:
            continue
        works = [cell for cell in row.cells if _is_worth(cell) and cell.kind != "all_but"]
        may = [] if works else [cell for cell in row.cells if _may_work(cell) and cell.kind != "all_but"]
        ranked, before = sorted(works or may, key=_surest_first), "perhaps " if may else ""
        signs = ", ".join(sign.metric for sign in row.signs) or NOTHING
        for cell in ranked[:_MOST_ADVICE]:
            names = before + " + ".join(cell.cures)
            rows.append((signs, row.illness, names, *_cost(matrix, row, cell), _how_sure(row, cell)))
        if not ranked:
            is_tried = any(cell.effect for cell in row.cells)
            answer = "nothing tried is shown to help" if is_tried else "no cure has been tried yet"
            rows.append((signs, row.illness, answer, *3 * (NOTHING,), _how_sure(row, None)))
    return Table(
        "From the sign to the cure",
        ("sign", "probable illness", "switch on", "side effect", "time", "memory", "damage undone, how sure"),
        tuple(rows),
        (
            f"The sign is a metric of the run. Each illness has at most {_MOST_ADVICE} cures here that undo "
            f"{NOTABLE:.0%} or more, the surest first. The study of the illness, {matrix.folder}/ILLNESS.yaml, has the "
            "keys that a cure sets.",
            "perhaps: no cure of this illness is shown to work, and the interval of this one alone excludes 0.",
            "Side effect: on the healthy model, in the metric's unit. Time of a step and peak memory: relative to it.",
            _CLOCK,
        ),
        essential=3,
    )


def illness_table(matrix: Matrix) -> Table:
    """Return the proof of each illness."""
    rows = tuple(
        (
            row.illness,
            describe_damage(row),
            "missing runs" if row.damage is None else "proved" if row.proved else UNPROVED,
            NOTHING
            if row.damage is None or row.damage.p_value is None
            else format_p(row.damage.p_value, row.rule.alpha),
            describe_stable(row.healthy),
            describe_stable(row.sick),
            "; ".join([*(f"{sign.metric} {sign.text}" for sign in row.signs), *_notes(row)]) or NOTHING,
        )
        for row in matrix.rows
    )
    metrics = sorted({row.metric for row in matrix.rows})
    titles = ", ".join(f"{name} ({unit})" if unit else name for name, unit in map(name_and_unit, metrics))
    return Table(
        "Each illness proves itself first",
        ("illness", "damage", "proof", "p", "healthy stable", "sick stable", "signs and notes"),
        rows,
        (
            f"Damage: sick minus healthy in {titles}, paired by seed, with its interval. A failed run "
            "counts with its last value, but with none worse than its untrained model's.",
            "A sign leads if it left the range of the healthy runs, in all sick runs and for good, before the loss.",
            FAMILIES,
            *filter(None, (describe_error(matrix),)),
        ),
        essential=4,
    )


def share_table(matrix: Matrix) -> Table:
    """Return the matrix itself: the share of the damage that each single cure undoes."""
    rows = []
    for row in matrix.rows:
        alone = row.alone()
        cells = [*(alone.get(cure) for cure in matrix.cures), *(row.everything for _ in matrix.all_column)]
        rows.append((row.illness, *(NOTHING if cell is None else _mark_recommended(row, cell) for cell in cells)))
    return Table(
        "Share of the damage undone by each cure",
        ("illness", *matrix.cures, *matrix.all_column),
        tuple(rows),
        (
            "(sick - cured) / (sick - healthy), paired by seed. 100 %: as good as healthy. 0 %: as sick as without. In "
            "brackets Fieller's interval. No entry: not tried.",
            f"cures: {CURED:.0%} or more by estimate, and shown to exceed {HALF:.0%}; helps: shown to exceed 0; "
            f"harms: shown to be less than 0; none: shown to lie within ±{HALF:.0%}; unclear: none of these is shown.",
            f"{RECOMMENDED}: a source names the cure against this illness; the table of recommendations has it.",
            "2/3 stable: runs that neither diverged nor failed to learn by the study's rule, and the exact interval of "
            "their share. Named where some failed.",
        ),
        figure="matrix",
    )


def recommendation_table(matrix: Matrix) -> Table:
    """Return which cures sources recommend, beside what is shown."""
    rows = []
    for row in matrix.rows:
        alone = row.alone()
        for one in row.recommendations or ():
            effect = alone[one.cure].decisive
            seen = "not run yet" if effect is None else _SEEN.get(effect.verdict, "not shown")
            verdict = NOTHING if effect is None else str(effect.verdict)
            rows.append((row.illness, one.cure, one.source, describe_share(effect), verdict, seen))
    return Table(
        "What is recommended, and what is seen",
        ("illness", "cure", "recommended by", "share undone", "verdict", "here"),
        tuple(rows),
        (
            "seen: the cure is shown to work here. not seen: it is shown not to. not shown: neither is. A small "
            "model does not refute what a source says of another size or task.",
        ),
        essential=4,
    )


def stability_table(matrix: Matrix) -> Table:
    """Return stable runs and recovery of every model, with intervals."""
    rows = []
    for row in matrix.rows:
        models = [("healthy", row.healthy), ("sick", row.sick)]
        models += [(f"sick + {cell.label}", cell.outcome) for cell in row.cells]
        models += [(f"healthy + {one.cure}", one.outcome) for one in row.side_effects]
        for model, outcome in models:
            if outcome.survival.total:
                recovery = format_recovery(outcome.recovery, outcome.is_recovery_known)
                spiked = f"{outcome.recovery.spiked} of {outcome.survival.total}"
                rows.append((row.illness, model, describe_stable(outcome), spiked, recovery))
    return Table(
        "Stable runs and time to recover",
        ("illness", "model", "stable", "spiked", "recovery"),
        tuple(rows),
        (
            "stable: runs that neither diverged nor failed to learn, of all with a result, and the exact interval of "
            "their share (Clopper and Pearson).",
            "spiked: runs with a spike of the training loss. recovery: optimiser steps until it is back, the longest "
            "of each run; geometric mean over the runs that recovered, with its t interval.",
        ),
    )


def combination_table(matrix: Matrix) -> Table:
    """Return the cells of several cures, and of all but one."""
    rows = tuple(
        (
            row.illness,
            cell.label,
            describe_share(cell.decisive),
            str(cell.decisive.verdict) if cell.decisive else NOTHING,
            _describe_p(cell),
            describe_stable(cell.outcome),
            _describe_note(cell) if cell.decisive else f"{len(cell.missing)} runs missing",
        )
        for row in matrix.rows
        for cell in row.cells
        if cell.kind != "alone"
    )
    return Table(
        "Cures together, and all but one",
        ("illness", "cures", "share undone", "verdict", "p", "stable", "note"),
        rows,
        ("`all but X` below `all` means that X is missed when the others are there.",),
        essential=4,
    )


def side_effect_table(matrix: Matrix) -> Table:
    """Return what each cure does to a healthy model, and its cost."""
    rows = tuple(
        (
            one.cure,
            describe_side_effect(one),
            str(one.effect.text) if one.effect else f"{len(one.missing)} runs missing",
            describe_stable(one.outcome),
            describe_time(one.time),
            describe_cost(one.memory),
            ", ".join(one.studies),
        )
        for one in sorted(matrix.side_effects, key=lambda one: one.cure)
    )
    return Table(
        "Side effects and cost on the healthy model",
        ("cure", "effect", "verdict", "stable", "time of a step", "peak memory", "healthy model of"),
        rows,
        (
            "Effect: with the cure minus without, in the primary metric's unit, paired by seed. A cure that the "
            "healthy model has already is not measured.",
            "Time and memory: medians of runs, relative to the healthy model.",
            _CLOCK,
        ),
        essential=6,
    )


def fresh_table(matrix: Matrix) -> Table:
    """Return the repeated cells on the first and on fresh seeds."""
    cells = matrix.repeated
    rows = tuple(
        (
            illness,
            cell.label,
            "by its study" if cell.is_named else "as strong",
            describe_share(cell.effect),
            str(cell.effect.verdict) if cell.effect else NOTHING,
            describe_share(cell.fresh),
            str(cell.fresh.verdict) if cell.fresh else NOTHING,
            cell.agreement,
        )
        for illness, cell in cells
    )
    return Table(
        "Cells repeated on fresh seeds",
        ("illness", "cure", "chosen", "share undone", "verdict", "on fresh seeds", "verdict there", "verdicts"),
        rows,
        (
            describe_fresh(matrix),
            "as strong: by the first seeds alone, which show that the cure does most. by its study: named beforehand, "
            "whatever the first seeds show.",
            "decide: the first seeds leave the cell unclear, and the fresh ones do not. Its verdict is that of the "
            "fresh seeds. Such a cell has had two chances of a false verdict.",
        ),
    )


def missing_table(matrix: Matrix) -> Table:
    """Return the runs without a result, by study."""
    rows = []
    for name, runs in matrix.missing.items():
        seeds: dict[str, list[str]] = {}
        for run in runs:
            arm, _, seed = run.rpartition("-seed")
            seeds.setdefault(arm, []).append(seed)
        rows.append((name, str(len(runs)), ", ".join(f"{arm} ({' '.join(each)})" for arm, each in seeds.items())))
    return Table("Missing runs", ("study", "runs", "arms (seeds)"), tuple(rows), essential=2)


def _is_worth(cell: Cell) -> bool:
    """Whether a cell is shown to undo a share that is worth a switch."""
    effect = cell.decisive
    if effect is None or effect.share is None:
        return False
    return effect.verdict in _WORKS and effect.share.estimate >= NOTABLE


def _may_work(cell: Cell) -> bool:
    """Whether a cell seems to undo such a share, and only the correction for the others stands against it."""
    effect = cell.decisive
    if effect is None or effect.share is None or effect.verdict is not CureVerdict.UNCLEAR:
        return False
    return effect.share.estimate >= NOTABLE and effect.share.interval.low > 0


def _describe_p(cell: Cell) -> str:
    share = None if cell.decisive is None else cell.decisive.share
    return NOTHING if share is None or share.p_adjusted is None else f"{share.p_adjusted:.2g}"


def _mark_recommended(row: Row, cell: Cell) -> str:
    is_recommended = cell.kind == "alone" and row.recommends(cell.cures[0])
    return f"{describe_cell(cell)} {RECOMMENDED}" if is_recommended else describe_cell(cell)


def _notes(row: Row) -> tuple[str, ...]:
    if row.damage is None:
        return (f"{len(row.missing)} runs missing",)
    return (row.damage.note,) if row.damage.note else ()


def _describe_note(cell: Cell) -> str:
    note = cell.decisive.note if cell.decisive else ""
    return "; ".join(filter(None, ("on fresh seeds" if cell.is_decided_afresh else "", note)))


def _surest_first(cell: Cell) -> tuple[bool, int, float]:
    """Return what sorts cures before helps, fewer switches before more, and larger shares before smaller ones."""
    effect = cell.decisive
    assert effect is not None and effect.share is not None, "it is ranked"
    return effect.verdict is not CureVerdict.CURES, len(cell.cures), -effect.share.estimate


def _cost(matrix: Matrix, row: Row, cell: Cell) -> tuple[str, str, str]:
    """Return side effect, time and memory of a single cure, on the healthy model of the illness."""
    if len(cell.cures) > 1:
        return ("see its parts", NOTHING, NOTHING)
    one = find_side_effect(matrix, cell.cures[0], row.illness)
    if one is None or one.effect is None or one.effect.centre is None:
        return ("not measured", NOTHING, NOTHING)
    return (f"{format_signed(one.effect.centre)} {one.effect.text}", describe_time(one.time), describe_cost(one.memory))


def _how_sure(row: Row, cell: Cell | None) -> str:
    if cell is None:
        return f"damage {describe_damage(row)}, {len(row.seeds)} seeds"
    again = f"; fresh seeds {cell.agreement}" if cell.agreement and not cell.is_decided_afresh else ""
    seeds = cell.fresh.seeds if cell.fresh and cell.is_decided_afresh else row.seeds
    return f"{describe_cell(cell)}; {len(seeds)} seeds{again}"
