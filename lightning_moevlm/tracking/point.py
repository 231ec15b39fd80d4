"""One logged value of a metric."""

from typing import NamedTuple


class Point(NamedTuple):
    """One logged value of a metric."""

    key: str
    step: int
    """Optimiser step as Lightning counts it."""
    value: float
    """NaN or infinite where the run logged that: a divergence is data."""
    time_ms: int
    """Unix time, milliseconds."""
