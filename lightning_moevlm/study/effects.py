"""Effects paired by seed: how much an arm differs from the baseline, how sure that is, and the word for it.

Runs of one seed share data order and, where shapes agree, initial weights, so the difference d_i = arm_i - baseline_i
within a seed is what carries the information. Of these n differences: the mean, a bootstrap interval (BCa) where
n >= 3, the t interval mean +- t_{n-1} s / sqrt(n) where n >= 2, the paired t-test's p, and the share of seeds that got
better. A bootstrap of three numbers covers far less than it promises, so **the wider interval decides**.
Pure functions of numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from scipy import integrate, special, stats

from lightning_moevlm.study.spec import Direction

_SPREAD_LEAST = 3  # a spread of two numbers is off by a factor of 2 every third time
_BOOTSTRAP_LEAST = 3  # of two numbers there are three distinct resamples: no interval worth the name
_BOOTSTRAP_RESAMPLES = 9_999
_MOST_SEEDS = 1_000
_POWER = 0.8


class Verdict(StrEnum):
    """The word for a comparison. BASELINE marks the row that the others are compared with."""

    BASELINE = "baseline"
    BETTER = "better"
    WORSE = "worse"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Interval:
    """A two-sided interval in the metric's unit. method: "t" or "bootstrap"."""

    low: float
    high: float
    method: str

    @property
    def width(self) -> float:
        """high - low."""
        return self.high - self.low


class Lost(NamedTuple):
    """Runs of an arm that gave no sound result, by kind."""

    diverged: int = 0
    crashed: int = 0

    @property
    def runs(self) -> int:
        """All of them."""
        return self.diverged + self.crashed


@dataclass(frozen=True)
class Effect:
    """An arm against the baseline; differences are arm minus baseline, in the metric's unit.

    seeds: those compared. left_out: seeds of the study that have no difference (crashed, diverged to a non-finite value
    or not yet run, in either arm). bootstrap, t: the two intervals; interval: the wider one, which decides. p_value:
    two-sided paired t-test. share_better: fraction of compared seeds in which the arm is ahead. seeds_needed: for 80 %
    power at this effect and spread; None where it cannot be told (fewer than 3 seeds) or is
    beyond 1,000. note: what limits the verdict.
    """

    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None
    bootstrap: Interval | None
    t: Interval | None
    interval: Interval | None
    p_value: float | None
    share_better: float | None
    seeds_needed: int | None
    verdict: Verdict
    note: str


def paired_effect(
    arm: Mapping[int, float],
    baseline: Mapping[int, float],
    seeds: tuple[int, ...],
    direction: Direction,
    alpha: float,
    arm_lost: Lost | None = None,
    baseline_lost: Lost | None = None,
) -> Effect:
    """Compare an arm with the baseline.

    Args:
        arm: Final value of the metric by seed; a seed without a result is absent, a diverged one may be non-finite.
        baseline: The same of the baseline.
        seeds: All seeds of the study.
        direction: Which way is progress.
        alpha: Two-sided error rate; intervals cover 1 - alpha.
        arm_lost: Runs of the arm that diverged or crashed. Where they are more than of the baseline, no mean over the
            survivors may call the arm better; where they are fewer, none may call it worse.
        baseline_lost: The same of the baseline.
    """
    arm_lost, baseline_lost = arm_lost or Lost(), baseline_lost or Lost()
    paired = {s: arm[s] - baseline[s] for s in seeds if s in arm and s in baseline}
    paired = {s: d for s, d in paired.items() if math.isfinite(d)}
    differences = tuple(paired.values())
    left_out = tuple(s for s in seeds if s not in paired)
    losses = _losses(left_out, seeds, arm_lost, baseline_lost)
    if not differences:
        note = "; ".join(["no seed has a finite result in both arms", *losses])
        return Effect((), left_out, (), None, None, None, None, None, None, None, Verdict.INCONCLUSIVE, note)
    bootstrap = bootstrap_interval(differences, alpha)
    t = t_interval(differences, alpha)
    interval = max((i for i in (t, bootstrap) if i is not None), key=lambda i: i.width, default=None)
    verdict, limit = decide(interval, len(differences), direction, arm_lost.runs - baseline_lost.runs)
    note = "; ".join([*([limit] if limit else []), *losses])
    sign = -1.0 if direction == "lower" else 1.0
    return Effect(
        seeds=tuple(paired),
        left_out=left_out,
        differences=differences,
        mean=float(np.mean(differences)),
        bootstrap=bootstrap,
        t=t,
        interval=interval,
        p_value=paired_p(differences),
        share_better=sum(sign * d > 0 for d in differences) / len(differences),
        seeds_needed=seeds_needed(differences, alpha),
        verdict=verdict,
        note=note,
    )


def decide(interval: Interval | None, num_pairs: int, direction: Direction, more_lost: int) -> tuple[Verdict, str]:
    """Return the word for an interval of differences, and what limits it.

    more_lost: diverged and crashed runs of the arm, minus those of the baseline.
    """
    if interval is None:
        return Verdict.INCONCLUSIVE, f"{num_pairs} seed gives no interval; at least 2 are needed"
    if interval.width == 0:
        return Verdict.INCONCLUSIVE, f"all {num_pairs} seeds give exactly the same difference: are they repetitions?"
    ahead = interval.high < 0 if direction == "lower" else interval.low > 0
    behind = interval.low > 0 if direction == "lower" else interval.high < 0
    if ahead and more_lost > 0:
        return (
            Verdict.INCONCLUSIVE,
            f"ahead where it survives, but it lost {more_lost} more than the baseline",
        )
    if behind and more_lost < 0:
        return (
            Verdict.INCONCLUSIVE,
            f"behind where the baseline survives, but that lost {-more_lost} more than this arm",
        )
    if ahead or behind:
        return (Verdict.BETTER if ahead else Verdict.WORSE), ""
    return Verdict.INCONCLUSIVE, ""


def _losses(left_out: tuple[int, ...], seeds: tuple[int, ...], arm: Lost, baseline: Lost) -> list[str]:
    """Return what a reader must know of the seeds that are missing from a comparison."""
    told = []
    if left_out:
        told.append(f"{len(left_out)} of {len(seeds)} seeds left out")
    for whose, lost in (("this arm", arm), ("the baseline", baseline)):
        for count, what in ((lost.diverged, "diverged"), (lost.crashed, "crashed")):
            if count == len(seeds):
                told.append(f"every run of {whose} {what}")
            elif count:
                told.append(f"{count} {'run' if count == 1 else 'runs'} of {whose} {what}")
    return told


def bootstrap_interval(differences: tuple[float, ...], alpha: float) -> Interval | None:
    """Return the BCa bootstrap interval of the mean, or None for fewer than three numbers.

    The generator is fixed: the same differences always give the same interval. Source: Efron 1987, as in SciPy.
    """
    if len(differences) < _BOOTSTRAP_LEAST:
        return None
    if _is_constant(differences):  # BCa divides by the spread
        return Interval(differences[0], differences[0], "bootstrap")
    found = stats.bootstrap(
        (np.asarray(differences),),
        np.mean,
        confidence_level=1 - alpha,
        n_resamples=_BOOTSTRAP_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.low), float(found.high), "bootstrap")


def t_interval(differences: tuple[float, ...], alpha: float) -> Interval | None:
    """Return mean +- t_{n-1, 1-alpha/2} s / sqrt(n), or None for fewer than two numbers."""
    n = len(differences)
    if n < 2:
        return None
    if _is_constant(differences):
        return Interval(differences[0], differences[0], "t")
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half, "t")


def paired_p(differences: tuple[float, ...]) -> float | None:
    """Return the two-sided p of "the mean difference is 0", or None where n < 2 or nothing varies."""
    n = len(differences)
    if n < 2 or _is_constant(differences):
        return None
    deviation = float(np.std(differences, ddof=1))
    statistic = float(np.mean(differences)) / (deviation / math.sqrt(n))
    return float(2 * stats.t.sf(abs(statistic), n - 1))


def seeds_needed(differences: tuple[float, ...], alpha: float) -> int | None:
    """Return the least n whose two-sided paired t-test finds this mean at this spread with 80 % power.

    With d = |mean| / s the test statistic is noncentral t with n - 1 degrees of freedom and noncentrality d sqrt(n).
    None where n < 3 or nothing varies (too little to tell the spread), the mean is 0, or more than 1,000 are needed.
    """
    if len(differences) < _SPREAD_LEAST or _is_constant(differences):
        return None
    mean, deviation = abs(float(np.mean(differences))), float(np.std(differences, ddof=1))
    if mean == 0:
        return None
    size = mean / deviation
    low, high = 2, _MOST_SEEDS
    if power(size, high, alpha) < _POWER:
        return None
    while low < high:  # power grows with n
        middle = (low + high) // 2
        low, high = (low, middle) if power(size, middle, alpha) >= _POWER else (middle + 1, high)
    return low


def power(size: float, n: int, alpha: float) -> float:
    """Return the power of a two-sided paired t-test. size: |mean| / standard deviation of the differences; n >= 2.

    Given u = (estimated / true deviation) the statistic is normal, so power = E[Phi(shift - edge u) + Phi(-shift -
    edge u)], taken over the quantiles of u. SciPy's noncentral t gives NaN at large effects.
    """
    edge = stats.t.ppf(1 - alpha / 2, n - 1)
    shift = size * math.sqrt(n)

    def given_quantile(p: float) -> float:
        u = math.sqrt(special.chdtri(n - 1, 1 - p) / (n - 1))
        return float(special.ndtr(shift - edge * u) + special.ndtr(-shift - edge * u))

    return float(integrate.quad(given_quantile, 0.0, 1.0)[0])


def _is_constant(differences: tuple[float, ...]) -> bool:
    """Whether nothing varies; a computed deviation may be 1e-17 where it ought to be 0."""
    return max(differences) == min(differences)
