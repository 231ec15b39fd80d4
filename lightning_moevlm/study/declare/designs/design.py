"""Makes designs: pure functions from factors to the combinations of levels that are trained.

`design_keys` describes each design. The first point is the reference, which becomes the study's baseline unless the
file names another. A point's name lists its differences from the reference: `router_z`, `no_router_z`,
`qk_norm__router_z__lr_3e_4`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from lightning_moevlm.study.declare.designs.fraction import Fraction
from lightning_moevlm.study.declare.factors import OFF, ON, Factor, FactorLevel

Kind = Literal[
    "one_in",
    "leave_one_out",
    "factorial",
    "fractional_factorial",
    "grid",
    "lr_sensitivity",
    "size_ladder",
    "product",
    "cures",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
REFERENCE = "baseline"
"""Name of the arm at the reference."""

_JOINT = "__"  # no name of a factor or level holds two in a row


@dataclass(frozen=True)
class Point:
    """One combination."""

    name: str  # "" for the reference
    levels: tuple[FactorLevel, ...]  # one per factor, in the design's order


class Recommendation(NamedTuple):
    """A cure that a source names against the illness."""

    cure: str
    source: str


class CureStudy(NamedTuple):
    """What a cure study says beside its arms."""

    signs: tuple[str, ...]  # metrics that show the illness
    fresh_seeds: tuple[int, ...]  # for the strongest cells of the matrix, trained again
    fresh_arms: tuple[str, ...]  # trained on them in any case
    recommendations: tuple[Recommendation, ...] | None = None  # None: the study does not say; (): there are none


@dataclass(frozen=True)
class Design:
    """Points and the factors that they vary."""

    kind: Kind  # name of the design
    factors: tuple[Factor, ...]  # in order, with the ladder that the design itself brings
    points: tuple[Point, ...]  # the reference first
    fraction: Fraction | None = None  # alias structure of a fractional factorial
    parts: "tuple[Design, ...]" = ()  # of a product
    cure_study: CureStudy | None = None  # of the design `cures`

    @property
    def fractions(self) -> tuple[Fraction, ...]:
        """All fractions in it, those of its parts included."""
        own = (self.fraction,) if self.fraction else ()
        return (*own, *(fraction for part in self.parts for fraction in part.fractions))

    def factor(self, name: str) -> Factor:
        """Return the factor of that name."""
        return next(factor for factor in self.factors if factor.name == name)

    def describe(self, point: Point) -> str:
        """Return a point in words: its levels that differ from the reference."""
        words = [
            _describe_level(self.factor(here.factor), here.level).rstrip(".") for here in self.changed_levels(point)
        ]
        return "; ".join(words) + "." if words else f"The reference: {self._describe_reference()}."

    def changed_levels(self, point: Point) -> tuple[FactorLevel, ...]:
        """Return the levels of a point that differ from the reference."""
        pairs = zip(point.levels, self.points[0].levels, strict=True)
        return tuple(here for here, usual in pairs if here != usual)

    def _describe_reference(self) -> str:
        on = [here.factor for here in self.points[0].levels if here.level == ON]
        off = [here.factor for here in self.points[0].levels if here.level == OFF]
        rest = [f"{here.factor} {here.level}" for here in self.points[0].levels if here.level not in (ON, OFF)]
        groups = [f"{', '.join(names)} {word}" for names, word in ((on, ON), (off, OFF)) if names]
        return "; ".join([*groups, *rest])


def one_in(factors: tuple[Factor, ...]) -> Design:
    """Return the reference and every point that differs from it in one factor."""
    reference = tuple(FactorLevel(factor.name, factor.levels[0].name) for factor in factors)
    points = [Point("", reference)]
    for i, factor in enumerate(factors):
        for level in factor.levels[1:]:
            here = FactorLevel(factor.name, level.name)
            points.append(Point(_name_part(factor, here), (*reference[:i], here, *reference[i + 1 :])))
    return Design("one_in", factors, tuple(points))


def leave_one_out(factors: tuple[Factor, ...]) -> Design:
    """Return all switches on, and every point with one of them off. Expects switches."""
    reference = tuple(FactorLevel(factor.name, ON) for factor in factors)
    points = [Point("", reference)]
    for i, factor in enumerate(factors):
        off = FactorLevel(factor.name, OFF)
        points.append(Point(f"no_{factor.name}", (*reference[:i], off, *reference[i + 1 :])))
    return Design("leave_one_out", factors, tuple(points))


def crossing(kind: Kind, factors: tuple[Factor, ...]) -> Design:
    """Return all combinations, the last factor changing fastest."""
    every = itertools.product(*(factor.levels for factor in factors))
    combinations = (
        tuple(FactorLevel(factor.name, level.name) for factor, level in zip(factors, levels, strict=True))
        for levels in every
    )
    return Design(kind, factors, tuple(_point(factors, levels) for levels in combinations))


def fractional(factors: tuple[Factor, ...], fraction: Fraction) -> Design:
    """Return the combinations of a fraction. Expects switches, in the fraction's order."""
    points = tuple(
        _point(
            factors, tuple(FactorLevel(factor.name, ON if on else OFF) for factor, on in zip(factors, run, strict=True))
        )
        for run in fraction.runs()
    )
    return Design("fractional_factorial", factors, points, fraction)


def product(parts: tuple[Design, ...]) -> Design:
    """Return every point of each part with every point of the others. Expects parts that share no factor."""
    points = tuple(
        Point(
            _JOINT.join(point.name for point in some if point.name),
            tuple(level for point in some for level in point.levels),
        )
        for some in itertools.product(*(part.points for part in parts))
    )
    return Design("product", tuple(factor for part in parts for factor in part.factors), points, parts=parts)


def num_combinations(factors: tuple[Factor, ...]) -> int:
    """Return the number of combinations."""
    return math.prod(len(factor.levels) for factor in factors)


def _point(factors: tuple[Factor, ...], levels: tuple[FactorLevel, ...]) -> Point:
    words = [_name_part(factor, level) for factor, level in zip(factors, levels, strict=True)]
    return Point(_JOINT.join(word for word in words if word), levels)


def _describe_level(factor: Factor, level: str) -> str:
    description = factor.level(level).description
    if factor.is_switch:
        return description or f"{'with' if level == ON else 'without'} {factor.description or factor.name}"
    return description or f"{factor.name} {level}"


def _name_part(factor: Factor, here: FactorLevel) -> str:
    """Return a level's part of a point's name: a switch by its name if it is on, else factor and level."""
    if factor.is_switch:
        return factor.name if here.level == ON else ""
    return f"{factor.name}_{here.level}"
