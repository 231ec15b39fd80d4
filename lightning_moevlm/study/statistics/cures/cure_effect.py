"""Judges a cure of an illness from the share of the damage that it undoes (`share_undone`).

A cure

- cures, if it undoes 80 % or more by estimate, and is shown to undo more than half;
- helps, if it is shown to undo more than nothing;
- harms, if it is shown to undo less than nothing: the cured model is worse than the sick one;
- does none of it, if neither is shown, and the share is shown to lie between minus a half and a half.

Everything else is unclear. "Shown" means that the interval of the share says so, and the p of the same paired t-test,
corrected over the family of cells, is at most alpha. "More than nothing", "more than half" and "between" are a family
each. All tests are t-tests of undone_i - k damage_i, k a share; the study's `test` is not used.

A failed run counts with its capped value (`Final`), so a cure of divergence is seen, and one that diverges itself is
not judged by its survivors. If a model of the family failed with some seeds and not with others, chance limits p, as
in `effects`. A seed without a result in the cured model alone (a crash) takes away "cures" and "helps".
"""

import dataclasses
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import TypeVar

from lightning_moevlm.study.statistics.cures.share_undone import fieller_interval, share_undone
from lightning_moevlm.study.statistics.intervals import Interval
from lightning_moevlm.study.statistics.outcomes.survival import Final, Survival, find_jump, is_within_jump
from lightning_moevlm.study.statistics.paired_tests import chance_p, format_p, holm, p_above, paired_p
from lightning_moevlm.study.statistics.verdict import Rule

CURED = 0.8
"""The least share, by estimate, of a cure that cures."""
HALF = 0.5
"""The share that such a cure is shown to exceed, and that one that does nothing is shown not to reach."""

Key = TypeVar("Key", bound=Hashable)


class CureVerdict(StrEnum):
    """The result of a cell."""

    CURES = "cures"
    HELPS = "helps"
    NONE = "none"
    HARMS = "harms"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Share:
    """The share of the damage that a cure undoes, with what stands against three statements on it."""

    estimate: float
    interval: Interval
    p_value: float | None
    """Of "nothing is undone", two-sided; None, as the next ones, if all seeds give the same difference."""
    p_adjusted: float | None
    """Corrected over the family of cells, as the next ones."""
    p_half: float | None
    """Of "at most half is undone", doubled: its alpha is that of the two-sided interval."""
    p_half_adjusted: float | None
    p_small: float | None
    """Of "the share lies at or beyond +- a half", the greater of two one-sided tests."""
    p_small_adjusted: float | None


@dataclass(frozen=True)
class CureEffect:
    """One cure of one illness."""

    seeds: tuple[int, ...]
    """Those with a value in all three models."""
    damage: tuple[float, ...]
    """By seed, in the metric's unit; positive: the sick model is worse than the healthy one."""
    undone: tuple[float, ...]
    """By seed, likewise; positive: the cured model is better than the sick one."""
    share: Share | None
    """None if no damage is shown."""
    survival: Survival
    """Of the cured model."""
    failures: tuple[int, int, int]
    """Failed runs among the compared seeds: healthy, sick, cured."""
    jump: float
    """How far failed runs of one of the three models end from its other runs; 0 if none or all of them failed."""
    lost: int
    """Seeds in which the cured model alone has no value."""
    left_out: int
    """Seeds of the study that are not compared."""
    verdict: CureVerdict
    limit: str
    """Reason or limit of the verdict, in words."""

    @property
    def note(self) -> str:
        """Limit of the verdict, failed runs and missing seeds, in words."""
        runs, parts = self.survival, [self.limit] if self.limit else []
        if runs.failed:
            parts.append(f"{runs.failed} of {runs.total} runs failed and count with their capped value")
        if self.left_out:
            parts.append(f"{self.left_out} of {self.left_out + len(self.seeds)} seeds left out")
        return "; ".join(parts)


def judge_cell(
    healthy: Mapping[int, Final],
    sick: Mapping[int, Final],
    cured: Mapping[int, Final],
    seeds: tuple[int, ...],
    rule: Rule,
) -> CureEffect:
    """Judge a cure as a single comparison; `judge_cures` corrects for the others.

    Args:
        healthy: Last value of the primary metric by seed; a seed without a result is absent.
        sick: The same with the illness.
        cured: The same with illness and cure.
        seeds: All seeds of the study.
        rule: Direction of the metric, and alpha.
    """
    sign = 1.0 if rule.direction == "lower" else -1.0
    both = [seed for seed in seeds if seed in healthy and seed in sick]
    compared = tuple(seed for seed in both if seed in cured)
    damage = tuple(sign * (sick[seed].value - healthy[seed].value) for seed in compared)
    undone = tuple(sign * (sick[seed].value - cured[seed].value) for seed in compared)
    effect = CureEffect(
        seeds=compared,
        damage=damage,
        undone=undone,
        share=_measure(damage, undone, rule),
        survival=Survival.of(cured),
        failures=(_count(healthy, compared), _count(sick, compared), _count(cured, compared)),
        jump=max(_jump(healthy, compared), _jump(sick, compared), _jump(cured, compared)),
        lost=len(both) - len(compared),
        left_out=len(seeds) - len(compared),
        verdict=CureVerdict.UNCLEAR,
        limit="",
    )
    return _judge(effect, rule)


def judge_cures(
    cells: Mapping[Key, CureEffect],
    rule: Rule,
    unproved: Collection[Key] = (),
    jumps: Mapping[Key, float] | None = None,
) -> dict[Key, CureEffect]:
    """Judge the cells of a family together, with Holm's correction if the rule asks for it.

    Args:
        cells: The family: cures of one illness. A cell without a p counts with p = 1: no other cell's p gets smaller by
            its absence.
        rule: Direction of the metric, alpha and correction.
        unproved: Cells of illnesses whose damage is not shown after a correction of its own: they have no share.
        jumps: What chance can make of the runs of each cell; None: the largest jump of any cell.
    """
    judged = {
        key: _judge(dataclasses.replace(cell, share=None), rule) if key in unproved else cell
        for key, cell in cells.items()
    }
    if rule.correction == "none":
        return judged
    if jumps is None:
        jumps = dict.fromkeys(cells, max((cell.jump for cell in cells.values()), default=0.0))
    judged = {key: _limit_p(cell, jumps[key]) for key, cell in judged.items()}
    shares = _correct([cell.share for cell in judged.values()])
    return {
        key: _judge(dataclasses.replace(cell, share=share), rule)
        for (key, cell), share in zip(judged.items(), shares, strict=True)
    }


def _correct(shares: Sequence[Share | None]) -> list[Share | None]:
    """Return the shares of a family with their corrected p; one that is not known counts with p = 1."""
    plain, half, small = (
        holm({str(i): 1.0 if share is None or (p := p_of(share)) is None else p for i, share in enumerate(shares)})
        for p_of in (attrgetter("p_value"), attrgetter("p_half"), attrgetter("p_small"))
    )
    return [
        None
        if share is None
        else dataclasses.replace(
            share, p_adjusted=plain[str(i)], p_half_adjusted=half[str(i)], p_small_adjusted=small[str(i)]
        )
        for i, share in enumerate(shares)
    ]


def _measure(damage: tuple[float, ...], undone: tuple[float, ...], rule: Rule) -> Share | None:
    """Return the share undone as a single comparison; None if no damage is shown."""
    estimate, interval = share_undone(damage, undone), fieller_interval(damage, undone, rule.alpha)
    if estimate is None or interval is None:
        return None
    nothing, half, small = paired_p(undone), _p_half(damage, undone), _p_small(damage, undone)
    return Share(estimate, interval, nothing, nothing, half, half, small, small)


def _count(finals: Mapping[int, Final], seeds: tuple[int, ...]) -> int:
    return sum(finals[seed].failed for seed in seeds)


def _jump(finals: Mapping[int, Final], seeds: tuple[int, ...]) -> float:
    return find_jump({seed: finals[seed].value for seed in seeds}, {seed for seed in seeds if finals[seed].failed})


def _limit_p(cell: CureEffect, jump: float) -> CureEffect:
    """Return a cell whose p is at least that of its counts of failures, if a jump could have made what is undone."""
    _, sick, cured = cell.failures
    share = cell.share
    if share is None or share.p_value is None or sick == cured:
        return cell
    if not is_within_jump(math.fsum(cell.undone) / len(cell.undone), jump):
        return cell
    limit = chance_p(sick, cured, len(cell.seeds))
    half = None if share.p_half is None else max(share.p_half, limit)
    limited = dataclasses.replace(share, p_value=max(share.p_value, limit), p_half=half)
    return dataclasses.replace(cell, share=limited)


def _p_half(damage: tuple[float, ...], undone: tuple[float, ...]) -> float | None:
    above = p_above("t", tuple(u - HALF * d for u, d in zip(undone, damage, strict=True)))
    return None if above is None else min(1.0, 2 * above)


def _p_small(damage: tuple[float, ...], undone: tuple[float, ...]) -> float | None:
    """Return the p of two one-sided tests whose bounds are shares of the damage, itself measured."""
    below = p_above("t", tuple(HALF * d - u for u, d in zip(undone, damage, strict=True)))
    above = p_above("t", tuple(HALF * d + u for u, d in zip(undone, damage, strict=True)))
    return None if below is None or above is None else max(below, above)


def _judge(cell: CureEffect, rule: Rule) -> CureEffect:
    verdict, limit = _decide(cell, rule)
    return dataclasses.replace(cell, verdict=verdict, limit=limit)


def _decide(cell: CureEffect, rule: Rule) -> tuple[CureVerdict, str]:
    if len(cell.seeds) < 2:
        count = "no seed" if not cell.seeds else "1 seed"
        return CureVerdict.UNCLEAR, f"{count} with a value in all three models; at least 2 are needed"
    share = cell.share
    if share is None:
        return CureVerdict.UNCLEAR, "the illness did not prove itself: no damage is shown"
    low, high = share.interval.low, share.interval.high
    if not any(cell.undone):
        limit = f"exactly as the sick model in all {len(cell.seeds)} seeds, as if it changed nothing"
        return (CureVerdict.NONE if _passes(share.p_small_adjusted, rule) else CureVerdict.UNCLEAR), limit
    if low > 0 or high < 0:
        if share.p_adjusted is None:
            return CureVerdict.UNCLEAR, f"all {len(cell.seeds)} seeds give exactly the same difference"
        if share.p_adjusted > rule.alpha:
            family = " over the family of cells" if rule.correction == "holm" else ""
            return (
                CureVerdict.UNCLEAR,
                f"its interval excludes 0, but p = {format_p(share.p_adjusted, rule.alpha)}{family}",
            )
        if high < 0:
            return CureVerdict.HARMS, ""
        if cell.lost:
            return CureVerdict.UNCLEAR, f"better in the seeds that ended, but {cell.lost} of its runs have no result"
        is_cure = share.estimate >= CURED and low > HALF and _passes(share.p_half_adjusted, rule)
        return (CureVerdict.CURES if is_cure else CureVerdict.HELPS), ""
    if low > -HALF and high < HALF and _passes(share.p_small_adjusted, rule):
        return CureVerdict.NONE, ""
    return CureVerdict.UNCLEAR, ""


def _passes(p: float | None, rule: Rule) -> bool:
    return p is not None and p <= rule.alpha
