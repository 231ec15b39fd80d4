"""Computes p values from null draws.

    p = (1 + draws at or above the observed value) / (1 + draws)          Phipson and Smyth 2010

With fewer than 10 such draws this is a coarse upper bound. Then p is that of a Pearson type III distribution with the
mean, deviation and skewness of the draws (Mielke and Berry 2007, section 2.3), if it is smaller: information of
independent things is about a scaled chi squared, which is of this type.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_FEW = 10
_ROUNDING = 1e-9


def permutation_p(observed: NDArray[np.float64], draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the p of "no larger than by chance". observed: (...); draws: (B, ...)."""
    tolerance = _ROUNDING * np.maximum(1.0, np.abs(observed))
    reached = (draws >= observed - tolerance).sum(axis=0)
    p = (1.0 + reached) / (1.0 + len(draws))
    mean, deviation = draws.mean(axis=0), draws.std(axis=0)
    is_tail = (reached < _FEW) & (deviation > tolerance)
    if not is_tail.any():
        return p
    safe = np.where(is_tail, deviation, 1.0)
    skew = np.where(is_tail, (((draws - mean) / safe) ** 3).mean(axis=0), 0.0)
    tail = stats.pearson3.sf(observed, skew, loc=mean, scale=safe)
    return np.where(is_tail, np.minimum(p, np.maximum(tail, np.finfo(np.float64).tiny)), p)
