"""Computes main effects and two-way interactions of a study whose arms are combinations of factor levels.

A contrast compares one level of a factor with another: on with off for a switch, each level with the first for other
factors. Per seed, from the values y of the arms at one of the two levels:

    main effect of A       = mean of y at A's level - mean of y at A's other level
    interaction of A and B = effect of A at B's level - effect of A at B's other level, averaged over the other factors
                           = 2 (mean of y where A and B agree - mean of y where they do not)

so an interaction of 0 means that the effects add up. Differences are paired by seed. Over seeds they get interval, p
and verdict as in `effects`, as one family. In a fractional factorial a contrast contains the effects that are aliased
with it. If a part of a design varies one factor at a time, a contrast of one of its factors takes the arms with the
others at the reference. A level that lost more runs cannot be the better one, like an arm.
Source: Box, Hunter and Hunter, Statistics for Experimenters, chapter 5.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from types import MappingProxyType
from typing import NamedTuple

from lightning_moevlm.study.declare.designs.design import Design
from lightning_moevlm.study.declare.factors import OFF, ON, FactorLevel
from lightning_moevlm.study.statistics.effects import Effect, Lost, compare_paired, judge_family
from lightning_moevlm.study.statistics.verdict import Rule, Sides

Levels = Mapping[str, Mapping[str, str]]
_ROUNDING = 1e-14  # relative, of sums in fp64
_ALONE = ("one_in", "leave_one_out")  # designs that vary one factor at a time


class Contrast(NamedTuple):
    """A level of a factor compared with another one, by names."""

    factor: str
    level: str
    other: str

    @property
    def is_switch(self) -> bool:
        """Whether it compares on with off."""
        return (self.level, self.other) == (ON, OFF)

    @property
    def name(self) -> str:
        """The name of a switch; another factor's with the level."""
        return self.factor if self.is_switch else f"{self.factor} {self.level}"

    @property
    def other_text(self) -> str:
        """The other level, with its factor unless that is a switch."""
        return self.other if self.is_switch else f"{self.factor} {self.other}"

    def sign(self, levels: Mapping[str, str]) -> int:
        """Return +1 for an arm at the level, -1 for one at the other, 0 for one at a further level."""
        return {self.level: 1, self.other: -1}.get(levels[self.factor], 0)


@dataclass(frozen=True)
class FactorEffect:
    """A main effect (one contrast) or an interaction (two)."""

    contrasts: tuple[Contrast, ...]
    effect: Effect
    """Level minus other, in the metric's unit."""

    @property
    def factors(self) -> tuple[str, ...]:
        """The factors' names."""
        return tuple(contrast.factor for contrast in self.contrasts)

    @property
    def name(self) -> str:
        """The contrasts, joined by x."""
        return " x ".join(contrast.name for contrast in self.contrasts)


@dataclass(frozen=True)
class Crossing:
    """The contrasts of a design, and the level of each factor in each arm."""

    contrasts: tuple[Contrast, ...]
    """One or more per factor, in order."""
    levels: Levels
    """By arm and factor."""
    alone: tuple[frozenset[str], ...] = ()
    """Groups of factors of which at most one leaves its reference at a time."""
    reference: Mapping[str, str] = field(default_factory=dict)
    """Level of every factor at the design's first point."""

    def terms(self) -> list[tuple[Contrast, ...]]:
        """Return every main effect, then every two-way interaction that the design can estimate."""
        pairs = [(a, b) for a, b in combinations(self.contrasts, 2) if a.factor != b.factor]
        crossed = [(a, b) for a, b in pairs if not any({a.factor, b.factor} <= group for group in self.alone)]
        return [*((contrast,) for contrast in self.contrasts), *crossed]

    def signs(self, term: tuple[Contrast, ...]) -> dict[str, int]:
        """Return the side of a term, +1 or -1, of each arm that has one."""
        mine = {contrast.factor for contrast in term}
        still = {factor for group in self.alone if group & mine for factor in group - mine}
        signs = {
            arm: math.prod(contrast.sign(levels) for contrast in term)
            for arm, levels in self.levels.items()
            if all(levels[factor] == self.reference[factor] for factor in still)
        }
        return {arm: sign for arm, sign in signs.items() if sign}


def find_crossing(design: Design | None, arms: Mapping[str, Sequence[FactorLevel]]) -> Crossing | None:
    """Return the contrasts of a design; None if it crosses no factors.

    Args:
        design: The design that made the arms; None if they were listed.
        arms: The levels of every arm.
    """
    if design is None or design.kind in (*_ALONE, "cures") or len(design.factors) < 2:
        return None
    contrasts = tuple(
        contrast
        for factor in design.factors
        for contrast in (
            [Contrast(factor.name, ON, OFF)]
            if factor.is_switch
            else [Contrast(factor.name, level.name, factor.levels[0].name) for level in factor.levels[1:]]
        )
    )
    return Crossing(
        contrasts,
        {arm: {here.factor: here.level for here in levels} for arm, levels in arms.items()},
        tuple(frozenset(factor.name for factor in part.factors) for part in design.parts if part.kind in _ALONE),
        {here.factor: here.level for here in design.points[0].levels},
    )


def factor_effects(
    values: Mapping[str, Mapping[int, float]],
    crossing: Crossing,
    seeds: tuple[int, ...],
    rule: Rule,
    lost: Mapping[str, Lost] = MappingProxyType({}),
    failed: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> tuple[FactorEffect, ...]:
    """Return every main effect, then every two-way interaction.

    Args:
        values: Final value of the metric by arm and seed, of a failed run the capped one. A contrast leaves out a seed
            in which one of its arms has no finite value: it would not be balanced.
        crossing: Contrasts and levels.
        seeds: All seeds of the study.
        rule: How verdicts are reached.
        lost: Runs without a value, by arm; none of an arm that is absent.
        failed: Seeds whose run failed, by arm, likewise.

    Raises:
        ValueError: An arm lacks a factor, or a factor never changes.
    """
    _refuse_holes(crossing)
    effects = {}
    for term in crossing.terms():
        signs = crossing.signs(term)
        if len(set(signs.values())) < 2:
            continue  # the fraction holds the two switches together: there is nothing to compare
        whole = [s for s in seeds if all(math.isfinite(values.get(arm, {}).get(s, math.nan)) for arm in signs)]
        contrast = {s: len(term) * _contrast({arm: values[arm][s] for arm in signs}, signs) for s in whole}
        mine, theirs = (_lost_by(sign, signs, lost) for sign in (1, -1))
        zero = dict.fromkeys(whole, 0.0)
        my_failed, their_failed = (_failed_of(sign, signs, failed) for sign in (1, -1))
        effects[term] = compare_paired(
            contrast,
            zero,
            seeds,
            rule,
            mine,
            theirs,
            sides=_sides(term),
            arm_failed=my_failed,
            baseline_failed=their_failed,
        )
    judged = judge_family({str(term): effect for term, effect in effects.items()}, rule)
    return tuple(FactorEffect(term, judged[str(term)]) for term in effects)


def _sides(term: tuple[Contrast, ...]) -> Sides:
    if len(term) == 1:
        [only] = term
        if only.is_switch:
            return Sides("runs with it on", "runs with it off")
        return Sides(f"runs with {only.name}", f"runs with {only.other_text}")
    if all(contrast.is_switch for contrast in term):
        return Sides("runs with both on or both off", "runs with one of the two on")
    return Sides("runs with both levels or neither", "runs with one of the two levels")


def _contrast(values: Mapping[str, float], signs: Mapping[str, int]) -> float:
    """Return the mean of the values signed +1 minus the mean of those signed -1."""
    above = [value for arm, value in values.items() if signs[arm] > 0]
    below = [value for arm, value in values.items() if signs[arm] < 0]
    difference = sum(above) / len(above) - sum(below) / len(below)
    # A switch that changes nothing leaves what rounding makes of the sums, and tests of ranks would take its signs.
    return difference if abs(difference) > _ROUNDING * max(map(abs, values.values())) else 0.0


def _lost_by(sign: int, signs: Mapping[str, int], lost: Mapping[str, Lost]) -> Lost:
    """Return the runs that the arms of one sign lost."""
    mine = [lost[arm] for arm, own in signs.items() if own == sign and arm in lost]
    return Lost(*(sum(counts) for counts in zip(*mine, strict=True)))


def _failed_of(sign: int, signs: Mapping[str, int], failed: Mapping[str, Collection[int]]) -> set[int]:
    """Return the seeds in which a run of the arms of one sign failed."""
    return {seed for arm, own in signs.items() if own == sign for seed in failed.get(arm, ())}


def _refuse_holes(crossing: Crossing) -> None:
    factors = tuple(dict.fromkeys(contrast.factor for contrast in crossing.contrasts))
    for arm, levels in crossing.levels.items():
        if missing := [factor for factor in factors if factor not in levels]:
            raise ValueError(f"arm {arm!r} has no level of {', '.join(missing)}; give every arm one")
    for factor in factors:
        if len({levels[factor] for levels in crossing.levels.values()}) < 2:
            raise ValueError(f"factor {factor!r} is the same in every arm; a factor has two levels or more")
