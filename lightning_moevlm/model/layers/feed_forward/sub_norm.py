"""Sub-LN for experts: a norm on the hidden units before the last matrix (Magneto, arXiv 2210.06423, section 2.2).

Experts hand their matrix products to a `linear` of the dispatcher; this one normalises the rows on their way into the
last stack, so that any expert and any dispatcher can be used. The experts of a layer share the norm: a matrix
can absorb a scale in front of it, so one of its own would add nothing to an expert.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_moevlm.model.dispatch import Experts
from lightning_moevlm.model.experts import Linear
from lightning_moevlm.model.layers.norms import normalise
from lightning_moevlm.model.precision import PrecisionPolicy


class SubNormedExperts:
    """An expert stack with a norm before its last matrix; what a dispatcher needs of experts.

    Args:
        experts: any stack.
        norm: over the hidden width.
        precision: of the norm.
    """

    def __init__(self, experts: Experts, norm: nn.Module, precision: PrecisionPolicy) -> None:
        self._experts = experts
        self._norm = norm
        self._precision = precision

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield those of the experts and of the norm."""
        yield from self._experts.parameters()
        yield from self._norm.parameters()

    def stacks(self) -> tuple[Tensor, ...]:
        """Return the stacks of the experts."""
        return self._experts.stacks()

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Apply the feed-forward to rows."""

        def with_norm(rows: Tensor, weight: Tensor, /) -> Tensor:
            return linear(normalise(rows, self._norm, self._precision) if weight is weights[-1] else rows, weight)

        return self._experts.run(rows_ND, weights, with_norm)

    def activation(self) -> None:
        """Return None: there is also a norm between the matrix stages."""
        return
