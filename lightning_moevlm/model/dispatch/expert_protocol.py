"""What a dispatcher needs of an expert stack (`experts.ExpertStack` has it)."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Linear(Protocol):
    """(rows, weight) -> rows: how a dispatcher multiplies."""

    def __call__(self, rows: Tensor, weight: Tensor, /) -> Tensor:
        """Multiply rows by weight."""
        ...


class Activation(Protocol):
    """What stands between two matrix stages, and its derivative; elementwise, draws nothing at random."""

    @property
    def forward(self) -> Callable[..., Tensor]:
        """(p_1, ...) -> h, each (rows, F)."""
        ...

    @property
    def backward(self) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
        """(gradient of h, p_1, ...) -> h again, and the gradients of p_1, ..."""
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
