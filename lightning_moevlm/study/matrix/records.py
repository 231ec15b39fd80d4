"""Records of the matrix. A row is an illness, one cure study; a column is a cure. All outputs are made from these."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lightning_moevlm.study.declare.designs.design import Recommendation
from lightning_moevlm.study.matrix.signs import SignLead
from lightning_moevlm.study.statistics.cures.cure_effect import CureEffect, CureVerdict
from lightning_moevlm.study.statistics.cures.damage import Damage
from lightning_moevlm.study.statistics.effects import Effect
from lightning_moevlm.study.statistics.outcomes.arm_stability import Recovery
from lightning_moevlm.study.statistics.outcomes.survival import Survival
from lightning_moevlm.study.statistics.verdict import Rule

CellKind = Literal["alone", "together", "all", "all_but"]


@dataclass(frozen=True)
class Outcome:
    """How the runs of one model went, of those with a result."""

    survival: Survival
    interval: tuple[float, float] | None
    """Exact, of the share of runs that survive; None without runs."""
    recovery: Recovery
    """From spikes of the training loss."""
    is_recovery_known: bool
    """Whether a run has enough points to see a spike."""


@dataclass(frozen=True)
class Cell:
    """The sick model with one cure, or with several."""

    arm: str
    kind: CellKind
    cures: tuple[str, ...]
    """Those that are on."""
    label: str
    """For people: `qk_norm`, `qk_norm + warmup`, `all`, `all but qk_norm`."""
    effect: CureEffect | None
    """None if runs of it, of the sick or of the healthy model are missing."""
    outcome: Outcome
    """Of the runs that it has."""
    missing: tuple[str, ...] = ()
    """Its runs without a result."""
    stands: bool = False
    """Whether the verdict is the same if all cells of the matrix are one family."""
    fresh: CureEffect | None = None
    """The same on fresh seeds; None if it was not repeated."""
    is_named: bool = False
    """Whether the study named it for fresh seeds beforehand."""

    @property
    def is_decided_afresh(self) -> bool:
        """Whether the fresh seeds decide what the first ones leave unclear, of a cell that was named for them."""
        if not self.is_named or self.effect is None or self.effect.share is None or self.fresh is None:
            return False
        return self.effect.verdict is CureVerdict.UNCLEAR and self.fresh.verdict is not CureVerdict.UNCLEAR

    @property
    def decisive(self) -> CureEffect | None:
        """What its verdict is taken from: the first seeds, or the fresh ones where these decide."""
        return self.fresh if self.is_decided_afresh else self.effect

    @property
    def agrees(self) -> bool | None:
        """Whether the fresh seeds give the same verdict; None if it was not repeated."""
        if self.effect is None or self.fresh is None:
            return None
        return self.effect.verdict is self.fresh.verdict

    @property
    def agreement(self) -> str:
        """The same in words; a cure that works on both may work better on one."""
        if self.effect is None or self.fresh is None:
            return ""
        if self.is_decided_afresh:
            return "decide"
        if self.agrees:
            return "agree"
        both = {self.effect.verdict, self.fresh.verdict} == {CureVerdict.CURES, CureVerdict.HELPS}
        return "differ, both work" if both else "differ"


class StepTime(NamedTuple):
    """The time of a step with a cure."""

    more: float
    """Relative to the healthy model's, minus 1."""
    clock: Literal["wall", "CPU"]
    """CPU if the wall times of runs of one arm differ too much to be compared."""


@dataclass(frozen=True)
class SideEffect:
    """A cure on a healthy model."""

    cure: str
    healthy: frozenset[str]
    """Digests of the healthy runs, as the next: studies that share them measure the same."""
    cured: frozenset[str]
    studies: tuple[str, ...]
    effect: Effect | None
    """Cured minus healthy in the primary metric's unit; failed runs with capped values. None if runs are missing."""
    outcome: Outcome
    """Of the model with the cure."""
    time: StepTime | None
    """None if it is not known, or if other work ran beside some runs."""
    memory: float | None
    """Peak memory relative to the healthy model's, minus 1."""
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One illness."""

    illness: str
    """Name of its study."""
    question: str
    source: str
    metric: str
    """The primary one."""
    rule: Rule
    seeds: tuple[int, ...]
    spends: str
    """Budget of a run in words."""
    damage: Damage | None
    """None if runs of the sick or the healthy model are missing."""
    healthy: Outcome
    sick: Outcome
    signs: tuple[SignLead, ...]
    recommendations: tuple[Recommendation, ...] | None
    """Cures that a source names against it; None: the study does not say."""
    cells: tuple[Cell, ...]
    side_effects: tuple[SideEffect, ...]
    missing: tuple[str, ...]
    """Runs of the healthy and the sick model without a result."""

    @property
    def proved(self) -> bool:
        """Whether the illness has shown itself."""
        return self.damage is not None and self.damage.proved

    @property
    def everything(self) -> Cell | None:
        """The cell of all cures together; None if the study does not try that."""
        return next((cell for cell in self.cells if cell.kind == "all"), None)

    def recommends(self, cure: str) -> bool:
        """Whether a source names the cure against this illness."""
        return any(one.cure == cure for one in self.recommendations or ())

    def alone(self) -> dict[str, Cell]:
        """Return the cells of single cures, by cure."""
        return {cell.cures[0]: cell for cell in self.cells if cell.kind == "alone"}


@dataclass(frozen=True)
class Matrix:
    """Everything, after the corrections for several comparisons."""

    name: str
    """Of the folder."""
    folder: str
    """As the command takes it."""
    rows: tuple[Row, ...]
    side_effects: tuple[SideEffect, ...]
    """One per cure and healthy model, over all studies."""
    part: str = ""
    """Which seeds it is of, in words; empty for all."""
    cures: tuple[str, ...] = field(init=False)
    """The columns: those that most illnesses have first."""

    def __post_init__(self) -> None:
        counts: dict[str, int] = {}
        for row in self.rows:
            for cell in row.cells:
                for cure in cell.cures if cell.kind == "alone" else ():
                    counts[cure] = counts.get(cure, 0) + 1
        object.__setattr__(self, "cures", tuple(sorted(counts, key=lambda cure: -counts[cure])))

    @property
    def all_column(self) -> tuple[str, ...]:
        """The name of the column of all cures together, if a study tries that."""
        return ("all",) if any(row.everything for row in self.rows) else ()

    @property
    def repeated(self) -> tuple[tuple[str, Cell], ...]:
        """The cells that were repeated on fresh seeds, each with its illness."""
        return tuple((row.illness, cell) for row in self.rows for cell in row.cells if cell.fresh is not None)

    @property
    def by_healthy_model(self) -> tuple[Mapping[str, SideEffect], ...]:
        """The side effects by cure, of each healthy model."""
        models: dict[frozenset[str], dict[str, SideEffect]] = {}
        for one in self.side_effects:
            models.setdefault(one.healthy, {})[one.cure] = one
        return tuple(models.values())

    @property
    def missing(self) -> Mapping[str, tuple[str, ...]]:
        """Names of runs without a result, by study; studies that have all are absent."""
        lacking = {
            row.illness: (
                *row.missing,
                *(name for cell in row.cells for name in cell.missing),
                *(name for one in row.side_effects for name in one.missing if name not in row.missing),
            )
            for row in self.rows
        }
        return {name: runs for name, runs in lacking.items() if runs}
