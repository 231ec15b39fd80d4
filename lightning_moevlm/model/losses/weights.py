"""Weights of losses that follow what routing does: state that moves once per optimiser step, on the counts of that
step.

    by overflow      weight *= factor          where more pairs are dropped than wanted
                     weight /= factor          where fewer are
    by sparsity      weight *= factor          where more experts are active than aimed at
                     weight /= factor          where fewer are

The first is the adaptive balance loss of axlearn (`AdaptiveLoadBalanceLoss`, factor e^0.01; there on a moving
average and per layer), the second steers ReLU routing (ReMoE, arXiv 2412.14711: factor 1.2, from 1e-8).
Rates are pooled over all layers, so that a loss has one weight. They are those of one step, over its micro-batches and
ranks, and are not averaged over steps: only the sign counts and the factor is small, so the weight itself averages,
over about 1 / log(factor) steps, and one step moves it by one factor however far off it was. What is steered to the aim
is therefore the median of the rate over steps, not its mean. A weight is an fp32 number on the device; nothing waits
for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.schedules import Ramp, Schedule, value_at
from lightning_moevlm.model.losses.loss_input import LayerCounts

LOWEST, HIGHEST = 1e-12, 1e6
"""Bounds of a weight, because it could not return from 0 or infinity."""


class AdaptiveWeight(ABC):
    """A weight with state; `start` is its value in the first step."""

    start: float
    factor: float

    @abstractmethod
    def direction(self, layers: Sequence[LayerCounts]) -> Tensor:
        """Return 1 where the weight shall grow, -1 where it shall shrink, 0 where it shall stay: an fp32 scalar."""

    def next(self, weight: Tensor, layers: Sequence[LayerCounts]) -> Tensor:
        """Return the weight of the next step, given this step's and the counts of all layers."""
        return (weight * self.factor ** self.direction(layers)).clamp(LOWEST, HIGHEST)

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("start of an adaptive weight", self.start, least=LOWEST, most=HIGHEST)
        check_number("factor of an adaptive weight", self.factor, least=1, advice="; at 1 the weight stands still")


@dataclass(frozen=True)
class ByOverflow(AdaptiveWeight):
    """Grows while more pairs are dropped than wanted, shrinks while fewer are.

    Args:
        drop_rate: share of dropped pairs that is wanted, such as 0.05; without capacity nothing is ever dropped and the
            weight only shrinks.
        start: the first step's weight.
        factor: per optimiser step.

    Raises:
        UserError: a value outside its range.
    """

    drop_rate: float
    start: float = 1e-2
    factor: float = 1.01

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_number("drop_rate of an adaptive weight", self.drop_rate, least=0, below=1)

    def direction(self, layers: Sequence[LayerCounts]) -> Tensor:
        """Compare dropped pairs with those wanted."""
        chosen = _total([layer.chosen_AE for layer in layers])
        kept = _total([layer.kept_AE for layer in layers])
        return (chosen - kept - self.drop_rate * chosen).sign()


@dataclass(frozen=True)
class BySparsity(AdaptiveWeight):
    """Grows while more experts are active than the router aims at, shrinks while fewer are.

    Args:
        start: the first step's weight.
        factor: per optimiser step.

    Raises:
        UserError: a value outside its range.
    """

    start: float = 1e-8
    factor: float = 1.2

    def direction(self, layers: Sequence[LayerCounts]) -> Tensor:
        """Compare active pairs with those aimed at."""
        active = _total([layer.chosen_AE for layer in layers])
        aimed = sum(layer.aimed_share * layer.chosen_AE.shape[1] * layer.token_A.sum().float() for layer in layers)
        return (active - aimed).sign()


BalanceWeight: TypeAlias = float | Ramp | ByOverflow
"""A constant, a ramp over optimiser steps, or one that follows the drop rate."""

SparsityWeight: TypeAlias = float | Ramp | BySparsity
"""A constant, a ramp over optimiser steps, or one that follows the number of active experts."""

Weight: TypeAlias = Schedule | AdaptiveWeight
"""Any of them."""


def check_weight(name: str, weight: Weight) -> None:
    """Refuse a weight that would reward what its loss punishes, now or at an end of its ramp.

    Raises:
        UserError: a negative value, or NaN.
    """
    values = {"": weight} if isinstance(weight, int | float) else {}
    if isinstance(weight, Ramp):
        values = {".start": weight.start, ".stop": weight.stop}
    for end, value in values.items():
        check_number(f"{name}{end}", value, least=0, advice="; less than 0 would reward what the loss punishes")


def first_value(weight: Weight) -> float:
    """Return the weight before any optimiser step is done."""
    return weight.start if isinstance(weight, AdaptiveWeight) else value_at(weight, 0)


def _total(counts: Sequence[Tensor]) -> Tensor:
    return torch.stack([count.sum() for count in counts]).sum().float()
