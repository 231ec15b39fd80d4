"""Judges whether an illness proves itself: whether the sick model is shown to be worse than the healthy one.

The damage is the paired effect of the illness on the primary metric (`effects`), failed runs with their capped values.
Runs that survive are counted beside it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_moevlm.study.statistics.cures.cure_effect import Key
from lightning_moevlm.study.statistics.effects import Effect, Lost, compare_paired, judge_family
from lightning_moevlm.study.statistics.intervals import Interval
from lightning_moevlm.study.statistics.outcomes.survival import Final, Survival
from lightning_moevlm.study.statistics.verdict import Rule, Sides, Verdict


@dataclass(frozen=True)
class Damage:
    """What an illness does to a model."""

    effect: Effect
    """Sick minus healthy, in the metric's unit."""
    healthy: Survival
    sick: Survival

    @property
    def proved(self) -> bool:
        """Whether the sick model is shown to be worse."""
        return self.effect.verdict is Verdict.HURTS

    @property
    def mean(self) -> float | None:
        """Sick minus healthy on average, in the metric's unit."""
        return self.effect.mean

    @property
    def interval(self) -> Interval | None:
        """Of the damage, in the metric's unit."""
        return self.effect.interval

    @property
    def p_value(self) -> float | None:
        """Two-sided p of "no damage", corrected over the illnesses judged together."""
        return self.effect.p_adjusted

    @property
    def note(self) -> str:
        """Limit of the judgement, failed runs and missing seeds, in words."""
        return self.effect.note


def judge_damage(healthy: Mapping[int, Final], sick: Mapping[int, Final], seeds: tuple[int, ...], rule: Rule) -> Damage:
    """Judge one illness as a single comparison; `judge_damages` corrects for the others.

    Args:
        healthy: Last value of the primary metric by seed; a seed without a result is absent.
        sick: The same with the illness.
        seeds: All seeds of the study.
        rule: How a verdict is reached.
    """
    effect = compare_paired(
        {seed: final.value for seed, final in sick.items()},
        {seed: final.value for seed, final in healthy.items()},
        seeds,
        rule,
        arm_lost=Lost(crashed=sum(seed in healthy and seed not in sick for seed in seeds)),
        baseline_lost=Lost(crashed=sum(seed in sick and seed not in healthy for seed in seeds)),
        sides=Sides("sick runs", "healthy runs"),
        arm_failed={seed for seed, final in sick.items() if final.failed},
        baseline_failed={seed for seed, final in healthy.items() if final.failed},
    )
    return Damage(effect, Survival.of(healthy), Survival.of(sick))


def judge_damages(damages: Mapping[Key, Damage], rule: Rule) -> dict[Key, Damage]:
    """Judge the illnesses of a family together, with Holm's correction if the rule asks for it.

    What chance can make of the runs of one illness is seen in its own runs: those of another tell nothing of it.
    """
    effects = {str(i): damage.effect for i, damage in enumerate(damages.values())}
    judged = judge_family(effects, rule, {name: effect.jump for name, effect in effects.items()})
    return {key: dataclasses.replace(damage, effect=judged[str(i)]) for i, (key, damage) in enumerate(damages.items())}
