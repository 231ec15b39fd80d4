"""Computes intervals of paired differences: the one of each test, by inverting it, and the bootstrap's.

- t: mean +- t_{n-1, 1-alpha/2} s / sqrt(n).
- bootstrap: BCa, of the mean (Efron 1987). A resample of three numbers never leaves their range, so it covers far less
  than it promises. It may widen a t interval of skewed differences, and never stands alone.
- wilcoxon: from the (k+1)-th least to the (k+1)-th greatest of the n(n+1)/2 means of pairs (Walsh averages), k the
  largest rank sum with 2 P(T <= k) <= alpha (Hodges and Lehmann 1963); for the centre of a symmetric distribution.
- sign: from the (k+1)-th least to the (k+1)-th greatest difference, k the largest with 2 P(Binomial(n, 1/2) <= k) <=
  alpha; for the median, whatever the distribution.

The two rank intervals are exact. They need n >= 6 at alpha = 0.05.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from lightning_moevlm.study.declare.comparison import Test

_BOOTSTRAP_LEAST = 3  # of two numbers there are three distinct resamples: no interval worth the name
_BOOTSTRAP_RESAMPLES = 9_999
_ROUNDING = 1e-13  # relative, of differences in fp64


@dataclass(frozen=True)
class Interval:
    """A two-sided interval in the metric's unit."""

    low: float
    high: float
    method: str
    """"t", "bootstrap", "wilcoxon", "sign" or "fieller"."""

    @property
    def width(self) -> float:
        """high - low."""
        return self.high - self.low


def interval_of(test: Test, differences: tuple[float, ...], alpha: float) -> Interval | None:
    """Return the interval that decides: for the t-test the wider of t and bootstrap, else the test's own."""
    if test == "wilcoxon":
        return wilcoxon_interval(differences, alpha)
    if test == "sign":
        return sign_interval(differences, alpha)
    return wider(t_interval(differences, alpha), bootstrap_interval(differences, alpha))


def wider(*intervals: Interval | None) -> Interval | None:
    """Return the widest of the intervals that there are, the first of equal ones; None if there is none."""
    return max((one for one in intervals if one is not None), key=lambda one: one.width, default=None)


def centre_of(test: Test, differences: tuple[float, ...]) -> float | None:
    """Return the estimate inside that interval: mean, Hodges-Lehmann (median of the means of pairs), or median."""
    if not differences:
        return None
    if test == "t":
        return float(np.mean(differences))
    return float(np.median(_walsh_averages(differences) if test == "wilcoxon" else differences))


def t_interval(differences: tuple[float, ...], alpha: float) -> Interval | None:
    """Return mean +- t_{n-1, 1-alpha/2} s / sqrt(n), or None for fewer than two numbers."""
    n = len(differences)
    if n < 2:
        return None
    if is_constant(differences):
        return Interval(differences[0], differences[0], "t")
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    half = float(special.stdtrit(n - 1, 1 - alpha / 2)) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half, "t")


def bootstrap_interval(differences: tuple[float, ...], alpha: float) -> Interval | None:
    """Return the BCa bootstrap interval of the mean; None for fewer than three numbers, or if BCa gives none.

    The generator is fixed and draws from sorted differences, so their order does not matter.
    """
    if len(differences) < _BOOTSTRAP_LEAST:
        return None
    if is_constant(differences):  # BCa divides by the spread
        return Interval(differences[0], differences[0], "bootstrap")
    found = stats.bootstrap(
        (np.sort(differences),),
        np.mean,
        confidence_level=1 - alpha,
        n_resamples=_BOOTSTRAP_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return Interval(low, high, "bootstrap") if math.isfinite(low) and math.isfinite(high) else None


def wilcoxon_interval(differences: tuple[float, ...], alpha: float) -> Interval | None:
    """Return the exact interval of the centre; None if no rank sum is as rare as alpha (n < 6 at 0.05)."""
    n = len(differences)
    cumulated = np.cumsum(sign_patterns(range(1, n + 1))) / 2.0**n
    skipped = int(np.searchsorted(cumulated, alpha / 2, side="right"))  # k + 1 of the sums 0 .. k
    if skipped == 0:
        return None
    walsh = _walsh_averages(differences)
    return Interval(walsh[skipped - 1], walsh[-skipped], "wilcoxon")


def sign_interval(differences: tuple[float, ...], alpha: float) -> Interval | None:
    """Return the exact interval of the median; None if even n equal signs are likelier than alpha."""
    n = len(differences)
    cumulated = stats.binom.cdf(np.arange(n), n, 0.5)
    skipped = int(np.searchsorted(cumulated, alpha / 2, side="right"))
    if skipped == 0:
        return None
    ordered = sorted(differences)
    return Interval(ordered[skipped - 1], ordered[-skipped], "sign")


def is_constant(differences: tuple[float, ...]) -> bool:
    """Whether differences vary by rounding alone; a deviation of 0 may be computed as 1e-17."""
    size = max(abs(difference) for difference in differences)
    return max(differences) - min(differences) <= _ROUNDING * size


def _walsh_averages(differences: tuple[float, ...]) -> list[float]:
    return sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(differences, 2))


def sign_patterns(ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the number of the 2^n sign patterns that give each sum 0 .. sum(ranks) of the positive ranks."""
    counts = np.zeros(int(sum(ranks)) + 1)
    counts[0] = 1.0
    for rank in ranks:
        counts[rank:] += counts[:-rank].copy()
    return counts
