"""One logged value of a metric."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    pass


class Point(NamedTuple):
    """One logged value. step: optimiser step as Lightning counts it. time_ms: Unix time, milliseconds.

    value is NaN or infinite where the run logged that: a divergence is data.
    """

    key: str
    step: int
    value: float
    time_ms: int
