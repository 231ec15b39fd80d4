"""Computes p values of paired differences: centre 0 (two-sided), and centre within +- x (two one-sided tests).

The t-test is of the mean, Wilcoxon's signed ranks of the centre of a symmetric distribution, the sign test of the
median. The two exact tests need n >= 6 at alpha = 0.05 (2 / 2^5 = 0.0625), and leave out differences of 0. Equal sizes
share the mean of their ranks. Wilcoxon's p stays exact with ties, over the 2^n sign patterns: the normal approximation
gives 0.014 for six equal differences, whose p is 2 / 2^6 = 0.031.

Holm's step-down keeps the chance of any false alarm among m comparisons at alpha, whatever their dependence: of the
sorted p values p_(1) <= ... <= p_(m) the adjusted ones are max_{j <= i} min(1, (m - j + 1) p_(j)). Source: Holm 1979.
"""

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
from scipy import special, stats

from lightning_moevlm.study.declare.comparison import Test
from lightning_moevlm.study.statistics.intervals import is_constant, sign_patterns

_EXACT_MOST = 50  # seeds; beyond, SciPy's normal approximation


def two_sided_p(test: Test, differences: tuple[float, ...]) -> float | None:
    """Return the two-sided p of "the centre is 0"; None if n < 2 or, for t, nothing varies."""
    if len(differences) < 2:
        return None
    if test == "t":
        return paired_p(differences)
    upper, lower = p_above(test, differences), p_above(test, tuple(-d for d in differences))
    return None if upper is None or lower is None else min(1.0, 2 * min(upper, lower))


def paired_p(differences: tuple[float, ...]) -> float | None:
    """Return the p of the two-sided paired t-test; None if n < 2 or nothing varies."""
    statistic = _t(differences)
    return None if statistic is None else float(2 * special.stdtr(len(differences) - 1, -abs(statistic)))


def p_above(test: Test, differences: tuple[float, ...]) -> float | None:
    """Return the one-sided p of "the centre is 0 or below"; None if it is undefined."""
    n = len(differences)
    if test == "t":
        statistic = _t(differences)
        return None if statistic is None else float(special.stdtr(n - 1, -statistic))
    kept = np.asarray([d for d in differences if d != 0])  # a seed without a difference has no sign
    if not kept.size:
        return None
    if test == "sign":
        return float(stats.binom.sf(int((kept > 0).sum()) - 1, kept.size, 0.5))
    if kept.size > _EXACT_MOST:
        return float(stats.wilcoxon(kept, alternative="greater", method="approx").pvalue)
    ranks = np.rint(2 * stats.rankdata(np.abs(kept))).astype(int)  # twice the ranks are whole, ties or not
    return float(sign_patterns(ranks)[ranks[kept > 0].sum() :].sum() / 2.0**kept.size)


def p_outside(test: Test, differences: tuple[float, ...], within: float) -> float | None:
    """Return the p of "the centre lies at or beyond +- within", the greater of two one-sided tests (TOST).

    At most alpha means: no difference within `within`. Source: Schuirmann 1987.
    """
    above = p_above(test, tuple(d + within for d in differences))
    below = p_above(test, tuple(within - d for d in differences))
    return None if above is None or below is None else max(above, below)


def least_seeds(test: Test, alpha: float) -> int:
    """Return the least number of seeds with which any outcome of a two-sided test can reach alpha."""
    return 2 if test == "t" else math.ceil(1 - math.log2(alpha))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the adjusted p of each comparison; those without a p do not count."""
    known = sorted(((p, name) for name, p in p_values.items() if p is not None))
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for place, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * p))
        adjusted[name] = highest
    return adjusted


def format_p(p: float, alpha: float) -> str:
    """Return p to three digits, or to as many as keep it on its side of alpha: 0.05004 is not printed as 0.05."""
    texts = (f"{p:.{digits}g}" for digits in range(3, 17))
    return next((text for text in texts if (float(text) <= alpha) == (p <= alpha)), repr(p))


def fisher_p(stable: int, total: int, baseline_stable: int, baseline_total: int) -> float | None:
    """Return the two-sided p of Fisher's exact test of stable/total runs against the baseline's; None without runs."""
    if not total or not baseline_total:
        return None
    table = [[stable, total - stable], [baseline_stable, baseline_total - baseline_stable]]
    return float(stats.fisher_exact(table).pvalue)


def mcnemar_p(better: int, worse: int) -> float:
    """Return the two-sided p of McNemar's exact test: 1 if no pair differs. Source: McNemar 1947.

    Args:
        better: Pairs in which the first run is stable and the second is not.
        worse: Pairs in which it is the other way round.
    """
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


@cache
def chance_p(mine: int, theirs: int, n: int) -> float:
    """Return the two-sided p of two counts of failed runs out of n each, if all runs fail at one rate, by chance.

    At the worst rate, 1/2, the difference of the counts is Binomial(2n, 1/2) - n. Runs of one seed may fail together;
    that makes p smaller than it says. 3 of 3 against none: 1/32; 5 of 5: 1/512.
    """
    return float(stats.binomtest(n + abs(mine - theirs), 2 * n).pvalue)


def _t(differences: tuple[float, ...]) -> float | None:
    n = len(differences)
    if n < 2 or is_constant(differences):
        return None
    return float(np.mean(differences)) / (float(np.std(differences, ddof=1)) / math.sqrt(n))
