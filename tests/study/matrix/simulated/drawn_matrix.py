"""Matrices of runs that are drawn, not trained, with shares that are known; judged as those of real runs are.

Noise of a run has deviation 1. A run of the sick model ends `damage` above the healthy one. It fails with a chance of
`rate`, and then ends three times as far above. A cure with the share s takes s of either away. So s is the share undone
of the mean capped values too.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from lightning_moevlm.study.matrix.judge_matrix import make_matrix
from lightning_moevlm.study.matrix.records import Cell, Matrix, Outcome, Row, SideEffect
from lightning_moevlm.study.matrix.strongest import find_strongest
from lightning_moevlm.study.statistics.cures.cure_effect import CureVerdict, judge_cell
from lightning_moevlm.study.statistics.cures.damage import judge_damage
from lightning_moevlm.study.statistics.outcomes.arm_stability import summarise_recovery
from lightning_moevlm.study.statistics.outcomes.survival import Final, Survival
from lightning_moevlm.study.statistics.verdict import Rule

NO_CURE = (0.0,) * 12
MIXED = (*(0.0,) * 5, *(0.5,) * 3, *(1.0,) * 3, -1.0)
"""Per illness: five cures that do nothing, three that undo half, three that undo all, one that doubles the damage."""

_FAILED = 3.0  # times the damage
_FAR = 20.0  # a healthy run that fails ends twice this above the others
_OUTCOME = Outcome(Survival(0, 0), None, summarise_recovery([], 0.05), False)
Finals = dict[int, Final]


@dataclass(frozen=True)
class World:
    """What is true of the illnesses and cures of a matrix."""

    seeds: int
    damages: tuple[float, ...] = (40.0,) * 10
    """By illness, in deviations of the noise; 0: it is no illness."""
    shares: tuple[float, ...] = NO_CURE
    """By cure, the same against every illness."""
    rates: tuple[float, ...] = (0.0,)
    """Chances that a sick run fails, of the illnesses in turn."""
    freedom: float = float("inf")
    """Of the noise: Student's t; its tails are heavy for few degrees."""
    rule: Rule = field(default_factory=lambda: Rule("lower", 0.05, "t", "holm"))

    def noise(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return noise with the deviation 1."""
        if np.isinf(self.freedom):
            return rng.normal(size=count)
        return rng.standard_t(self.freedom, size=count) / np.sqrt(self.freedom / (self.freedom - 2))

    def finals(self, rng: np.random.Generator, left: float, rate: float, seeds: range) -> Finals:
        """Return runs that end `left` above the healthy model, or three times as far if they fail."""
        failed = rng.random(len(seeds)) < rate
        values = left * np.where(failed, _FAILED, 1.0) + self.noise(rng, len(seeds))
        return {seed: Final(float(v), bool(f)) for seed, v, f in zip(seeds, values, failed, strict=True)}


def draw_matrix(rng: np.random.Generator, world: World, fresh_seeds: int = 0) -> Matrix:
    """Return a judged matrix. Two healthy models serve the illnesses in turn, as several studies share one.

    fresh_seeds: how many further seeds repeat the strongest cells; 0: none are repeated.
    """
    seeds = range(world.seeds)
    rows = _draw_rows(rng, world, seeds, {str(i): _arms(world) for i in range(len(world.damages))})
    if not fresh_seeds:
        return make_matrix("drawn", "drawn", rows, {})
    strongest = find_strongest(make_matrix("drawn", "drawn", rows, {}), frozenset(row.illness for row in rows))
    again = _draw_rows(rng, world, range(world.seeds, world.seeds + fresh_seeds), strongest)
    return make_matrix("drawn", "drawn", rows, {row.illness: row for row in again})


def draw_side_effects(rng: np.random.Generator, world: World, cures: int, rate: float) -> Matrix:
    """Return a judged matrix of cures that do nothing to two healthy models, whose runs fail with a chance of `rate`.

    A failed run ends far above the others.
    """
    seeds, rows = range(world.seeds), []
    for model in ("0", "1"):
        healthy = world.finals(rng, _FAR, rate, seeds)
        sides = []
        for cure in map(str, range(cures)):
            effect = judge_damage(healthy, world.finals(rng, _FAR, rate, seeds), tuple(seeds), world.rule).effect
            digests = frozenset({model}), frozenset({f"{model} {cure}"})
            sides.append(SideEffect(cure, *digests, (model,), effect, _OUTCOME, None, None))
        rows.append(replace(_row(model, world, seeds), side_effects=tuple(sides)))
    return make_matrix("drawn", "drawn", rows, {})


def true_share(world: World, cell: Cell) -> float:
    """Return the share that a drawn cell undoes."""
    return world.shares[int(cell.arm)]


def find_wrong(verdict: CureVerdict, damage: float, share: float) -> str:
    """Return which kind of false claim a verdict is; empty if it is none."""
    acts = verdict in (CureVerdict.CURES, CureVerdict.HELPS, CureVerdict.HARMS)
    if damage == 0:
        return "of no illness" if verdict is not CureVerdict.UNCLEAR else ""
    if acts and (share == 0 or (share < 0) is not (verdict is CureVerdict.HARMS)):
        return "acts"
    if verdict is CureVerdict.CURES and share <= 0.5:
        return "cures"
    return "none" if verdict is CureVerdict.NONE and abs(share) >= 0.5 else ""


def _arms(world: World) -> tuple[str, ...]:
    return tuple(map(str, range(len(world.shares))))


def _draw_rows(rng: np.random.Generator, world: World, seeds: range, arms: dict[str, tuple[str, ...]]) -> list[Row]:
    models = [world.finals(rng, 0.0, 0.0, seeds) for _ in range(2)]
    rows, named = [], tuple(seeds)
    for illness, own in arms.items():
        i = int(illness)
        damage, rate, healthy = world.damages[i], world.rates[i % len(world.rates)], models[i % 2]
        sick = world.finals(rng, damage, rate, seeds)
        cells = []
        for arm in own:
            cured = world.finals(rng, damage * (1 - world.shares[int(arm)]), rate, seeds)
            effect = judge_cell(healthy, sick, cured, named, world.rule)
            cells.append(Cell(arm, "alone", (arm,), arm, effect, _OUTCOME))
        found = judge_damage(healthy, sick, named, world.rule)
        rows.append(replace(_row(illness, world, seeds), damage=found, cells=tuple(cells)))
    return rows


def _row(illness: str, world: World, seeds: range) -> Row:
    return Row(
        illness=illness,
        question="",
        source="",
        metric="val/task_loss",
        rule=world.rule,
        seeds=tuple(seeds),
        spends="",
        damage=None,
        healthy=_OUTCOME,
        sick=_OUTCOME,
        signs=(),
        recommendations=None,
        cells=(),
        side_effects=(),
        missing=(),
    )
