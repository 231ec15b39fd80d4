"""The contract of an expert stack: E feed-forwards whose weights are stacked along the first axis.

An expert's mathematics is written once, in `run`, over a `linear` that the dispatcher provides: a plain matrix
product when it runs one expert, a grouped one when it runs rows of all experts at once. Stacked weights keep
optimisers, compile and sharding simple; never index the stack under autograd, because the backward of
`weight[e]` writes a zero tensor of the whole stack for each expert.
"""

from abc import abstractmethod

from torch import Tensor

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.model.dispatch.expert_protocol import Activation, Linear
from lightning_moevlm.model.initial_weights import ExpertInit, Module
from lightning_moevlm.model.precision import Region


class ExpertWeights(Module):
    """The weights of E experts, whoever runs them.

    dim: model width D. num_experts: E.
    """

    region: Region = "experts"
    dim: int
    num_experts: int

    @abstractmethod
    def stacks(self) -> tuple[Tensor, ...]:
        """Return the weight stacks, each (E, in, out)."""

    @abstractmethod
    def forward_flops_per_row(self) -> int:
        """Matrix FLOPs of one row through one expert."""


class ExpertStack(ExpertWeights):
    """E feed-forwards D -> D; the first two constructor arguments are `dim` and `num_experts`.

    Args:
        dim: model width D.
        num_experts: E.
        hidden_dim: hidden width F of one expert.
        dropout: share of hidden units left out in training.
        init: initial weights of the stacks, (E, in, out) each.

    Raises:
        UserError: no hidden unit, or a dropout outside 0 <= p < 1.
    """

    def __init__(
        self, dim: int, num_experts: int, hidden_dim: int = 256, dropout: float = 0.0, init: ExpertInit = ExpertInit()
    ) -> None:
        super().__init__()
        check_number("hidden_dim of experts", hidden_dim, least=1)
        check_number("expert dropout", dropout, least=0, below=1, advice="; Switch fine-tunes with 0.4")
        self.dim = dim
        self.num_experts = num_experts
        self.hidden_dim = hidden_dim
        self.dropout = dropout
        self.init = init
        self.add_stacks()

    def add_stacks(self) -> None:
        """Create the weight stacks; a subclass with a constructor of its own may create them there."""

    @abstractmethod
    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Apply the feed-forward to rows; `weights` are the stacks, or one expert's slices of them."""

    def activation(self) -> Activation | None:
        """Return a where `run` is linear(a(linear(rows, W) for every W but the last), last W), else None.

        With it a dispatcher may run the layer in one piece; without, product by product. Both are right.
        """
        return None
