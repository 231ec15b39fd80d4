"""Estimates the share of a damage that a cure undoes, with its interval.

    damage_i = sick_i - healthy_i      undone_i = sick_i - cured_i      share = mean undone / mean damage

of the runs of seed i. 1: the cured model is as good as the healthy one. 0: as bad as the sick one. Below 0: worse.

The interval is Fieller's (1954) of paired values: it holds every share k for which the t-test does not reject "the mean
of undone_i - k damage_i is 0". It covers exactly as often as it says if the values are normal, also where the noise of
the damage matters. It is bounded if and only if the t-test shows a damage: without a damage a share means nothing.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from lightning_moevlm.study.statistics.intervals import Interval, is_constant


def share_undone(damage: Sequence[float], undone: Sequence[float]) -> float | None:
    """Return mean undone / mean damage, of values by seed; None without values or without a damage."""
    if not damage or math.fsum(damage) <= 0:
        return None
    return math.fsum(undone) / math.fsum(damage)


def fieller_interval(damage: Sequence[float], undone: Sequence[float], alpha: float) -> Interval | None:
    """Return the interval of the share undone; None for n < 2, or if it is not bounded: no damage is shown.

    Of the quadratic inequality (u - k d)^2 <= t^2 (s_uu - 2 k s_ud + k^2 s_dd) / n in k, with the means u and d, the
    sample covariances s, and t = t_{n-1, 1-alpha/2}.
    """
    n = len(damage)
    if n < 2 or math.fsum(damage) <= 0:
        return None
    if is_constant(tuple(damage)) and is_constant(tuple(undone)):
        share = math.fsum(undone) / math.fsum(damage)
        return Interval(share, share, "fieller")
    d, u = math.fsum(damage) / n, math.fsum(undone) / n
    rest = np.array([damage, undone]) - [[d], [u]]
    (s_dd, s_ud), (_, s_uu) = (rest @ rest.T * (special.stdtrit(n - 1, 1 - alpha / 2) ** 2 / (n - 1) / n)).tolist()
    a, b, c = d * d - s_dd, u * d - s_ud, u * u - s_uu
    if a <= 0:
        return None
    half = math.sqrt(max(0.0, b * b - a * c))  # not negative but for rounding: the estimate itself fulfils it
    return Interval((b - half) / a, (b + half) / a, "fieller")
