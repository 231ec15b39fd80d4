"""What a dispatcher needs of an expert stack (`experts.ExpertStack` has it)."""

from typing import Protocol

from torch import Tensor


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
