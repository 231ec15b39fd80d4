"""The interface of experts that a dispatcher needs; `experts.ExpertStack` has it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor, nn

Linear = Callable[[Tensor, Tensor], Tensor]
"""(rows, weight) -> rows: how a dispatcher multiplies."""


class Activation(NamedTuple):
    """The function between two matrix stages, elementwise in the rows; it draws nothing at random.

    forward: (p_1, ...) -> h, each (rows, F).
    backward: (gradient of h, p_1, ...) -> (h again, gradients of p_1, ...).
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


class Experts(Protocol):
    """E feed-forwards with stacked weights."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights as they are stored; stacks may be views of them."""
        ...

    def stacks(self) -> tuple[Tensor, ...]:
        """Weight stacks, each (E, in, out)."""
        ...

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Apply the feed-forward to rows."""
        ...

    def activation(self) -> Activation | None:
        """Return a where `run` is linear(a(linear(rows, W) for every W but the last), last W), else None."""
        ...
