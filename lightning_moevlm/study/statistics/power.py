"""Computes the power of the two-sided paired t-test, and the number of seeds that an effect or failures need."""

import math

import numpy as np
from scipy import special

from lightning_moevlm.study.statistics.intervals import is_constant
from lightning_moevlm.study.statistics.paired_tests import chance_p

_SPREAD_LEAST = 3  # a spread of two numbers is off by a factor of 2 every third time
_MOST_SEEDS = 1_000
_POWER = 0.8
_NOISE = np.linspace(-8.0, 8.0, 401)
_WEIGHTS = np.exp(-(_NOISE**2) / 2) / math.sqrt(2 * math.pi) * (_NOISE[1] - _NOISE[0])


def seeds_needed(differences: tuple[float, ...], alpha: float) -> int | None:
    """Return the least n whose two-sided paired t-test finds this mean at this spread with 80 % power.

    With d = |mean| / s the test statistic is noncentral t with n - 1 degrees of freedom and noncentrality d sqrt(n).
    None if n < 3 or nothing varies (the spread is unknown), if the mean is 0, or if more than 1,000 are needed.
    """
    if len(differences) < _SPREAD_LEAST or is_constant(differences):
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


def seeds_against_chance(mine: int, theirs: int, n: int, alpha: float) -> int | None:
    """Return the least number of seeds, n or more, at which chance does not explain these shares of failed runs.

    The shares mine / n and theirs / n are kept. `chance_p` is then at most alpha. None if more than 1,000 are needed.
    """
    for seeds in range(n, _MOST_SEEDS + 1):
        if chance_p(round(mine * seeds / n), round(theirs * seeds / n), seeds) <= alpha:
            return seeds
    return None


def power(size: float, n: int, alpha: float) -> float:
    """Return the power of a two-sided paired t-test. size: |mean| / standard deviation of the differences; n >= 2.

    The statistic is (shift + z) / u, with z standard normal and u^2 = chi^2_{n-1} / (n - 1). So power = E[P(u < |shift
    + z| / edge)], a sum over z that is right to 1e-5. SciPy's noncentral t gives NaN at large effects.
    """
    edge = special.stdtrit(n - 1, 1 - alpha / 2)
    shift = size * math.sqrt(n)
    return float(_WEIGHTS @ special.chdtr(n - 1, (n - 1) * ((shift + _NOISE) / edge) ** 2))
