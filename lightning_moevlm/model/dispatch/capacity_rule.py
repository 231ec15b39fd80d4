"""A capacity factor that follows the share of pairs it drops: state that moves once per optimiser step.

    factor *= change          where more pairs are dropped than wanted
    factor /= change          where fewer are

Every layer has a factor of its own, steered on its own counts, over micro-batches and ranks. Only the sign counts and
`change` is small, so the factor itself averages, over about 1 / log(change) steps (the rule of the adaptive weights of
losses). What is steered to the aim is therefore the median of the rate over steps, not its mean.
"""

from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.common.number_checks import check_number

LOWEST, HIGHEST = 1e-2, 1e3
"""Bounds of a factor; above the number of experts nothing is dropped."""


@dataclass(frozen=True)
class ByDropRate:
    """Grows while more pairs are dropped than wanted, shrinks while fewer are.

    Args:
        drop_rate: target share of dropped pairs, such as 0.02.
        start: factor of the first step.
        change: factor per optimiser step by which the capacity factor grows or shrinks.

    Raises:
        UserError: a value outside its range.
    """

    drop_rate: float
    start: float = 1.25
    change: float = 1.01

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("drop_rate of an adaptive capacity factor", self.drop_rate, least=0, below=1)
        check_number("start of an adaptive capacity factor", self.start, least=LOWEST, most=HIGHEST)
        check_number(
            "change of an adaptive capacity factor", self.change, least=1, advice="; at 1 the factor stands still"
        )

    def next(self, factor: Tensor, chosen_E: Tensor, kept_E: Tensor) -> Tensor:
        """Return the factor of the next step, fp64, given this step's and the pairs of any shape, int64."""
        chosen, kept = chosen_E.sum().double(), kept_E.sum().double()
        direction = (chosen - kept - self.drop_rate * chosen).sign()
        return (factor.to(chosen) * self.change**direction).clamp(LOWEST, HIGHEST)
