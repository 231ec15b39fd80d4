"""Robust z-scores: how far a value lies from its past, in a unit that outliers of the past do not stretch.

    z = (x - median) / max(1.4826 MAD, floor)

MAD is the median of |past - median|, and 1.4826 MAD is the standard deviation of a normal variable, since
1.4826 = 1 / Phi^-1(3/4). The floor keeps a constant past from making every change a large one. A trend stays small: on
a line of n points the next one has z = 1.35. Only finite values of the past count. A value that is not finite has an
infinite score.

A loss falls steeply at first, which would hide a spike. So losses are compared after their trend is taken away: by how
much each differs from the median of the 8 values before it.
"""

import math
import statistics
from collections.abc import Sequence

_NORMAL = 1.4826
_RELATIVE_FLOOR = 1e-3  # of the median


def robust_score(value: float, past: Sequence[float], floor: float = 0.0) -> float:
    """Return z of a value; 0 without a finite past.

    Args:
        value: the value.
        past: earlier values.
        floor: least standard deviation; at least 0.001 of the median is taken.
    """
    if not math.isfinite(value):
        return math.inf
    known = [each for each in past if math.isfinite(each)]
    if not known:
        return 0.0
    middle = statistics.median(known)
    spread = _NORMAL * statistics.median(abs(each - middle) for each in known)
    unit = max(spread, floor, _RELATIVE_FLOOR * abs(middle), 1e-12)
    return (value - middle) / unit


_LEVEL, _LEAST_LEVEL = 8, 4


def find_level(past: Sequence[float]) -> float | None:
    """Return the median of the last 8 values of the past; None before there are 4."""
    last = past[-_LEVEL:]
    return statistics.median(last) if len(last) >= _LEAST_LEVEL else None


def remove_trend(values: Sequence[float]) -> list[float]:
    """Return by how much each value differs from the level before it; without the first values, which have none."""
    levels = ((value, find_level(values[:place])) for place, value in enumerate(values))
    return [value - level for value, level in levels if level is not None]
