"""What a dispatcher needs of an expert stack (`experts.ExpertStack` has it)."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Activation = Callable[..., Tensor]
"""(inner products, each (rows, F)) -> hidden units (rows, F); elementwise, draws nothing at random."""


class Linear(Protocol):
    """(rows, weight) -> rows: how a dispatcher multiplies."""

    def __call__(self, rows: Tensor, weight: Tensor, /) -> Tensor:
        """Multiply rows by weight."""
        ...


class Experts(Protocol):
    """E feed-forwards with stacked weights."""

    def stacks(self) -> tuple[Tensor, ...]:
        """Weight stacks, each (E, in, out)."""
        ...

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Apply the feed-forward to rows."""
        ...

    def activation(self) -> Activation | None:
        """Return a where `run` is linear(a(linear(rows, W) for every W but the last), last W), else None."""
        ...
