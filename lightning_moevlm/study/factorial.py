"""Main effects and two-way interactions of a study whose arms are combinations of switches.

Every factor is off (-1) or on (+1) in an arm. Per seed, from the values y of all arms:

    main effect of A       = mean of y where A is on - mean of y where A is off
    interaction of A and B = effect of A with B on - effect of A with B off, averaged over the other factors
                           = 2 (mean of y where A and B agree - mean of y where they do not)

so an interaction of 0 means that the switches add up. Differences of one seed are paired, as everywhere; over seeds
they get the interval, p and word of `effects`, as one family. In a fractional factorial the same contrasts hold the
effects that the design aliases with them. A factor whose side lost more runs is not the better one, as an arm is not.
Source: Box, Hunter and Hunter, Statistics for Experimenters, chapter 5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

from lightning_moevlm.study.effects import Effect, Lost, as_family, paired_effect
from lightning_moevlm.study.verdict import Rule, Sides

Levels = Mapping[str, Mapping[str, bool]]
_ROUNDING = 1e-14  # relative, of sums in fp64
_SIDES = {
    1: Sides("runs with it on", "runs with it off"),
    2: Sides("runs with both on or both off", "runs with one of the two on"),
}


@dataclass(frozen=True)
class FactorEffect:
    """A main effect (one factor) or an interaction (two); effect: in the metric's unit, on minus off."""

    factors: tuple[str, ...]
    effect: Effect

    @property
    def name(self) -> str:
        """The factors, joined by x."""
        return " x ".join(self.factors)


def factor_effects(
    values: Mapping[str, Mapping[int, float]],
    levels: Levels,
    seeds: tuple[int, ...],
    rule: Rule,
    lost: Mapping[str, Lost] = MappingProxyType({}),
) -> tuple[FactorEffect, ...]:
    """Return every main effect, then every two-way interaction.

    Args:
        values: Final value of the metric by arm and seed. A seed in which any arm has no finite value is left out of
            all of them: its contrasts would not be balanced.
        levels: Whether each factor is on, by arm.
        seeds: All seeds of the study.
        rule: How verdicts are reached.
        lost: Runs that diverged or crashed, by arm; none of an arm that is absent.

    Raises:
        ValueError: an arm lacks a factor, or a factor is never switched.
    """
    factors = _factors(levels)
    whole = [s for s in seeds if all(math.isfinite(values.get(arm, {}).get(s, math.nan)) for arm in levels)]
    zero = dict.fromkeys(whole, 0.0)
    terms = [(factor,) for factor in factors] + list(combinations(factors, 2))
    effects = {}
    for term in terms:
        signs = {arm: math.prod(1 if on[factor] else -1 for factor in term) for arm, on in levels.items()}
        if len(set(signs.values())) < 2:
            continue  # the fraction holds the two switches together: there is nothing to compare
        contrast = {s: len(term) * _contrast({arm: values[arm][s] for arm in levels}, signs) for s in whole}
        mine, theirs = (_lost_by(sign, signs, lost) for sign in (1, -1))
        effects[term] = paired_effect(contrast, zero, seeds, rule, mine, theirs, sides=_SIDES[len(term)])
    judged = as_family({" x ".join(term): effect for term, effect in effects.items()}, rule)
    return tuple(FactorEffect(term, judged[" x ".join(term)]) for term in effects)


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


def _factors(levels: Levels) -> tuple[str, ...]:
    factors = tuple(dict.fromkeys(factor for on in levels.values() for factor in on))
    for arm, on in levels.items():
        if missing := [factor for factor in factors if factor not in on]:
            raise ValueError(f"arm {arm!r} does not say whether {', '.join(missing)} is on; say it for every arm")
    for factor in factors:
        if len({on[factor] for on in levels.values()}) < 2:
            raise ValueError(f"factor {factor!r} is the same in every arm; a factor is on in some and off in others")
    return factors
